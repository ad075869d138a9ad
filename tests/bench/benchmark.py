"""What a benchmark is: a figure of ours against that of a peer, measured in turn on the same data.

A module in `bench/subjects/` holds the benchmarks of one subject; it is found by lying there. For example:

    @benchmark(
        "8-time",
        what="rollout file: encode and decode",
        peer="padded pickle",
        target=at_most(0.5),  # of ours divided by the peer's; at_least(2) for tokens a second and the like
        gate="round trip exact",
        limit="6-8 B a token",
    )
    def rollout_file_time(at: Surroundings) -> Iterator[Pair]:
        rollouts = make_rollouts(8 if at.quick else 64)

        def gate() -> None:  # raises, best with what differs; AssertionErrors of numpy and torch count
            np.testing.assert_array_equal(decode(encode(rollouts)), decode_pickle(encode_pickle(rollouts)))

        yield Pair(seconds(lambda: decode(encode(rollouts))), seconds(lambda: decode_pickle(...)), gate)
        ...  # what has to be closed

`make bench IDS="8-time"` runs it alone and puts its row into docs/benchmarks.md; `make bench-quick` runs all with fewer
rounds, and smaller where `at.quick` is asked. Benchmarks of one subject run in one process, in the order of the file,
so what they share may be cached (and torch and vLLM are imported in functions, as the runner imports all subjects).
`at.folder` is empty at first and removed afterwards. A benchmark that cannot run here raises CannotMeasure with one
line that says why.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GROSS = 2.0
"""By what factor a quick run may miss a target: it is smaller, and CI's machines are busy."""


class CannotMeasure(Exception):
    """The surroundings do not allow it: one line, of what is missing and what to do."""


class GateFailed(Exception):
    """Ours and the peer do not give the same: a ratio would mean nothing."""


@dataclass(frozen=True)
class Surroundings:
    """What a benchmark is given."""

    folder: Path
    """Its own, empty at first."""
    quick: bool
    """For the gate and gross regressions only: take small sizes."""


@dataclass(frozen=True)
class Pair:
    """The two that are compared; each call is one measurement, and returns its figure."""

    ours: Callable[[], float]
    peer: Callable[[], float]
    gate: Callable[[], object]
    """Raises unless both give the same answer; called once, before the rounds."""


@dataclass(frozen=True)
class Target:
    """What the ratio, ours divided by the peer's, should be."""

    bound: Literal["at most", "at least"]
    ratio: float

    def is_met(self, ratio: float) -> bool:
        """Whether a ratio is on the right side."""
        return ratio <= self.ratio if self.bound == "at most" else ratio >= self.ratio

    def gross(self) -> Target:
        """What a quick run must not miss."""
        return Target(self.bound, self.ratio * GROSS if self.bound == "at most" else self.ratio / GROSS)

    def __str__(self) -> str:
        return f"{'≤' if self.bound == 'at most' else '≥'} {self.ratio:g}"


def at_most(ratio: float) -> Target:
    """For costs: seconds, bytes."""
    return Target("at most", ratio)


def at_least(ratio: float) -> Target:
    """For yields: tokens a second."""
    return Target("at least", ratio)


@dataclass(frozen=True)
class Benchmark:
    """One row of the table."""

    id: str
    what: str
    """What is measured."""
    peer: str
    """Against what."""
    target: Target
    gate: str
    """In what ours and the peer have to agree."""
    limit: str
    """What the best possible ratio is, and why."""
    missed: str
    """Why the target is missed, where it is: what the profile says, and the limit."""
    prepare: Callable[[Surroundings], AbstractContextManager[Pair]]
    unit: str
    """Of both figures."""
    memory_gb: float
    """How much has to be free."""
    disk_gb: float
    """The same, in the folder."""
    gross: Target
    """What a quick run must not miss."""
    apart: str
    """The command that measures it, when it takes too long for `make bench`; empty otherwise."""
    quick: bool
    """Whether it belongs to the quick run."""
    gate_warms: bool
    """Whether the gate runs both as they are measured, and so is the first of the two rounds to warm up."""


registry: dict[str, Benchmark] = {}


def benchmark(
    id: str,
    *,
    what: str,
    peer: str,
    target: Target,
    gate: str,
    limit: str,
    missed: str = "",
    unit: str = "s",
    memory_gb: float = 1.0,
    disk_gb: float = 0.1,
    gross: Target | None = None,
    apart: str = "",
    quick: bool = True,
    gate_warms: bool = False,
) -> Callable[[Callable[[Surroundings], Iterator[Pair]]], Callable[[Surroundings], Iterator[Pair]]]:
    """Register a generator function that yields the pair and afterwards closes what it opened."""

    def register(function: Callable[[Surroundings], Iterator[Pair]]) -> Callable[[Surroundings], Iterator[Pair]]:
        if id in registry:
            raise ValueError(f"two benchmarks are called {id}")
        registry[id] = Benchmark(
            id=id,
            what=what,
            peer=peer,
            target=target,
            gate=gate,
            limit=limit,
            missed=missed,
            prepare=contextmanager(function),
            unit=unit,
            memory_gb=memory_gb,
            disk_gb=disk_gb,
            gross=gross or target.gross(),
            apart=apart,
            quick=quick,
            gate_warms=gate_warms,
        )
        return function

    return register


def seconds(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """A measurement of how long something takes; `before` is called each time and not measured."""

    def measured() -> float:
        before()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return measured


def subjects() -> dict[str, list[str]]:
    """The modules in `bench/subjects/` with the ids of their benchmarks, in the order of the modules' names."""
    import bench.subjects

    found = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(bench.subjects.__path__)):
        before = set(registry)
        importlib.import_module(f"bench.subjects.{module}")
        found[module] = [id for id in registry if id not in before]
    return found
