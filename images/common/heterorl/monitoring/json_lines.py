"""Growing files of JSON lines, the record of what a process measured: one writer, any number of readers.

A learner that resumed from step c writes c + 1 again, so a line with a step supersedes every earlier line of its own or
a later step (`supersede` applies that).
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from heterorl.exchange.storage import persistently

Record = dict[str, Any]


class JsonLines:
    """The writer's end; each line is one write. A torn last line is cut off, on opening and after a failed write."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (open for the writer's lifetime)
        self._file.seek(0)
        self._size = self._file.read().rfind(b"\n") + 1
        self._file.truncate(self._size)

    def write(self, record: Record) -> None:
        """Append a record; OSError, and nothing of it in the file, when the volume does not take it whole."""
        self.append(encode(record))

    def append(self, line: bytes) -> None:
        """The same with a record that is encoded already."""
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(line)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def encode(record: Record) -> bytes:
    """The record's line; ValueError for a number that is not finite."""
    return json.dumps(record, allow_nan=False, ensure_ascii=False).encode(errors="replace") + b"\n"


class Tail:
    """New whole lines of a growing file; a torn last line is left for the next time, a damaged one is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.beginnings = 0
        """How often the file was shorter than before and is read anew: then it is another one."""

    def read(self) -> list[Record]:
        """What was added since the last call; nothing while the file is absent or cannot be read."""
        return [record for _, record in self.read_places()]

    def read_places(self) -> list[tuple[int, Record]]:
        """The same, with the byte at which each line begins."""
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                    self.beginnings += 1
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return []
        begin, self._offset = self._offset, self._offset + added.rfind(b"\n") + 1
        return [(begin + place, record) for place, record in _records(added[: self._offset - begin])]


def record_at(path: Path, place: int) -> Record:
    """The record whose line begins at this byte, as `Tail.read_places` told it."""
    with open(path, "rb") as file:
        file.seek(place)
        record: Record = json.loads(file.readline())
    return record


class MetricsTail(Tail):
    """The same of a metrics file: of each line what it can say (`metrics_line`)."""

    def read_places(self) -> list[tuple[int, Record]]:
        """As `Tail.read_places`."""
        return [(place, metrics_line(record)) for place, record in super().read_places()]


def metrics_line(record: Record) -> Record:
    """What a line of a metrics file can say: a number or nothing under every name but a few; the rest is left out."""
    return {name: value for name, value in record.items() if _SAYS.get(name, _is_number)(value)}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_SAYS: dict[str, Callable[[Any], bool]] = {
    "event": _is_text,
    "version": _is_text,
    "names": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "software": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "step": _is_whole,
    "version_step": _is_whole,
    "groups": _is_whole,
}


def read_metrics(path: Path) -> list[Record]:
    """All records that stand, in the order written; an absent file, or a folder in its place, has none.

    Lines with a step supersede every earlier line of their own or a later step. Lines that are torn are left out, and
    of the others what is not as their writer writes it (`metrics_line`).
    """
    try:
        content = persistently(path.read_bytes, what=path.name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return []
    records: list[Record] = []
    supersede(records, [metrics_line(record) for _, record in _records(content)])
    return records


def supersede(records: list[Record], added: Iterable[Record]) -> None:
    """Append records; one with a step takes the place of every earlier one of its own or a later step."""
    last_step = next((record["step"] for record in reversed(records) if "step" in record), -1)
    for record in added:
        if (step := record.get("step")) is not None:
            if step <= last_step:
                records[:] = [earlier for earlier in records if earlier.get("step", -1) < step]
            last_step = step
        records.append(record)


def _records(content: bytes) -> list[tuple[int, Record]]:
    found, place = [], 0
    for line in content.split(b"\n"):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append((place, record))
        place += len(line) + 1
    return found


def numbers(record: Record) -> Iterator[tuple[str, float]]:
    """The entries of a record that are numbers."""
    return ((key, float(value)) for key, value in record.items() if isinstance(value, int | float))
