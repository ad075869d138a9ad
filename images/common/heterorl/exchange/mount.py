"""Whether a mount can do what the exchange relies on, tried before anything is entrusted to it."""

from __future__ import annotations

import errno
import shutil
import uuid
from pathlib import Path

from heterorl.blame import TRANSIENT
from heterorl.errors import RunFolderError
from heterorl.exchange.storage import STAGING, Files


def check_mount(files: Files, folder: Path, *others: Path) -> None:
    """Try to create, rename and fsync in `folder`, and to rename from it into the others and back.

    RunFolderError with the way out for a mount that cannot do it, or others on another one. What is merely not offered,
    as fsync of a folder, is warned of by `files`. OSError for a full disk, and for what may pass and did not.
    """
    trial = folder / f"{STAGING}trial-{uuid.uuid4().hex}"
    try:
        files.make_dir(trial)
        _try_names(files, trial)
        for other in filter(files.exists, others):  # what is made later is on the same mount
            _try_rename(files, trial / "new", other / trial.name)
    except OSError as error:
        if error.errno in TRANSIENT or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFolderError(
            f"{folder}: this mount cannot be used ({error}); expected one where files can be created, renamed and"
            " linked: a local disk, NFS, CephFS, or a FUSE or SMB mount with hard links or renameat2"
        ) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _try_names(files: Files, trial: Path) -> None:
    old, new = trial / "old", trial / "new"
    files.write(new, b"new")
    files.write(old, b"old")
    if files.publish(old, new) or files.read(new) != b"new":
        raise RunFolderError(
            f"{trial.parent}: this mount lets a new file take the name of another one, so two processes could take each"
            " other's place; use a mount where exclusive creation is exclusive"
        )
    files.move(old, new)
    if files.read(new) != b"old":
        raise RunFolderError(
            f"{trial.parent}: after a rename this mount still shows the file before it; use one where a rename is seen"
            " at once by the machine that made it"
        )
    files.sync_dir(trial)


def _try_rename(files: Files, source: Path, target: Path) -> None:
    try:
        files.move(source, target)
        files.move(target, source)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise RunFolderError(
            f"{target.parent} is on another file system than {source.parents[1]}, and nothing can be renamed from one"
            " to the other; mount the run's whole folder from one file system"
        ) from error
