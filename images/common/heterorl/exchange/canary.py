"""What weights are checked by when an engine loads them: the names and shapes of their tensors, then the canary.

The canary is two texts and the learner's log-probabilities of them, by which an engine shows what weights it serves.
The statistic is the mean absolute difference of a token's log-probability between engine and learner. One token's
difference says little in bfloat16, where a rare token is off by 1 under honest rounding; the mean over 542 tokens is
stable. `docs/exchange.md` says what it sees and what it cannot, with the measurements in `docs/reports/canary.md`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import ConfigDict, Field, FiniteFloat, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open

from heterorl.errors import CanaryMismatch, CorruptFile, ModelError
from heterorl.exchange.version import Version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANARY_TOKENS = 272
"""Tokens of a canary text: more than two blocks of any engine's KV cache (128 on a CPU)."""

ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}
"""What rounding may change where the same is computed in two ways: mean absolute difference of log-probabilities,
as a share of their spread over tokens (`docs/models.md`)."""


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Canary:
    """Texts and what the learner makes of them, to be checked by every engine that loads the version."""

    token_ids: Annotated[list[Annotated[list[int], Field(min_length=2)]], Field(min_length=1)]
    """Token ids of each text."""
    logp: list[list[FiniteFloat]]
    """Log-probability of tokens 1.. of each text given those before, at temperature 1."""

    @model_validator(mode="after")
    def _one_logp_a_token(self) -> Self:
        expected, found = [len(text) - 1 for text in self.token_ids], [len(values) for values in self.logp]
        if expected != found:
            raise ValueError(f"has {found} log-probabilities for texts that need {expected}")
        return self

    def mean_abs_diff(self, scores: list[list[float]]) -> float:
        """Mean absolute difference between an engine's scores and the learner's; infinite if one is not finite."""
        differences = [
            abs(a - b)
            for ours, theirs in zip(self.logp, scores, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        mean = math.fsum(differences) / len(differences)
        return mean if math.isfinite(mean) else math.inf

    def check(self, version: Version, score: Callable[[list[list[int]]], list[list[float]]], tolerance: float) -> float:
        """Score the texts with an engine that serves `version`; returns the mean absolute difference.

        Raises CanaryMismatch when it exceeds the tolerance.
        """
        found = self.mean_abs_diff(score(self.token_ids))
        if found > tolerance:
            raise CanaryMismatch(
                f"weights {version}: the engine's log-probabilities of the canary differ by {found:.3g} on average from"
                f" the learner's; at most {tolerance:g} is allowed (exchange.canary.tolerance)"
            )
        return found


def canary_texts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[list[int]]) -> list[list[int]]:
    """Two different texts of CANARY_TOKENS tokens: prose, or the run's prompts where the tokenizer cannot spell prose.

    Prose, because its tokens are likely ones: rounding moves the log-probability of an unlikely token more.
    """
    prose = resources("heterorl.exchange").joinpath("canary.txt").read_text().split("\n\n")
    encoded = [_encode(tokenizer, " ".join(text.split())) for text in prose]
    if all(len(ids) == CANARY_TOKENS for ids in encoded):
        return encoded
    tokens = itertools.cycle(itertools.chain.from_iterable(prompts))
    stream = list(itertools.islice(tokens, 3 * CANARY_TOKENS))
    first, *others = (stream[start : start + CANARY_TOKENS] for start in (0, *range(CANARY_TOKENS, 2 * CANARY_TOKENS)))
    # Even where the data is one short prompt repeated, the texts differ from the first block on.
    return [first, next((other for other in others if other != first), first)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's first tokens; none when they do not spell it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[:CANARY_TOKENS]
    spelt = "".join(str(tokenizer.decode(ids)).split())
    return ids if spelt and "".join(text.split()).startswith(spelt) else []


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
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
