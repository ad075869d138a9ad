"""The few file operations that the exchange is made of.

Everything the exchange does to the volume goes through one `Files` object, so a test can stop it between any two
operations. Nothing here relies on locks, modification times or atomic appends by several writers: network file systems
keep none of these promises. What it relies on: rename within a mount is atomic, exclusive creation is exclusive, and
what was fsynced stays; `heterorl.exchange.mount` tries the first two before anything is entrusted to a mount.

An error that passes by itself (`blame.TRANSIENT`: a server that is away for a moment) is met here and nowhere else:
every operation is tried again for some seconds, from its beginning, so that no half of it is left. What a library reads
or writes on the volume goes through `persistently`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar, cast

from heterorl.blame import TRANSIENT
from heterorl.errors import CorruptFile

log = logging.getLogger(__name__)

STAGING = ".tmp-"
_NOT_OFFERED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR})
"""What a mount says that does not have the operation."""
_NO_FILE = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ELOOP})
"""What is said of a folder that is read, of a path through a file, and of a link to itself."""
RETRY_AFTER_S = (0.1, 0.5, 2.0, 5.0)
_ERROR_NUMBER = re.compile(r"(?:\[Errno |\(os error )([0-9]+)[\])]")
_CHUNK = 1 << 20
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100

_P = ParamSpec("_P")
_T = TypeVar("_T")


def persistently(
    operation: Callable[[], _T],
    *,
    what: str = "",
    folder: Path | None = None,
    retry_after_s: Sequence[float] = RETRY_AFTER_S,
    sleep: Callable[[float], None] = time.sleep,
) -> _T:
    """Do what reads or writes the volume, and do it again from its beginning where it failed for a reason that passes.

    At last it raises that reason as an OSError, whatever a library or we made of it: it is nobody's wrong input.
    `folder`: what a library reads that takes a folder out of reach for one that is not there, as transformers does.
    """
    for delay in (*retry_after_s, None):
        try:
            return operation()
        except Exception as error:
            if (reason := _transient_reason(error) or _out_of_reach(folder)) is None:
                raise
            if delay is None:
                raise reason from None
            log.warning("%s: %s; trying again in %.1f s", what or getattr(operation, "__name__", ""), reason, delay)
            sleep(delay)
    raise AssertionError


def _transient_reason(error: BaseException | None) -> OSError | None:
    """What passes by itself among an error and those that led to it; libraries often keep only its number, as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            return error
        for number in map(int, _ERROR_NUMBER.findall(str(error))):
            if number in TRANSIENT:
                return OSError(number, str(error).strip())
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _out_of_reach(folder: Path | None) -> OSError | None:
    try:
        if folder is not None:
            os.stat(folder)
    except OSError as error:
        return error if error.errno in TRANSIENT else None
    return None


