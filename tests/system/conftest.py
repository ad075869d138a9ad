"""Whole runs through the command line, as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


class Run:
    """A `heterorl run` in a folder of its own."""

    def __init__(self, runs: Path, file: Path, *arguments: str) -> None:
        self.runs, self.file, self.arguments = runs, file, arguments
        self.output = runs / "output.txt"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> Path:
        """The run's folder, once there is one."""
        return next(path for path in self.runs.iterdir() if path.is_dir())

    def start(self, *arguments: str) -> None:
        """Start it; what it prints goes to a file."""
        command = [sys.executable, "-m", "heterorl", "run", str(self.file), "--runs-dir", str(self.runs)]
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [*command, *self.arguments, *arguments], stdout=output, stderr=subprocess.STDOUT
            )

    def wait(self, timeout: float) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(timeout)

    def succeed(self, timeout: float, *arguments: str) -> dict[str, Any]:
        """Start it, see it succeed, and read its summary."""
        self.start(*arguments)
        code = self.wait(timeout)
        assert code == 0, self.said()
        return self.summary()

    def said(self) -> str:
        """All that was printed."""
        return self.output.read_text()

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return dict(json.loads((self.root / "summary.json").read_text()))

    def learner(self) -> dict[str, Any]:
        """The learner's heartbeat."""
        with contextlib.suppress(FileNotFoundError, StopIteration):
            return dict(json.loads((self.root / "learner.json").read_text()))
        return {}

    def slot(self, slot: str) -> dict[str, Any]:
        """A slot's heartbeat."""
        with contextlib.suppress(FileNotFoundError, StopIteration):
            return dict(json.loads((self.root / "slots" / slot / "heartbeat.json").read_text()))
        return {}

    def until(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        """Wait for something to become true while the run goes on."""
        assert self.process is not None
        give_up = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"the run ended early:\n{self.said()}"
            assert time.monotonic() < give_up, f"waited {timeout} s in vain:\n{self.said()}"
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        """Wait for the learner to get there."""
        self.until(lambda: self.learner().get("step", 0) >= step)

    def child(self, *words: str) -> psutil.Process:
        """The process of this run with these words on its command line."""
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if set(words) <= set(process.cmdline()):
                    return process
        raise AssertionError(f"no process with {words}")

    def stop(self) -> None:
        """End it for sure, with all it started."""
        if self.process is None or self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Factory: `new_run("quickstart.yaml", "--set", ...)` for an example, or a path for another manifest."""
    started: list[Run] = []

    def make(file: str | Path, *arguments: str) -> Run:
        runs = tmp_path / f"runs-{len(started)}"
        runs.mkdir()
        started.append(Run(runs, EXAMPLES / file, *arguments))
        return started[-1]

    yield make
    for run in started:
        run.stop()


def as_root() -> bool:
    """Whether mounts can be made here."""
    return os.geteuid() == 0
