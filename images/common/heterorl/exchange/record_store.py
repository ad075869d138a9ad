"""Reading and replacing records, listing names, putting aside what failed its checks: the same way everywhere.

A file that cannot be read is absent for its reader, and a name that the protocol does not know is ignored; both are
logged once. Nothing is removed for either: what a writer would replace is put into quarantine first.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from heterorl.errors import CorruptFile, ExchangeError, UnknownProtocol
from heterorl.exchange.records import QuarantineNote, Record, parse_record
from heterorl.exchange.storage import Files

log = logging.getLogger(__name__)

_REASON = ".reason.json"
_R = TypeVar("_R", bound=Record)
_Name = TypeVar("_Name")


class RecordStore:
    """The records below one run's folder."""

    def __init__(self, root: Path, files: Files, clock: Callable[[], float]) -> None:
        self._root, self._files, self._now = root, files, clock
        self._unreadable: dict[Path, tuple[tuple[int, ...], ExchangeError]] = {}
        self._strange: set[Path] = set()
        self._parsed: dict[Path, dict[str, Any]] = {}  # by folder, of the last look

    def read(self, path: Path, model: type[_R]) -> _R | None:
        """The record in a file; None while it is absent or cannot be read, which is logged once for each content."""
        try:
            return parse_record(model, self._files.read(path), self.shown(path))
        except FileNotFoundError:
            return None
        except (CorruptFile, UnknownProtocol) as error:
            self._tell(path, error)
            return None

    def write(self, path: Path, record: Record) -> None:
        """Put a record in place of the one before; UnknownProtocol when that is a later version's."""
        if (found := self._unreadable.get(path)) is not None:
            if isinstance(found[1], UnknownProtocol):
                raise found[1]
            self.quarantine(path, str(found[1]))
        self._files.replace(path, record.to_bytes())

    def names(self, folder: Path, parse: Callable[[str], _Name], suffix: str = "") -> list[_Name]:
        """What the names in a folder stand for, sorted by name; those that the protocol does not know are ignored.

        There may be thousands, and a process looks again and again: it parses only those that are new to it.
        """
        known, found = self._parsed.get(folder, {}), {}
        for name in self._files.list(folder):
            found[name] = known[name] if name in known else self._parse(folder / name, parse, suffix)
        self._parsed[folder] = found
        return [parsed for parsed in found.values() if parsed is not None]

    def _parse(self, path: Path, parse: Callable[[str], _Name], suffix: str) -> _Name | None:
        try:
            if not path.name.endswith(suffix):
                raise ValueError
            return parse(path.name.removesuffix(suffix))
        except ValueError:
            self._ignore(path)
            return None

    def quarantine(self, path: Path, reason: str) -> None:
        """Move a file or folder below `quarantine/`, with the reason beside it; fine if it is gone."""
        self._put_aside(path, reason, lambda target: self._files.publish(path, target))
        self._unreadable.pop(path, None)

    def keep_copy(self, path: Path, reason: str) -> None:
        """Put a copy of a file below `quarantine/`, for one that goes on without what cannot be read of it."""
        data = self._files.read(path)
        self._put_aside(path, reason, lambda target: self._files.create(target, data))

    def _put_aside(self, path: Path, reason: str, put: Callable[[Path], bool]) -> None:
        note = QuarantineNote(reason=reason, came_from=self.shown(path), time=self._now())
        first = self._root / "quarantine" / path.relative_to(self._root)
        self._files.make_dir(first.parent)
        for count in itertools.count(1):
            target = first if count == 1 else first.with_name(f"{first.name}.{count}")
            try:
                if not put(target):
                    continue  # one of this name lies there already
                self._files.settle(target.parent)
                self._files.replace(target.with_name(target.name + _REASON), note.to_bytes())
            except FileNotFoundError:
                pass
            break

    def shown(self, path: Path) -> str:
        """A path as messages call it: below the run's folder."""
        return path.relative_to(self._root).as_posix()

    def _tell(self, path: Path, error: ExchangeError) -> None:
        try:
            content = self._files.identity(path)
        except OSError:
            return
        if self._unreadable.get(path, (None,))[0] != content:
            self._unreadable[path] = content, error
            log.error("%s; it is treated as absent", error)

    def _ignore(self, path: Path) -> None:
        if path not in self._strange and not path.name.endswith(_REASON):
            self._strange.add(path)
            log.warning("%s is not a name of the exchange; ignored", self.shown(path))