def _persistent(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """For a method of `Files`: `persistently`."""

    @functools.wraps(operation)
    def tried(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        files = cast(Files, args[0])
        name = operation.__name__.lstrip("_")
        return persistently(
            lambda: operation(*args, **kwargs), what=name, retry_after_s=files.retry_after_s, sleep=files.sleep
        )

    return tried


class Files:
    """File operations with the durability the protocol needs."""

    def __init__(
        self, *, retry_after_s: Sequence[float] = RETRY_AFTER_S, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.retry_after_s = retry_after_s
        self.sleep = sleep
        self._told: set[str] = set()

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────
    @_persistent
    def list(self, path: Path) -> list[str]:
        """Names of finished entries, sorted; an absent folder is empty, as is a file in its place."""
        try:
            return sorted(name for name in os.listdir(path) if not name.startswith(STAGING))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @_persistent
    def leftovers(self, path: Path) -> Sequence[Path]:
        """Staged entries of a folder, from all processes."""
        try:
            return sorted(path / name for name in os.listdir(path) if name.startswith(STAGING))
        except FileNotFoundError:
            return []

    @_persistent
    def walk(self, folder: Path) -> Sequence[Path]:
        """Every file below a folder, sorted."""
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def read(self, path: Path) -> bytes:
        """The whole file; FileNotFoundError if it is gone, CorruptFile if what has its name is none."""
        try:
            return self._unless_stale(path, self._read)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise CorruptFile(f"{path} is not a file ({error.strerror})") from error

    def size(self, path: Path) -> int:
        """Bytes of a file; FileNotFoundError if it is gone."""
        return self._unless_stale(path, self._stat).st_size

    def exists(self, path: Path) -> bool:
        """Whether a file or folder is there."""
        try:
            self._unless_stale(path, self._stat)
        except FileNotFoundError:
            return False
        return True

    def identity(self, path: Path) -> tuple[int, ...]:
        """What changes when the file is replaced or written again; FileNotFoundError if it is gone."""
        about = self._unless_stale(path, self._stat)
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    def modified(self, path: Path) -> float:
        """When it was last written, by the file server's clock: to be compared with nothing but another file's."""
        return self._unless_stale(path, self._stat).st_mtime

    def stamp(self, folder: Path) -> float:
        """What the file server's clock says: of a file that is written into the folder, and removed."""
        trial = folder / f"{STAGING}clock-{uuid.uuid4().hex}"
        try:
            self.write(trial, b"")
            return self.modified(trial)
        finally:
            self._unlink(trial)

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, in hex."""
        return self._unless_stale(path, self._digest)

    def copy(self, source: Path, target: Path, *, arrived: Callable[[int], None] = lambda num_bytes: None) -> str:
        """Copy a file to this machine and return its SHA-256; read with read(), as mmap over a network may SIGBUS.

        `arrived` is told the bytes of each chunk of up to 1 MiB; what it raises ends the copy.
        """
        return self._unless_stale(source, lambda path: self._copy(path, target, arrived))

    def _unless_stale(self, path: Path, operation: Callable[[Path], _T]) -> _T:
        """NFS says ESTALE, not ENOENT, of a file that was deleted while it was in use: if it goes on saying so."""
        try:
            return operation(path)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            raise FileNotFoundError(errno.ENOENT, "deleted while it was in use", str(path)) from error

    @_persistent
    def _read(self, path: Path) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    @_persistent
    def _stat(self, path: Path) -> os.stat_result:
        return os.stat(path)

    @_persistent
    def _digest(self, path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @_persistent
    def _copy(self, source: Path, target: Path, arrived: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        with open(source, "rb") as reader, open(target, "wb") as writer:
            while chunk := reader.read(_CHUNK):
                digest.update(chunk)
                writer.write(chunk)
                arrived(len(chunk))
        return digest.hexdigest()

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────
    @_persistent
    def make_dir(self, path: Path) -> None:
        """Make a folder and its parents; fine if it is there."""
        path.mkdir(parents=True, exist_ok=True)

    @_persistent
    def write(self, path: Path, data: bytes) -> None:
        """Write through to the disk under this very name; only for names no reader looks at yet."""
        with open(path, "wb") as file:
            file.write(data)
            self._flush(file)

    def replace(self, path: Path, data: bytes) -> None:
        """Put new contents under a name; a reader sees the old ones or the new ones, whole."""
        staged = path.with_name(f"{STAGING}{path.name}-{uuid.uuid4().hex}")
        try:
            self.write(staged, data)
            self.move(staged, path)
        except BaseException:
            self._unlink(staged)
            raise
        self.settle(path.parent)

    def create(self, path: Path, data: bytes) -> bool:
        """Create a file that must not exist, with its contents; False if another process was first."""
        return not self.create_all({path: data})

    def create_all(self, contents: Mapping[Path, bytes]) -> Sequence[Path]:
        """The same for several files of one folder, waiting for the folder once; returns those that existed before."""
        staged = {path: path.with_name(f"{STAGING}{path.name}-{uuid.uuid4().hex}") for path in contents}
        try:
            for path, data in contents.items():
                self.write(staged[path], data)
            existed = [path for path in contents if not self.publish(staged[path], path)]
        finally:
            for path in staged.values():
                self._unlink(path)
        self.settle(path.parent)
        return existed

    @_persistent
    def append(self, path: Path, data: bytes) -> None:
        """Append whole lines and wait until the disk has them; what an earlier append left torn becomes a line of its
        own. One writer a file.
        """
        with open(path, "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                data = b"\n" + data
            try:
                while data:
                    data = data[file.write(data) :]
                self._flush(file)
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
        if size == 0:
            self.settle(path.parent)

    @_persistent
    def move(self, source: Path, target: Path) -> None:
        """Rename within a mount, at once for all readers, in place of what has that name."""
        os.replace(source, target)

    def publish(self, source: Path, target: Path) -> bool:
        """Give a staged file or folder its name, which must be free; False, and nothing is changed, if it is taken.

        The caller waits for the folder (`sync_dir`).
        """
        about = self._stat(source)
        try:
            self._rename_to_new(source, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):
                raise
            # Over a network the answer to the call that succeeded may be lost, and its repetition finds our own doing.
            if not self._is_at(target, about):
                if error.errno == errno.ENOENT:
                    raise
                return False
            self._unlink(source)
        return True

    def rename(self, source: Path, target: Path) -> None:
        """Rename and wait until the disk has it."""
        self.move(source, target)
        self.settle(target.parent)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with all in it; fine if it is gone. A folder vanishes from sight at once."""
        if self._is_dir(path):
            hidden = path.with_name(f"{STAGING}{uuid.uuid4().hex}")
            self.move(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            self._unlink(path)

    def sync_file(self, path: Path) -> None:
        """Wait until the disk has a file that something else wrote."""
        self._sync(path, os.O_RDWR)

    def sync_dir(self, path: Path) -> None:
        """Wait until the disk has a folder's entries, where the mount can tell."""
        self._sync(path, os.O_RDONLY)

    def settle(self, folder: Path) -> None:
        """The same when new names are already in it: then a failure is only logged, since they cannot be taken back."""
        try:
            self.sync_dir(folder)
        except OSError as error:
            log.error("%s: whether its newest names would survive a power failure is not known: %s", folder, error)

    @_persistent
    def _sync(self, path: Path, flags: int) -> None:
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            self._tell_not_offered("opening a folder to fsync it", path, error)
            return
        try:
            self._fsync(descriptor, path)
        finally:
            os.close(descriptor)

    def _flush(self, file: BinaryIO | FileIO) -> None:
        file.flush()
        self._fsync(file.fileno(), Path(file.name))

    def _fsync(self, descriptor: int, path: Path) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            self._tell_not_offered("fsync", path, error)

    def _tell_not_offered(self, what: str, path: Path, error: OSError) -> None:
        """Warn, once, of what the mount cannot do; raise the error if it is another one."""
        if error.errno not in _NOT_OFFERED:
            raise error
        kind = f"{what} of {'folders' if path.is_dir() else 'files'}"
        if kind not in self._told:
            self._told.add(kind)
            log.warning(
                "%s: the mount does not offer %s (%s); continuing, but what was just written may be lost if the machine"
                " or the file server loses its power",
                path,
                kind,
                error.strerror,
            )

    @_persistent
    def _is_dir(self, path: Path) -> bool:
        return path.is_dir()

    @_persistent
    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    @_persistent
    def _rename_to_new(self, source: Path, target: Path) -> None:
        """Rename without replacing: by the kernel where the file system can, else by a link, which never replaces.

        A folder that is not empty is never replaced by a rename, and everything published is not empty.
        """
        try:
            _rename_no_replace(source, target)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
            if source.is_dir():
                os.rename(source, target)
            else:
                os.link(source, target)
                os.unlink(source)

    def _is_at(self, target: Path, about: os.stat_result) -> bool:
        return self.exists(target) and os.path.samestat(self._stat(target), about)


def _rename_no_replace(source: Path, target: Path) -> None:
    """renameat2(2) with RENAME_NOREPLACE, which Python does not offer; ENOSYS where the C library has none."""
    call = getattr(_LIBC, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


_LIBC = ctypes.CDLL(None, use_errno=True)
