"""A benchmark's measurement: the gate, warm-ups, then ours and the peer in turn, and the ratio of each round."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import statistics
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import psutil

from bench.benchmark import Benchmark, CannotMeasure, GateFailed, Pair, Surroundings, Target, registry

WARM_UPS, ROUNDS = 2, 7
QUICK_ROUNDS, QUICK_MOST = 3, 9
"""Of a quick run, and how many there may be while other work on the machine makes it miss its bound."""


@dataclass(frozen=True)
class Outcome:
    """What became of a benchmark."""

    id: str
    gate: Literal["passed", "failed", "not measured"]
    why: str = ""
    """One line, unless it passed."""
    details: str = ""
    """A traceback, for what nobody foresaw."""
    ours: tuple[float, ...] = ()
    """The figure of each round."""
    peer: tuple[float, ...] = ()
    seconds: float = 0.0
    """Of the whole benchmark."""

    @property
    def ratios(self) -> list[float]:
        """Ours divided by the peer's, of each round."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer)]

    @property
    def median(self) -> float:
        """Of the ratios."""
        return statistics.median(self.ratios)

    @property
    def ours_median(self) -> float:
        """Of our figures."""
        return statistics.median(self.ours)

    @property
    def peer_median(self) -> float:
        """Of the peer's."""
        return statistics.median(self.peer)


def measure(benchmark: Benchmark, parent: Path, *, quick: bool) -> Outcome:
    """Measure one benchmark in a folder of its own below `parent`; whatever it raises becomes its outcome."""
    folder = None
    try:
        _check_room(benchmark, parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{benchmark.id}-", dir=parent))
        with benchmark.prepare(Surroundings(folder, quick)) as pair:
            _pass_gate(pair)
            ours, peer = _rounds(benchmark, pair, quick)
        return Outcome(benchmark.id, "passed", ours=tuple(ours), peer=tuple(peer))
    except GateFailed as error:
        return Outcome(benchmark.id, "failed", f"the gate ({benchmark.gate}) failed: {_one_line(error)}")
    except (CannotMeasure, MemoryError, OSError) as error:
        return Outcome(benchmark.id, "not measured", _one_line(error) or type(error).__name__)
    except Exception as error:
        return Outcome(
            benchmark.id, "failed", f"{type(error).__name__}: {_one_line(error)}", details=traceback.format_exc()
        )
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_room(benchmark: Benchmark, parent: Path) -> None:
    free = shutil.disk_usage(parent).free / 1e9
    if free < benchmark.disk_gb:
        raise CannotMeasure(
            f"needs {benchmark.disk_gb:g} GB of disk and {parent} has {free:.1f} GB free: make room, or name another"
            " folder with DIR"
        )
    available = psutil.virtual_memory().available / 1e9
    if available < benchmark.memory_gb:
        raise CannotMeasure(
            f"needs {benchmark.memory_gb:g} GB of memory and {available:.1f} GB are available: end other programs"
        )


def _pass_gate(pair: Pair) -> None:
    try:
        pair.gate()
    except AssertionError as error:  # of numpy's and torch's comparisons
        raise GateFailed(str(error)) from error


def _rounds(benchmark: Benchmark, pair: Pair, quick: bool) -> tuple[list[float], list[float]]:
    warm_up, rounds = (1, QUICK_MOST) if quick else (WARM_UPS - benchmark.gate_warms, ROUNDS)
    ours: list[float] = []
    peer: list[float] = []
    for number in range(warm_up + rounds):
        gc.collect()
        figures = pair.ours(), pair.peer()
        if number < warm_up:
            continue
        ours.append(figures[0])
        peer.append(figures[1])
        if quick and len(ours) >= QUICK_ROUNDS and benchmark.gross.is_met(_median_ratio(ours, peer)):
            break
    return ours, peer


def _median_ratio(ours: list[float], peer: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, peer))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def bound(benchmark: Benchmark, *, quick: bool) -> Target:
    """What the ratio is judged by."""
    return benchmark.gross if quick else benchmark.target


# ── one subject in a process of its own ──────────────────────────────────────────────────────────────────────────────
def run_subject(subject: str, ids: list[str], parent: Path, quick: bool, to: Connection) -> None:
    """The body of that process: each benchmark's outcome is sent when it is known.

    What the engines print goes to a file, so that the table stays whole.
    """
    log = os.open(parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    importlib.import_module(f"bench.subjects.{subject}")
    for id in ids:
        started = time.monotonic()
        outcome = measure(registry[id], parent, quick=quick)
        to.send(replace(outcome, seconds=time.monotonic() - started))
