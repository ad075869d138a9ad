"""From tokens to the texts that rewards and answer checks read, and that end a completion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterorl.data.tokenizer import load_tokenizer
from heterorl.exchange.storage import persistently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAG = re.compile(r"<(/?)([A-Za-z_]+)>")
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


class Decoder:
    """Decodes completions without the tokens that end, pad or steer, and with all that is written.

    Tags such as `<think>` and `</think>` stay where a tokenizer has them as special tokens: a special token is a tag
    when it has its counterpart, and is not the tokenizer's own for the beginning, the end or padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        tags = {content for content in special if _is_tag(content, special)} - set(
            tokenizer.special_tokens_map.values()
        )
        self._dropped = {*special.values(), *tokenizer.all_special_ids} - {special[content] for content in tags}

    def text(self, token_ids: Sequence[int]) -> str:
        """What these tokens of a completion say."""
        return self._plain([token for token in token_ids if token not in self._dropped])

    def opened(self, row: Mapping[str, Any]) -> str:
        r"""What a prepared row's prompt has written of the model's turn: `<think>\n`, a closed empty think, or nothing.

        A conversation may also end in the turn itself, which the model then continues.
        """
        prompt = row["prompt"]
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            return str(prompt[-1]["content"])
        found = _OPENED.search(self._plain(row["prompt_ids"]))
        return found.group() if found else ""

    def _plain(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _is_tag(content: str, special: dict[str, int]) -> bool:
    """Whether a special token is half of a pair `<name>`, `</name>`."""
    tag = _TAG.fullmatch(content)
    return tag is not None and (f"<{tag[2]}>" if tag[1] else f"</{tag[2]}>") in special


@lru_cache
def stop_texts(texts: tuple[str, ...], model_dir: Path) -> StopTexts:
    """Those of a model's tokenizer, which is read once."""
    return StopTexts(texts, model_dir)


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
