"""What the exit code of one of our processes means."""

from __future__ import annotations

import signal

USER_ERROR = 2
"""Exit code of a process that wants its user, not a restart."""
PREEMPTED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a process that somebody asked to go."""


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
