"""Supervises the processes of a run on this machine: starts, restarts, evaluates, stops.

One loop runs a few times a second and never blocks. The runner knows how far the run is
only from what the processes write into the run's folder, as the operator would.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.learner_state import LAUNCHER
from heterorl.exchange.records import RunnerState
from heterorl.exchange.version import Version
from heterorl.exit_codes import CODE_OF, INTERRUPTED, SITE_ERROR, USER_ERROR, describe_exit
from heterorl.failure_policy import Role, run_failure
from heterorl.heterogeneity.availability import next_change, replicas_at
from heterorl.local.evaluations import Evaluations
from heterorl.local.live_view import ProcessState, RunDisplay, RunView
from heterorl.local.outages import Outages
from heterorl.local.preflight import assign_gpus, gpu_devices
from heterorl.local.processes import ManagedProcess, ProcessRole, RoleOutcome, tail
from heterorl.logs import shown
from heterorl.spec.run import Slot

TICK_S = 0.2
GRACE_S = 120.0
"""Time between SIGTERM and SIGKILL: a learner may be in the middle of a long step, and saves a checkpoint after it."""
_SAVE_EVERY_S = 2.0
_NAMED = 8
"""Processes that are named when the run is told to stop; of more, the number is said."""
TAKEN_OVER = "taken over"
"""How a run ended whose folder another runner has taken over."""


@dataclass(frozen=True)
class Programs:
    """The command of each process; `--root ROOT` and what else it needs is appended."""

    prepare: Sequence[str] = (sys.executable, "-m", "heterorl_learner", "prepare")
    learner: Sequence[str] = (sys.executable, "-m", "heterorl_learner")
    sampler: Sequence[str] = (sys.executable, "-m", "heterorl_sampler")
    evaluate: Sequence[str] = (sys.executable, "-m", "heterorl_sampler", "evaluate")
    conclude: Sequence[str] = (sys.executable, "-m", "heterorl_learner", "conclude")


@dataclass(frozen=True)
class Verdict:
    """How the run ended."""

    status: str
    exit_code: int
    reason: str = ""


class Interrupts:
    """Ctrl-C and SIGTERM, counted: the first asks all processes to stop, the second kills them."""

    def __init__(self) -> None:
        self.count = 0
        self._arrived = threading.Event()

    def arrived(self, *_: object) -> None:
        """Signal handler."""
        self.count += 1
        self._arrived.set()

    def wait(self, seconds: float) -> None:
        """Sleep, but not through a signal."""
        self._arrived.wait(seconds)
        self._arrived.clear()

    def patience(self, heard: int = 0) -> Callable[[float], None]:
        """Sleeps for what waits until a folder is back; KeyboardInterrupt after a signal beyond those heard before."""

        def sleep(seconds: float) -> None:
            self.wait(seconds)
            if self.count > heard:
                raise KeyboardInterrupt

        return sleep


@contextmanager
def count_interrupts() -> Iterator[Interrupts]:
    """Count SIGINT and SIGTERM instead of dying of them."""
    interrupts = Interrupts()
    previous = {number: signal.signal(number, interrupts.arrived) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Runner:
    """Supervises the processes of one run: `prepare`, then `supervise`."""

    def __init__(self, exchange: Exchange, programs: Programs, interrupts: Interrupts, lock: int) -> None:
        self.exchange, self.programs, self.interrupts = exchange, programs, interrupts
        self.spec = exchange.spec
        self.state = exchange.runner or RunnerState(status="preparing")
        self._lock = lock
        exchange.launcher = uuid.uuid4().hex
        self._gpus = assign_gpus(self.spec, gpu_devices())
        self._fair_threads = max(1, cores() // (self.spec.learner.world_size + len(self.spec.slots)))
        learner = self.spec.learner
        self.learner = self._role("learner", "learner", programs.learner, learner.threads, ranks=learner.world_size)
        self.samplers = {slot: self._sampler(slot) for slot in self.spec.slots}
        self.evaluations = Evaluations(exchange, self._evaluator)
        self._saved_at = 0.0
        self._ends: list[tuple[ProcessRole, RoleOutcome]] = []  # that were not reacted to yet
        self._failure: Verdict | None = None
        self._trained_steps = 0

    def prepare(self) -> Verdict | None:
        """Put model and data onto the volume, its output shown; a verdict if the run ends here."""
        outages, patience = Outages(self.exchange.root, print), self.interrupts.patience()
        if outages.until_over(lambda: self.exchange.prepared, wait=patience) is not None:
            return None
        role = self._role("prepare", "learner", self.programs.prepare, cores())
        # It is short, and what it crashes by once it crashes by again; its node may get well.
        role.policy = role.policy.model_copy(update={"learner_restarts": 0})
        started = time.monotonic()
        # The process itself says nothing for the seconds that its libraries take to load.
        print(f"{time.strftime('%H:%M:%S')} preparing model and data, see {shown(role.log)}", flush=True)
        self._see_through(role, outages)
        self.state.prepare_s += time.monotonic() - started
        if self.interrupts.count:
            return Verdict("stopped", INTERRUPTED, "interrupted during the preparation")
        if role.exit_code == 0 and outages.until_over(lambda: self.exchange.prepared, wait=patience) is not None:
            return None
        code = role.exit_code if role.exit_code in (USER_ERROR, SITE_ERROR) else 1
        return Verdict("failed", code, "the preparation failed")

    def _see_through(self, role: ProcessRole, outages: Outages) -> None:
        """Run a process until it ends for good, or is interrupted; its log is shown."""
        role.wanted, printed = True, _size(role.log)
        while True:
            outcome = None
            with outages.lived_through():
                outcome = role.tick()
            printed = _print_from(role.log, printed)
            if outcome is RoleOutcome.RESTARTED:
                print(f"the node of {role.name} is to blame; starting it again", flush=True)
            elif outcome is not None:
                return
            role.wanted = not self.interrupts.count
            if self.interrupts.count > 1 or not (role.wanted or role.running):
                role.kill()
                return
            self.interrupts.wait(TICK_S)

    def supervise(self, view: RunDisplay) -> Verdict:
        """Keep the run going until it is done, fails, or is interrupted; then stop all processes.

        While the folder is out of reach nothing is decided but what Ctrl-C asks for, and what ended meanwhile is
        reacted to afterwards.
        """
        verdict: Verdict | None = None
        self.state.status, self.state.reason = "running", ""
        outages = Outages(self.exchange.root, view.say)
        last = time.monotonic()
        while True:
            now = time.monotonic()
            self.state.elapsed_s += now - last
            last = now
            verdict = self._asked_to_end(view, verdict)
            with outages.lived_through():
                verdict = self._step(view, verdict)
                self._publish(view, verdict, now)
                if verdict and not self._busy(verdict):
                    break
            if verdict and verdict.status == "stopped" and not any(role.running for role in self._roles()):
                break
            self.interrupts.wait(TICK_S)
        self.state.status, self.state.reason = verdict.status, verdict.reason
        outages.until_over(self._save, wait=self.interrupts.patience(self.interrupts.count))
        return verdict

    def kill_all(self) -> None:
        """Leave nothing running, whatever happened."""
        for role in self._roles():
            role.kill()

    def _busy(self, verdict: Verdict) -> bool:
        if any(role.running for role in self._roles()):
            return True
        return verdict.status == "succeeded" and self.evaluations.busy()

    # ── one look around ──────────────────────────────────────────────────────────────────────────────────────────────
    def _asked_to_end(self, view: RunDisplay, verdict: Verdict | None) -> Verdict | None:
        """The verdict once Ctrl-C or the deadline has come. Reads nothing."""
        if self.interrupts.count > 1:
            self.kill_all()
        if self.interrupts.count and (verdict is None or verdict.status == "succeeded"):
            verdict = Verdict("stopped", INTERRUPTED, "interrupted")
            view.say(f"stopping: {self._awaited()}")
        deadline = self.spec.active_deadline_seconds
        if verdict is None and deadline and self.state.elapsed_s > deadline:
            verdict = Verdict(
                "failed", 1, f"activeDeadlineSeconds {deadline} passed; raise it and resume with --resume"
            )
        return verdict

    def _step(self, view: RunDisplay, verdict: Verdict | None) -> Verdict | None:
        if verdict is None and self._trained():
            verdict = Verdict("succeeded", 0)
        self.learner.wanted = verdict is None
        self._want_samplers(going_on=verdict is None)
        if verdict is None or verdict.status == "succeeded":
            self.evaluations.want(finished=verdict is not None)
        else:
            self.evaluations.stop()
        self._ends += [(role, outcome) for role in self._roles() if (outcome := role.tick()) is not None]
        while self._ends:
            self._failure = self._failure or self._ended(*self._ends[0], view)
            self._ends.pop(0)
        return verdict or self._failure

    def _awaited(self) -> str:
        """Whom a run that is told to stop waits for: those that have a process; one that never started is not there."""
        names = [role.name for role in self._roles() if role.running and role is not self.learner]
        if len(names) > _NAMED:
            names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"]
        if self.learner.running:
            names.insert(0, "learner (saving its checkpoint)")
        return f"waiting for {', '.join(names)}; Ctrl-C again kills them at once" if names else "nothing runs"

    def _trained(self) -> bool:
        """Whether the last step is trained and the learner, which writes the output after it, has left."""
        return self.exchange.trained and not self.learner.running

    def _steps_trained(self) -> int:
        """Steps the learner has trained, as far as could be seen."""
        with suppress(OSError):
            self._trained_steps = self.exchange.step
        return self._trained_steps

    def _want_samplers(self, *, going_on: bool) -> None:
        for pool in self.spec.samplers:
            elapsed, seed, scale = self.state.elapsed_s, self.spec.seed, self.spec.time_scale
            count = replicas_at(pool, elapsed, seed=seed, time_scale=scale) if going_on else 0
            for index in range(pool.replicas):
                self.samplers[Slot(pool.name, index)].wanted = index < count

    def _ended(self, role: ProcessRole, outcome: RoleOutcome, view: RunDisplay) -> Verdict | None:
        """React to the end of a process; a verdict if the run ends with it. What it has to read, it reads first."""
        trained, other = self._trained(), self.exchange.successor_of_launcher
        about = self.evaluations.ended(outcome) if role is self.evaluations.role else None
        how = f"{role.name}: {describe_exit(role.exit_code)}"
        if outcome is RoleOutcome.RESTARTED:
            self.state.restarts[role.name] = self.state.restarts.get(role.name, 0) + 1
            whose = "; its node is to blame" if role.exit_code == SITE_ERROR else ""
            view.say(f"{how}{whose}; restarting it, see {shown(role.log)}")
        if outcome is RoleOutcome.GAVE_UP:
            assert role.given_up is not None
            lines = tail(role.log)
            view.say(f"{role.name} {role.given_up.message}; the last lines of {shown(role.log)}:\n{lines}")
        if role.role == "evaluation":
            if about:
                view.say(about)
            return None
        if role is self.learner and other is not None:
            return Verdict(TAKEN_OVER, 1, f"{other}; this run ends and writes nothing more")
        if outcome is RoleOutcome.CLEAN and not trained:
            view.say(f"{role.name} exited before the end of the run; restarting it")
        samplers = {str(slot): sampler.given_up for slot, sampler in self.samplers.items() if self._counts(slot)}
        if outcome is RoleOutcome.GAVE_UP and (failure := run_failure(self.learner.given_up, samplers)):
            return Verdict("failed", CODE_OF[failure.kind], failure.message)
        return None

    def _counts(self, slot: Slot) -> bool:
        """Whether the slot has worked, or will: one that availability never asks for is not waited for."""
        pool, sampler = self.spec.pool(slot.pool), self.samplers[slot]
        changes = next_change(pool, self.state.elapsed_s, seed=self.spec.seed, time_scale=self.spec.time_scale)
        return bool(sampler.given_up) or sampler.wanted or changes is not None

    def _publish(self, view: RunDisplay, verdict: Verdict | None, now: float) -> None:
        def seen(role: ProcessRole) -> ProcessState:
            ended = None if verdict is None else "done" if verdict.status == "succeeded" else "stopped"
            return ProcessState(ended or role.state if role.state == "away" else role.state, len(role.failures))

        slots = {slot: seen(role) for slot, role in self.samplers.items()}
        view.show(RunView(seen(self.learner), slots, self.evaluations.version, self.state.elapsed_s))
        if now - self._saved_at >= _SAVE_EVERY_S:
            self._save()
            self._saved_at = now

    def _save(self) -> None:
        if self.exchange.successor_of_launcher is None:  # else the folder is another runner's by now
            self.exchange.save_runner(self.state)

    # ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _roles(self) -> list[ProcessRole]:
        return [self.learner, *self.samplers.values(), *([self.evaluations.role] if self.evaluations.role else [])]

    def _sampler(self, slot: Slot) -> ProcessRole:
        program = [*self.programs.sampler, "--pool", slot.pool, "--index", str(slot.index)]
        return self._role(str(slot), "sampler", program, self.spec.pool(slot.pool).threads, log=f"sampler-{slot}")

    def _evaluator(self, version: Version) -> ProcessRole:
        return self._role("evaluate", "evaluation", [*self.programs.evaluate, "--version", str(version)])

    def _role(
        self,
        name: str,
        role: Role,
        program: Sequence[str],
        threads: int = 0,
        *,
        ranks: int = 1,
        log: str | None = None,
    ) -> ProcessRole:
        log_file = self.exchange.logs_dir / f"{log or name}.log"
        command = [*program, "--root", str(self.exchange.root)]
        env = process_env(threads or self._fair_threads, self._gpus.get(name, []))
        env[LAUNCHER] = self.exchange.launcher

        def start() -> ManagedProcess:
            return ManagedProcess(command, env, log_file, ranks=ranks, keep_open=(self._lock,))

        policy = self.spec.failure_policy
        return ProcessRole(name, role, start, log_file, policy, self._steps_trained, grace_s=GRACE_S)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_env(threads: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of a child: its share of threads (spinning OpenMP threads slow each other down), its devices."""
    numbers = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    defaults = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress bars make no sense in a log
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    if not gpus:
        defaults["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed warns that it looked for one
    fixed = {**dict.fromkeys(numbers, str(threads)), "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    return {**defaults, **os.environ, **fixed}


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0


def _print_from(log: Path, offset: int) -> int:
    """Show what was added to a log; returns the new offset."""
    try:
        with open(log, "rb") as file:
            file.seek(offset)
            added = file.read()
    except OSError:
        return offset  # it is not there yet, or out of sight for a moment
    sys.stdout.write(added.decode(errors="replace"))
    sys.stdout.flush()
    return offset + len(added)
