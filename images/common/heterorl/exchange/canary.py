"""The canary of a version: texts and the learner's own log-probabilities of them, checked by every engine."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, FiniteFloat, model_validator
from pydantic.dataclasses import dataclass

CANARY_TOKENS = 272
"""Tokens of a canary text: more than two blocks of any engine's KV cache (128 on a CPU), so that a stale one shows."""


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

    def max_abs_diff(self, scores: list[list[float]]) -> float:
        """Largest difference between an engine's scores and the learner's; infinite if one is not a number."""
        pairs = [
            (a, b) for ours, theirs in zip(self.logp, scores, strict=True) for a, b in zip(ours, theirs, strict=True)
        ]
        differences = [abs(a - b) for a, b in pairs]
        return max(differences) if all(d == d for d in differences) else float("inf")
