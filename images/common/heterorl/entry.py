"""How every process ends: what its user can put right becomes one line and an exit code, never a stack trace."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from heterorl.errors import HeteroRLError, RunFolderError

log = logging.getLogger(__name__)


def exit_code(work: Callable[[], object], root: Path) -> int:
    """Do the work on the run folder `root`; returns 0, 2 for what is the user's to mend, or 1 for what failed."""
    try:
        with no_space_is_a_user_error(root):
            work()
    except HeteroRLError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


@contextmanager
def no_space_is_a_user_error(root: Path) -> Iterator[None]:
    """Turn a full disk, wherever it shows, into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFolderError(
            f"{root}: no space left on the disk; free some and go on with --resume, or start elsewhere with --runs-dir"
        ) from error
