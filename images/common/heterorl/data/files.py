"""Data files: which ones a path names, and the rows of each format with the line they stand on.

    .jsonl .ndjson .json .csv .tsv, also with .gz or .zst · .parquet · a folder written by datasets' save_to_disk

A row that its format cannot hold (a broken line, a record with too many cells) is yielded as `Unreadable`, to be judged
with the rows that are wrong in themselves; a file that cannot be read at all is a `DataError`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from heterorl.errors import DataError

FORMATS = "a data file ends in .jsonl, .json, .csv or .tsv, each also with .gz or .zst, or in .parquet"


@dataclass(frozen=True)
class Unreadable:
    """What stands in place of a row."""

    why: str


@dataclass(frozen=True)
class FileRow:
    """A row as it was found."""

    id: int
    """Its position in all files together, from 0; lines that hold no row count."""
    where: str
    """In words: `line 3`, or `part-2.jsonl line 3` where there are several files."""
    content: Any


def named_files(path: str, base: Path) -> list[Path]:
    """The files and saved folders that a path or glob names, sorted; DataError when there are none."""
    place = base / Path(path).expanduser()
    if place.exists():
        return [place]
    if glob.has_magic(path):
        if found := sorted(Path(name) for name in glob.glob(str(place), recursive=True)):
            return found
        raise DataError(f"{path}: no file matches (looked for {place}); relative paths start at the manifest's folder")
    raise DataError(f"{path}: no such file (looked for {place}); relative paths start at the manifest's folder")


def read_files(paths: list[str], base: Path, split: str) -> Iterator[FileRow]:
    """The rows of all files, in order; `split` is that of folders which hold several."""
    files = [(path, file) for path in paths for file in named_files(path, base)]
    first = 0
    for path, file in files:
        source = path if len(files) == 1 else file.name
        unit, rows = _reader(source, file, split)
        prefix = "" if len(files) == 1 else f"{file.name} "
        place = -1
        for place, row in rows:
            yield FileRow(first + place, f"{prefix}{unit} {place + 1}", row)
        first += place + 1


Rows = Iterator[tuple[int, Any]]


def _reader(source: str, path: Path, split: str) -> tuple[str, Rows]:
    """What to call the position of a row, and the rows with their position from 0."""
    if path.is_dir():
        return "row", _from_saved(source, path, split)
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "row", _from_parquet(source, path)
    plain = name.removesuffix(".gz").removesuffix(".zst")
    readers: dict[str, tuple[str, Callable[[IO[str]], Rows]]] = {
        ".jsonl": ("line", _from_lines),
        ".ndjson": ("line", _from_lines),
        ".json": ("row", _from_json),
        ".csv": ("line", lambda text: _from_table(text, ",")),
        ".tsv": ("line", lambda text: _from_table(text, "\t")),
    }
    suffix = Path(plain).suffix
    if suffix not in readers:
        raise DataError(f"{source}: {FORMATS}, this one in {path.suffix or 'nothing'}")
    unit, read = readers[suffix]
    return unit, _from_text(source, path, read)


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _from_text(source: str, path: Path, read: Callable[[IO[str]], Rows]) -> Rows:
    try:
        with _opened(path) as text:
            yield from read(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source}: cannot be read ({first_line(error)}); copy it again") from error
    except _BadFile as error:
        raise DataError(f"{source}: {error}") from error


class _BadFile(Exception):
    """The file is not of its format; the message says why."""


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The file's text, unpacked, line ends as they are, without the mark that Windows puts first."""
    with path.open("rb") as packed:
        binary: IO[bytes] = packed
        if path.name.lower().endswith(".gz"):
            binary = cast(IO[bytes], gzip.GzipFile(fileobj=packed))
        elif path.name.lower().endswith(".zst"):
            import pyarrow

            binary = pyarrow.CompressedInputStream(packed, "zstd")
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
            yield text


def _from_lines(text: IO[str]) -> Rows:
    """One JSON value a line; blank lines hold none."""
    for place, line in enumerate(text):
        if line.strip():
            yield place, _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"not a JSON object ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return Unreadable(f"not a JSON object that can be read ({first_line(error)})")


def _from_json(text: IO[str]) -> Rows:
    """A list of objects, alone or as the one list of an object; else JSON lines under another name."""
    content = text.read()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith("["):
            raise _BadFile(f"not valid JSON ({first_line(error)})") from error
        yield from _from_lines(io.StringIO(content, newline=""))
        return
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise _BadFile("holds one value; expected a list of objects")
    yield from enumerate(value)


def _from_table(text: IO[str], delimiter: str) -> Rows:
    """The records below a header; a quoted cell may hold line ends. A record's position is that of its first line."""
    csv.field_size_limit(2**31 - 1)
    records = csv.reader(text, delimiter=delimiter, strict=True)
    end = 0
    header: list[str] | None = None
    try:
        for cells in records:
            start, end = end, records.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _checked_header(cells, delimiter)
            elif len(cells) != len(header):
                yield start, Unreadable(f"has {len(cells)} cells, the header {len(header)}; quote cells with commas")
            else:
                yield start, dict(zip(header, cells))
    except csv.Error as error:
        raise _BadFile(f"line {end + 1}: {error}; cells with quotes or line ends are quoted, quotes doubled") from error


def _checked_header(cells: list[str], delimiter: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise _BadFile(f"the header names {', '.join(repeated)!r} more than once")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t," if sign != delimiter):
        raise _BadFile(f"the header is one cell, {header[0]!r}; separate by commas in .csv, by tabs in .tsv")
    return header


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _from_parquet(source: str, path: Path) -> Rows:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from enumerate(row for batch in file.iter_batches() for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a readable Parquet file ({first_line(error)})") from error


def _from_saved(source: str, path: Path, split: str) -> Rows:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{source}: a folder that save_to_disk did not write (it has no state.json); name the files in it, by a"
            f" glob such as {source.rstrip('/')}/*.parquet"
        )
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise DataError(f"{source}: the saved dataset cannot be read ({first_line(error)}); save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{source}: has no split {split}; set split to one of {', '.join(saved)}")
        saved = saved[split]
    yield from enumerate(saved)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
