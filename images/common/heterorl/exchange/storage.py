"""The few file operations that the exchange is made of.

Everything the exchange does to the volume goes through one `Files` object, so a test can stop it between any two
operations. Nothing here relies on locks, modification times or atomic appends by several writers: network file systems
keep none of these promises. What it relies on: rename within one folder is atomic, and exclusive creation is exclusive.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

STAGING = ".tmp-"
_CHUNK = 8 << 20


@contextmanager
def _stale_is_gone(path: Path) -> Iterator[None]:
    """NFS says ESTALE, not ENOENT, of a file that was deleted while it was being read."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        raise FileNotFoundError(errno.ENOENT, "deleted while it was read", str(path)) from error


class Files:
    """File operations with the durability the protocol needs."""

    def make_dir(self, path: Path) -> None:
        """Make a folder and its parents; fine if it is there."""
        path.mkdir(parents=True, exist_ok=True)

    def list(self, path: Path) -> list[str]:
        """Names of finished entries, sorted; an absent folder is empty."""
        try:
            return sorted(name for name in os.listdir(path) if not name.startswith(STAGING))
        except FileNotFoundError:
            return []

    def read(self, path: Path) -> bytes:
        """The whole file; FileNotFoundError if it is gone."""
        with _stale_is_gone(path):
            return path.read_bytes()

    def identity(self, path: Path) -> tuple[int, ...]:
        """What changes when the file is replaced or written again; FileNotFoundError if it is gone."""
        about = path.stat()
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    def write(self, path: Path, data: bytes) -> None:
        """Write through to the disk under this very name; only for names no reader looks at yet."""
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, path: Path, data: bytes) -> None:
        """Put new contents under a name; a reader sees the old ones or the new ones, whole."""
        self.replace_all({path: data})

    def replace_all(self, contents: Mapping[Path, bytes]) -> None:
        """The same for several files of one folder, waiting for the folder once; each file appears whole."""
        staged = {path: path.with_name(f"{STAGING}{uuid.uuid4().hex}") for path in contents}
        try:
            for path, data in contents.items():
                self.write(staged[path], data)
            for path in contents:
                self.move(staged[path], path)
            self.sync_dir(path.parent)
        except BaseException:
            for path in staged.values():
                path.unlink(missing_ok=True)
            raise

    def create(self, path: Path, data: bytes) -> bool:
        """Create a file that must not exist; False if somebody else was first."""
        try:
            file = open(path, "xb")  # noqa: SIM115  (closed below, after what may go wrong has been undone)
        except FileExistsError:
            return False
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.sync_dir(path.parent)
        return True

    def append(self, path: Path, data: bytes) -> None:
        """Append and wait until the disk has it. One writer a file."""
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def move(self, source: Path, target: Path) -> None:
        """Rename within a volume, at once for all readers."""
        os.replace(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename and wait until the disk has it."""
        self.move(source, target)
        self.sync_dir(target.parent)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with all in it; fine if it is gone. A folder vanishes from sight at once."""
        if path.is_dir():
            hidden = path.with_name(f"{STAGING}{uuid.uuid4().hex}")
            self.move(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def sync_file(self, path: Path) -> None:
        """Wait until the disk has a file that something else wrote."""
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def sync_dir(self, path: Path) -> None:
        """Wait until the disk has a folder's entries."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, in hex."""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def copy(self, source: Path, target: Path, *, rest: Callable[[], None] = lambda: None) -> str:
        """Copy a file to this machine and return its SHA-256; read with read(), as mmap over a network may SIGBUS.

        `rest` is called between chunks, so that a caller can give way or give up by raising.
        """
        digest = hashlib.sha256()
        with _stale_is_gone(source), open(source, "rb") as reader, open(target, "wb") as writer:
            while chunk := reader.read(_CHUNK):
                digest.update(chunk)
                writer.write(chunk)
                rest()
        return digest.hexdigest()
