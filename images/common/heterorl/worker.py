"""A process that can be killed, for a function that may hang, crash or eat memory: other people's code and libraries.

    Worker.call (any thread, any process)  --JSON lines-->  `python -m heterorl.worker FUNCTION`, which keeps one child
                                                                |  fork, pipes, SIGKILL
                                                            child: calls the function

A Python time limit does not reach into C code, and a signal handler can be replaced by the very function it guards. So
the process between watches the clock and kills the child with all it started; the kernel refuses memory beyond the
limit. It is a fresh interpreter that holds neither torch nor threads, and forks the next child within milliseconds.
Both leave when their standard input ends, that is, with the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Self

from heterorl.errors import HeteroRLError

MEMORY_BYTES = 4 << 30
"""Memory that a child may have unless told otherwise: private and writable, so that mapped libraries do not count."""
LOAD_LIMIT_S = 300.0
"""Time that a child has to get ready for its first call."""

_LEAVING_S = 5.0

Reason = Literal["error", "time", "memory", "crash"]
_Call = Callable[[Sequence[Any] | None], Any]
"""What a child does with the arguments of a call, or, without any, to load."""
_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # absent off Linux


class CallFailed(HeteroRLError):
    """A call gave no value: the function raised, took too long, wanted too much memory, or ended its process."""

    def __init__(self, reason: Reason, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.trace = trace
        """With reason `error` and `memory`: the traceback, with file and line."""


class Worker:
    """Calls one function, named by its dotted path, in a process of its own: one call at a time, from any thread.

    Arguments and values are JSON. `warm_up`: arguments of a call made once, before the first fork, for imports and
    caches that every child then inherits. `load`: dotted path and arguments of a call that every new child makes first,
    for what does not survive a fork (threads, a GPU, connections); `LOAD_LIMIT_S` bounds it. What the function prints
    goes to this process's stderr. The process starts with the first call; close it, or use it as a context manager.
    """

    def __init__(
        self,
        function: str,
        *,
        warm_up: Sequence[Any] | None = None,
        load: Sequence[Any] | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._function = function
        self._setup = {"warm_up": warm_up, "load": load, "memory_bytes": memory_bytes}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def call(self, *args: Any, time_limit_s: float) -> Any:
        """The function's value. Raises `CallFailed`; the next call finds a child that works."""
        return self._ask(args, time_limit_s)

    def load(self) -> Any:
        """Start a child, unless there is one, and return what its `load` call gave. Raises `CallFailed`."""
        return self._ask(None, LOAD_LIMIT_S)

    def close(self) -> None:
        """End the process and a call that it is busy with."""
        self._closed = True
        if process := self._process:
            _hang_up(process)
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, args: Sequence[Any] | None, time_limit_s: float) -> Any:
        line = json.dumps([args, time_limit_s]) + "\n"
        with self._lock:
            # A process that is gone was killed from outside (memory, an operator) or crashed: a fresh one tries again.
            answer = self._put(line) or self._put(line)
        reply = json.loads(answer) if answer else _failure("crash", "the worker was killed")
        if "failed" in reply:
            raise CallFailed(reply["failed"], reply["message"], reply["trace"])
        return reply["value"]

    def _put(self, line: str) -> str:
        """The reply, or nothing when the process is gone."""
        if self._closed:
            return ""
        process = self._process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it left, or `close` hung up
            reply = ""
        if not reply:
            self._stop()
        return reply

    def _start(self) -> subprocess.Popen[str]:
        process = self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "heterorl.worker",
                self._function,
                json.dumps({**self._setup, "path": sys.path}),
            ],
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sets have one order, so a function of its arguments stays one
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C and group signals are for the parent, which then closes the pipe
        )
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            self._stop()
            raise HeteroRLError(f"the worker that calls {self._function} did not start; its output above says why")
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _hang_up(process)
        try:
            process.wait(_LEAVING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout
        process.stdout.close()


def _hang_up(process: subprocess.Popen[str]) -> None:
    """Close its input, at which it kills its child and leaves."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _failure(reason: Reason, message: str, trace: str = "") -> dict[str, Any]:
    return {"failed": reason, "message": message, "trace": trace}


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────
class _Child:
    """A forked child that calls the function, seen from the process that watches it."""

    def __init__(self, call: _Call, memory_bytes: int) -> None:
        question_end, questions = os.pipe()
        replies, reply_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(questions)
            os.close(replies)
            _answer(call, question_end, reply_end, memory_bytes)
        os.close(question_end)
        os.close(reply_end)
        self._questions, self._replies = os.fdopen(questions, "wb", 0), os.fdopen(replies, "rb", 0)
        self.alive = True

    def ask(self, args: Sequence[Any] | None, time_limit_s: float) -> dict[str, Any]:
        """Its reply, or why there is none; `SystemExit` when the parent is gone. Without `args` it loads."""
        until = time.monotonic() + time_limit_s
        reply = b""
        with contextlib.suppress(BrokenPipeError):
            self._questions.write(json.dumps(args).encode() + b"\n")
        while not reply.endswith(b"\n"):
            ready, _, _ = select.select([self._replies.fileno(), 0], [], [], max(0.0, until - time.monotonic()))
            if 0 in ready:  # nothing is asked during a call: its pipe was closed
                self.kill()
                sys.exit(0)
            if not ready:
                self.kill()
                return _failure("time", f"no value within {time_limit_s:g} s")
            more = self._replies.read(1 << 16)
            if not more:
                return _failure("crash", f"the process {_ending(self.kill())}")
            reply += more
        found: dict[str, Any] = json.loads(reply)
        if found.get("failed") == "memory":
            self.kill()  # what it still holds would fail the next call
        return found

    def kill(self) -> int:
        """End it and all it started; its exit code."""
        self.alive = False
        for kill, pid in ((os.killpg, self._pid), (os.kill, self._pid)):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        self._questions.close()
        self._replies.close()
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _serve(
    name: str, path: list[str], warm_up: Sequence[Any] | None, load: Sequence[Any] | None, memory_bytes: int
) -> None:
    """Answer the questions on standard input, a JSON line each, by a child that is replaced once it is gone."""
    sys.path[:] = path  # what the parent can import can be imported here
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what the parent's thread had blocked
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed must not stand among the replies
    function = _resolved(name)

    def call(args: Sequence[Any] | None) -> Any:
        if args is not None:
            return function(*args)
        return _resolved(load[0])(*load[1:]) if load is not None else None

    if warm_up is not None:
        function(*warm_up)
    replies.write("ready\n")
    replies.flush()
    child: _Child | None = None
    loaded: dict[str, Any] = {"value": None}
    while question := sys.stdin.readline():
        args, time_limit_s = json.loads(question)
        if child is None or not child.alive:
            child = _Child(call, memory_bytes)
            loaded = child.ask(None, LOAD_LIMIT_S)
            if "failed" in loaded and child.alive:
                child.kill()
        reply = child.ask(args, time_limit_s) if child.alive and args is not None else loaded
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    if child is not None and child.alive:
        child.kill()


def _answer(call: _Call, question_end: int, reply_end: int, memory_bytes: int) -> NoReturn:
    """The child: answer the questions until the pipe closes."""
    os.setpgid(0, 0)
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        for question in os.fdopen(question_end, "rb"):
            with os.fdopen(os.dup(reply_end), "w") as replies:
                replies.write(_reply(call, json.loads(question)) + "\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _reply(call: _Call, args: Sequence[Any] | None) -> str:
    try:
        return json.dumps({"value": call(args)})
    except BaseException as error:
        reason: Reason = "memory" if isinstance(error, MemoryError) else "error"
        return json.dumps(_failure(reason, f"{type(error).__name__}: {error}", _trace(error)))


def _resolved(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _trace(error: BaseException) -> str:
    """The traceback from the first frame that is not this module's."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename == __file__:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame))


if __name__ == "__main__":
    _serve(sys.argv[1], **json.loads(sys.argv[2]))
