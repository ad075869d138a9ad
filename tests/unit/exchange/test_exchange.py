"""The exchange in a temporary folder: publication, checks, leases, journal, and a crash at every point."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from builders import CANARY, FAR, Clock, exchange_at, publish, put, rollout_name, rollout_of, run_of
from heterorl.errors import CorruptFile, ExchangeError, RunFolderError, Superseded
from heterorl.exchange.exchange import Exchange, surviving_versions
from heterorl.exchange.records import JournalEntry, ModelOrigin, Prepared, SlotState, SlotStatus
from heterorl.exchange.rollout import Rollout, RolloutName
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version
from heterorl.spec.run import Slot

V3 = Version(3, 1)
MADE = ModelOrigin(source="tiny", digest="0")
SPEC = {"samplers": [{"name": "far", "replicas": 2}], "exchange": {"leaseSeconds": 10}}


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    clock = Clock()
    return exchange_at(tmp_path / "run", run_of(**SPEC), clock=clock, sleep=clock.sleep)


def rollout(reward: float = 1.0) -> Rollout:
    return rollout_of(
        [reward, 0.0],
        [1, 2],
        version=3,
        logp=[-0.1, -0.2, -0.3],
        truncated=[False, True],
        terms={"accuracy": [1.0, 0.0]},
        meta={"row_id": 4},
    )


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("v00000012-i0003", Version(12, 3)),
        ("far-east-2-10", Slot("far-east-2", 10)),
        ("v00000012-i0003--far-0--s0000000042", RolloutName(Version(12, 3), Slot("far", 0), 42)),
    ],
)
def test_a_name_is_read_back_as_what_it_names(text: str, value: Version | Slot | RolloutName) -> None:
    assert type(value).parse(text) == value
    assert str(value) == text


@pytest.mark.parametrize("text", ["", "v1-i1", "v00000012-i0003--s0000000042", "../../etc/passwd", ".tmp-abc"])
def test_an_invalid_rollout_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rollout"):
        RolloutName.parse(text)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_published_weights_are_fetched_whole_with_their_canary(exchange: Exchange, tmp_path: Path) -> None:
    publish(exchange, V3, b"abc")
    fetched = exchange.fetch_weights(V3, tmp_path / "here")
    assert (fetched.folder / "model.safetensors").read_bytes() == b"abc"
    assert fetched.canary == CANARY


def test_staged_weights_do_not_exist_for_readers(exchange: Exchange) -> None:
    (exchange.stage_weights(V3) / "model.safetensors").write_bytes(b"half")
    assert exchange.list_versions() == []


def test_a_version_is_never_overwritten(exchange: Exchange, tmp_path: Path) -> None:
    publish(exchange, V3, b"first")
    with pytest.raises(ExchangeError, match="never overwritten"):
        publish(exchange, V3, b"second")
    assert (exchange.fetch_weights(V3, tmp_path / "here").folder / "model.safetensors").read_bytes() == b"first"


def test_a_version_of_a_resumed_learner_stands_beside_its_predecessors(exchange: Exchange) -> None:
    publish(exchange, Version(3, 1))
    publish(exchange, Version(3, 2))
    assert exchange.list_versions() == [Version(3, 1), Version(3, 2)]


@pytest.mark.parametrize(
    ("published", "surviving"),
    [
        (["5-1", "6-1", "7-1", "5-2"], ["5-1", "5-2"]),  # the second learner resumed from step 5
        (["5-1", "5-2", "6-2", "9-1"], ["5-1", "5-2", "6-2"]),  # the first one woke up and published step 9
        (["4-1", "9-1", "7-2", "8-2", "6-3"], ["4-1", "6-3"]),  # two were superseded
        (["9-1", "7-3", "8-3", "8-2"], ["7-3", "8-3"]),
    ],
)
def test_later_steps_than_a_later_incarnation_resumed_from_are_of_a_lost_future(
    published: list[str], surviving: list[str]
) -> None:
    def versions(names: list[str]) -> list[Version]:
        return [Version(*map(int, name.split("-"))) for name in names]

    assert surviving_versions(versions(published)) == versions(surviving)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"weightz", "checksum of model.safetensors"),
        (b"weight", "has 6 bytes; its manifest says 7"),
        (b"weights and more", "has 16 bytes"),
    ],
)
def test_damaged_weights_are_refused_with_the_reason(
    exchange: Exchange, tmp_path: Path, damage: bytes, message: str
) -> None:
    publish(exchange, V3, b"weights")
    (exchange.root / "weights" / str(V3) / "model.safetensors").write_bytes(damage)
    with pytest.raises(CorruptFile, match=message):
        exchange.fetch_weights(V3, tmp_path / "here")


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"{}", b'{"protocol": 1}', b'{"protocol": 0, "files": {}}'])
def test_a_manifest_that_cannot_be_read_is_a_corrupt_version(
    exchange: Exchange, tmp_path: Path, manifest: bytes
) -> None:
    publish(exchange, V3)
    (exchange.root / "weights" / str(V3) / "manifest.json").write_bytes(manifest)
    with pytest.raises(CorruptFile):
        exchange.fetch_weights(V3, tmp_path / "here")


def test_a_manifest_cannot_name_a_file_outside_its_folder(exchange: Exchange, tmp_path: Path) -> None:
    publish(exchange, V3)
    path = exchange.root / "weights" / str(V3) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"]["../../run.json"] = manifest["files"]["model.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile, match="not a file inside the folder"):
        exchange.fetch_weights(V3, tmp_path / "here")


def test_a_retired_version_is_a_missing_file_not_a_corrupt_one(exchange: Exchange, tmp_path: Path) -> None:
    publish(exchange, V3)
    assert exchange.retire_weights([]) == [V3]
    with pytest.raises(FileNotFoundError):
        exchange.fetch_weights(V3, tmp_path / "here")


def test_a_pinned_version_is_not_retired(exchange: Exchange) -> None:
    publish(exchange, V3)
    publish(exchange, Version(4, 1))
    exchange.pin(V3)
    assert exchange.retire_weights([Version(4, 1)]) == []
    exchange.unpin(V3)
    assert exchange.retire_weights([Version(4, 1)]) == [V3]


def test_a_rollout_is_read_back_as_it_was_put(exchange: Exchange) -> None:
    name = RolloutName(V3, FAR, 0)
    put(exchange, {name: rollout()})
    found = exchange.read_rollout(name)
    assert exchange.list_rollouts() == [name]
    assert found.completion_ids.tolist() == [7, 8, 9]
    assert found.truncated.tolist() == [False, True]
    assert found.reward_terms["accuracy"].tolist() == [1.0, 0.0]
    assert found.meta == {"row_id": 4}


def test_groups_published_together_are_all_there(exchange: Exchange) -> None:
    names = [RolloutName(V3, FAR, seq) for seq in range(3)]
    put(exchange, {name: rollout(float(name.seq)) for name in names})
    assert [exchange.read_rollout(name).rewards[0] for name in names] == [0.0, 1.0, 2.0]


def test_a_rollout_is_never_overwritten(exchange: Exchange) -> None:
    name = RolloutName(V3, FAR, 0)
    put(exchange, {name: rollout(1.0)})
    with pytest.raises(ExchangeError, match="two samplers use one slot"):
        put(exchange, {name: rollout(2.0)})
    assert exchange.read_rollout(name).rewards[0] == 1.0


def test_every_cut_and_every_flipped_byte_of_a_rollout_is_noticed() -> None:
    data = rollout().to_bytes()
    for size in range(len(data)):
        with pytest.raises(CorruptFile):
            Rollout.from_bytes(data[:size])
    for position in range(len(data)):
        with pytest.raises(CorruptFile):
            Rollout.from_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])


def test_every_bit_of_a_rollouts_arrays_comes_back() -> None:
    wide = np.array([0, 1, 255, 256, 151_935, 2**31 - 1, -1, -(2**31)], np.int32)
    logp = np.array([-0.0, -1e-45, -1e-38, -0.1, -1 / 3, -88.7, -3.4e38, 0.0], np.float32)
    made = rollout_of(lengths=[3, 5], logp=logp, terms={"a": [np.nan, 1.0], "": [0.1, -0.0]})
    made = dataclasses.replace(made, completion_ids=wide, prompt_ids=wide)
    found = Rollout.from_bytes(made.to_bytes())
    for name in ("prompt_ids", "completion_ids", "lengths", "logp", "rewards", "truncated"):
        assert getattr(found, name).tobytes() == getattr(made, name).tobytes()
    assert {name: term.tobytes() for name, term in found.reward_terms.items()} == {
        name: term.tobytes() for name, term in made.reward_terms.items()
    }


@pytest.mark.parametrize(
    "arrays",
    [
        '{"prompt_ids": 1000000000000}',
        '{"prompt_ids": -2, "completion_ids": 5}',
        '{"prompt_ids": "2"}',
        "{}",
        "[2]",
        "null",
        '{"prompt_ids": 2, "completion_ids": 3}',
    ],
)
def test_a_rollout_that_claims_other_arrays_than_it_holds_is_refused(arrays: str) -> None:
    data = rollout().to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    packed = load(data)["packed"]
    header = {**header, "arrays": arrays}
    del header["sha256"]
    signature = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + f"uint8:{packed.shape}".encode())
    signature.update(packed.tobytes())
    with pytest.raises(CorruptFile, match="an array or a part of the header"):
        Rollout.from_bytes(save({"packed": packed}, {**header, "sha256": signature.hexdigest()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": np.array([1, 1], np.int32)}, "do not add up"),
        ({"lengths": np.array([3, 0], np.int32)}, "do not add up"),
        ({"logp": np.array([-0.1, np.nan, -0.3], np.float32)}, "not finite"),
        ({"rewards": np.array([1.0], np.float32)}, "has 1 values; expected 2"),
        ({"prompt_ids": np.array([], np.int32)}, "prompt is empty"),
    ],
)
def test_a_rollout_whose_arrays_do_not_fit_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        Rollout.from_bytes(Rollout(**{**vars(rollout()), **change}).to_bytes())


def test_a_quarantined_rollout_is_out_of_the_way_with_its_reason_beside_it(exchange: Exchange) -> None:
    name = RolloutName(V3, FAR, 7)
    put(exchange, {name: rollout()})
    exchange.quarantine_rollout(name, "bad")
    assert exchange.list_rollouts() == []
    assert exchange.list_quarantined() == [name]
    assert (
        json.loads((exchange.root / "quarantine" / "rollouts" / f"{name}.safetensors.reason.json").read_text())[
            "reason"
        ]
        == "bad"
    )


def test_strange_files_among_the_rollouts_are_ignored(exchange: Exchange) -> None:
    put(exchange, {RolloutName(V3, FAR, 0): rollout()})
    for stray in (".tmp-1234", "notes.txt", "v00000003-i0001--far-0--s1.safetensors"):
        (exchange.root / "rollouts" / stray).write_bytes(b"")
    assert exchange.list_rollouts() == [RolloutName(V3, FAR, 0)]


def test_archived_rollouts_leave_the_queue_and_stay_on_the_volume(exchange: Exchange) -> None:
    name = RolloutName(V3, FAR, 0)
    put(exchange, {name: rollout()})
    exchange.retire_rollouts([name, RolloutName(V3, FAR, 1)], archive=True)
    assert exchange.list_rollouts() == []
    assert (exchange.root / "archive" / f"{name}.safetensors").is_file()


# ── journal and checkpoints ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_torn_last_line_of_the_journal_is_left_out(exchange: Exchange) -> None:
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=[rollout_name(0)]))
    with open(exchange.root / "journal.jsonl", "ab") as file:
        file.write(b'{"step": 1, "inc')
    assert exchange.read_journal() == [JournalEntry(step=0, incarnation=1, names=[rollout_name(0)])]


def test_the_later_line_of_a_step_stands(exchange: Exchange) -> None:
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=[rollout_name(0)]))
    exchange.append_journal(JournalEntry(step=0, incarnation=2, names=[rollout_name(1)]))
    assert exchange.read_journal() == [JournalEntry(step=0, incarnation=2, names=[rollout_name(1)])]


def test_a_checkpoint_is_opened_with_its_state_and_a_damaged_one_is_refused(exchange: Exchange) -> None:
    folder = exchange.stage_checkpoint(50)
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"w")
    exchange.commit_checkpoint(50, {"step": 50})
    opened, state = exchange.open_checkpoint(50)
    assert state == {"step": 50}
    (opened / "model" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptFile, match="checksum"):
        exchange.open_checkpoint(50)


def test_a_folder_without_a_manifest_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.json is missing"):
        _ = Exchange(tmp_path).run


def test_a_spec_file_elsewhere_stands_for_the_folders_own(exchange: Exchange, tmp_path: Path) -> None:
    given = json.loads((exchange.root / "run.json").read_text())
    given["spec"]["learner"]["steps"] = 7
    elsewhere = tmp_path / "config" / "run.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps(given))
    assert Exchange(exchange.root, spec_file=elsewhere).spec.learner.steps == 7
    assert Exchange(exchange.root).spec.learner.steps != 7


def test_a_trace_that_lies_on_the_volume_is_read_in_with_the_spec(exchange: Exchange) -> None:
    given = json.loads((exchange.root / "run.json").read_text())
    given["spec"]["samplers"][0]["delay"] = {"distribution": "trace", "trace": {"path": "lags.csv", "column": "lag"}}
    (exchange.root / "run.json").write_text(json.dumps(given))
    (exchange.root / "lags.csv").write_text("lag\n3\n5\n")
    assert Exchange(exchange.root).spec.samplers[0].delay.trace.values == [3, 5]


# ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def foreign(exchange: Exchange, slot: Slot, epoch: int) -> None:
    """A lease held on another machine."""
    exchange.files.make_dir(exchange.root / "slots" / str(slot))
    path = exchange.root / "slots" / str(slot) / f"lease-{epoch:08d}.json"
    path.write_text(json.dumps({"host": "elsewhere", "boot": "x", "pid": 1, "started": 1, "first_seq": 0}))


def test_two_samplers_of_a_pool_get_two_slots(exchange: Exchange) -> None:
    candidates = [Slot("far", 0), Slot("far", 1)]
    first = exchange.acquire_slot(lambda: candidates)
    exchange.beat(first, SlotStatus())
    assert first.slot == Slot("far", 0)
    assert exchange.acquire_slot(lambda: candidates).slot == Slot("far", 1)


def test_a_released_slot_is_taken_at_once_with_its_state(exchange: Exchange) -> None:
    lease = exchange.acquire_slot(lambda: [FAR])
    exchange.save_slot(lease, SlotState(next_seq=8))
    exchange.beat(lease, SlotStatus(), released=True)
    before = exchange.now()
    assert exchange.acquire_slot(lambda: [FAR]).epoch == 2
    assert exchange.now() == before
    assert exchange.load_slot(FAR) == SlotState(next_seq=8)


def test_a_slot_of_a_dead_process_of_this_machine_is_taken_at_once(exchange: Exchange) -> None:
    lease = exchange.acquire_slot(lambda: [FAR])
    path = exchange.root / "slots" / "far-0" / f"lease-{lease.epoch:08d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "started": 1}))  # its process id was given away since
    before = exchange.now()
    assert exchange.acquire_slot(lambda: [FAR]).epoch == 2
    assert exchange.now() == before


def test_a_silent_slot_of_another_machine_is_taken_only_after_the_lease_time(exchange: Exchange) -> None:
    foreign(exchange, FAR, 1)
    before = exchange.now()
    assert exchange.acquire_slot(lambda: [FAR]).epoch == 2
    assert exchange.now() - before >= exchange.spec.exchange.lease_seconds


def test_a_half_written_lease_frees_its_slot_after_the_lease_time(exchange: Exchange) -> None:
    foreign(exchange, FAR, 1)
    (exchange.root / "slots" / "far-0" / "lease-00000001.json").write_bytes(b"")
    before = exchange.now()
    lease = exchange.acquire_slot(lambda: [FAR])
    assert lease is not None
    assert lease.epoch == 2
    assert exchange.now() - before >= exchange.spec.exchange.lease_seconds


def test_waiting_for_a_slot_ends_when_told(exchange: Exchange) -> None:
    foreign(exchange, FAR, 1)
    assert exchange.acquire_slot(lambda: [FAR], lambda: True) is None


def test_a_slot_that_beats_is_left_alone(exchange: Exchange) -> None:
    foreign(exchange, FAR, 1)
    beats = exchange.root / "slots" / "far-0" / "heartbeat.json"
    sleep, count = exchange.sleep, 0

    def sleep_while_it_beats(seconds: float) -> None:
        nonlocal count
        count += 1
        sleep(seconds)
        beats.write_text(json.dumps({"epoch": 1, "beats": count}))
        if count == 100:  # 50 s by then, five times the lease
            raise TimeoutError

    exchange.sleep = sleep_while_it_beats
    with pytest.raises(TimeoutError):
        exchange.acquire_slot(lambda: [FAR])


def test_a_sampler_whose_slot_was_taken_over_learns_it_at_its_next_beat(exchange: Exchange) -> None:
    lease = exchange.acquire_slot(lambda: [FAR])
    foreign(exchange, FAR, 2)
    with pytest.raises(Superseded, match="taken over"):
        exchange.beat(lease, SlotStatus())


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Crash(Exception):
    pass


class CrashingFiles(Files):
    """Dies before its n-th operation that changes the volume, as a process that is killed there."""

    def __init__(self, survive: int) -> None:
        super().__init__()
        self.left = survive

    def _operation(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash

    def write(self, path: Path, data: bytes) -> None:
        self._operation()
        super().write(path, data[: len(data) // 2] if self.left == 0 else data)  # the last one is torn
        if self.left == 0:
            raise Crash

    def move(self, source: Path, target: Path) -> None:
        self._operation()
        super().move(source, target)

    def sync_file(self, path: Path) -> None:
        self._operation()

    def sync_dir(self, path: Path) -> None:
        self._operation()

    def make_dir(self, path: Path) -> None:
        self._operation()
        super().make_dir(path)


def test_a_writer_that_dies_anywhere_leaves_all_or_nothing(exchange: Exchange, tmp_path: Path) -> None:
    seen = set()
    for survive in range(40):
        root = tmp_path / f"crash-{survive}"
        shutil.copytree(exchange.root, root)
        writer, reader = Exchange(root, files=CrashingFiles(survive)), Exchange(root)
        name = RolloutName(V3, FAR, 0)
        try:
            publish(writer, V3)
            put(writer, {name: rollout()})
            crashed = False
        except Crash:
            crashed = True
        versions, rollouts = reader.list_versions(), reader.list_rollouts()
        for version in versions:
            reader.fetch_weights(version, tmp_path / f"fetched-{survive}")
        for found in rollouts:
            reader.read_rollout(found)
        seen.add((crashed, bool(versions), bool(rollouts)))
        reader.sweep()
        if not versions:
            publish(reader, V3)  # whoever comes next is not in the way of what was left
    # Every stage was met: nothing published, weights only, both with and without an orderly end.
    assert {(True, False, False), (True, True, False), (False, True, True)} <= seen


# ── whose volume it is ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def on_volume(tmp_path: Path) -> Callable[..., Exchange]:
    """A run on one shared volume, its manifest read elsewhere as in a pod."""

    def on_volume(name: str, uid: str | None = None, **spec: object) -> Exchange:
        file = tmp_path / f"{name}-{uid}.json"
        metadata = {"name": name, "uid": uid}
        run = run_of(metadata=metadata, **SPEC | spec)
        file.write_text(json.dumps(run.resolved()))
        return Exchange(tmp_path / "volume", spec_file=file)

    return on_volume


def test_a_fresh_volume_becomes_the_runs_and_stays_so(on_volume: Callable[..., Exchange]) -> None:
    run = on_volume("mine", "uid-1")
    for _ in range(2):
        run.occupy()
    run.mark_prepared(MADE)
    assert run.prepared == Prepared(run="uid-1", model=MADE)
    assert run.successor is None
    assert json.loads(run.run_file.read_bytes())["metadata"]["uid"] == "uid-1"


@pytest.mark.parametrize(("name", "uid"), [("other", "uid-2"), ("mine", "uid-2"), ("other", None)])
def test_a_volume_that_holds_another_run_is_refused_once_it_is_prepared(
    on_volume: Callable[..., Exchange], name: str, uid: str | None
) -> None:
    first = on_volume("mine", "uid-1")
    first.occupy()
    first.mark_prepared(MADE)
    second = on_volume(name, uid)
    with pytest.raises(
        RunFolderError, match=r"^VolumeInUse: .*volume holds run mine; set spec\.resume: true to continue"
    ):
        second.occupy()
    assert first.prepared == Prepared(run="uid-1", model=MADE)
    assert second.prepared is None


def test_a_volume_that_another_run_is_preparing_is_refused(on_volume: Callable[..., Exchange]) -> None:
    on_volume("mine", "uid-1").occupy()
    with pytest.raises(RunFolderError, match=r"^VolumeInUse: .*volume holds run mine"):
        on_volume("other", "uid-2").occupy()


def test_a_run_that_is_applied_again_after_a_preparation_that_was_killed_finds_the_volume_free(
    on_volume: Callable[..., Exchange],
) -> None:
    on_volume("mine", "uid-1").occupy()
    again = on_volume("mine", "uid-2", seed=3)  # put right: it may differ in what a resumed run must keep
    again.occupy()
    assert json.loads(again.run_file.read_bytes())["metadata"]["uid"] == "uid-2"


def test_checkpoints_keep_their_volume_though_the_marker_is_lost(on_volume: Callable[..., Exchange]) -> None:
    first = on_volume("mine", "uid-1")
    first.occupy()
    first.mark_prepared(MADE)
    publish(first, V3)
    (first.root / "prepared.json").unlink()
    first.release()
    with pytest.raises(RunFolderError, match=r"^VolumeInUse: .*volume holds run mine"):
        on_volume("mine", "uid-2").occupy()


def test_a_resumed_run_takes_the_volume_over_with_all_that_is_on_it(on_volume: Callable[..., Exchange]) -> None:
    first = on_volume("mine", "uid-1")
    first.occupy()
    first.mark_prepared(MADE)
    publish(first, V3)
    second = on_volume("again", "uid-2", resume=True, learner={"steps": 2000})
    assert second.prepared is None
    second.occupy()
    assert second.prepared == Prepared(run="uid-2", model=MADE)
    assert first.prepared is None
    assert (first.successor, second.successor) == ("again", None)
    assert second.list_versions() == [V3]
    assert json.loads(second.run_file.read_bytes())["metadata"]["name"] == "again"


def test_a_resumed_run_that_would_need_another_preparation_is_refused(on_volume: Callable[..., Exchange]) -> None:
    on_volume("mine", "uid-1").occupy()
    second = on_volume("again", "uid-2", resume=True, seed=3, exchange={"volume": {"claimName": "the-claim"}})
    with pytest.raises(RunFolderError, match=r"VolumeInUse: .* holds run mine, which had another seed; go on from it"):
        second.occupy()


def test_a_rendered_run_is_told_by_its_name(on_volume: Callable[..., Exchange]) -> None:
    on_volume("mine").occupy()
    on_volume("mine").mark_prepared()
    assert on_volume("mine").prepared == Prepared(run="mine")
    assert on_volume("other").prepared is None


def test_a_run_folder_on_one_machine_is_never_another_runs(on_volume: Callable[..., Exchange]) -> None:
    moved = on_volume("mine", "uid-1")
    moved.occupy()
    moved.mark_prepared()
    here = Exchange(moved.root)
    here.create(run_of(**SPEC))
    assert here.prepared is not None


def test_a_slot_that_is_added_while_one_waits_is_taken(exchange: Exchange) -> None:
    exchange.beat(exchange.acquire_slot(lambda: [FAR]), SlotStatus())
    looks = iter([[FAR], [FAR], [FAR, Slot("far", 1)]])
    assert exchange.acquire_slot(lambda: next(looks)).slot == Slot("far", 1)
