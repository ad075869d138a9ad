"""Texts that end a completion: the same for every engine, which ask after each token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from heterorl.data.tokenizer import load_tokenizer
from heterorl.exchange.storage import persistently


@lru_cache
def stop_texts(texts: tuple[str, ...], model_dir: Path) -> StopTexts:
    """Those of a model's tokenizer, which is read once."""
    return StopTexts(texts, model_dir)


class StopTexts:
    """Tells which completions have just said one of the texts that end them.

    A text may end inside a token, and special tokens count by their text: so the last tokens are decoded again after
    each one. A token is at least a byte, so as many as the text has bytes hold it; a few more keep it away from the
    first, whose leading blank some decoders drop.
    """

    def __init__(self, texts: Sequence[str], model_dir: Path) -> None:
        self._texts = texts
        self.window = max((len(text.encode()) for text in texts), default=0) + 4
        """How many of the last tokens are looked at."""
        self._tokenizer = persistently(lambda: load_tokenizer(model_dir), folder=model_dir) if texts else None

    def said(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each completion, asked after every token of it, has said one."""
        if self._tokenizer is None:
            return [False] * len(completions)
        tails = [list(token_ids[-self.window :]) for token_ids in completions]
        decoded = self._tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [any(text in tail for text in self._texts) for tail in decoded]
