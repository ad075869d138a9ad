"""Measure benchmarks, print their table as it grows, and record it in docs/benchmarks.md and docs/benchmarks.json.

    python -m bench [--quick] [--dir FOLDER] [ID ...]      (with PYTHONPATH=tests)
    python -m bench --page                                 write the table anew from the results

Without ids it measures all but those that have a command of their own, and with `--quick` those that are quick. Each row is recorded as soon as it is known.
`--quick` records nothing; it fails when a gate does, or when a ratio misses its target grossly.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from bench.benchmark import Target, registry, subjects
from bench.measure import Outcome, bound, run_subject
from bench.page import RESULTS, Origin, figure, record

LIMIT_S = 900.0
"""For one benchmark, unless it has a command of its own: then something hangs."""
COLUMNS = "{:12} {:>8} {:>8} {:>8}  {:8} {:14} {:>9} {:>9} {:>6}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes, nothing recorded")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="folder for all files (%(default)s)"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    if args.page:
        subjects()
        record(registry, {})
        return 0
    chosen = _choose(args.ids, quick=args.quick)
    if isinstance(chosen, str):
        print(chosen, file=sys.stderr)
        return 2
    if not (args.dir.is_dir() and os.access(args.dir, os.W_OK)):
        print(f"{args.dir} is not a folder that can be written: name another with DIR or --dir", file=sys.stderr)
        return 2
    origin = Origin.here("make bench" + (f' IDS="{" ".join(args.ids)}"' if args.ids else ""))
    print(f"{origin.commit}, {origin.hardware}\n")
    print(COLUMNS.format("id", "median", "min", "max", "target", "", "ours", "peer", "took"))
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, lambda number, _: sys.exit(128 + number))  # so that nothing is left behind
    good = True
    with tempfile.TemporaryDirectory(prefix="heterorl-bench-", dir=args.dir) as folder:
        for outcome in measured(chosen, Path(folder), quick=args.quick):
            good &= tell(outcome, quick=args.quick)
            if not args.quick:
                record(registry, {outcome.id: outcome}, origin)
    if not args.quick:
        print(f"\nrecorded in {RESULTS.with_suffix('.md')} and {RESULTS.name}")
    return 0 if good else 1


def _choose(ids: Sequence[str], *, quick: bool) -> dict[str, list[str]] | str:
    """The subjects with the ids to measure of each; or what is wrong, in a line."""
    every = subjects()
    if unknown := [id for id in ids if id not in registry]:
        return f"there is no benchmark {', '.join(unknown)}; there are {', '.join(sorted(registry))}"
    usual = {id for id, benchmark in registry.items() if not benchmark.apart and (benchmark.quick or not quick)}
    wanted = set(ids) or usual
    chosen = {subject: [id for id in of_it if id in wanted] for subject, of_it in every.items()}
    return {subject: of_it for subject, of_it in chosen.items() if of_it}


def measured(chosen: dict[str, list[str]], folder: Path, *, quick: bool) -> Iterator[Outcome]:
    """Each outcome as it is known. A subject has a process of its own; one that dies takes one benchmark with it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    for subject, ids in chosen.items():
        while ids:
            for outcome in _in_a_process(subject, ids, folder, quick=quick):
                yield outcome
                ids = [id for id in ids if id != outcome.id]


def _in_a_process(subject: str, ids: list[str], folder: Path, *, quick: bool) -> Iterator[Outcome]:
    """Outcomes, to the last or to that of the benchmark in which the process died."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=run_subject, args=(subject, ids, folder, quick, there))
    process.start()
    there.close()
    try:
        for id in ids:
            if not (registry[id].apart or here.poll(LIMIT_S)):
                why = f"did not end within {LIMIT_S / 60:.0f} minutes"
                yield Outcome(id, "failed", why, details=_tail(folder / "log.txt"), seconds=LIMIT_S)
                return
            try:
                yield here.recv()
            except EOFError:
                process.join()
                yield Outcome(id, "failed", _death(process.exitcode), details=_tail(folder / "log.txt"))
                return
        process.join()
    finally:
        _end(process)


def _end(process: BaseProcess) -> None:
    """With all that it has started."""
    if process.is_alive():
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()


def _death(exit_code: int | None) -> str:
    if exit_code == -9:
        return "its process was killed, most likely for want of memory: end other programs"
    return f"its process ended with exit code {exit_code}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""


def tell(outcome: Outcome, *, quick: bool) -> bool:
    """Print a row; returns whether all is well."""
    benchmark = registry[outcome.id]
    took = f"{outcome.seconds:.0f} s"
    if outcome.gate != "passed":
        print(f"{outcome.id:12} {outcome.gate}: {outcome.why} ({took})", flush=True)
        if outcome.details:
            print(outcome.details, file=sys.stderr, flush=True)
        return outcome.gate == "not measured" and not quick
    ratios, target = outcome.ratios, bound(benchmark, quick=quick)
    numbers = [f"{number:.3g}" for number in (outcome.median, min(ratios), max(ratios))]
    figures = [figure(number, benchmark.unit) for number in (outcome.ours_median, outcome.peer_median)]
    print(COLUMNS.format(outcome.id, *numbers, str(target), _verdict(outcome, target), *figures, took), flush=True)
    return not quick or target.is_met(outcome.median)


def _verdict(outcome: Outcome, target: Target) -> str:
    return "met" if target.is_met(outcome.median) else "NOT MET"


if __name__ == "__main__":
    sys.exit(main())
