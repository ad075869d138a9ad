"""What a model's folder says: its tensors, its context, the tokens and texts that end a completion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from heterorl.data.tokenizer import load_tokenizer
from heterorl.errors import CorruptFile, ModelError
from heterorl.exchange.storage import persistently

Dtype = Literal["bfloat16", "float32"]


class StopTexts:
    """Tells which completions have just said one of the texts that end them; the same for every engine.

    A text may end inside a token, and special tokens count by their text: so the last tokens are decoded again after
    each one. A token is at least a byte, so as many as the text has bytes hold it; a few more keep it away from the
    first, whose leading blank some decoders drop.
    """

    def __init__(self, texts: Sequence[str], model_dir: Path) -> None:
        self._texts = texts
        self.window = max((len(text.encode()) for text in texts), default=0) + 4
        """How many of the last tokens are looked at."""
        self._tokenizer = persistently(lambda: load_tokenizer(model_dir)) if texts else None

    def said(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each completion, asked after every token of it, has said one."""
        if self._tokenizer is None:
            return [False] * len(completions)
        tails = [list(token_ids[-self.window :]) for token_ids in completions]
        decoded = self._tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [any(text in tail for text in self._texts) for tail in decoded]


def end_token_ids(model_dir: Path) -> list[int]:
    """Tokens that end a completion: of generation_config.json, of config.json, of the tokenizer where there is one."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (model_dir / name).is_file():
            found = json.loads((model_dir / name).read_text()).get("eos_token_id")
            ends.update(found if isinstance(found, list) else [] if found is None else [found])
    if (model_dir / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(model_dir).eos_token_id
        ends.update([] if found is None else [found])
    if not ends:
        raise ModelError(f"{model_dir}: no end-of-sequence token; set eos_token_id in generation_config.json")
    return sorted(ends)


def context_length(model_dir: Path) -> int:
    """Tokens that the model was made for, prompt and completion together."""
    from transformers import AutoConfig

    length: int = AutoConfig.from_pretrained(model_dir).get_text_config().max_position_embeddings
    return length


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files in a folder that may hold others beside them; ModelError if there are none."""
    if files := sorted(folder.glob("model*.safetensors")):
        return files
    raise ModelError(f"{folder}: no model.safetensors; only weights in safetensors are read")


def tensor_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the files' headers; CorruptFile if one cannot be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "numpy") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{path}: {error}") from error
    return shapes


def require_same_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """CorruptFile naming the first difference, unless the weights fit the model; vLLM would skip what is missing."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CorruptFile(
                f"weights: {name} is {found.get(name, 'absent')}, the model has {expected.get(name, 'none')}"
            )
