"""What the figures draw of a run: its records, who waited, and each slot's lives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.json_lines import Record
from heterorl.monitoring.run_records import (
    is_batch,
    learner_wait_share,
    read_samplers,
    read_steps,
    sampler_wait_share,
)
from heterorl.monitoring.series import Series, family_of, series


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
        return family_of(self.name)


def read_run(root: Path, name: str, about: str) -> RunSeries:
    """What is drawn of the run in a folder, under this name."""
    exchange = Exchange(root)
    evals: dict[str, list[tuple[int, float]]] = {}
    for version, result in sorted(exchange.read_evals().items()):
        for label, scores in result.sets.items():
            if scores.get("mean") is not None:
                evals.setdefault(label, []).append((version.step, scores["mean"]))
    return RunSeries(
        name=name,
        about=about,
        learner=read_steps(exchange.metrics_dir),
        samplers={str(slot): records for slot, records in read_samplers(exchange.metrics_dir).items()},
        evals=evals,
    )


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
