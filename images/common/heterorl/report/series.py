"""What a run's records say, as curves: series over steps, smoothed, averaged over seeds, and each slot's lives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heterorl.monitoring.json_lines import Record
from heterorl.monitoring.run_records import is_batch, learner_wait_share, sampler_wait_share

Floats = npt.NDArray[np.float64]
Series = tuple[Floats, Floats]

SEED = re.compile(r"[-_](s|seed)-?\d+$")
"""What tells the seeds of one thing apart: the end of the name."""


@dataclass(frozen=True)
class RunSeries:
    """What is drawn of one run."""

    name: str
    about: str
    """Loss, steps and samplers, in a line."""
    learner: list[Record]
    """Records with a step."""
    samplers: dict[str, list[Record]]
    """Every record of each slot, events included."""
    evals: dict[str, list[tuple[int, float]]]
    """(step, mean@k) of each evaluation set."""

    @property
    def family(self) -> str:
        """The name without its seed."""
        return SEED.sub("", self.name)


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


def waiting_shares(run: RunSeries) -> dict[str, Series]:
    """Share of its time that each side waited, over the learner's steps: `learner`, and every sampler pool.

    The learner waits for rollouts; a sampler for room in the queue, for its turn, or for weights.
    """
    shares = {"learner": _share_by(run.learner, "step", lambda record: learner_wait_share([record]))}
    times, steps = series(run.learner, "time", "step")
    for pool in sorted({pool_of(slot) for slot in run.samplers}):
        records = [r for slot, found in run.samplers.items() if pool_of(slot) == pool for r in found]
        at, share = _share_by(sorted(records, key=_time), "time", sampler_wait_share)
        if len(times):
            shares[pool] = (np.interp(at, times, steps), share)
    return shares


def _share_by(records: Iterable[Record], x: str, share: Callable[[Record], float | None]) -> Series:
    return series(({x: r.get(x), "share": share(r)} for r in records if is_batch(r)), x, "share")


def pool_of(slot: str) -> str:
    """`far` of `far-0`."""
    return slot.rpartition("-")[0]


def _time(record: Record) -> float:
    return float(record.get("time") or 0.0)


def lives(records: Sequence[Record]) -> list[list[tuple[float, int]]]:
    """(time, version) of a slot at each of its records, one list for each life between start and stop."""
    found: list[list[tuple[float, int]]] = [[]]
    held: int | None = None
    for record in records:
        if record.get("event") == "start":
            found.append([])
            held = None
        held = record.get("version_step", held)
        if held is not None and record.get("time") is not None:
            found[-1].append((record["time"], held))
    return [life for life in found if life]
