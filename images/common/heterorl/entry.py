"""How every process ends: what its user can put right becomes one line and an exit code, never a stack trace."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from heterorl.errors import HeteroRLError, RunFolderError

log = logging.getLogger(__name__)


def leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code, at once and for certain; the last act of `__main__`.

    The interpreter is not taken down: threads that libraries leave running (torch's process groups) may abort a process
    in its last moment, after all its work is done, and it would count as crashed. So no `atexit` handler runs, and what
    has to be closed is closed by `main`; logs and standard streams are flushed here.
    """
    code = 1
    try:
        code = main()
    except SystemExit as ending:  # argparse, after it has said what it had to say
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        log.critical("ended by an error that is not expected", exc_info=True)
    finally:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the reader is gone
                stream.flush()
        os._exit(code)


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
