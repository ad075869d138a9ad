"""The operator with a thousand runs; on clusters of its own, so apart from the others."""

from __future__ import annotations

from collections.abc import Iterator

from bench.benchmark import Pair, Surroundings, at_most, benchmark

RUNS = 1000
MEMORY = 200e6
"""Bytes that it may take."""


def gate() -> None:
    """Every object of a few runs exists, and then nothing is written."""
    from bench.operator_scale import at_rest, operated

    with operated(5) as (bench, operator, _):  # waits for the objects
        _, writes = at_rest(bench, 5, operator, rest_s=15)
        assert writes == 0, f"{writes:.0f} writes a minute at rest"


def children_s() -> float:
    """Seconds from the operator's start to the last object."""
    from bench.operator_scale import operated

    with operated(RUNS) as (_, _, seconds):
        return seconds


def bare_s() -> float:
    """Seconds in which as many threads apply the same objects."""
    from bench.operator_scale import bare_loop

    return bare_loop(RUNS)


def memory() -> float:
    """Bytes of the operator, at rest."""
    from bench.operator_scale import at_rest, operated

    with operated(RUNS) as (bench, operator, _):
        return at_rest(bench, RUNS, operator, rest_s=15)[0]


@benchmark(
    "14",
    what=f"operator: {RUNS:,} runs to all children, of which each has eight",
    peer="bare loop of the same client",
    target=at_most(1.3),
    gate="all objects exist, and nothing is written at rest",
    limit="1",
    missed="while the operator works, the API server takes a whole core of two and the operator 0.4 of one: for its start, for a"
    " thousand manifests that it receives and checks, and for eight objects of each, which the bare loop has made beforehand",
    memory_gb=6,
    disk_gb=2,
    apart="make bench IDS=14: a quarter of an hour",
    rounds=3,  # each takes four minutes
    warm_up=0,
)
def time_to_children(at: Surroundings) -> Iterator[Pair]:
    yield Pair(children_s, bare_s, gate)


@benchmark(
    "14-memory",
    what=f"operator: memory with {RUNS:,} runs, at rest",
    peer="a bound of 200 MB",
    target=at_most(1.0),
    gate="all objects exist, and nothing is written at rest",
    limit="its imports",
    unit="B",
    memory_gb=6,
    disk_gb=2,
    apart="make bench IDS=14-memory: ten minutes",
    rounds=1,
    warm_up=0,
)
def memory_at_rest(at: Surroundings) -> Iterator[Pair]:
    yield Pair(memory, lambda: MEMORY, gate)
