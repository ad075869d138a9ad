"""How every process of ours begins and ends: one parser, one way to be told to go, one exit code for each kind of end.

    run ─▶ listen for SIGTERM ─▶ parse ─▶ log ─▶ work ─▶ leave with 0, 2 (user), 3 (node), 1 (crash) or 143 (told to go)

It imports nothing heavy, so that a process can be told to go from its first moment on. A process that is told to go
leaves within ten seconds: its work is interrupted, or, inside `Stop.finishing`, ends by itself; a thread ends the
process when neither comes to pass.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from heterorl.exit_codes import TOLD_TO_GO, failure_kind

if TYPE_CHECKING:
    from heterorl.exchange.exchange import Exchange

log = logging.getLogger(__name__)

LEAVE_S = 8.0
"""Time that the work has to come back in after the signal, or after what it had to finish."""


class Stop(threading.Event):
    """Set once the process is told to go.

    Until then nothing is to be finished: SIGTERM and SIGINT raise SystemExit in the main thread, wherever it is. Inside
    `finishing` they only set the event, and the work looks at it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told_at: float | None = None
        self._finish_s: float | None = None
        self._interrupted = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on; called once, by the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        # Python runs a handler only between two bytecodes of the main thread; this wakes the watchdog at once.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._arrived)
        threading.Thread(target=self._watch, args=(reader, writer), name="watchdog", daemon=True).start()

    @contextmanager
    def finishing(self, within_s: float = LEAVE_S) -> Iterator[None]:
        """Work that ends by itself when the event is set, and has so long for it; what follows has LEAVE_S again."""
        self._finish_s = within_s
        try:
            if self.is_set():  # the exception was swallowed by what it met
                raise SystemExit(TOLD_TO_GO)
            yield
        finally:
            self._finish_s = None
            if self.is_set():
                self._told_at = time.monotonic()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.set()
        if self._finish_s is None and not self._interrupted:
            self._interrupted = True  # once: what unwinds must not be interrupted again
            raise SystemExit(TOLD_TO_GO)

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        while self._told_at is None:
            if (select.select([reader], [], [], 1.0)[0] and reader.recv(1)) or self.is_set():
                self._told_at = time.monotonic()
        self.set()
        while time.monotonic() < self._told_at + (LEAVE_S if self._finish_s is None else self._finish_s):
            time.sleep(0.1)
        os.write(2, b"told to go, and ended because the work did not come back in time\n")
        os._exit(TOLD_TO_GO)


@dataclass(frozen=True)
class Process:
    """What the work of a process is given."""

    exchange: Exchange
    stop: Stop
    args: argparse.Namespace
    """`root`, `spec` and what the program adds."""

    @property
    def arguments(self) -> list[str]:
        """Root and spec as on the command line, for processes that this one starts."""
        spec = ["--spec", str(self.args.spec)] if self.args.spec else []
        return ["--root", str(self.args.root), *spec]


@dataclass(frozen=True)
class Program:
    """One thing that a package does when it is run with `python -m`."""

    work: Callable[[Process], object]
    about: str
    """A sentence."""
    label: Callable[[argparse.Namespace], str]
    """How its log lines are signed."""
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None


def run(module: str, programs: Mapping[str, Program], arguments: Sequence[str] | None = None) -> NoReturn:
    """`python -m MODULE [PROGRAM] --root ROOT [--spec FILE] ...`: do what is asked, then end the process.

    The first program is the one that needs no name.
    """
    stop = Stop()
    stop.listen()
    leave(lambda: perform(module, programs, sys.argv[1:] if arguments is None else arguments, stop))


def perform(module: str, programs: Mapping[str, Program], arguments: Sequence[str], stop: Stop) -> int:
    """Do what the arguments ask for, in this process; returns the exit code."""
    from heterorl.logs import setup_logging

    first = next(iter(programs))
    name, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in programs else (first, arguments)
    program = programs[name]
    parser = argparse.ArgumentParser(
        prog=module if name == first else f"{module} {name}",
        description=program.about,
        epilog=f"Programs: {', '.join(programs)} [{first}]." if len(programs) > 1 else None,
    )
    parser.add_argument("--root", type=Path, required=True, help="the run's folder on the shared volume")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="the resolved spec [ROOT/run.json]")
    program.add_arguments(parser)
    args = parser.parse_args(rest)
    setup_logging(program.label(args))
    return exit_code(lambda: _work(program, args, stop), args.root)


def _work(program: Program, args: argparse.Namespace, stop: Stop) -> object:
    from heterorl.exchange.exchange import Exchange

    return program.work(Process(Exchange(args.root, spec_file=args.spec), stop, args))


def exit_code(work: Callable[[], object], root: Path) -> int:
    """Do the work on the run folder `root`; its code, 0 if it returns none, or that of its failure, which is logged."""
    from heterorl.blame import explain

    try:
        code = work()
    except Exception as error:
        ours = explain(error, root)
        if ours is None:
            log.critical("ended by an error that is not expected", exc_info=True)
            return 1
        log.log(logging.ERROR if failure_kind(ours.exit_code) else logging.WARNING, "%s", ours)
        return ours.exit_code
    return code if isinstance(code, int) else 0


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code, at once and for certain; the last act of `__main__`.

    The interpreter is not taken down: threads that libraries leave running (torch's process groups) may abort a process
    in its last moment, after all its work is done, and it would count as crashed. So no `atexit` handler runs, and what
    has to be closed is closed by `main`; logs and standard streams are flushed here.
    """
    code = 1
    try:
        code = main()
    except SystemExit as ending:  # argparse, after it has said what it had to say, or told to go
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        log.critical("ended by an error that is not expected", exc_info=True)
    finally:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the reader is gone
                stream.flush()
        os._exit(code)
