"""The file operations under every error that a mount may raise: what passes is waited for, nothing is left half done."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from builders import FAR, exchange_at, publish, put, rollout_name, rollout_of
from heterorl.blame import TRANSIENT, explain
from heterorl.errors import ModelError, RunFolderError, SiteError
from heterorl.exchange import storage
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.mount import check_mount
from heterorl.exchange.records import Evaluation, JournalEntry, LearnerHeartbeat
from heterorl.exchange.storage import Files, persistently
from heterorl.exchange.version import Version
from heterorl.local.processes import tail
from heterorl.monitoring.json_lines import Tail, read_metrics
from heterorl.monitoring.run_records import read_samplers

NOT_OFFERED = [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS]
DATA = b'{"line": 1}\n'


class Breaking:
    """A system call that fails a number of times before it does its work."""

    def __init__(self, call: Callable[..., Any], number: int, times: float) -> None:
        self._call, self._number, self.left = call, number, times

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left > 0:
            self.left -= 1
            raise OSError(self._number, os.strerror(self._number), str(args[0]))
        return self._call(*args, **kwargs)


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def files(slept: list[float]) -> Files:
    return Files(sleep=slept.append)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, `old`, with DATA."""
    (tmp_path / "old").write_bytes(DATA)
    return tmp_path


@pytest.fixture
def break_call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Breaking]:
    def break_call(name: str, number: int, times: float = float("inf")) -> Breaking:
        if name in ("open", "_rename_no_replace"):
            breaking = Breaking(getattr(storage, name, open), number, times)
            monkeypatch.setattr(storage, name, breaking, raising=False)
        else:
            breaking = Breaking(getattr(os, name), number, times)
            monkeypatch.setattr(os, name, breaking)
        return breaking

    return break_call


def _appended(files: Files, folder: Path) -> bytes:
    files.append(folder / "old", b"more\n")
    return (folder / "old").read_bytes()


def _replaced(files: Files, folder: Path) -> bytes:
    files.replace(folder / "old", b"new")
    return (folder / "old").read_bytes()


def _renamed(files: Files, folder: Path) -> list[str]:
    files.rename(folder / "old", folder / "moved")
    return os.listdir(folder)


def _copied(files: Files, folder: Path) -> tuple[str, bytes]:
    return files.copy(folder / "old", folder / "copy"), (folder / "copy").read_bytes()


SHA = hashlib.sha256(DATA).hexdigest()
OPERATIONS: list[tuple[str, Callable[[Files, Path], Any], Any]] = [
    # the system call that fails, the operation that makes it, what the operation gives in the end
    ("listdir", lambda files, folder: files.list(folder), ["old"]),
    ("listdir", lambda files, folder: list(files.leftovers(folder)), []),
    ("open", lambda files, folder: files.read(folder / "old"), DATA),
    ("stat", lambda files, folder: files.size(folder / "old"), len(DATA)),
    ("stat", lambda files, folder: files.exists(folder / "new"), False),
    ("stat", lambda files, folder: files.identity(folder / "old")[2], len(DATA)),
    ("open", lambda files, folder: files.digest(folder / "old"), SHA),
    ("open", _copied, (SHA, DATA)),
    ("mkdir", lambda files, folder: files.make_dir(folder / "made") or (folder / "made").is_dir(), True),
    ("open", _replaced, b"new"),
    ("fsync", _replaced, b"new"),
    ("replace", _replaced, b"new"),
    ("open", lambda files, folder: files.create(folder / "new", b"new"), True),
    ("fsync", lambda files, folder: files.create(folder / "new", b"new"), True),
    ("_rename_no_replace", lambda files, folder: files.create(folder / "new", b"new"), True),
    ("open", _appended, DATA + b"more\n"),
    ("fsync", _appended, DATA + b"more\n"),
    ("replace", _renamed, ["moved"]),
    ("unlink", lambda files, folder: files.remove(folder / "old") or os.listdir(folder), []),
    ("fsync", lambda files, folder: files.sync_file(folder / "old"), None),
    ("fsync", lambda files, folder: files.sync_dir(folder), None),
]


