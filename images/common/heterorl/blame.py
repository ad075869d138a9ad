"""Whose failure an exception is: the one place that maps what libraries and the system raise to our errors.

no space, quota     on the shared volume the user's, for every node meets it; on another disk the node's
out of reach        the node's: what passes by itself (TRANSIENT) and did not while it was tried again
no memory           the node's: MemoryError, ENOMEM
CUDA                the node's: no device, out of memory, a device that is lost
ours                what its class says
all others          a crash: None here
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heterorl.errors import HeteroRLError, RunFolderError, SiteError

TRANSIENT = frozenset(
    {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ECOMM, errno.ENOLINK}
    | {errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
)
"""What passes by itself, or may: whoever works on the volume tries it again."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_A_MEBIBYTE = 1 << 20
_NO_RESOURCES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_DEVICE = re.compile(r"\bCUDA|\bNVML|\bcuDNN|\bcuBLAS|NVIDIA driver|Free memory on device", re.IGNORECASE)
"""What torch and vLLM say of a device that is not there, full or lost, in RuntimeError and ValueError."""


def explain(error: BaseException, root: Path) -> HeteroRLError | None:
    """The error of ours that says whose failure this is, of a process that works on the run folder `root`.

    None for a crash: an unexpected exception.
    """
    for each in _chain(error):
        if isinstance(each, HeteroRLError):
            return each
        if isinstance(each, OSError) and each.errno in _NO_SPACE:
            return _no_space(each, root)
        if isinstance(each, OSError) and each.errno in TRANSIENT:
            return out_of_reach(each, root)
        if isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno in _NO_RESOURCES):
            return SiteError(f"this node is out of memory or of open files: {each or type(each).__name__}")
        if isinstance(each, RuntimeError | ValueError) and _DEVICE.search(str(each)):
            return SiteError(f"this node's GPU cannot be used: {str(each).strip().splitlines()[0]}")
    return None


def out_of_reach(error: OSError, root: Path) -> SiteError:
    """What a TRANSIENT error means once it was tried again for long enough."""
    return SiteError(f"{_place(error, root)} is out of reach of this node ({error.strerror})")


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Raise what `explain` makes of an exception in its place."""
    try:
        yield
    except Exception as error:
        ours = explain(error, root)
        if ours is None or ours is error:
            raise
        raise ours from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from; not what was merely being handled, which it may replace."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__


def _no_space(error: OSError, root: Path) -> HeteroRLError:
    if _is_on_volume(error, root):
        return RunFolderError(
            f"{root}: no space left on the disk; free some and resume with --resume (on Kubernetes: increase"
            " failurePolicy.resumes), or start elsewhere with --runs-dir"
        )
    where = f" for {error.filename}" if error.filename else ""
    return SiteError(f"no space left on a disk of this node{where}: {error.strerror}")


def _place(error: OSError, root: Path) -> Path:
    """The file that the error names, else the run folder."""
    return Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else root


def _is_on_volume(error: OSError, root: Path) -> bool:
    """Whether it is the shared volume that is full; where the error names no file, unless this node's own disk is."""
    if isinstance(error.filename, str | bytes):
        return Path(os.path.abspath(os.fsdecode(error.filename))).is_relative_to(os.path.abspath(root))
    return not _is_full(Path(tempfile.gettempdir())) or _is_full(root)


def _is_full(folder: Path) -> bool:
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _A_MEBIBYTE or (disk.f_files > 0 and disk.f_favail == 0)
