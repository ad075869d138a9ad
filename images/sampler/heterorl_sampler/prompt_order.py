"""Which prompt a slot generates for under which sequence number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterorl.exchange.records import PromptEvidence
from heterorl.seeds import derive_seed, uniform

Row = dict[str, Any]


class PromptOrder:
    """A slot's walk through the data: its own share of a fresh seeded shuffle in every epoch.

    Several sets are mixed first (`Mix`), and each is then walked through by itself, in epochs of its own. The problem
    of number s is a pure function of (seed, share, s), so the sequence number is the prompt cursor.
    """

    def __init__(
        self, rows: Sequence[Row], *, seed: int, share: int, shares: int, weights: Mapping[str, float] | None = None
    ) -> None:
        """`share` of `shares`, from 0: slots with different shares never meet the same row within an epoch.

        `weights`: how often each `set` that rows name is drawn from, in proportion; None where rows name none.
        """
        self._mix = Mix(list(weights.values()), seed=seed, share=share) if weights else None
        sets = [[row for row in rows if row["set"] == name] for name in weights] if weights else [rows]
        seeds = [derive_seed("set", seed, name) for name in weights] if weights else [seed]
        self._walks = [_Walk(part, seed=own, share=share, shares=shares) for part, own in zip(sets, seeds)]

    def row(self, seq: int, step: int = 0) -> Row:
        """The prepared row (id, prompt_ids, answer, columns) for a sequence number.

        `step`, that of the weights that generate for it, and what is observed matter to an adaptive order only.
        """
        return self.candidates(seq, 1)[0]

    def candidates(self, seq: int, count: int) -> list[Row]:
        """The next `count` rows of the set that a number draws from, where every number takes as many."""
        which, place = self._mix.draw(seq) if self._mix else (0, seq)
        return [self._walks[which].row(place * count + more) for more in range(count)]

    def observe(self, row: Row, rewards: NDArray[np.float32], step: int) -> None:
        """Be told the rewards [G] of a group that the weights of this step generated for the row."""

    @property
    def evidence(self) -> PromptEvidence:
        """What the slot's next holder has to know."""
        return PromptEvidence()


class Mix:
    """Draws from several sets, number after number, in proportion to their weights.

    Number s draws the set in whose share of the unit interval frac(u + s/φ) lies, u seeded: the golden ratio φ spreads
    the numbers most evenly, so that any stretch of n draws a set within O(log n) of its due (Niederreiter, Random
    Number Generation and Quasi-Monte Carlo Methods, 1992, chapter 3).
    """

    _STEP = (5**0.5 - 1) / 2

    def __init__(self, weights: Sequence[float], *, seed: int, share: int) -> None:
        self._bounds = np.cumsum(weights)[:-1] / sum(weights)
        self._start = uniform("mix", seed, share)
        self._drawn = self._places = np.empty(0, np.int64)

    def draw(self, number: int) -> tuple[int, int]:
        """The set, and how many smaller numbers draw from the same."""
        if number >= len(self._drawn):
            self._fill(max(1024, 2 * number))
        return int(self._drawn[number]), int(self._places[number])

    def _fill(self, size: int) -> None:
        points = (self._start + np.arange(size) * self._STEP) % 1
        self._drawn = np.searchsorted(self._bounds, points, side="right")
        self._places = np.empty(size, np.int64)
        for which in range(len(self._bounds) + 1):
            mine = self._drawn == which
            self._places[mine] = np.arange(mine.sum())


class _Walk:
    """A slot's share of one set, in a new order in every epoch."""

    def __init__(self, rows: Sequence[Row], *, seed: int, share: int, shares: int) -> None:
        self._rows = rows
        self._seed = seed
        # More slots than rows: slots then share rows rather than stand idle.
        self._share, self._shares = share % min(shares, len(rows)), min(shares, len(rows))
        self._epoch_size = len(range(self._share, len(rows), self._shares))

    def row(self, place: int) -> Row:
        epoch, place = divmod(place, self._epoch_size)
        return self._rows[int(_shuffle(len(self._rows), self._seed, epoch)[self._share + place * self._shares])]


@lru_cache(maxsize=32)
def _shuffle(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive_seed("prompts", seed, epoch)).permutation(size)
