"""The model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heterorl.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; ModelError when it holds none that can be read."""
    from transformers import AutoTokenizer  # slow to import

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json); copy the tokenizer's files there, as"
            " `AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(FOLDER)` does"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder}: the tokenizer cannot be read: {reason}") from error
    return tokenizer
