"""Fixtures shared by the tests."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
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
