"""What has a name is on the disk: contents before the name, the folder's entry after it, seen at the calls themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import exchange_at, publish, rollout_name, rollout_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import JournalEntry
from heterorl.exchange.storage import STAGING, Files
from heterorl.exchange.version import Version

Event = tuple[str, str, int]
"""`synced` or `named`, the name without what staging adds to it, and the bytes that were there."""


class Watched(Files):
    """Real file operations, with a record of the order in which things reach the disk and get their names."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def move(self, source: Path, target: Path) -> None:
        super().move(source, target)
        self.events.append(("named", target.name, target.stat().st_size))

    def _rename_to_new(self, source: Path, target: Path) -> None:
        super()._rename_to_new(source, target)
        self.events.append(("named", target.name, target.stat().st_size))

    def synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.events.append(("synced", plain(path.name), os.fstat(descriptor).st_size))

    def before_the_name(self, name: str) -> list[tuple[str, int]]:
        """What was synced before that name stood: name and size, folders without size."""
        until = next(at for at, event in enumerate(self.events) if event[:2] == ("named", name))
        return [(event[1], event[2]) for event in self.events[:until] if event[0] == "synced"]

    def after_the_name(self, name: str) -> list[str]:
        until = next(at for at, event in enumerate(self.events) if event[:2] == ("named", name))
        return [event[1] for event in self.events[until:] if event[0] == "synced"]


def plain(name: str) -> str:
    """A staged name without its prefix and its random end."""
    stem, dash, end = name.removeprefix(STAGING).rpartition("-")
    return stem if name.startswith(STAGING) and dash and len(end) == 32 else name.removeprefix(STAGING)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched, fsync = Watched(), os.fsync

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        watched.synced(descriptor)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    return watched


@pytest.fixture
def exchange(tmp_path: Path, files: Watched) -> Exchange:
    exchange = exchange_at(tmp_path / "run", files=files)
    exchange.begin_incarnation()
    files.events.clear()
    return exchange


@pytest.mark.parametrize("put", [Files.replace, Files.create], ids=["replace", "create"])
def test_a_file_is_on_the_disk_before_its_name_and_its_folder_after(
    tmp_path: Path, files: Watched, put: Callable[[Files, Path, bytes], object]
) -> None:
    put(files, tmp_path / "file", b"contents")
    assert files.before_the_name("file") == [("file", len(b"contents"))]
    assert files.after_the_name("file") == [tmp_path.name]


def test_every_appended_line_is_on_the_disk_when_the_call_returns(tmp_path: Path, files: Watched) -> None:
    for length in (5, 10):
        files.append(tmp_path / "lines", b"line\n")
        assert ("synced", "lines", length) in files.events
    assert ("synced", tmp_path.name, tmp_path.stat().st_size) in files.events  # the new file's entry


def test_a_steps_selection_is_on_the_disk_before_it_is_trained(exchange: Exchange, files: Watched) -> None:
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=[rollout_name(0)]))
    size = (exchange.root / "journal.jsonl").stat().st_size
    assert size > 0
    assert ("synced", "journal.jsonl", size) in files.events


def test_weights_are_on_the_disk_to_the_last_file_before_samplers_see_them(exchange: Exchange, files: Watched) -> None:
    version = Version(3, 1)
    publish(exchange, version, b"weights")
    contents = {path.name: path.stat().st_size for path in (exchange.root / "weights" / str(version)).iterdir()}
    assert {"model.safetensors", "canary.json", "manifest.json"} <= set(contents)
    before = files.before_the_name(str(version))
    assert contents.items() <= set(before)
    assert str(version) in dict(before)  # the folder, whose entries they are
    assert "weights" in files.after_the_name(str(version))


def test_a_checkpoint_is_on_the_disk_to_the_last_file_before_it_counts(exchange: Exchange, files: Watched) -> None:
    staged = exchange.stage_checkpoint(4)
    (staged / "model").mkdir()
    (staged / "optimizer.pt").write_bytes(b"moments")
    (staged / "model" / "model.safetensors").write_bytes(b"weights, too")
    exchange.commit_checkpoint(4, {"step": 4})
    before = files.before_the_name("step-00000004")
    assert {("optimizer.pt", len(b"moments")), ("model.safetensors", len(b"weights, too"))} <= set(before)
    assert {"model", "manifest.json"} <= set(dict(before))
    assert "checkpoints" in files.after_the_name("step-00000004")


def test_a_rollout_is_on_the_disk_before_the_learner_sees_it(exchange: Exchange, files: Watched) -> None:
    lease = exchange.acquire_slot(lambda: [rollout_name(0).slot])
    assert lease is not None
    exchange.put_rollouts(lease, {rollout_name(0): rollout_of()})
    (path,) = (exchange.root / "rollouts").iterdir()
    assert (path.name, path.stat().st_size) in files.before_the_name(path.name)
    assert files.after_the_name(path.name)[0] == "rollouts"