@pytest.mark.parametrize("number", sorted(TRANSIENT), ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize(("call", "operation", "expected"), OPERATIONS)
def test_what_passes_by_itself_is_waited_for_and_done_once(
    files: Files,
    folder: Path,
    slept: list[float],
    break_call: Callable[..., Breaking],
    call: str,
    operation: Callable[[Files, Path], Any],
    expected: Any,
    number: int,
) -> None:
    breaking = break_call(call, number, times=2)
    assert operation(files, folder) == expected
    assert breaking.left == 0
    assert slept == [0.1, 0.5]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize(("call", "operation", "expected"), OPERATIONS)
def test_what_does_not_pass_leaves_everything_as_it_was(
    files: Files,
    folder: Path,
    break_call: Callable[..., Breaking],
    call: str,
    operation: Callable[[Files, Path], Any],
    expected: Any,
    number: int,
) -> None:
    breaking, failed = break_call(call, number), None
    try:
        assert operation(files, folder) == expected  # the deed is done and its folder cannot be fsynced
    except OSError as error:
        failed = error
    breaking.left = 0
    if failed is not None:
        assert failed.errno in ((number, errno.ENOENT) if number == errno.ESTALE else (number,))
        assert (folder / "old").read_bytes() == DATA
        assert set(os.listdir(folder)) <= {"old", "copy"}


def test_waiting_is_bounded(
    files: Files, folder: Path, slept: list[float], break_call: Callable[..., Breaking]
) -> None:
    break_call("listdir", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        files.list(folder)
    assert sum(slept) < 10


@pytest.mark.parametrize("operation", [Files.read, Files.size, Files.identity, Files.digest, Files.modified])
def test_a_file_deleted_under_its_reader_on_nfs_is_a_missing_file(
    files: Files, folder: Path, break_call: Callable[..., Breaking], operation: Callable[[Files, Path], Any]
) -> None:
    break_call("open", errno.ESTALE)
    break_call("stat", errno.ESTALE)
    with pytest.raises(FileNotFoundError):
        operation(files, folder / "old")


# ── fsync that a mount does not offer ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("number", NOT_OFFERED, ids=lambda number: errno.errorcode[number])
def test_a_mount_without_fsync_is_used_and_that_is_said_once(
    files: Files,
    folder: Path,
    break_call: Callable[..., Breaking],
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    break_call("fsync", number)
    check_mount(files, folder)
    for _ in range(3):
        files.replace(folder / "old", b"new")
        files.append(folder / "old", b"more\n")
    assert files.create(folder / "new", b"")
    warned = [record.message for record in caplog.records if "does not offer" in record.message]
    assert len(warned) == 2  # of files and of folders
    assert "may be lost if the machine or the file server loses its power" in warned[0]


def test_a_folder_that_cannot_be_fsynced_after_the_name_stands_is_no_error(
    files: Files, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(files, "sync_dir", fail)
    assert files.create(folder / "new", b"new")
    files.replace(folder / "old", b"newer")
    files.rename(folder / "old", folder / "moved")
    assert sorted(os.listdir(folder)) == ["moved", "new"]
    assert caplog.text.count("is not known") == 3


# ── names are given once ─────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(params=["renameat2", "link", "folder rename"])
def way(request: pytest.FixtureRequest, break_call: Callable[..., Breaking]) -> str:
    """With the kernel's help, and without it as on NFS, where files are linked and folders renamed."""
    if request.param != "renameat2":
        break_call("_rename_no_replace", errno.EINVAL)
    return str(request.param)


def staged(folder: Path, way: str) -> Path:
    path = folder / f".tmp-{uuid.uuid4().hex}"
    if way == "folder rename":
        path.mkdir()
        (path / "inside").write_bytes(b"new")
    else:
        path.write_bytes(b"new")
    return path


def test_a_name_goes_to_the_first_and_the_second_changes_nothing(files: Files, folder: Path, way: str) -> None:
    first, second = staged(folder, way), staged(folder, way)
    assert files.publish(first, folder / "name")
    about = (folder / "name").stat().st_ino
    assert not files.publish(second, folder / "name")
    assert (folder / "name").stat().st_ino == about
    assert not first.exists()
    assert second.exists()


def test_a_name_whose_answer_was_lost_is_still_ours(
    files: Files, folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server did it and its answer was lost: the call that is repeated finds the name taken, by ourselves."""
    done = files._rename_to_new.__wrapped__
    broken: Iterator[bool] = iter([True])

    def answer_lost(self: Files, source: Path, target: Path) -> None:
        done(self, source, target)
        if next(broken, False):
            raise OSError(errno.ETIMEDOUT, "Connection timed out", str(target))

    monkeypatch.setattr(Files, "_rename_to_new", storage._persistent(answer_lost))
    assert files.publish(staged(folder, way), folder / "name")
    assert sorted(os.listdir(folder)) == ["name", "old"]


def test_what_several_files_lack_is_told_and_the_others_stand(files: Files, folder: Path) -> None:
    existed = files.create_all({folder / "old": b"new", folder / "other": b"new"})
    assert existed == [folder / "old"]
    assert (folder / "old").read_bytes() == DATA
    assert (folder / "other").read_bytes() == b"new"
    assert sorted(os.listdir(folder)) == ["old", "other"]


# ── the journal's lines ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_line_after_a_torn_one_is_whole(files: Files, folder: Path) -> None:
    (folder / "old").write_bytes(DATA + b'{"lin')
    files.append(folder / "old", DATA)
    assert (folder / "old").read_bytes() == DATA + b'{"lin\n' + DATA


# ── what a mount can do ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_mount_that_does_it_all_is_taken_and_left_clean(files: Files, folder: Path) -> None:
    check_mount(files, folder, folder / "archive")
    assert os.listdir(folder) == ["old"]


def test_a_folder_on_another_file_system_is_refused_before_anything_is_moved(files: Files, folder: Path) -> None:
    elsewhere = Path("/dev/shm") / f"heterorl-{uuid.uuid4().hex}"
    elsewhere.mkdir()
    try:
        assert elsewhere.stat().st_dev != folder.stat().st_dev
        (folder / "archive").symlink_to(elsewhere)
        with pytest.raises(
            RunFolderError, match=r"archive is on another file system than .*; mount the run's whole folder"
        ):
            check_mount(files, folder, folder / "archive")
        assert sorted(os.listdir(folder)) == ["archive", "old"]
        assert os.listdir(elsewhere) == []
    finally:
        elsewhere.rmdir()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EACCES, errno.EROFS])
def test_a_mount_without_links_and_exclusive_renames_is_refused(
    files: Files, folder: Path, break_call: Callable[..., Breaking], number: int
) -> None:
    break_call("_rename_no_replace", errno.EINVAL)
    break_call("link", number)
    with pytest.raises(RunFolderError, match=r"this mount cannot be used .*; expected one where"):
        check_mount(files, folder)
    assert os.listdir(folder) == ["old"]


def test_a_mount_where_a_name_can_be_taken_from_another_file_is_refused(
    files: Files, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_rename_no_replace", os.replace)
    with pytest.raises(RunFolderError, match="exclusive"):
        check_mount(files, folder)


def test_a_full_disk_is_told_as_such(files: Files, folder: Path, break_call: Callable[..., Breaking]) -> None:
    break_call("open", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        check_mount(files, folder)


# ── on the disk before the name stands ───────────────────────────────────────────────────────────────────────────────
class Disk:
    """What of the files was waited for, by inode; and what was not when its name was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[int] = set()
        self.early: list[str] = []
        fsync, replace, rename = os.fsync, os.replace, storage._rename_no_replace

        def note(descriptor: int) -> None:
            self.synced.add(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        def named(give: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
            def give_name(source: Path, target: Path) -> None:
                inside = [source, *(source.rglob("*") if source.is_dir() else [])]
                self.early += [str(path) for path in inside if path.stat().st_ino not in self.synced]
                give(source, target)

            return give_name

        monkeypatch.setattr(os, "fsync", note)
        monkeypatch.setattr(os, "replace", named(replace))
        monkeypatch.setattr(storage, "_rename_no_replace", named(rename))


PUBLICATIONS: dict[str, tuple[Callable[[Exchange], object], str]] = {
    "rollouts": (lambda e: put(e, {rollout_name(seq): rollout_of() for seq in range(3)}), "rollouts"),
    "weights": (lambda e: publish(e, Version(1, 1)), "weights"),
    "a checkpoint": (lambda e: save_checkpoint(e), "checkpoints"),
    "a heartbeat": (lambda e: e.write_learner(LearnerHeartbeat(step=1)), "."),
    "a claim": (lambda e: e.begin_incarnation(), "incarnations"),
    "a lease and a state": (lambda e: e.acquire_slot(lambda: [FAR]), "slots/far-0"),
    "results": (lambda e: e.write_eval(Version(1, 1), Evaluation(average=0.5)), "evals"),
    "the journal anew": (lambda e: e.rewrite_journal([]), "."),
}


def save_checkpoint(exchange: Exchange) -> None:
    staged = exchange.stage_checkpoint(1)
    (staged / "model").mkdir()
    for name in ("state.pt", "model/model.safetensors"):
        (staged / name).write_bytes(b"contents")
    exchange.commit_checkpoint(1, {})


@pytest.mark.parametrize("what", PUBLICATIONS)
def test_a_name_is_given_when_all_of_its_contents_are_on_the_disk_and_then_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    exchange = exchange_at(tmp_path / "run")
    publication, folder = PUBLICATIONS[what]
    disk = Disk(monkeypatch)
    publication(exchange)
    assert disk.early == []
    assert (exchange.root / folder).stat().st_ino in disk.synced


def test_a_line_of_the_journal_is_on_the_disk_when_it_is_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, disk = exchange_at(tmp_path / "run"), Disk(monkeypatch)
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=[rollout_name(0)]))
    journal = exchange.root / "journal.jsonl"
    assert {journal.stat().st_ino, exchange.root.stat().st_ino} <= disk.synced
    disk.synced.clear()
    exchange.append_journal(JournalEntry(step=1, incarnation=1, names=[rollout_name(1)]))
    assert disk.synced == {journal.stat().st_ino}


# ── what libraries and other modules do on the volume ────────────────────────────────────────────────────────────────
def made_of(error: Exception, reason: OSError) -> Exception:
    """An error that was raised from another one."""
    error.__cause__ = reason
    return error


STALE = OSError(errno.ESTALE, "Stale file handle", "model.safetensors")
PASSES: list[Exception] = [
    STALE,
    made_of(ModelError("the tokenizer cannot be read"), STALE),
    SafetensorError("Error while serializing: I/O error: Stale file handle (os error 116)"),
    shutil.Error([("a", "b", "[Errno 5] Input/output error: 'a'")]),
    RuntimeError("Input/output error (os error 5)"),
]


def raising_once(error: Exception) -> Callable[[], str]:
    errors = [error]

    def operation() -> str:
        if errors:
            raise errors.pop()
        return "done"

    return operation


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_passes_is_waited_for_in_whatever_a_library_says_of_it(error: Exception, slept: list[float]) -> None:
    assert persistently(raising_once(error), sleep=slept.append) == "done"
    assert slept == [0.1]


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_does_not_pass_after_all_is_no_users_error(error: Exception, slept: list[float], tmp_path: Path) -> None:
    def operation() -> None:
        raise error

    with pytest.raises(OSError, match=r"error|Stale") as raised:
        persistently(operation, sleep=slept.append)
    assert raised.value.errno in TRANSIENT
    assert isinstance(explain(raised.value, tmp_path), SiteError)
    assert slept == [0.1, 0.5, 2.0, 5.0]


def test_a_folder_out_of_reach_that_a_library_takes_for_none_is_waited_for(
    slept: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_away(path: Path) -> os.stat_result:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))

    monkeypatch.setattr("heterorl.exchange.storage.os.stat", is_away)
    # As transformers 5 says it, which asks os.path.isdir and then takes the path for a name on the Hub.
    wrong = ModelError("the tokenizer cannot be read: Repo id must be in the form 'repo_name'")
    assert persistently(raising_once(wrong), sleep=slept.append, folder=tmp_path) == "done"
    assert slept == [0.1]


def test_a_folder_within_reach_that_a_library_cannot_read_is_not_waited_for(slept: list[float], tmp_path: Path) -> None:
    wrong = ModelError("the tokenizer cannot be read")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError):
            persistently(raising_once(wrong), sleep=slept.append, folder=folder)
    assert slept == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("exit code 5"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        made_of(ModelError("no weights"), FileNotFoundError(errno.ENOENT, "No such file or directory")),
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("No space left on device (os error 28)"),
    ],
    ids=repr,
)
def test_what_does_not_pass_is_raised_at_once_and_as_it_is(error: Exception, slept: list[float]) -> None:
    with pytest.raises(type(error)) as raised:
        persistently(raising_once(error), sleep=slept.append)
    assert (raised.value, slept) == (error, [])


READS: dict[str, Callable[[Exchange], Any]] = {
    "prepared rows": lambda e: list(e.rows("train")),
    "rows of the canary": lambda e: next(e.rows("train")),
    "files of a folder": lambda e: e.files.walk(e.model_dir),
    "a folder that is removed": lambda e: e.files.remove(e.model_dir),
    "metrics": lambda e: read_metrics(e.metrics_dir / "learner.jsonl"),
    "metrics of the samplers": lambda e: read_samplers(e.metrics_dir),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("call", ["io.open", "os.scandir", "os.stat"])
def test_who_reads_the_volume_meets_nothing_that_passes(
    read: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = exchange_at(tmp_path / "run")
    for path, content in {
        "data/train.jsonl": '{"prompt_ids": [1]}\n{"prompt_ids": [2]}\n',
        "model/config.json": "{}",
        "metrics/learner.jsonl": '{"step": 1}\n',
        "metrics/sampler-far-0.jsonl": '{"batch": 1}\n',
    }.items():
        exchange.files.make_dir((exchange.root / path).parent)
        (exchange.root / path).write_text(content)
    expected = READS[read](exchange) if "removed" not in read else None
    module, name = call.split(".")
    real = getattr(sys.modules[module], name)
    left = [1]

    def once(path: Any, *args: Any, **kwargs: Any) -> Any:
        if left and str(path).startswith(str(exchange.root)):
            left.clear()
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(sys.modules[module], name, once)
    if call == "io.open":
        monkeypatch.setattr("builtins.open", once)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert READS[read](exchange) == expected


def test_a_log_or_a_metrics_file_that_is_out_of_sight_for_a_moment_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "learner.log").write_text("last words\n")
    (tmp_path / "learner.jsonl").write_text('{"step": 1}\n')
    lines = Tail(tmp_path / "learner.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", Breaking(open, errno.EIO, float("inf")))
        assert (tail(tmp_path / "learner.log"), lines.read()) == ("", [])
    assert (tail(tmp_path / "learner.log"), lines.read()) == ("last words", [{"step": 1}])
