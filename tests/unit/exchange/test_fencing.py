"""A learner or sampler that was followed by another one, and does not know it yet, changes nothing."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import CANARY, FAR, Clock, exchange_at, publish, put, rollout_name, rollout_of, run_of
from heterorl.errors import CorruptFile, ExchangeError, Superseded
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import JournalEntry, LearnerHeartbeat, SlotState, SlotStatus
from heterorl.exchange.slots import Lease, _started
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version

V3 = Version(3, 1)


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    clock = Clock()
    return exchange_at(tmp_path / "run", run_of(exchange={"leaseSeconds": 10}), clock=clock, sleep=clock.sleep)


def content(root: Path) -> dict[str, bytes]:
    """Everything in a folder that a reader sees."""
    paths = [path for path in root.rglob("*") if path.is_file() and ".tmp-" not in str(path)]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


# ── the learner ──────────────────────────────────────────────────────────────────────────────────────────────────────
LEARNER_WRITES: dict[str, Callable[[Exchange], object]] = {
    "journal": lambda e: e.append_journal(JournalEntry(step=9, incarnation=1, names=[rollout_name(9)])),
    "journal rewritten": lambda e: e.rewrite_journal([]),
    "heartbeat": lambda e: e.write_learner(LearnerHeartbeat(step=9)),
    "stage weights": lambda e: e.stage_weights(Version(9, 1)),
    "publish weights": lambda e: e.commit_weights(Version(4, 1), CANARY),
    "delete weights": lambda e: e.retire_weights([]),
    "quarantine weights": lambda e: e.quarantine_weights(V3, "bad"),
    "stage checkpoint": lambda e: e.stage_checkpoint(9),
    "save checkpoint": lambda e: e.commit_checkpoint(8, {}),
    "delete checkpoint": lambda e: e.remove_checkpoint(5),
    "quarantine checkpoint": lambda e: e.quarantine_checkpoint(5, "bad"),
    "delete rollouts": lambda e: e.retire_rollouts([rollout_name(0)], archive=False),
    "archive rollouts": lambda e: e.retire_rollouts([rollout_name(0)], archive=True),
    "quarantine rollout": lambda e: e.quarantine_rollout(rollout_name(0), "bad"),
    "sweep": lambda e: e.sweep(),
}


@pytest.fixture
def frozen(exchange: Exchange) -> Exchange:
    """A learner with something of everything on the volume, and more of it staged."""
    exchange.begin_incarnation()
    publish(exchange, V3)
    put(exchange, {rollout_name(0): rollout_of()})
    exchange.append_journal(JournalEntry(step=0, incarnation=1, names=[rollout_name(0)]))
    exchange.write_learner(LearnerHeartbeat(step=1, incarnation=1))
    (exchange.stage_checkpoint(5) / "state.pt").write_bytes(b"state")
    exchange.commit_checkpoint(5, {"step": 5})
    (exchange.stage_checkpoint(8) / "state.pt").write_bytes(b"later")
    (exchange.stage_weights(Version(4, 1)) / "model.safetensors").write_bytes(b"later")
    return exchange


@pytest.mark.parametrize("swept", [False, True], ids=["", "swept"])
@pytest.mark.parametrize("write", LEARNER_WRITES)
def test_a_learner_that_wakes_up_after_its_successor_began_changes_nothing(
    frozen: Exchange, write: str, swept: bool
) -> None:
    successor = Exchange(frozen.root)
    assert successor.begin_incarnation() == 2
    if swept:
        successor.sweep()
    before = content(frozen.root)
    with pytest.raises(Superseded, match=r"another learner has begun .* \(incarnation 2, this one is 1\)"):
        LEARNER_WRITES[write](frozen)
    assert content(frozen.root) == before


@pytest.mark.parametrize("write", LEARNER_WRITES)
def test_the_newest_learner_may_do_all_of_it(frozen: Exchange, write: str) -> None:
    LEARNER_WRITES[write](frozen)


def test_a_learner_frozen_in_the_midst_of_publishing_publishes_nothing(frozen: Exchange, tmp_path: Path) -> None:
    """At every file operation of a publication and a checkpoint the successor begins, and the predecessor goes on."""

    class Interrupted(Files):
        """Lets the successor begin before its n-th operation."""

        def __init__(self, after: int, root: Path) -> None:
            super().__init__()
            self.left, self.root = after, root

        def write(self, path: Path, data: bytes) -> None:
            self._tick()
            super().write(path, data)

        def sync_file(self, path: Path) -> None:
            self._tick()
            super().sync_file(path)

        def digest(self, path: Path) -> str:
            self._tick()
            return super().digest(path)

        def sync_dir(self, path: Path) -> None:
            self._tick()
            super().sync_dir(path)

        def _tick(self) -> None:
            self.left -= 1
            if self.left == 0:
                Exchange(self.root).begin_incarnation()

    refused = 0
    for after in range(1, 12):
        for name, landed in (
            ("publish weights", "weights/v00000004-i0001"),
            ("save checkpoint", "checkpoints/step-00000008"),
        ):
            root = tmp_path / f"{name}-{after}"
            shutil.copytree(frozen.root, root)
            files = Interrupted(after, root)
            writer = Exchange(root, files=files)
            writer.incarnation = 1
            try:
                LEARNER_WRITES[name](writer)
            except Superseded:
                refused += 1
                assert not (root / landed).exists()
            else:
                assert (root / landed).exists()
                # Either nobody came in between, or only once the name stood and its folder was waited for.
                assert files.left >= 0
    assert refused >= 10


def test_an_incarnation_is_claimed_by_one_of_many(exchange: Exchange) -> None:
    claimed: list[int] = []
    threads = [
        threading.Thread(target=lambda: claimed.append(Exchange(exchange.root).begin_incarnation())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [1, 2, 3, 4, 5, 6, 7, 8]


def launched(exchange: Exchange, launcher: str) -> Exchange:
    """The run's folder as a learner sees it that this launcher starts."""
    mine = Exchange(exchange.root)
    mine.launcher = launcher
    return mine


