"""Which prompt a slot generates for under which sequence number."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterorl.seeds import derive_seed


class PromptOrder:
    """A slot's walk through the data: its own share of a fresh seeded shuffle in every epoch.

    The problem of number s is a pure function of (seed, share, s), so the sequence number is the prompt cursor.
    """

    def __init__(self, rows: list[dict[str, Any]], *, seed: int, share: int, shares: int) -> None:
        """`share` of `shares`, from 0: slots with different shares never meet the same row within an epoch."""
        self._rows = rows
        self._seed = seed
        # More slots than rows: slots then share rows rather than stand idle.
        self._share, self._shares = share % min(shares, len(rows)), min(shares, len(rows))
        self._epoch_size = len(range(self._share, len(rows), self._shares))

    def row(self, seq: int) -> dict[str, Any]:
        """The prepared row (id, prompt_ids, answer, columns) for a sequence number."""
        epoch, place = divmod(seq, self._epoch_size)
        return self._rows[int(_shuffle(len(self._rows), self._seed, epoch)[self._share + place * self._shares])]


@lru_cache(maxsize=2)
def _shuffle(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive_seed("prompts", seed, epoch)).permutation(size)
