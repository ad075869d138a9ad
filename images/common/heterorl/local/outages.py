"""The run's folder out of reach for longer than operations on it are tried again: the runner waits, and says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from heterorl.blame import TRANSIENT
from heterorl.exchange.storage import Files
from heterorl.logs import shown

_PAUSE_S = 1.0
_T = TypeVar("_T")


def single_tries() -> Files:
    """Operations that are tried once: `Outages` tries again, and Ctrl-C is heard in between."""
    return Files(retry_after_s=())


class Outages:
    """Outages of one folder, each told when it begins and when it is over."""

    def __init__(self, folder: Path, say: Callable[[str], object]) -> None:
        self._folder, self._say = folder, say
        self._since: float | None = None

    @contextmanager
    def lived_through(self) -> Iterator[None]:
        """What fails because the folder is out of reach is left for the next time; any other error is raised."""
        try:
            yield
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            if self._since is None:
                self._since = time.monotonic()
                self._say(f"{shown(self._folder)} is out of reach ({error.strerror}); waiting for it, nothing is lost")
        else:
            if self._since is not None:
                self._say(f"{shown(self._folder)} is back after {time.monotonic() - self._since:.0f} s")
                self._since = None

    def until_over(self, operation: Callable[[], _T], *, wait: Callable[[float], object] = time.sleep) -> _T:
        """The operation's result, tried again while the folder is out of reach; `wait` may raise to give up."""
        while True:
            with self.lived_through():
                return operation()
            wait(_PAUSE_S)
