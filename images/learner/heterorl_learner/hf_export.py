"""The trained model as a Hugging Face folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.storage import STAGING
from heterorl_learner.engines.base import TrainingEngine


def write_model(exchange: Exchange, engine: TrainingEngine, folder: Path) -> None:
    """Write weights, config and tokenizer into a new folder, which appears whole. Every rank calls it."""
    tensors = engine.full_state_dict()
    if engine.rank != 0:
        return
    staged = folder.with_name(STAGING + folder.name)
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(exchange.model_dir, staged, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
    save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    exchange.files.rename(staged, folder)
