"""Unit tests start no process: what does is in tests/process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
_watching = False


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in _STARTS:
        raise RuntimeError(f"a unit test starts a process ({event} {arguments[:2]}); move it to tests/process")


sys.addaudithook(_refuse)


@pytest.fixture(scope="module", autouse=True)
def no_process() -> Iterator[None]:
    """Fail the test that starts one."""
    global _watching
    _watching = True
    yield
    _watching = False
