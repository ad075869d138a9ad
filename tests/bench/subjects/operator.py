"""The operator with a thousand runs; on clusters of its own, so apart from the others."""

from __future__ import annotations

from collections.abc import Iterator

from bench import operator_scale
from bench.benchmark import Pair, Surroundings, at_most, benchmark
from bench.operator_scale import Bench
from cluster.operators import OperatorProcess

RUNS = 1000
MEMORY = 200e6
"""Bytes that it may take."""
GATE = "all objects exist, and nothing is written at rest"


def at_rest(bench: Bench, runs: int, operator: OperatorProcess) -> float:
    """Bytes of the operator, which writes nothing."""
    memory, writes = operator_scale.at_rest(bench, runs, operator, rest_s=15)
    assert writes == 0, f"{writes:.0f} writes a minute at rest"
    return memory


@benchmark(
    "14",
    what=f"operator: {RUNS:,} runs to all children, of which each has eight",
    peer="bare loop of the same client",
    target=at_most(1.3),
    gate=GATE,
    limit="1",
    missed="while the operator works, the API server takes a whole core of two and the operator 0.4 of one: for its start, for a"
    " thousand manifests that it receives and checks, and for eight objects of each, which the bare loop has made beforehand",
    memory_gb=6,
    disk_gb=2,
    apart="make bench IDS=14: three quarters of an hour",
)
def time_to_children(at: Surroundings) -> Iterator[Pair]:
    def gate() -> None:
        with operator_scale.operated(5) as (bench, operator, _):  # waits for the objects
            at_rest(bench, 5, operator)

    def ours() -> float:
        with operator_scale.operated(RUNS) as (_, _, seconds):
            return seconds

    yield Pair(ours, lambda: operator_scale.bare_loop(RUNS), gate)


@benchmark(
    "14-memory",
    what=f"operator: memory with {RUNS:,} runs, at rest",
    peer="a bound of 200 MB",
    target=at_most(1.0),
    gate=GATE,
    limit="its imports",
    unit="B",
    memory_gb=6,
    disk_gb=2,
    apart="make bench IDS=14-memory: three quarters of an hour",
    gate_warms=True,
)
def memory_at_rest(at: Surroundings) -> Iterator[Pair]:
    """The gate's operator has made all objects; a round's is started where they are, and reads them all."""
    with operator_scale.operated(RUNS) as (bench, operator, _):

        def ours() -> float:
            operator_scale.restarted(RUNS, operator)
            return at_rest(bench, RUNS, operator)

        yield Pair(ours, lambda: MEMORY, lambda: at_rest(bench, RUNS, operator))
