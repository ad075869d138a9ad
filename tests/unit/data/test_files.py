"""Every format that a data file may have, and what is said of one that does not keep to it."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heterorl.data.datasets import load_rows
from heterorl.data.files import FileRow, Unreadable, named_files, read_files
from heterorl.errors import DataError
from heterorl.spec.run import DatasetSpec

ROWS = [
    {"problem": 'Line\none, "quoted" \'n 1+1=', "answer": "2"},
    {"problem": "Größe 2+2=", "answer": "4"},
    {"problem": "3+3=", "answer": "6"},
]


def as_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[Any], delimiter: str = ",") -> bytes:
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row.values()] for row in rows]
    lines = [delimiter.join(rows[0]), *(delimiter.join(cells) for cells in quoted)]
    return "".join(line + "\r\n" for line in lines).encode()


def zstd(content: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: as_jsonl(ROWS),
    "a.JSONL": lambda: as_jsonl(ROWS),
    "a.ndjson": lambda: as_jsonl(ROWS),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + as_jsonl(ROWS),
    "windows.jsonl": lambda: as_jsonl(ROWS).replace(b"\n", b"\r\n"),
    "no-end.jsonl": lambda: as_jsonl(ROWS).rstrip(b"\n"),
    "a.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "wrapped.json": lambda: json.dumps({"version": 2, "data": ROWS}).encode(),
    "lines.json": lambda: as_jsonl(ROWS),
    "a.csv": lambda: as_csv(ROWS),
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(ROWS),
    "blank.csv": lambda: as_csv(ROWS) + b"\r\n,\r\n",
    "a.tsv": lambda: as_csv(ROWS, "\t"),
    "a.jsonl.gz": lambda: gzip.compress(as_jsonl(ROWS)),
    "two.jsonl.gz": lambda: gzip.compress(as_jsonl(ROWS[:1])) + gzip.compress(as_jsonl(ROWS[1:])),
    "a.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.gz": lambda: gzip.compress(as_csv(ROWS)),
    "a.jsonl.zst": lambda: zstd(as_jsonl(ROWS)),
    "two.jsonl.zst": lambda: zstd(as_jsonl(ROWS[:2])) + zstd(as_jsonl(ROWS[2:])),
    "a.csv.zst": lambda: zstd(b"\xef\xbb\xbf" + as_csv(ROWS)),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_are_read_from_every_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    assert [row.content for row in read_files([name], tmp_path, "train")] == ROWS


def test_parquet_keeps_nested_values(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"reward_model": {"ground_truth": "2", "style": "rule"}, "tags": ["a", "b"]}, {"reward_model": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    first, second = read_files(["a.parquet"], tmp_path, "train")
    assert first == FileRow(0, "row 1", rows[0])
    assert second == FileRow(1, "row 2", {"reward_model": None, "tags": None})


def test_a_saved_dataset_is_read_by_its_split(tmp_path: Path) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].select([2, 0]).save_to_disk(tmp_path / "one")
    assert [row.content for row in read_files(["both"], tmp_path, "test")] == ROWS[:1]
    assert [row.content for row in read_files(["one"], tmp_path, "train")] == [ROWS[2], ROWS[0]]
    with pytest.raises(DataError, match="both: has no split validation; set split to one of train, test"):
        list(read_files(["both"], tmp_path, "validation"))


# ── several files ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_globs_name_files_in_the_order_of_their_names_and_rows_are_numbered_on(tmp_path: Path) -> None:
    for part in (2, 0, 1):
        (tmp_path / f"part-{part}.jsonl").write_bytes(b"\n" + as_jsonl([ROWS[part]]))
    (tmp_path / "other.json").write_text(json.dumps(ROWS[:1]))
    found = list(read_files(["part-*.jsonl", "other.json"], tmp_path, "train"))
    assert [row.content for row in found] == [*ROWS, ROWS[0]]
    assert [row.id for row in found] == [1, 3, 5, 6]  # the blank lines count
    assert [row.where for row in found] == [*(f"part-{i}.jsonl line 2" for i in range(3)), "other.json row 1"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(as_jsonl(ROWS))
    assert named_files("a[1].jsonl", tmp_path) == [tmp_path / "a[1].jsonl"]
    with pytest.raises(DataError, match=r"b\*\.jsonl: no file matches"):
        named_files("b*.jsonl", tmp_path)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{broken", "not a JSON object (Expecting property name enclosed in double quotes, column 2)"),
        ('{"problem": "p", "answer": ' + "9" * 5000 + "}", "not a JSON object that can be read (Exceeds the limit"),
        ("[" * 100_000, "not a JSON object that can be read (maximum recursion depth exceeded"),
    ],
)
def test_a_line_that_is_no_json_is_told_beside_the_good_ones(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    good, bad = read_files(["a.jsonl"], tmp_path, "train")
    assert (good.content, bad.where) == (ROWS[0], "line 2")
    assert isinstance(bad.content, Unreadable)
    assert bad.content.why.startswith(why)


def test_a_record_with_too_many_cells_is_a_bad_row_on_the_line_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('problem,answer\n"1\n+1=",2\n1, 2 and 3?,6\n')
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used: line 4: has 3 cells, the header 2"):
        load_rows(DatasetSpec(source="file", path="a.csv"), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", b"problem;answer\n1+1=;2\n", r"the header is one cell, 'problem;answer'; separate by commas in .csv"),
        ("a.csv", b"problem,answer,answer\n1,2,3\n", "the header names 'answer' more than once"),
        ("a.csv", b'problem,answer\n"1+1=,2\n', "line .*: unexpected end of data"),
        ("a.csv", "problem,answer\nGröße,2\n".encode("latin-1"), "not UTF-8 text"),
        ("a.csv", b"", "the dataset is empty"),
        ("a.csv", b"problem,answer\n", "the dataset is empty"),
        ("a.json", b'[{"problem": "1+1=", ', "not valid JSON"),
        ("a.json", b"3", "holds one value; expected a list of objects"),
        ("a.json", b"", "the dataset is empty"),
        ("a.jsonl.gz", as_jsonl(ROWS), "cannot be read .*copy it again"),
        ("a.jsonl.gz", gzip.compress(as_jsonl(ROWS))[:-20], "cannot be read .*copy it again"),
        ("a.jsonl.zst", as_jsonl(ROWS), "cannot be read .*copy it again"),
        ("a.jsonl.zst", zstd(as_jsonl(ROWS))[:-20], "cannot be read .*copy it again"),
        ("a.parquet", as_jsonl(ROWS), "not a readable Parquet file"),
        ("a.xlsx", b"PK", r"a data file ends in .jsonl, .json, .csv or .tsv.* this one in .xlsx"),
        ("a", b"", "this one in nothing"),
    ],
    ids=itertools.count(),  # the contents are no names: gzip's hold the time, and two workers have to agree
)
def test_a_file_that_is_not_of_its_format_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{name}: .*{why}") as error:
        load_rows(DatasetSpec(source="file", path=name), tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_was_not_saved_by_datasets_asks_for_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with pytest.raises(DataError, match=r"parts: a folder that save_to_disk did not write.*parts/\*\.parquet"):
        load_rows(DatasetSpec(source="file", path="parts"), tmp_path)
    (tmp_path / "parts" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="parts: the saved dataset cannot be read"):
        load_rows(DatasetSpec(source="file", path="parts"), tmp_path)
