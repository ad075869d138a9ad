"""Processes of one run on this machine: started in sessions of their own, restarted within a budget, stopped for sure.

A `Process` is one program, or one of several ranks that live and die together. A `Role` keeps a process alive while it
is wanted. The ranks of a learner are started here and not by torchrun, whose workers survive a `kill -9` of torchrun
and whose exit code hides theirs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO

from heterorl.exit_codes import SITE_ERROR, TOLD_TO_GO, USER_ERROR, describe_exit, failure_kind
from heterorl.failure_policy import Failure, GivenUp, Role, given_up
from heterorl.local.tee import Tee
from heterorl.spec.run import FailurePolicySpec

BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses before a process is started again: after one end, two in a row, and so on."""
SITE_BACKOFF_S = (10.0, 30.0, 60.0, 120.0, 300.0)
"""The same after a failure of the node: a device or a disk does not come back within seconds."""
_HEALTHY_S = 60.0  # a process that lived so long starts its back-off afresh
_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # looked up before any fork; absent off Linux


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of several machines meet. Every machine starts as many."""

    address: str
    """Of the first machine."""
    port: int
    node: int
    """Number of this machine, from 0."""
    nodes: int


class ManagedProcess:
    """A running program: `ranks` equal processes with one fate, stdout and stderr appended to a log.

    With `echo` they are shown on this process's stdout as well. Without a rendezvous all ranks are here. Raises OSError
    before anything is started where the log cannot be opened; with `echo` it goes on without.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        *,
        ranks: int = 1,
        rendezvous: Rendezvous | None = None,
        keep_open: Sequence[int] = (),
        echo: bool = False,
    ) -> None:
        meeting = rendezvous or Rendezvous("127.0.0.1", _free_port(), 0, 1)
        logs = [log, *(log.with_name(f"{log.stem}-rank{rank}{log.suffix}") for rank in range(1, ranks))]
        if not echo:
            log.parent.mkdir(parents=True, exist_ok=True)
        self._tees = [Tee(path) for path in logs] if echo else []
        self._ranks: list[subprocess.Popen[bytes]] = []
        with ExitStack() as opened:  # all logs before the first rank is started, which would be left alone
            sources = [tee.pipe for tee in self._tees] or (open(path, "ab") for path in logs)  # noqa: SIM115
            outputs = [opened.enter_context(source) for source in sources]
            for rank, output in enumerate(outputs):
                distributed = _torchrun_env(rank, ranks, meeting) if ranks * meeting.nodes > 1 else {}
                self._ranks.append(_spawn(command, {**env, **distributed}, output, keep_open))
        self.pid = self._ranks[0].pid
        self.last_line = ""
        """With `echo`, once they are gone: the last line of the rank that failed, or of the first."""

    def poll(self) -> int | None:
        """Exit code once all ranks are gone; the first failed rank takes the others with it.

        Of several ends the one counts that explains the others: when a rank leaves, collectives of the others break,
        and they may be gone before it is.
        """
        codes = [rank.poll() for rank in self._ranks]
        failed = [code for code in codes if code]
        if None in codes and not failed:
            return None
        self.signal(signal.SIGKILL)  # the others would wait for it in a collective for ever; and what ranks started
        codes = [rank.wait() for rank in self._ranks]
        worst = next((code for code in (USER_ERROR, SITE_ERROR, TOLD_TO_GO) if code in codes), next(iter(failed), 0))
        for tee in self._tees:
            tee.join()
        self.last_line = self._tees[codes.index(worst)].last_line if self._tees else ""
        return worst

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank and all it started."""
        for rank in self._ranks:
            try:
                os.killpg(rank.pid, number)
            except (ProcessLookupError, PermissionError):
                continue  # the whole session is gone


class RoleOutcome(Enum):
    """How a role's process ended, as far as the run has to care."""

    CLEAN = "exited by itself, or was told to by another process"
    RESTARTED = "failed, will be started again"
    GAVE_UP = "failed, will not be started again"
    STOPPED = "stopped as asked"


