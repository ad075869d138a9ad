"""Processes that are stopped by the system, followed by others, and go on: they write nothing and leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from builders import CANARY, FAR, exchange_at, publish, rollout_name, rollout_of, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import JournalEntry, LearnerHeartbeat
from heterorl.exchange.version import Version

PREAMBLE = """
import os, signal, sys
from pathlib import Path
from builders import CANARY, FAR, publish, rollout_name, rollout_of
from heterorl.entry import exit_code
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import JournalEntry, LearnerHeartbeat, SlotState, SlotStatus
from heterorl.exchange.version import Version
exchange = Exchange(Path(sys.argv[1]))
"""
SAMPLER = """
def work():
    lease = exchange.acquire_slot(lambda: [FAR])
    for seq in range(1000):
        exchange.save_slot(lease, SlotState(next_seq=seq + 1))
        exchange.put_rollouts(lease, {rollout_name(seq): rollout_of(lease_epoch=lease.epoch)})
        exchange.beat(lease, SlotStatus())
        if seq == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(exit_code(work, exchange.root))
"""
LEARNER = """
def work():
    number = exchange.begin_incarnation()
    for step in range(1000):
        exchange.append_journal(JournalEntry(step=step, incarnation=number, names=[rollout_name(step)]))
        publish(exchange, Version(step + 1, number))
        (exchange.stage_checkpoint(step + 1) / "state.pt").write_bytes(b"state")
        exchange.commit_checkpoint(step + 1, {"step": step + 1})
        exchange.write_learner(LearnerHeartbeat(step=step + 1, incarnation=number))
        if step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(exit_code(work, exchange.root))
"""


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    return exchange_at(tmp_path / "run", run_of(exchange={"leaseSeconds": 2, "pollSeconds": 0.1}))


@pytest.fixture
def frozen(exchange: Exchange, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that has written three rounds and stands still."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + request.param, str(exchange.root)],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + 60
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < give_up
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def wake(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("frozen", [SAMPLER], indirect=True)
def test_a_sampler_frozen_past_its_lease_wakes_up_and_changes_nothing(
    exchange: Exchange, frozen: subprocess.Popen[str]
) -> None:
    lease = exchange.acquire_slot(lambda: [FAR])
    assert (lease.epoch, lease.first_seq) == (2, 3)
    exchange.put_rollouts(lease, {rollout_name(3): rollout_of(lease_epoch=2)})
    before = content(exchange.root)
    code, said = wake(frozen)
    assert code == 128 + signal.SIGTERM  # as one that was told to go: not charged
    assert "slot far-0 was taken over by another sampler" in said
    assert content(exchange.root) == before
    for name in exchange.list_rollouts():
        exchange.check_epoch(name, exchange.read_rollout(name).lease_epoch)


@pytest.mark.parametrize("frozen", [LEARNER], indirect=True)
def test_a_learner_frozen_while_another_one_takes_its_run_over_wakes_up_and_changes_nothing(
    exchange: Exchange, frozen: subprocess.Popen[str]
) -> None:
    assert exchange.begin_incarnation() == 2
    exchange.sweep()
    folder, state = exchange.open_newest_checkpoint()
    assert (folder.name, state) == ("step-00000003", {"step": 3})
    exchange.append_journal(JournalEntry(step=3, incarnation=2, names=[rollout_name(9)]))
    publish(exchange, Version(4, 2), canary=CANARY)
    exchange.write_learner(LearnerHeartbeat(step=4, incarnation=2))
    before = content(exchange.root)
    code, said = wake(frozen)
    assert code == 128 + signal.SIGTERM
    assert "another learner has begun" in said
    assert content(exchange.root) == before
