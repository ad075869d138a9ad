"""What runs on one GPU: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU; where there is none the test skips. Nothing in these tests but this fixture asks for one."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU on this machine; see nvidia-smi")
    return torch.device("cuda", 0)
