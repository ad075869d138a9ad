"""How a learner of two ranks ends: each of them with exit code 0, every time; with 143 when it was superseded.

A short version is a test. As a script it runs many endings and writes the report: `make exits`, or
`PYTHONPATH=tests python tests/process/test_exits.py 200 --report FILE`. Every ending is a real learner of two
processes that trains one step of a tiny model, publishes, saves, writes its output and leaves.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from builders import exchange_at, put, rollout_name, rollout_of, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exit_codes import TOLD_TO_GO, describe_exit
from heterorl.local.processes import ManagedProcess, Rendezvous, tail
from heterorl.spec.run import HeteroRLRun

STRATEGIES = ("torch", "zero1", "zero2", "zero3")
TIMEOUT_S = 300.0


def two_ranks(strategy: str) -> HeteroRLRun:
    """One step on the CPU in two processes."""
    tiny = {"hiddenSize": 64, "numLayers": 2, "targetAccuracy": 0.0, "maxSupervisedSteps": 0}
    return run_of(
        model={"dtype": "float32", "tiny": tiny},
        data={"train": {"arithmetic": {"digits": 1}}},
        generation={"maxPromptTokens": 16, "maxCompletionTokens": 6},
        algorithm={"groupSize": 2},
        learner={
            "steps": 1,
            "threads": 1,
            "batch": {"groups": 2},
            "strategy": strategy,
            "processesPerReplica": 2,
        },
        monitoring={"tensorboard": False},
        exchange={"pollSeconds": 0.05},
    )


def make_run(root: Path, strategy: str) -> Exchange:
    """A prepared run with the rollouts of its one step."""
    exchange = exchange_at(root, two_ranks(strategy))
    command = [sys.executable, "-m", "heterorl_learner", "prepare", "--root", str(root)]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    return exchange


def new_run(prepared: Exchange, root: Path, strategy: str) -> Exchange:
    """A copy of the prepared run with that strategy."""
    exchange = exchange_at(root, two_ranks(strategy))
    for name in ("model", "data"):
        (root / name).symlink_to(prepared.root / name)
    exchange.mark_prepared()
    return exchange


def put_batch(exchange: Exchange) -> None:
    """The rollouts of the one step."""
    put(exchange, {rollout_name(seq): rollout_of() for seq in range(2)})


@pytest.mark.parametrize("strategy", ["torch", "zero3"])
def test_two_ranks_that_finished_leave_with_exit_code_0(tmp_path: Path, strategy: str) -> None:
    exchange = new_run(make_run(tmp_path / "prepared", strategy), tmp_path / "run", strategy)
    put_batch(exchange)
    command = [sys.executable, "-m", "heterorl_learner", "--root", str(exchange.root)]
    ranks = ManagedProcess(command, {**os.environ, "OMP_NUM_THREADS": "1"}, exchange.logs_dir / "learner.log", ranks=2)
    give_up = time.monotonic() + TIMEOUT_S
    while (code := ranks.poll()) is None and time.monotonic() < give_up:
        time.sleep(0.1)
    ranks.signal(signal.SIGKILL)
    said = "\n".join(tail(path) for path in sorted(exchange.logs_dir.iterdir()))
    assert code == 0, said
    assert exchange.trained, said
    assert "goodbye" not in said


def test_all_ranks_of_a_superseded_learner_leave_uncharged(tmp_path: Path) -> None:
    """Each rank is a pod of its own, so that none is killed by the end of the other."""
    exchange = new_run(make_run(tmp_path / "prepared", "torch"), tmp_path / "run", "torch")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "heterorl_learner", "--root", str(exchange.root)]
    logs = [exchange.logs_dir / f"learner-{node}.log" for node in range(2)]
    ranks = [
        ManagedProcess(command, dict(os.environ), log, rendezvous=Rendezvous("127.0.0.1", port, node, 2))
        for node, log in enumerate(logs)
    ]
    try:
        wait_until(lambda: exchange.learner is not None, ranks)  # it waits for rollouts
        Exchange(exchange.root).begin_incarnation()
        put_batch(exchange)
        wait_until(lambda: None not in [rank.poll() for rank in ranks])
    finally:
        for rank in ranks:
            rank.signal(signal.SIGKILL)
    said = "\n".join(map(tail, logs))
    assert [rank.poll() for rank in ranks] == [TOLD_TO_GO, TOLD_TO_GO], said
    assert all("another learner has begun" in tail(log) for log in logs), said
    assert exchange.read_journal() == []


def wait_until(condition: Callable[[], bool], meanwhile: Sequence[ManagedProcess] = ()) -> None:
    """Wait for something to become true while processes go on."""
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert [rank.poll() for rank in meanwhile] == [None] * len(meanwhile)
        assert time.monotonic() < give_up
        time.sleep(0.1)


# ── many endings ─────────────────────────────────────────────────────────────────────────────────────────────────────
def ending(prepared: Exchange, root: Path, strategy: str) -> list[int]:
    """Train a copy of the prepared run in two forks of this process, which has imported what takes long; exit codes."""
    exchange = new_run(prepared, root, strategy)
    put_batch(exchange)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [fork_rank(exchange, rank, port) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert any(codes) or exchange.trained, "left with exit code 0 before it was trained"
    return codes


def fork_rank(exchange: Exchange, rank: int, port: int) -> int:
    """The process id of a rank, which ends as `python -m heterorl_learner` does."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    signal.alarm(int(TIMEOUT_S))
    exchange.logs_dir.mkdir(exist_ok=True)
    log = os.open(exchange.logs_dir / f"learner-{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}})
    sys.argv = ["heterorl_learner", "--root", str(exchange.root)]
    runpy.run_module("heterorl_learner", run_name="__main__")
    sys.exit(0)


def main() -> int:
    """Run the endings, strategies in turn; 0 if all ended well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endings", type=int, help="how many learners of two ranks to run")
    parser.add_argument("--report", type=Path, metavar="FILE", help="add a line with the result to this report")
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {strategy: Counter() for strategy in STRATEGIES}
    bad = 0
    importlib.import_module("deepspeed"), importlib.import_module("heterorl_learner.train")
    with tempfile.TemporaryDirectory() as folder:
        prepared = make_run(Path(folder) / "prepared", "torch")
        for number in range(args.endings):
            strategy = STRATEGIES[number % len(STRATEGIES)]
            root = Path(folder) / f"run-{number}"
            codes = ending(prepared, root, strategy)
            how = " and ".join(sorted({describe_exit(code) for code in codes}))
            counts[strategy][how] += 1
            bad += any(codes)
            print(f"{number + 1}/{args.endings}  {strategy}  {how}", flush=True)
            for path in (root / "logs").iterdir() if any(codes) else ():
                print(path.read_text(errors="replace"))
    if args.report:
        with open(args.report, "a") as report:
            report.write(_row(counts))
    print(f"{args.endings} endings, {bad} abnormal")
    return int(bad > 0)


def _row(counts: dict[str, Counter[str]]) -> str:
    cells = [", ".join(f"{n} × {how}" for how, n in counts[strategy].items()) or "–" for strategy in STRATEGIES]
    return f"| {datetime.now(UTC):%Y-%m-%d} | {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())
