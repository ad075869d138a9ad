"""Published folders: staged under a hidden name, described by a manifest that is written last, named by one rename.

    .tmp-NAME/  files ─▶ on the disk ─▶ manifest.json ─▶ on the disk ─▶ NAME/

A weights version and a checkpoint are such folders. The starting model and the output have no manifest, and a new one
may take the place of an old one (`replaced`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from heterorl.errors import CorruptFile, ExchangeError
from heterorl.exchange.records import FileEntry, Manifest, parse_record
from heterorl.exchange.storage import STAGING, Files

MANIFEST = "manifest.json"
_M = TypeVar("_M", bound=Manifest)


def stage(files: Files, parent: Path, name: str) -> Path:
    """A fresh hidden folder to write the contents of `parent/name` into."""
    staged = staged_path(parent, name)
    files.remove(staged)
    files.make_dir(staged)
    return staged


def staged_path(parent: Path, name: str) -> Path:
    """Where `stage` makes it."""
    return parent / f"{STAGING}{name}"


@contextmanager
def replaced(files: Files, target: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of `target` when the block ends well, and is removed when it does not.

    What had the name before is removed once the new folder has it. A crash in between leaves both, complete.
    """
    staged, old = stage(files, target.parent, target.name), staged_path(target.parent, f"{target.name}-before")
    try:
        yield staged
        _sync(files, staged)
        files.sync_dir(staged)
        files.remove(old)
        if files.exists(target):
            files.move(target, old)
        files.rename(staged, target)
    except BaseException:
        if files.exists(old) and not files.exists(target):
            files.move(old, target)
        files.remove(staged)
        raise
    files.remove(old)


def describe(files: Files, staged: Path, known: Mapping[str, FileEntry] = {}) -> dict[str, FileEntry]:
    """Wait until the disk has every file of a staged folder; its manifest's listing.

    `known`: entries of files that were hashed while they were written; the others are read.
    """
    found = {path.relative_to(staged).as_posix(): path for path in _sync(files, staged)}
    return {
        name: known.get(name) or FileEntry(bytes=files.size(path), sha256=files.digest(path))
        for name, path in found.items()
    }


def _sync(files: Files, staged: Path) -> list[Path]:
    """Wait until the disk has every file below a folder; the files."""
    paths = list(files.walk(staged))
    for path in paths:
        files.sync_file(path)
    for folder in {path.parent for path in paths} - {staged}:
        files.sync_dir(folder)
    return paths


def publish(files: Files, staged: Path, target: Path, manifest: Manifest, may_publish: Callable[[], None]) -> None:
    """Give a described folder its name. `may_publish` is asked last of all; ExchangeError if the name is taken."""
    files.write(staged / MANIFEST, manifest.to_bytes())
    files.sync_dir(staged)
    may_publish()
    if not files.publish(staged, target):
        raise ExchangeError(f"{target.name} was published before and is never overwritten")
    files.settle(target.parent)


def read_manifest(files: Files, folder: Path, model: type[_M]) -> _M:
    """The manifest; CorruptFile, UnknownProtocol, and FileNotFoundError if the folder is gone."""
    with standing(files, folder):
        data = files.read(folder / MANIFEST)
    return parse_record(model, data, f"{folder.parent.name}/{folder.name}/{MANIFEST}")


@contextmanager
def standing(files: Files, folder: Path) -> Iterator[None]:
    """A file that is missing from a folder that still stands is damage: a folder that is deleted goes all at once."""
    try:
        yield
    except FileNotFoundError as error:
        if files.exists(folder):
            missing = Path(str(error.filename)).name
            raise CorruptFile(f"{folder.parent.name}/{folder.name} stands and lacks {missing}") from error
        raise


def check_size(files: Files, path: Path, expected: FileEntry) -> None:
    """CorruptFile if a file has not the size that its manifest says."""
    found = files.size(path)
    if found != expected.bytes:
        raise CorruptFile(f"{path.parent.name}/{path.name} has {found} bytes; its manifest says {expected.bytes}")


def check_digest(path: Path, found: str, expected: FileEntry) -> None:
    """CorruptFile if a file has not the digest that its manifest says."""
    if found != expected.sha256:
        raise CorruptFile(f"{path.parent.name}: the checksum of {path.name} does not fit its manifest")