def test_two_launchers_that_live_do_not_follow_each_other_in_turn(exchange: Exchange) -> None:
    assert [launched(exchange, "a").begin_incarnation() for _ in range(2)] == [1, 2]  # it starts its learner again
    assert launched(exchange, "b").begin_incarnation() == 3
    before = content(exchange.root)
    for _ in range(2):
        with pytest.raises(
            Superseded, match=r"another learner \(incarnation 3, process \d+ of host .*\) has taken over"
        ):
            launched(exchange, "a").begin_incarnation()
    assert content(exchange.root) == before
    assert launched(exchange, "b").begin_incarnation() == 4


def test_a_launcher_that_is_new_takes_over_from_one_that_is_gone(exchange: Exchange) -> None:
    for number, launcher in enumerate(("a", "b", "c", ""), 1):  # the last is a learner started by hand
        assert launched(exchange, launcher).begin_incarnation() == number
    assert launched(exchange, "").begin_incarnation() == 5
    with pytest.raises(Superseded):
        launched(exchange, "c").begin_incarnation()


LOSSES: dict[str, Callable[[Exchange], object]] = {
    "incarnations": lambda e: shutil.rmtree(e.root / "incarnations"),
    "incarnations and heartbeat": lambda e: (
        shutil.rmtree(e.root / "incarnations"),
        os.remove(e.root / "learner.json"),
    ),
    "all but the weights": lambda e: [
        shutil.rmtree(e.root / "incarnations"),
        os.remove(e.root / "learner.json"),
        os.remove(e.root / "journal.jsonl"),
    ],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_no_incarnation_is_used_twice_whatever_was_lost(frozen: Exchange, loss: str) -> None:
    LOSSES[loss](frozen)
    assert Exchange(frozen.root).begin_incarnation() == 2


def test_a_line_that_a_superseded_learner_got_into_the_journal_does_not_count(exchange: Exchange) -> None:
    lines = [(0, 1, 0), (1, 1, 1), (1, 2, 5), (2, 1, 2)]  # step, incarnation, rollout: the last one came too late
    for step, incarnation, seq in lines:
        exchange.append_journal(JournalEntry(step=step, incarnation=incarnation, names=[rollout_name(seq)]))
    assert [(entry.step, entry.names[0].seq) for entry in exchange.read_journal()] == [(0, 0), (1, 5)]


def test_a_checkpoint_that_a_superseded_learner_saved_after_all_is_not_resumed_from(
    frozen: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen after it asked and before it gave the name: the window that no check closes."""
    successor = Exchange(frozen.root)
    successor.begin_incarnation()
    monkeypatch.setattr(frozen, "require_incarnation", lambda: None)
    frozen.commit_checkpoint(8, {"step": 8})
    folder, _ = successor.open_newest_checkpoint()
    assert folder.name == "step-00000008"  # the successor has trained nothing yet: it may as well go on from there
    successor.append_journal(JournalEntry(step=5, incarnation=2, names=[rollout_name(7)]))
    folder, _ = successor.open_newest_checkpoint()
    assert folder.name == "step-00000005"
    assert (frozen.root / "quarantine" / "checkpoints" / "step-00000008" / "state.pt").read_bytes() == b"later"


def test_two_learners_stage_their_checkpoints_in_folders_of_their_own(exchange: Exchange) -> None:
    staged = []
    for _ in range(2):
        learner = Exchange(exchange.root)
        learner.begin_incarnation()
        staged.append(learner.stage_checkpoint(5))
    assert staged[0] != staged[1]


# ── the sampler ──────────────────────────────────────────────────────────────────────────────────────────────────────
SAMPLER_WRITES: dict[str, Callable[[Exchange, Lease], object]] = {
    "rollouts": lambda e, lease: e.put_rollouts(lease, {rollout_name(lease.first_seq): rollout_of()}),
    "state": lambda e, lease: e.save_slot(lease, SlotState(next_seq=99)),
    "heartbeat": lambda e, lease: e.beat(lease, SlotStatus()),
    "release": lambda e, lease: e.beat(lease, SlotStatus(), released=True),
}


def take_over(exchange: Exchange) -> Lease:
    lease = exchange.acquire_slot(lambda: [FAR])
    assert lease is not None
    return lease


@pytest.fixture
def lost(exchange: Exchange) -> Lease:
    """A lease whose holder froze, and whose slot another sampler has by now."""
    lease = take_over(exchange)
    exchange.put_rollouts(lease, {rollout_name(0): rollout_of(lease_epoch=1)})
    exchange.save_slot(lease, SlotState(next_seq=4, adoption={"swaps": 3}))
    exchange.beat(lease, SlotStatus(), released=True)
    assert take_over(exchange).epoch == 2
    return lease


@pytest.mark.parametrize("write", SAMPLER_WRITES)
def test_a_sampler_that_wakes_up_after_its_slot_was_taken_changes_nothing(
    exchange: Exchange, lost: Lease, write: str
) -> None:
    before = content(exchange.root)
    with pytest.raises(Superseded, match=r"taken over by another sampler \(its lease has epoch 2, this one 1\)"):
        SAMPLER_WRITES[write](exchange, lost)
    assert content(exchange.root) == before


@pytest.mark.parametrize("write", SAMPLER_WRITES)
def test_the_holder_may_do_all_of_it(exchange: Exchange, write: str) -> None:
    SAMPLER_WRITES[write](exchange, take_over(exchange))


def test_a_state_that_is_written_after_all_does_not_replace_the_successors(
    exchange: Exchange, lost: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen after it asked and before it wrote: the window that no check closes."""
    holder = Lease(FAR, 2)
    exchange.save_slot(holder, SlotState(next_seq=8, adoption={"swaps": 4}))
    with monkeypatch.context() as patch:
        patch.setattr(exchange._slots, "epoch", lambda slot: 1)
        exchange.save_slot(lost, SlotState(next_seq=5))
    assert exchange.load_slot(FAR) == SlotState(next_seq=8, adoption={"swaps": 4})
    exchange.beat(holder, SlotStatus(), released=True)
    assert take_over(exchange).first_seq == 8


def test_rollouts_that_are_published_after_all_are_refused_by_the_learner(
    exchange: Exchange, lost: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_in_time, made_later = rollout_name(3), rollout_name(4)
    with monkeypatch.context() as patch:
        patch.setattr(exchange._slots, "epoch", lambda slot: 1)
        exchange.put_rollouts(lost, {made_in_time: rollout_of(), made_later: rollout_of()})
    exchange.check_epoch(made_in_time, 1)  # its number was the first holder's to give
    with pytest.raises(CorruptFile, match=r"made under lease 1 of slot far-0, whose numbers ended .* at number 4"):
        exchange.check_epoch(made_later, 1)
    exchange.check_epoch(made_later, 2)


def test_a_lease_in_between_that_cannot_be_read_leaves_the_judgement_to_the_next(
    exchange: Exchange, lost: Lease
) -> None:
    exchange.save_slot(Lease(FAR, 2), SlotState(next_seq=9))
    exchange.beat(Lease(FAR, 2), SlotStatus(), released=True)
    assert take_over(exchange).epoch == 3
    (exchange.root / "slots" / "far-0" / "lease-00000002.json").write_bytes(b"\0")
    fresh = Exchange(exchange.root)
    fresh.check_epoch(rollout_name(8), 1)
    with pytest.raises(CorruptFile, match="lease 3 began at number 9"):
        fresh.check_epoch(rollout_name(9), 1)


def test_a_slot_is_leased_by_one_of_many(exchange: Exchange) -> None:
    leases: list[Lease | None] = []

    def acquire() -> None:
        contender = Exchange(exchange.root)
        leases.append(contender._slots.try_lease(FAR, lambda slot: 0, 10.0))

    threads = [threading.Thread(target=acquire) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lease.epoch for lease in leases if lease] == [1]


def test_a_holder_of_this_machine_that_stands_still_loses_its_slot_after_the_lease_time(exchange: Exchange) -> None:
    exchange.beat(take_over(exchange), SlotStatus())  # this very process, which lives and does not beat any more
    before = exchange.now()
    assert take_over(exchange).epoch == 2
    assert exchange.now() - before >= 10


def test_an_observer_that_was_frozen_itself_does_not_take_its_own_pause_for_the_holders(exchange: Exchange) -> None:
    exchange.beat(take_over(exchange), SlotStatus())
    sleep, looks = exchange.sleep, []

    def asleep(seconds: float) -> None:
        looks.append(exchange.now())
        sleep(3600.0 if len(looks) == 2 else seconds)

    exchange.sleep = asleep
    assert take_over(exchange).epoch == 2
    assert looks[-1] - looks[2] >= 9  # counted anew from the first look after the hour


def test_a_contender_whose_claim_was_swept_by_who_was_first_has_lost(exchange: Exchange) -> None:
    class Overtaken(Files):
        """Another sampler is faster, at the last moment."""

        winner: Lease | None = None

        def publish(self, source: Path, target: Path) -> bool:
            if self.winner is None:
                self.winner = take_over(exchange)
            return super().publish(source, target)

    files = Overtaken()
    assert Exchange(exchange.root, files=files)._slots.try_lease(FAR, lambda slot: 0, 10.0) is None
    assert files.winner.epoch == 1


def test_a_process_is_told_from_a_later_one_by_the_ticks_of_its_start() -> None:
    assert _started(os.getpid()) > _started(1)
    assert _started(2**31 - 1) is None


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def lose_state(exchange: Exchange) -> None:
    for path in (exchange.root / "slots" / "far-0").glob("state-*.json"):
        path.write_bytes(b"")


PLACES: dict[str, Callable[[Exchange], object]] = {
    "published": lambda e: None,
    "archived": lambda e: e.retire_rollouts([rollout_name(6)], archive=True),
    "quarantined": lambda e: e.quarantine_rollout(rollout_name(6), "bad"),
    "trained and deleted": lambda e: (
        e.write_learner(LearnerHeartbeat(step=1, taken={"far-0": 6})),
        e.retire_rollouts([rollout_name(6)], archive=False),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_number_is_used_twice_when_a_slots_state_is_lost(exchange: Exchange, place: str) -> None:
    lease = take_over(exchange)
    exchange.put_rollouts(lease, {rollout_name(6): rollout_of()})
    PLACES[place](exchange)
    lose_state(exchange)
    exchange.beat(lease, SlotStatus(), released=True)
    assert take_over(exchange).first_seq == 7


def test_a_rollout_is_published_exclusively_and_the_others_of_its_batch_stand(exchange: Exchange) -> None:
    lease = take_over(exchange)
    exchange.put_rollouts(lease, {rollout_name(0): rollout_of([1.0, 0.0])})
    with pytest.raises(ExchangeError, match="s0000000000: published before"):
        exchange.put_rollouts(lease, {rollout_name(0): rollout_of([0.0, 0.0]), rollout_name(1): rollout_of()})
    assert exchange.read_rollout(rollout_name(0)).rewards[0] == 1.0
    assert exchange.list_rollouts() == [rollout_name(0), rollout_name(1)]


# ── leftovers ────────────────────────────────────────────────────────────────────────────────────────────────────────
def left(exchange: Exchange, *names: str, age_s: float = 0.0) -> list[Path]:
    paths = [exchange.root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        moment = path.stat().st_mtime - age_s
        os.utime(path, (moment, moment))
    return paths


def test_a_new_holder_sweeps_what_earlier_holders_of_its_slot_left(exchange: Exchange) -> None:
    lease = take_over(exchange)
    exchange.beat(lease, SlotStatus(), released=True)
    name = rollout_name(3)
    gone = left(exchange, f"rollouts/.tmp-{name}.safetensors-a1", "slots/far-0/.tmp-heartbeat.json-a2")
    other = left(exchange, f"rollouts/.tmp-{str(name).replace('far-0', 'far-1')}.safetensors-a3")
    assert take_over(exchange).epoch == 2
    assert [path.exists() for path in gone + other] == [False, False, True]
    assert exchange.files.list(exchange.root / "slots" / "far-0") == [
        "heartbeat.json",
        "lease-00000001.json",
        "lease-00000002.json",
        "state-00000002.json",
    ]


def test_leases_of_long_ago_are_swept_by_the_holder(exchange: Exchange) -> None:
    for _ in range(103):
        lease = take_over(exchange)
        exchange.beat(lease, SlotStatus(), released=True)
    assert lease.epoch == 103
    kept = [name for name in exchange.files.list(exchange.root / "slots" / "far-0") if name.startswith("lease-")]
    assert (len(kept), kept[0]) == (100, "lease-00000004.json")


def test_a_learner_sweeps_its_predecessors_at_once_and_those_of_others_when_they_are_old(exchange: Exchange) -> None:
    gone = left(
        exchange, "weights/.tmp-v00000001-i0001/model.safetensors", "checkpoints/.tmp-step-00000001-i0001/state.pt"
    )
    young = left(exchange, "rollouts/.tmp-a", ".tmp-b", "evals/.tmp-c", age_s=3000)
    old = left(exchange, "rollouts/.tmp-d", ".tmp-e", "evals/.tmp-f", age_s=4000)
    exchange.begin_incarnation()
    exchange.sweep()
    assert not any(path.exists() for path in gone + old)
    assert all(path.exists() for path in young)


def test_the_status_of_a_sampler_is_shown_as_it_is(exchange: Exchange) -> None:
    status: dict[str, Any] = {"state": "generating", "version": "v00000003-i0001", "rollouts": 7, "reward": 0.5}
    exchange.beat(take_over(exchange), SlotStatus(**status))
    beat = exchange.heartbeats()[FAR]
    assert {name: getattr(beat, name) for name in status} == status
    assert (beat.epoch, beat.beats, beat.released) == (1, 1, False)
