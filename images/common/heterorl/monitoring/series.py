"""Columns of numbers as curves: smoothed, averaged over seeds, over the time of work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from heterorl.monitoring.json_lines import Record

Floats = npt.NDArray[np.float64]
Series = tuple[Floats, Floats]

SEED = re.compile(r"[-_](s|seed)-?\d+$")
"""What tells the seeds of one thing apart: the end of the name."""


def family_of(name: str) -> str:
    """The name of a run without its seed."""
    return SEED.sub("", name)


def series(records: Iterable[Record], x: str, y: str) -> Series:
    """The finite values of two keys, in the order written."""
    pairs = [(r[x], r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    columns = np.array(pairs, np.float64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def smooth(values: Floats) -> Floats:
    """Exponential mean over about a 25th of the series, without a bias towards its start."""
    span = max(3.0, len(values) / 25)
    decay = 1 - 1 / span
    weighted, total, out = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        weighted, total = decay * weighted + value, decay * total + 1
        out[i] = weighted / total
    return out


def smoothed(curve: Series) -> Series:
    """The same curve with smoothed values."""
    return curve[0], smooth(curve[1])


def mean_of(many: Sequence[Series]) -> Series:
    """Mean of several curves over the stretch that all of them reach, between their points by straight lines."""
    drawn = [(x, y) for x, y in many if len(x)]
    if not drawn:
        return np.empty(0), np.empty(0)
    grid = np.unique(np.concatenate([x for x, _ in drawn]))
    grid = grid[(grid >= max(x[0] for x, _ in drawn)) & (grid <= min(x[-1] for x, _ in drawn))]
    return grid, np.mean([np.interp(grid, x, y) for x, y in drawn], axis=0)


def active_clock(times: Sequence[float]) -> Callable[[float], float]:
    """Seconds since the first record; long gaps without records (the run was stopped) are shortened."""
    known = np.unique(np.array(times, np.float64))
    gaps = np.diff(known)
    longest = max(60.0, 20 * float(np.median(gaps))) if len(gaps) else 0.0
    elapsed = np.concatenate([[0.0], np.cumsum(np.minimum(gaps, longest))])
    return lambda time: float(np.interp(time, known, elapsed))
