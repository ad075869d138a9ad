"""Growing columns of numbers, and curves that are small enough to draw however long a run is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from heterorl.monitoring.json_lines import Record, numbers
from heterorl.monitoring.series import Floats, Series, smoothed


class StepTable:
    """The numbers of the learner's steps by name, a row a step, in ascending order."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._columns: dict[str, list[float]] = {}
        self.revision = 0
        """Changes whenever the table does."""
        self._arrays: dict[str, tuple[int, Floats]] = {}
        self._smooth: dict[str, tuple[int, Series]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, records: Iterable[Record]) -> None:
        """Append steps; one that is not after the last supersedes every earlier one of its own or a later step."""
        for record in records:
            step = record.get("step")
            if not isinstance(step, int) or isinstance(step, bool):
                continue
            self.revision += 1
            if self._steps and step <= self._steps[-1]:
                self._cut(int(np.searchsorted(self._steps, step)))
            for key, value in numbers(record):
                column = self._columns.setdefault(key, [])
                column.extend([math.nan] * (len(self._steps) - len(column)))
                column.append(value)
            self._steps.append(step)

    def _cut(self, length: int) -> None:
        del self._steps[length:]
        for column in self._columns.values():
            del column[length:]

    @property
    def keys(self) -> list[str]:
        """Names of the columns with a number in them."""
        return sorted(key for key, column in self._columns.items() if column and key != "step")

    def curve(self, key: str, x: str = "step") -> Series:
        """The finite values of a column over another one."""
        at, values = self._column(x), self._column(key)
        known = np.isfinite(at) & np.isfinite(values)
        return at[known], values[known]

    def last(self, key: str) -> float | None:
        """The newest value of a column, if the last step has one."""
        values = self._column(key)
        return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None

    def smoothed(self, key: str) -> Series:
        """The curve over the steps, smoothed."""
        if self._smooth.get(key, (-1,))[0] != self.revision:
            self._smooth[key] = self.revision, smoothed(self.curve(key))
        return self._smooth[key][1]

    def _column(self, key: str) -> Floats:
        if self._arrays.get(key, (-1,))[0] != self.revision:
            column = self._columns.get(key, [])
            padded = np.array(column + [math.nan] * (len(self._steps) - len(column)), np.float64)
            self._arrays[key] = self.revision, padded
        return self._arrays[key][1]


def within(curve: Series, low: float | None, high: float | None) -> Series:
    """The part of a curve between two values of x, and a point on either side so that lines reach the edge."""
    x, y = curve
    begin = 0 if low is None else max(0, int(np.searchsorted(x, low, "left")) - 1)
    end = len(x) if high is None else int(np.searchsorted(x, high, "right")) + 1
    return x[begin:end], y[begin:end]


def decimated(curve: Series, points: int) -> Series:
    """At most about `points` points that look the same: of each stretch the lowest and the highest, in their order.

    The first and the last point are kept, so a curve neither begins later nor ends earlier.
    """
    x, y = curve
    if len(x) <= points:
        return curve
    edges = np.linspace(1, len(x) - 1, max(2, points // 2), dtype=np.int64)
    kept = [0]
    for begin, end in pairwise(edges.tolist()):
        low, high = begin + int(np.argmin(y[begin:end])), begin + int(np.argmax(y[begin:end]))
        kept += sorted({low, high})
    kept.append(len(x) - 1)
    return x[kept], y[kept]


def rounded(values: Floats, digits: int = 5) -> list[float | None]:
    """As JSON: so many significant digits, null for what is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