@dataclass
class ProcessRole:
    """A process that is wanted or not, and its restarts. Call `tick` a few times a second."""

    name: str
    role: Role
    start: Callable[[], ManagedProcess]
    log: Path
    policy: FailurePolicySpec
    step: Callable[[], int] = lambda: 0
    """Steps the learner has trained: good steps give restarts back."""
    grace_s: float = 60.0
    """Time between SIGTERM and SIGKILL."""
    wanted: bool = False
    failures: list[Failure] = field(default_factory=list)
    """What is charged to it, oldest first."""
    given_up: GivenUp | None = None
    """Why it is started no more."""
    exit_code: int | None = None
    """Exit code of the last process."""
    _process: ManagedProcess | None = None
    _started: float = 0.0
    _kill_at: float | None = None
    _start_at: float = 0.0
    _in_a_row: int = field(default=0, repr=False)

    @property
    def running(self) -> bool:
        """Whether a process exists, be it on its way out."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Process id (of rank 0), if it runs."""
        return self._process.pid if self._process else None

    @property
    def state(self) -> str:
        """One word for people: up, stopping, restarting, lost (given up) or away."""
        if self._process:
            return "stopping" if self._kill_at is not None else "up"
        if self.given_up:
            return "lost"
        return "restarting" if self.wanted else "away"

    def tick(self, now: float | None = None) -> RoleOutcome | None:
        """Start, stop or look after the process; says so when it has ended. `now` in monotonic seconds."""
        now = time.monotonic() if now is None else now
        if self._process is None:
            if self.wanted and not self.given_up and now >= self._start_at:
                self._process, self._started, self._kill_at = self.start(), now, None
            return None
        code = self._process.poll()
        if code is None:
            if not self.wanted and self._kill_at is None:
                self._process.signal(signal.SIGTERM)
                self._kill_at = now + self.grace_s
            elif self._kill_at is not None and now >= self._kill_at:
                self._process.signal(signal.SIGKILL)
            return None
        return self._ended(code, now)

    def kill(self) -> None:
        """Kill the process now and wait for it."""
        self.wanted = False
        if self._process:
            self._process.signal(signal.SIGKILL)
            while self._process.poll() is None:
                time.sleep(0.01)
            self._process = None

    def _ended(self, code: int, now: float) -> RoleOutcome:
        self._process, self.exit_code = None, code
        if self._kill_at is not None:
            self._kill_at = None
            return RoleOutcome.STOPPED
        kind = failure_kind(code)
        self._in_a_row = 1 if now - self._started >= _HEALTHY_S else self._in_a_row + 1
        pauses = SITE_BACKOFF_S if kind == "site" else BACKOFF_S
        self._start_at = now + pauses[min(self._in_a_row, len(pauses)) - 1]
        if kind is None:
            return RoleOutcome.CLEAN  # never charged
        message = ": ".join(filter(None, (describe_exit(code), tail(self.log, 1))))
        self.failures.append(Failure(code, self.step(), message))
        self.given_up = given_up(self.role, self.failures, self.policy)
        return RoleOutcome.GAVE_UP if self.given_up else RoleOutcome.RESTARTED


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log; empty if there is none that can be read."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _torchrun_env(rank: int, ranks: int, meeting: Rendezvous) -> dict[str, str]:
    numbers = {
        "MASTER_PORT": meeting.port,
        "RANK": meeting.node * ranks + rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": meeting.nodes * ranks,
        "LOCAL_WORLD_SIZE": ranks,
    }
    return {"MASTER_ADDR": meeting.address} | {key: str(value) for key, value in numbers.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _spawn(
    command: Sequence[str], env: Mapping[str, str], output: IO[bytes], keep_open: Sequence[int]
) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        # SIGTERM, not SIGKILL: a learner whose runner was killed still saves its step before it goes.
        if _prctl is not None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=tuple(keep_open),
        preexec_fn=die_with_parent,
    )
