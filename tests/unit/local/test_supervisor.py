"""What the runner says when it is told to stop, with processes of its roles stood in for: here none may start."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from builders import exchange_at, run_of
from heterorl.exit_codes import INTERRUPTED
from heterorl.local.live_view import RunView
from heterorl.local.supervisor import Interrupts, Programs, Runner, Verdict
from heterorl.spec.run import Slot


class Heard:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def show(self, state: RunView) -> None:
        pass


class Process:
    """A process that runs until its `code` is set."""

    pid, last_line = 1, ""

    def __init__(self) -> None:
        self.code: int | None = None
        self.signals: list[signal.Signals] = []

    def poll(self) -> int | None:
        return self.code

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr("heterorl.local.supervisor.gpu_devices", list)
    pools = [{"name": "near", "engine": "transformers", "replicas": 12}, {"name": "far", "engine": "transformers"}]
    exchange = exchange_at(tmp_path / "demo", run_of("demo", samplers=pools))
    return Runner(exchange, Programs(), Interrupts(), lock=0)


def running(runner: Runner, *slots: Slot, learner: bool = True) -> dict[str, Process]:
    roles = [*([runner.learner] if learner else []), *(runner.samplers[slot] for slot in slots)]
    for role in roles:
        role._process = Process()
    return {role.name: role._process for role in roles}


def look(runner: Runner, view: Heard, verdict: Verdict | None = None) -> Verdict | None:
    """One look around, as `Runner.supervise` takes several a second."""
    return runner._step(view, runner._asked_to_end(view, verdict))


def test_stopping_names_whom_it_waits_for_and_waits_for_no_sampler_that_never_started(runner: Runner) -> None:
    processes, heard = running(runner, Slot("near", 0), Slot("far", 0)), Heard()
    runner.interrupts.arrived()
    verdict = look(runner, heard)
    assert verdict is not None
    assert verdict.exit_code == INTERRUPTED
    expected = "stopping: waiting for learner (saving its checkpoint), near-0, far-0; Ctrl-C again kills them at once"
    assert heard.said == [expected]
    assert [process.signals for process in processes.values()] == [[signal.SIGTERM]] * 3
    for name, process in processes.items():
        assert runner._busy(verdict), f"waits for {name}"
        process.code = 0
        verdict = look(runner, heard, verdict)
    assert not runner._busy(verdict)
    assert heard.said == [expected]
    assert not any(runner.samplers[Slot("near", index)].running for index in range(12))


def test_stopping_says_the_number_of_those_that_would_fill_the_screen(runner: Runner) -> None:
    heard = Heard()
    running(runner, *(Slot("near", index) for index in range(12)), learner=False)
    runner.interrupts.arrived()
    look(runner, heard)
    named = ", ".join(f"near-{index}" for index in range(7))
    assert heard.said == [f"stopping: waiting for {named}, 5 more; Ctrl-C again kills them at once"]


def test_stopping_before_anything_runs_waits_for_nobody(runner: Runner) -> None:
    heard = Heard()
    runner.interrupts.arrived()
    verdict = look(runner, heard)
    assert heard.said == ["stopping: nothing runs"]
    assert verdict is not None
    assert not runner._busy(verdict)
