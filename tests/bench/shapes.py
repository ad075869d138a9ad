"""Models of any size with random weights, in the shape of Qwen3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import save_character_tokenizer


def qwen3(*, hidden: int, layers: int, vocabulary: int, tied: bool = True) -> Any:
    """A configuration with heads 64 wide and half as many of keys and values, as vLLM's CPU kernels take them."""
    from transformers import Qwen3Config

    heads = max(2, hidden // 64)
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def save_qwen3(folder: Path, config: Any, *, dtype: str = "float32") -> int:
    """A folder with random weights of seed 0 and a tokenizer; returns the number of parameters."""
    import torch
    from transformers import Qwen3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    save_character_tokenizer(folder)
    return sum(parameter.numel() for parameter in model.parameters())
