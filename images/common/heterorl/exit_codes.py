"""What the exit code of one of our processes means, and so who is to blame for its end."""

from __future__ import annotations

import signal
from typing import Literal

USER_ERROR = 2
"""Exit code of what is the same on every node: wrong input. It wants its user, no restart helps."""
SITE_ERROR = 3
"""Exit code of what is wrong with this node: its GPU, disk, mount, memory or clock. Another node may do."""
INTERRUPTED = 130
"""Exit code of a run that was ended by Ctrl-C."""
TOLD_TO_GO = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM interrupted."""
PREEMPTED = (0, -signal.SIGTERM, TOLD_TO_GO)
"""Exit codes of a process that was asked to go, or had nothing left to do: never charged."""

FailureKind = Literal["user", "site", "crash"]
CODE_OF: dict[FailureKind, int] = {"user": USER_ERROR, "site": SITE_ERROR, "crash": 1}
"""What a run that ended for such a failure returns."""


def failure_kind(code: int) -> FailureKind | None:
    """Whose failure an exit code tells of; None where it tells of none."""
    if code in PREEMPTED:
        return None
    if code == USER_ERROR:
        return "user"
    return "site" if code == SITE_ERROR else "crash"


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
