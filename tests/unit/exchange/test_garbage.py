"""Whatever lies on the volume: no reader raises, strange names are ignored, nothing is removed for being unreadable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import CANARY, FAR, Clock, exchange_at, publish, put, rollout_name, rollout_of, run_of
from heterorl.errors import CorruptFile, RunFolderError, UnknownProtocol
from heterorl.exchange.crash_budget import Attempts, attempts_of
from heterorl.exchange.evaluations import due_now
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import (
    Attempt,
    Evaluation,
    JournalEntry,
    LearnerHeartbeat,
    Prepared,
    RunnerState,
    SlotState,
    SlotStatus,
)
from heterorl.exchange.version import Version
from heterorl.spec.run import Slot

GARBAGE: dict[str, bytes] = {
    "empty": b"",
    "zeros": b"\0" * 512,
    "blank": b" \n",
    "cut": b'{"step": 1, "epo',
    "text": b"not here\n",
    "binary": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "null": b"null",
    "list": b"[1, 2]",
    "number": b"3",
    "an object of another kind": b'{"kind": "Pod", "metadata": {}}',
    "no fields": b"{}",
    "only a protocol": b'{"protocol": 1}',
    "a protocol that never was": b'{"protocol": -1}',
    "wrong types": json.dumps(
        {
            name: {"a": []}
            for name in ("step", "epoch", "beats", "next_seq", "run", "average", "attempts", "names", "pid")
        }
    ).encode(),
    "deeply nested": b"[" * 100_000,
    "not a number": b'{"step": NaN, "epoch": Infinity, "beats": 1e999, "next_seq": -1, "average": NaN, "run": 1}',
    "huge numbers": b'{"step": 1' + b"0" * 5000 + b"}",
}
LATER = b'{"protocol": 2, "unheard": {"of": []}}'
STRANGE = [
    "{}-best",
    "{}.bak",
    "{}~",
    "{} (conflicted copy)",
    ".nfs000000000012345600000001",
    ".{}.swp",
    "copy of {}",
    "{}\n",
    "٣{}",
    ".DS_Store",
    "lost+found",
]


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    clock = Clock()
    evals = [{"label": "sums", "source": "arithmetic"}]
    run = run_of(exchange={"leaseSeconds": 10}, evaluation={"everySteps": 1}, data={"evals": evals})
    return exchange_at(tmp_path / "run", run, clock=clock, sleep=clock.sleep)


@pytest.fixture(params=GARBAGE)
def garbage(request: pytest.FixtureRequest) -> bytes:
    return GARBAGE[request.param]


# ── every record ─────────────────────────────────────────────────────────────────────────────────────────────────────
def heartbeat(exchange: Exchange) -> Path:
    lease = exchange.acquire_slot(lambda: [FAR])
    exchange.beat(lease, SlotStatus())
    return exchange.root / "slots" / "far-0" / "heartbeat.json"


def slot_state(exchange: Exchange) -> Path:
    exchange.acquire_slot(lambda: [FAR])
    return exchange.root / "slots" / "far-0" / "state-00000001.json"


def learner(exchange: Exchange) -> Path:
    exchange.write_learner(LearnerHeartbeat(step=3))
    return exchange.root / "learner.json"


def prepared(exchange: Exchange) -> Path:
    exchange.mark_prepared()
    return exchange.root / "prepared.json"


def evaluation(exchange: Exchange) -> Path:
    exchange.write_eval(Version(0, 1), Evaluation(average=0.5))
    return exchange.root / "evals" / "v00000000-i0001.json"


def runner(exchange: Exchange) -> Path:
    exchange.save_runner(RunnerState(status="running"))
    return exchange.root / "runner.json"


def attempts(exchange: Exchange) -> Path:
    exchange.begin_attempt(0, Attempt(run="test", pod="a", started=1.0))
    return exchange.root / "attempts" / "0-00000001.json"


RECORDS: list[tuple[Callable[[Exchange], Path], Callable[[Exchange], Any], Any]] = [
    (heartbeat, lambda exchange: exchange.heartbeats(), {}),
    (slot_state, lambda exchange: exchange.load_slot(FAR), None),
    (learner, lambda exchange: exchange.learner, None),
    (learner, lambda exchange: exchange.trained, False),
    (prepared, lambda exchange: exchange.prepared, None),
    (prepared, lambda exchange: exchange.successor, None),
    (evaluation, lambda exchange: exchange.read_evals(), {}),
    (runner, lambda exchange: exchange.runner, None),
    (attempts, attempts_of, {}),
]


@pytest.mark.parametrize(("make", "read", "absent"), RECORDS)
def test_a_record_that_cannot_be_read_is_absent_and_told_once(
    exchange: Exchange,
    caplog: pytest.LogCaptureFixture,
    garbage: bytes,
    make: Callable[[Exchange], Path],
    read: Callable[[Exchange], Any],
    absent: Any,
) -> None:
    path = make(exchange)
    path.write_bytes(garbage)
    assert [read(exchange) for _ in range(3)] == [absent] * 3
    assert path.read_bytes() == garbage
    assert [record.message.count("treated as absent") for record in caplog.records] == [1]
    assert path.relative_to(exchange.root).as_posix() in caplog.text


@pytest.mark.parametrize(("make", "read", "absent"), RECORDS)
def test_a_record_of_a_later_version_is_absent_and_never_replaced(
    exchange: Exchange, make: Callable[[Exchange], Path], read: Callable[[Exchange], Any], absent: Any
) -> None:
    path = make(exchange)
    path.write_bytes(LATER)
    assert read(exchange) == absent
    with pytest.raises(UnknownProtocol, match="protocol 2; this version of HeteroRL knows protocol 1"):
        exchange._records.write(path, Prepared(run="mine"))
    assert path.read_bytes() == LATER


def test_an_unreadable_record_is_put_aside_before_its_writer_replaces_it(exchange: Exchange) -> None:
    path = learner(exchange)
    path.write_bytes(b"\0\0\0")
    assert exchange.learner is None
    exchange.write_learner(LearnerHeartbeat(step=4))
    assert exchange.learner.step == 4
    aside = exchange.root / "quarantine" / "learner.json"
    assert aside.read_bytes() == b"\0\0\0"
    reason = json.loads((exchange.root / "quarantine" / "learner.json.reason.json").read_text())
    assert (reason["came_from"], "not JSON" in reason["reason"]) == ("learner.json", True)


@pytest.mark.parametrize(("make", "read", "absent"), RECORDS)
def test_a_folder_in_the_place_of_a_record_is_absent_told_once_and_put_aside_by_its_writer(
    exchange: Exchange,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Exchange], Path],
    read: Callable[[Exchange], Any],
    absent: Any,
) -> None:
    path = make(exchange)
    path.unlink()
    (path / "kept").mkdir(parents=True)
    assert [read(exchange) for _ in range(3)] == [absent] * 3
    assert [record.message.count("treated as absent") for record in caplog.records] == [1]
    exchange._records.write(path, Prepared(run="mine"))
    assert path.is_file()
    assert (exchange.root / "quarantine" / path.relative_to(exchange.root) / "kept").is_dir()


@pytest.mark.parametrize(("make", "read", "absent"), RECORDS)
def test_a_link_to_itself_and_a_file_for_a_folder_are_absent_records(
    exchange: Exchange, make: Callable[[Exchange], Path], read: Callable[[Exchange], Any], absent: Any
) -> None:
    path = make(exchange)
    path.unlink()
    path.symlink_to(path.name)
    assert read(exchange) == absent
    if path.parent != exchange.root:
        shutil.rmtree(path.parent)
        path.parent.write_bytes(b"a file")
        assert read(exchange) == absent


@pytest.mark.parametrize("entry", ["folder", "link to itself"])
def test_what_has_the_name_of_a_rollout_and_is_no_file_is_damage(exchange: Exchange, entry: str) -> None:
    name = rollout_name(0)
    path = exchange.root / "rollouts" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if entry == "folder" else path.symlink_to(path.name)
    with pytest.raises(CorruptFile, match="is not a file"):
        exchange.read_rollout(name)


@pytest.mark.parametrize(("make", "read", "absent"), RECORDS)
def test_fields_that_a_reader_does_not_know_are_ignored(
    exchange: Exchange, make: Callable[[Exchange], Path], read: Callable[[Exchange], Any], absent: Any
) -> None:
    path = make(exchange)
    before = read(exchange)
    path.write_text(json.dumps({**json.loads(path.read_text()), "since_version_9": {"a": 1}}))
    assert read(exchange) == before


def test_an_attempt_after_one_that_cannot_be_read_is_noted_and_the_other_stays(
    exchange: Exchange, garbage: bytes
) -> None:
    unreadable = attempts(exchange)
    unreadable.write_bytes(garbage)
    Attempts(exchange, 0, "pod").begin()
    assert [attempt.pod for attempt in attempts_of(exchange)[0]] == ["pod"]
    assert unreadable.read_bytes() == garbage


# ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_lease_that_cannot_be_read_frees_its_slot_after_the_lease_time(exchange: Exchange, garbage: bytes) -> None:
    exchange.acquire_slot(lambda: [FAR])
    (exchange.root / "slots" / "far-0" / "lease-00000001.json").write_bytes(garbage)
    before = exchange.now()
    lease = exchange.acquire_slot(lambda: [FAR])
    assert lease.epoch == 2
    assert exchange.now() - before >= 10


# ── the journal ──────────────────────────────────────────────────────────────────────────────────────────────────────
def journal(exchange: Exchange, *lines: bytes) -> None:
    entries = [JournalEntry(step=step, incarnation=1, names=[rollout_name(step)]).to_bytes() for step in (0, 1)]
    (exchange.root / "journal.jsonl").write_bytes(b"\n".join([entries[0], *lines, entries[1], b""]))


def test_a_line_of_the_journal_that_cannot_be_read_is_left_out_and_kept_aside(
    exchange: Exchange, garbage: bytes
) -> None:
    journal(exchange, garbage)
    whole = (exchange.root / "journal.jsonl").read_bytes()
    entries = exchange.read_journal()
    assert [entry.step for entry in entries] == [0, 1]
    exchange.rewrite_journal(entries)
    assert exchange.read_journal() == entries
    assert (exchange.root / "quarantine" / "journal.jsonl").read_bytes() == whole


def test_a_torn_last_line_is_cut_off_without_a_word(exchange: Exchange) -> None:
    journal(exchange)
    with open(exchange.root / "journal.jsonl", "ab") as file:
        file.write(b'{"step": 2, "inca')
    exchange.rewrite_journal(exchange.read_journal())
    assert not (exchange.root / "quarantine").exists()


def test_a_journal_of_a_later_version_is_refused_and_stays(exchange: Exchange) -> None:
    journal(exchange, LATER)
    whole = (exchange.root / "journal.jsonl").read_bytes()
    for refused in (exchange.read_journal, lambda: exchange.rewrite_journal([]), exchange.begin_incarnation):
        with pytest.raises(UnknownProtocol, match=r"line 2 has protocol 2; .* continue with the version that wrote it"):
            refused()
    assert (exchange.root / "journal.jsonl").read_bytes() == whole


# ── published folders ────────────────────────────────────────────────────────────────────────────────────────────────
def manifest_without(exchange: Exchange, folder: Path, field: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[field]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def checkpoint(exchange: Exchange, step: int = 5) -> Path:
    (exchange.stage_checkpoint(step) / "state.pt").write_bytes(b"state")
    exchange.commit_checkpoint(step, {"step": step})
    return exchange.root / "checkpoints" / f"step-{step:08d}"


def test_a_manifest_that_cannot_be_read_is_damage_for_every_reader(
    exchange: Exchange, tmp_path: Path, garbage: bytes
) -> None:
    version = publish(exchange, Version(3, 1))
    (exchange.root / "weights" / str(version) / "manifest.json").write_bytes(garbage)
    (checkpoint(exchange) / "manifest.json").write_bytes(garbage)
    for read in (
        lambda: exchange.fetch_weights(version, tmp_path / "here"),
        lambda: exchange.published_at(version),
        lambda: exchange.open_checkpoint(5),
    ):
        with pytest.raises(CorruptFile):
            read()


@pytest.mark.parametrize("field", ["time", "files", "step"])
def test_a_manifest_that_lacks_a_field_is_damage(exchange: Exchange, tmp_path: Path, field: str) -> None:
    version = publish(exchange, Version(3, 1))
    manifest_without(exchange, exchange.root / "weights" / str(version), field)
    manifest_without(exchange, checkpoint(exchange), field)
    with pytest.raises(CorruptFile, match=field):
        exchange.fetch_weights(version, tmp_path / "here")
    with pytest.raises(CorruptFile, match=field):
        exchange.open_checkpoint(5)


@pytest.mark.parametrize("lost", ["manifest.json", "model.safetensors", "canary.json"])
def test_a_version_that_stands_and_lacks_a_file_is_damaged_and_not_retired(
    exchange: Exchange, tmp_path: Path, lost: str
) -> None:
    version = publish(exchange, Version(3, 1))
    (exchange.root / "weights" / str(version) / lost).unlink()
    with pytest.raises(CorruptFile, match=f"stands and lacks {lost}"):
        exchange.fetch_weights(version, tmp_path / "here")


@pytest.mark.parametrize("later", [LATER, b'{"protocol": 1, "kind": "hologram"}'])
def test_what_a_later_version_published_is_refused_by_name_and_outlives_every_retirement(
    exchange: Exchange, tmp_path: Path, later: bytes
) -> None:
    version = publish(exchange, Version(3, 1))
    (exchange.root / "weights" / str(version) / "manifest.json").write_bytes(later)
    (checkpoint(exchange) / "manifest.json").write_bytes(later)
    for read in (
        lambda: exchange.fetch_weights(version, tmp_path / "here"),
        lambda: exchange.published_at(version),
        lambda: exchange.open_checkpoint(5),
    ):
        with pytest.raises(UnknownProtocol, match="Nothing was changed: continue with the version that wrote it"):
            read()
    assert exchange.retire_weights([]) == []
    exchange.remove_checkpoint(5)
    assert exchange.list_versions() == [version]
    assert exchange.list_checkpoints() == [5]


def test_what_is_damaged_is_put_aside_and_not_deleted_when_its_time_has_come(exchange: Exchange) -> None:
    version = publish(exchange, Version(3, 1))
    (exchange.root / "weights" / str(version) / "manifest.json").write_bytes(b"")
    (checkpoint(exchange) / "manifest.json").write_bytes(b"")
    exchange.retire_weights([])
    exchange.remove_checkpoint(5)
    assert (exchange.list_versions(), exchange.list_checkpoints()) == ([], [])
    aside = exchange.root / "quarantine"
    assert (aside / "weights" / str(version) / "model.safetensors").read_bytes() == b"weights"
    assert (aside / "checkpoints" / "step-00000005" / "state.pt").read_bytes() == b"state"


def test_two_damaged_checkpoints_of_one_step_are_both_kept(exchange: Exchange) -> None:
    for content in (b"first", b"second"):
        (checkpoint(exchange) / "state.pt").write_bytes(content)
        exchange.quarantine_checkpoint(5, "damaged")
    aside = exchange.root / "quarantine" / "checkpoints"
    assert (aside / "step-00000005" / "state.pt").read_bytes() == b"first"
    assert (aside / "step-00000005.2" / "state.pt").read_bytes() == b"second"


def test_the_newest_whole_checkpoint_is_opened_and_damaged_newer_ones_are_kept_aside(exchange: Exchange) -> None:
    for step in (5, 10, 15):
        checkpoint(exchange, step)
    for step, content in ((10, b"stat"), (15, b"statf")):
        (exchange.root / "checkpoints" / f"step-{step:08d}" / "state.pt").write_bytes(content)
    folder, state = exchange.open_newest_checkpoint()
    assert (folder.name, state) == ("step-00000005", {"step": 5})
    assert exchange.list_checkpoints() == [5]
    aside = exchange.root / "quarantine" / "checkpoints"
    assert (aside / "step-00000010" / "state.pt").read_bytes() == b"stat"
    assert "has 4 bytes; its manifest says 5" in (aside / "step-00000010.reason.json").read_text()
    assert "checksum" in (aside / "step-00000015.reason.json").read_text()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_by_itself(exchange: Exchange) -> None:
    assert exchange.open_newest_checkpoint() is None
    for step in (5, 10):
        (checkpoint(exchange, step) / "manifest.json").write_bytes(b"\0\0")
    for _ in range(2):
        with pytest.raises(
            RunFolderError, match=r"none of the checkpoints can be used .*failurePolicy\.startOver: true"
        ):
            exchange.open_newest_checkpoint()
    assert exchange.list_checkpoints() == [5, 10]


def test_a_run_that_is_told_to_start_over_puts_its_damaged_checkpoints_aside(tmp_path: Path) -> None:
    exchange = exchange_at(tmp_path, run_of("told", failurePolicy={"startOver": True}))
    for step in (5, 10):
        (checkpoint(exchange, step) / "manifest.json").write_bytes(b"\0\0")
    assert exchange.open_newest_checkpoint() is None
    assert exchange.list_checkpoints() == []
    aside = exchange.root / "quarantine" / "checkpoints"
    assert [(aside / f"step-{step:08d}" / "state.pt").read_bytes() for step in (5, 10)] == [b"state"] * 2


def test_a_run_that_may_start_over_goes_on_from_a_checkpoint_that_is_whole_and_refuses_a_later_versions(
    tmp_path: Path,
) -> None:
    exchange = exchange_at(tmp_path, run_of("told", failurePolicy={"startOver": True}))
    for step in (5, 10):
        checkpoint(exchange, step)
    (exchange.root / "checkpoints" / "step-00000010" / "manifest.json").write_bytes(b"\0\0")
    assert exchange.open_newest_checkpoint()[1] == {"step": 5}
    (checkpoint(exchange, 15) / "manifest.json").write_bytes(LATER)
    with pytest.raises(UnknownProtocol):
        exchange.open_newest_checkpoint()
    assert exchange.list_checkpoints() == [5, 15]


def test_a_newer_checkpoint_of_a_later_version_is_not_passed_over(exchange: Exchange) -> None:
    for step in (5, 10):
        checkpoint(exchange, step)
    (exchange.root / "checkpoints" / "step-00000010" / "manifest.json").write_bytes(LATER)
    with pytest.raises(UnknownProtocol, match=r"step-00000010/manifest\.json has protocol 2"):
        exchange.open_newest_checkpoint()
    assert exchange.list_checkpoints() == [5, 10]


@pytest.mark.parametrize(
    "canary", [*GARBAGE.values(), b'{"token_ids": [[1, 2]], "logp": [[NaN]]}', b'{"token_ids": [[1]], "logp": [[]]}']
)
def test_a_canary_that_is_none_refuses_its_version(exchange: Exchange, tmp_path: Path, canary: bytes) -> None:
    version = Version(3, 1)
    staged = exchange.stage_weights(version)
    (staged / "model.safetensors").write_bytes(b"weights")
    write, exchange.files.write = (
        exchange.files.write,
        lambda path, data: write(path, canary if path.name == "canary.json" else data),
    )
    exchange.commit_weights(version, CANARY)
    with pytest.raises(CorruptFile, match=r"canary\.json"):
        exchange.fetch_weights(version, tmp_path / "here")


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_rollout_that_is_none_is_damage_and_a_later_versions_is_not(exchange: Exchange, garbage: bytes) -> None:
    name = rollout_name(0)
    put(exchange, {name: rollout_of()})
    path = exchange.root / "rollouts" / f"{name}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(garbage)
    with pytest.raises(CorruptFile):
        exchange.read_rollout(name)
    path.write_bytes(whole.replace(b'"protocol":"1"', b'"protocol":"2"'))
    with pytest.raises(UnknownProtocol, match="the rollout has protocol 2"):
        exchange.read_rollout(name)


# ── strange names ────────────────────────────────────────────────────────────────────────────────────────────────────
LISTINGS: list[tuple[str, str, Callable[[Exchange], Any]]] = [
    ("weights", "v00000003-i0001", lambda exchange: exchange.list_versions()),
    ("pins", "v00000003-i0001", lambda exchange: exchange.list_pinned()),
    ("rollouts", "v00000003-i0001--far-0--s0000000000.safetensors", lambda exchange: exchange.list_rollouts()),
    ("quarantine/rollouts", "v00000003-i0001--far-0--s0000000000.safetensors", lambda e: e.list_quarantined()),
    ("checkpoints", "step-00000006", lambda exchange: exchange.list_checkpoints()),
    ("evals", "v00000003-i0001.json", lambda exchange: exchange.list_evals()),
    ("evals", "v00000003-i0001.json", lambda exchange: due_now(exchange, finished=False)),
    ("slots", "far-0", lambda exchange: exchange.heartbeats()),
    ("slots/far-0", "lease-00000001.json", lambda exchange: exchange.acquire_slot(lambda: [FAR]).epoch),
    ("slots/far-0", "state-00000001.json", lambda exchange: exchange.load_slot(FAR)),
    ("incarnations", "i0001.json", lambda exchange: exchange.begin_incarnation()),
    ("attempts", "0-00000001.json", lambda exchange: exchange.load_attempts()),
]


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize(("folder", "name", "look"), LISTINGS)
def test_a_strange_name_changes_nothing_that_is_listed(
    exchange: Exchange, tmp_path: Path, folder: str, name: str, look: Callable[[Exchange], Any], strange: str
) -> None:
    clean, littered = (exchange_at(tmp_path / where, exchange.run) for where in ("clean", "littered"))
    for where in (clean, littered):
        (where.root / folder).mkdir(parents=True, exist_ok=True)
    stray = littered.root / folder / strange.format(name)
    stray.write_bytes(b"stray")
    assert look(littered) == look(clean)
    assert stray.read_bytes() == b"stray"


def test_a_strange_name_is_told_once(exchange: Exchange, caplog: pytest.LogCaptureFixture) -> None:
    (exchange.root / "checkpoints" / "step-00000006.bak").mkdir(parents=True)
    for _ in range(3):
        exchange.list_checkpoints()
    assert [record.message for record in caplog.records] == [
        "checkpoints/step-00000006.bak is not a name of the exchange; ignored"
    ]


@pytest.mark.parametrize("name", ["far-00", "far-01", "far-٣", "Far-0", "far"])
def test_a_slot_has_one_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not a slot"):
        Slot.parse(name)


# ── run.json ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_manifest_that_cannot_be_read_is_refused_with_the_way_out(exchange: Exchange, garbage: bytes) -> None:
    exchange.run_file.write_bytes(garbage)
    with pytest.raises(
        RunFolderError, match=r"run\.json is not a manifest that this version of HeteroRL can read \(\w"
    ):
        _ = Exchange(exchange.root).run


def test_a_volume_whose_manifest_cannot_be_read_is_not_taken(
    exchange: Exchange, tmp_path: Path, garbage: bytes
) -> None:
    spec_file = tmp_path / "mine.json"
    spec_file.write_bytes(exchange.run_file.read_bytes())
    exchange.run_file.write_bytes(garbage)
    with pytest.raises(RunFolderError, match=r"VolumeInUse: .* it cannot be told whose volume it is"):
        Exchange(exchange.root, spec_file=spec_file).occupy()
    assert exchange.run_file.read_bytes() == garbage


def test_evaluations_that_are_due_are_told_by_names_alone(exchange: Exchange) -> None:
    for step in (0, 1):
        publish(exchange, Version(step, 1))
    exchange.write_eval(Version(0, 1), Evaluation(average=0.5))
    exchange.files.read = lambda path: (
        pytest.fail(f"{path} was read") if path.parent.name == "evals" else path.read_bytes()
    )
    assert due_now(exchange, finished=False) == [Version(1, 1)]


def test_the_newest_slot_state_that_can_be_read_stands(exchange: Exchange) -> None:
    lease = exchange.acquire_slot(lambda: [FAR])
    exchange.save_slot(lease, SlotState(next_seq=7))
    (exchange.root / "slots" / "far-0" / "state-00000002.json").write_bytes(b"\0\0")
    assert exchange.load_slot(FAR) == SlotState(next_seq=7)
