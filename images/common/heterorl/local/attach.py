"""`heterorl attach RUN`: the live view of a run that other processes run, on this machine or elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import RunnerState
from heterorl.local.live_view import ProcessState, RunView, open_view
from heterorl.local.outages import Outages, single_tries
from heterorl.monitoring.snapshot import ObservedSlot, Snapshot, SnapshotReader

_ENDED = ("succeeded", "failed", "stopped")
_TICK_S = 0.5


def attach(root: Path) -> None:
    """Show the run until it has ended or the user leaves. Nothing is written, and leaving stops nothing.

    Raises RunFolderError for a folder that holds no run.
    """
    exchange = Exchange(root, files=single_tries())
    reader = SnapshotReader(exchange)
    with suppress(KeyboardInterrupt):
        Outages(root, print).until_over(lambda: exchange.run)
        with open_view(exchange, on_interrupt="Ctrl-C leaves it running") as view:
            outages = Outages(root, view.say)
            while True:
                with outages.lived_through():
                    snapshot, runner = reader.read(), exchange.runner
                    view.show(view_of(snapshot, runner))
                    if has_ended(snapshot, runner):
                        break
                time.sleep(_TICK_S)


def has_ended(snapshot: Snapshot, runner: RunnerState | None) -> bool:
    """Whether there is nothing left to watch."""
    return runner.status in _ENDED if runner else snapshot.finished


def view_of(snapshot: Snapshot, runner: RunnerState | None) -> RunView:
    """The processes as the volume shows them; only their runner knows more."""
    ended = has_ended(snapshot, runner)
    runner = runner or RunnerState(status="running")
    learner = runner.status if ended else "up" if snapshot.learner else "starting"
    return RunView(
        learner=ProcessState(learner, runner.restarts.get("learner", 0)),
        slots={
            slot: ProcessState(_state(snapshot.slots.get(slot)), runner.restarts.get(f"sampler-{slot}", 0))
            for slot in snapshot.spec.slots
        },
        evaluating=None,
        elapsed_s=runner.prepare_s + runner.elapsed_s,
    )


def _state(seen: ObservedSlot | None) -> str:
    if seen is None:
        return "starting"
    if seen.heartbeat.released:
        return "stopped"
    return "up" if seen.alive else "lost"
