"""The log of completions as a table that is filtered by column; texts stay in the file until someone opens a group.

A line that is damaged or lacks what it must have is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterorl.exchange.rollout import RolloutName
from heterorl.monitoring.json_lines import Record, Tail, record_at
from heterorl.ui.columns import plain

_SNIPPET = 120
"""Characters of a prompt in the list."""
_BARS = 20
_FEW = 12
"""Up to this many different rewards have a bar each."""


@dataclass(frozen=True)
class Filter:
    """Which completions are asked for; None is any."""

    step_from: int | None = None
    step_to: int | None = None
    pool: str | None = None
    dataset: str | None = None
    reward_from: float | None = None
    reward_to: float | None = None
    truncated: bool | None = None


@dataclass
class _Table:
    """A row a group, and a row a completion with the number of its group."""

    places: list[tuple[int, Record]] = field(default_factory=list)
    """The byte of each line, and what the list shows of it."""
    group: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)


class CompletionIndex:
    """Follows a completions file."""

    def __init__(self, path: Path) -> None:
        self._path, self._tail = path, Tail(path)
        self._table, self._beginnings = _Table(), 0
        self._arrays: dict[str, NDArray[Any]] | None = None
        self.damaged = 0
        """Lines that could not be used."""

    def update(self) -> None:
        """Take what was added to the file."""
        added = self._tail.read_places()
        if self._tail.beginnings != self._beginnings:
            self._table, self._beginnings, self.damaged = _Table(), self._tail.beginnings, 0
            self._arrays = None
        for place, record in added:
            try:
                self._add(place, record)
            except (KeyError, TypeError, ValueError):
                self.damaged += 1

    def _add(self, place: int, record: Record) -> None:
        name = RolloutName.parse(record["rollout"])
        made = [(float(c["reward"]), bool(c["truncated"])) for c in record["completions"]]
        table, number = self._table, len(self._table.places)
        row = {
            "step": int(record["step"]),
            "incarnation": int(record["incarnation"]),
            "slot": str(name.slot),
            "pool": name.slot.pool,
            "set": str(record.get("set") or ""),
            "version": name.version.step,
            "lag": max(0, int(record["step"]) - 1 - name.version.step),
            "prompt": str(record["prompt"])[-_SNIPPET:],
            "rewards": [reward for reward, _ in made],
            "truncated": sum(cut for _, cut in made),
        }
        table.places.append((place, row))
        table.group += [number] * len(made)
        table.reward += [reward for reward, _ in made]
        table.truncated += [cut for _, cut in made]

    def __len__(self) -> int:
        return len(self._table.places)

    def query(self, asked: Filter, page: int, size: int) -> dict[str, Any]:
        """A page of the groups with a completion that is asked for, newest first, and the histogram of all of them."""
        columns = self._columns()
        group, reward = columns["group"], columns["reward"]
        pictured = self._groups(asked, columns)[group]
        if asked.truncated is not None:
            pictured &= columns["truncated"] == asked.truncated
        wanted = pictured.copy()  # the histogram shows what its bars choose from, so it is not filtered by reward
        if asked.reward_from is not None:
            wanted &= reward >= asked.reward_from
        if asked.reward_to is not None:
            wanted &= reward <= asked.reward_to
        hits = np.bincount(group[wanted], minlength=len(self))
        found = np.flatnonzero(hits)[::-1]
        shown = found[page * size : (page + 1) * size].tolist()
        steps = columns["step"]
        return {
            "groups": [
                {"number": number, "hits": int(hits[number]), **self._table.places[number][1]} for number in shown
            ],
            "found": len(found),
            "completions": int(wanted.sum()),
            "histogram": histogram(reward[pictured]),
            "pools": sorted(set(columns["pool"].tolist())),
            "sets": sorted(set(columns["set"].tolist()) - {""}),
            "steps": [int(steps.min()), int(steps.max())] if len(steps) else [0, 0],
            "damaged": self.damaged,
        }

    def _columns(self) -> dict[str, NDArray[Any]]:
        """The table as arrays: of the groups by what the list shows, of the completions by their own."""
        if self._arrays is None or len(self._arrays["step"]) != len(self):
            rows, table = [row for _, row in self._table.places], self._table
            kinds: dict[str, Any] = {"step": np.int64, "incarnation": np.int64, "pool": np.str_, "set": np.str_}
            self._arrays = {key: np.array([row[key] for row in rows], kind) for key, kind in kinds.items()}
            self._arrays |= {
                "group": np.array(table.group, np.int64),
                "reward": np.array(table.reward, np.float64),
                "truncated": np.array(table.truncated, np.bool_),
            }
        return self._arrays

    def _groups(self, asked: Filter, columns: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """Which groups are asked for and were not trained by a learner that died before its step was saved."""
        step, incarnation = columns["step"], columns["incarnation"]
        found = np.ones(len(step), np.bool_)
        for later in np.unique(incarnation)[1:]:
            found &= (incarnation >= later) | (step < step[incarnation == later].min())
        if asked.step_from is not None:
            found &= step >= asked.step_from
        if asked.step_to is not None:
            found &= step <= asked.step_to
        for key, value in (("pool", asked.pool), ("set", asked.dataset)):
            if value is not None:
                found &= columns[key] == value
        return found

    def group(self, number: int) -> Record:
        """All of a group, each completion with the texts of its tokens; IndexError for a number that is not there."""
        if number < 0:
            raise IndexError(number)
        place, row = self._table.places[number]
        record = record_at(self._path, place)
        completions = [{**c, "pieces": _pieces(c)} for c in record["completions"]]
        return plain({**record, "slot": row["slot"], "lag": row["lag"], "completions": completions})  # type: ignore[no-any-return]


def _pieces(completion: Record) -> list[str]:
    """The token's texts; the whole text as one where the lengths do not fit it."""
    text, lengths = completion["text"], completion.get("tokens") or []
    if not all(isinstance(length, int) for length in lengths) or sum(lengths) != len(text):
        return [text]
    return [text[begin:end] for begin, end in pairwise([0, *accumulate(lengths)])]


def histogram(rewards: NDArray[np.float64]) -> list[dict[str, float]]:
    """Bars {from, to, count}: one for each reward where they are few, else of equal width."""
    known = rewards[np.isfinite(rewards)]
    values = Counter(known.tolist())
    if len(values) <= _FEW:
        return [{"from": value, "to": value, "count": count} for value, count in sorted(values.items())]
    counts, edges = np.histogram(known, _BARS)
    return [{"from": float(a), "to": float(b), "count": int(n)} for (a, b), n in zip(pairwise(edges), counts)]
