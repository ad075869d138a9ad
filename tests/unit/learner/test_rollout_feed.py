"""The learner's feed on a real exchange: journal first, replay after a crash, nothing twice, nothing lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import builders
from builders import FAR, exchange_at, rollout_name, rollout_of, run_of
from heterorl.errors import Superseded, TrainingError, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import DataCount, SlotStatus
from heterorl.exchange.rollout import Provenance, RolloutName
from heterorl.exchange.version import Version
from heterorl_learner.rollout_feed import RolloutFeed, pause_s


class Stop(Exception):
    """Instead of sleeping: a test that would wait has gone wrong."""


def never() -> bool:
    return False


def no_sleep(seconds: float) -> None:
    raise Stop


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    algorithm = {"groupSize": 2, "staleness": {"maxSteps": 4}}
    return exchange_at(tmp_path / "run", run_of(learner={"batch": {"groups": 2}}, algorithm=algorithm), sleep=no_sleep)


@pytest.fixture
def put(exchange: Exchange) -> Callable[..., RolloutName]:
    def put(seq: int, step: int = 0, *, made_by: int | None = None, group_size: int = 2) -> RolloutName:
        name = rollout_name(seq, step)
        version = step if made_by is None else made_by
        builders.put(exchange, {name: rollout_of([1.0] * group_size, version=version)})
        return name

    return put


def take(feed: RolloutFeed, step: int) -> list[int]:
    batch = feed.take(step)
    assert batch is not None
    return [name.seq for name in batch.names]


def test_a_step_is_on_the_disk_before_it_is_trained(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    names = [put(0), put(1)]
    RolloutFeed(exchange, 0, 1, never).take(0)
    assert exchange.read_journal()[0].names == names


def test_the_run_ends_with_the_reason_when_every_sampler_refuses_the_weights(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = Version(0, 1)
    (exchange.stage_weights(version) / "model.safetensors").write_text("weights")
    exchange.commit_weights(version, builders.CANARY)
    lease = exchange.acquire_slot(lambda: [FAR])
    assert lease is not None
    exchange.beat(lease, SlotStatus(state="waiting: weights", refused={str(version): "the canary differs by 0.4"}))
    with pytest.raises(Stop):  # a version that is being written now may be accepted: it waits
        RolloutFeed(exchange, 0, 1, never).take(0)
    monkeypatch.setattr("heterorl_learner.rollout_feed.DEAD_END_S", 0.0)
    with pytest.raises(UserError, match=r"v00000000-i0001: the canary differs by 0.4\. .*exchange\.canary\.tolerance"):
        RolloutFeed(exchange, 0, 1, never).take(0)


def test_no_rollout_is_given_twice(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    for seq in range(4):
        put(seq)
    feed = RolloutFeed(exchange, 0, 1, never)
    assert take(feed, 0) == [0, 1]
    assert take(feed, 1) == [2, 3]
    with pytest.raises(Stop):
        feed.take(2)


def test_a_rollout_that_a_late_listing_still_shows_is_not_given_twice(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    first = [put(0), put(1)]
    feed = RolloutFeed(exchange, 0, 1, never)
    assert take(feed, 0) == [0, 1]
    put(2), put(3)
    for name in first:  # as where a cached folder is looked at: moved away, and still there
        taken = exchange.root / "taken" / f"{name}.safetensors"
        (exchange.root / "rollouts" / taken.name).write_bytes(taken.read_bytes())
    assert take(feed, 1) == [2, 3]


def test_a_file_that_shows_up_late_is_not_forgotten(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    put(0), put(2)
    feed = RolloutFeed(exchange, 0, 1, never)
    assert take(feed, 0) == [0, 2]
    put(1), put(3)  # 1 was published before 2, but the volume showed it later
    assert take(feed, 1) == [1, 3]


def test_a_resumed_learner_replays_its_journal_and_then_selects_afresh(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(4):
        put(seq)
    died = RolloutFeed(exchange, 0, 1, never)
    steps = [take(died, 0), take(died, 1)]
    for seq in range(4, 6):
        put(seq)
    resumed = RolloutFeed(exchange, 0, 2, never)  # from a checkpoint before both steps
    assert [take(resumed, 0), take(resumed, 1), take(resumed, 2)] == [*steps, [4, 5]]
    # the replayed steps were not journalled again
    assert [(entry.step, entry.incarnation) for entry in exchange.read_journal()] == [(0, 1), (1, 1), (2, 2)]


def test_what_a_step_took_is_moved_out_of_the_listed_folder_and_can_still_be_read(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    names = [put(seq) for seq in range(3)]
    RolloutFeed(exchange, 0, 1, never).take(0)
    assert exchange.list_rollouts() == [names[2]]
    assert exchange.list_taken() == names[:2]
    assert exchange.read_rollout(names[0]).rewards.tolist() == [1.0, 1.0]
    exchange.retire_rollouts(names, archive=False)
    assert (exchange.list_rollouts(), exchange.list_taken()) == ([], [])


@pytest.mark.parametrize("journalled", [True, False])
def test_a_crash_between_journal_and_move_is_put_right_by_the_next_learner(
    exchange: Exchange, put: Callable[..., RolloutName], journalled: bool
) -> None:
    names = [put(0), put(1)]
    RolloutFeed(exchange, 0, 1, never).take(0)
    if journalled:  # died before it moved them
        exchange.give_back(names)
    else:  # the journal was lost after it moved them
        exchange.rewrite_journal([])
    RolloutFeed(exchange, 0, 2, never)
    assert (exchange.list_taken(), exchange.list_rollouts()) == ((names, []) if journalled else ([], names))


def test_the_learner_tells_each_slot_what_waits_and_what_came_after_a_later_one_was_taken(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    put(0), put(3)
    feed = RolloutFeed(exchange, 0, 1, never)
    take(feed, 0)
    put(1), put(4)
    feed._candidates()
    waiting, late = feed.waiting(1)
    assert (dict(waiting), dict(late)) == ({"far-0": 2}, {"far-0": 1})
    assert dict(feed.waiting(99)[0]) == {}  # all are too old by then


def test_steps_whose_files_are_gone_are_selected_afresh(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    names = [put(seq) for seq in range(5)]
    died = RolloutFeed(exchange, 0, 1, never)
    take(died, 0), take(died, 1)
    exchange.retire_rollouts([names[2]], archive=False)
    resumed = RolloutFeed(exchange, 0, 2, never)
    assert take(resumed, 0) == [0, 1]
    assert take(resumed, 1) == [3, 4]
    assert [entry.names for entry in exchange.read_journal()] == [
        [names[0], names[1]],
        [names[3], names[4]],
    ]


def test_too_old_rollouts_are_dropped_and_counted_once(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    put(0, step=0), put(1, step=1), put(2, step=2)
    feed = RolloutFeed(exchange, 5, 1, never)
    assert take(feed, 5) == [1, 2]  # lags 4 and 3; that of 0 is 5, one over maxSteps
    assert feed.dropped == 1
    put(3, step=5), put(4, step=5)
    assert take(feed, 6) == [3, 4]
    assert feed.dropped == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"made_by": 3}, "made by weights v00000003-i0001, not v00000000-i0001"),
        ({"group_size": 3}, "3 completions; groupSize is 2"),
    ],
)
def test_a_rollout_that_is_not_what_it_is_named_goes_to_quarantine(
    exchange: Exchange, put: Callable[..., RolloutName], fields: dict[str, int], reason: str
) -> None:
    bad = put(0, **fields)
    put(1), put(2)
    exchange.sleep = lambda seconds: None
    assert take(RolloutFeed(exchange, 0, 1, never), 0) == [1, 2]
    assert exchange.list_quarantined() == [bad]
    assert reason in (exchange.root / "quarantine" / "rollouts" / f"{bad}.safetensors.reason.json").read_text()


def test_only_what_a_checkpoint_covers_is_deleted(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    for seq in range(4):
        put(seq)
    feed = RolloutFeed(exchange, 0, 1, never)
    take(feed, 0), take(feed, 1)
    feed.retire(1)  # a durable checkpoint holds step 0's update
    assert [name.seq for name in exchange.list_taken()] == [2, 3]


def test_a_learner_that_died_while_deleting_does_not_train_the_rest_again(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(3):
        put(seq)
    take(
        RolloutFeed(exchange, 0, 1, never), 0
    )  # 0 and 1 are trained; the checkpoint of step 1 is durable, nothing is deleted
    resumed = RolloutFeed(exchange, 1, 2, never)
    resumed.retire(1)
    assert (exchange.list_taken(), [name.seq for name in exchange.list_rollouts()]) == ([], [2])
    with pytest.raises(Stop):
        resumed.take(1)  # one rollout is not enough, and no old one fills up


def test_a_replay_stops_when_told_and_is_left_to_the_next_incarnation(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    put(0), put(1)
    take(RolloutFeed(exchange, 0, 1, never), 0)
    assert RolloutFeed(exchange, 0, 2, lambda: True).take(0) is None
    assert take(RolloutFeed(exchange, 0, 3, never), 0) == [0, 1]


def test_a_waiting_feed_stops_when_told(exchange: Exchange) -> None:
    assert RolloutFeed(exchange, 0, 1, lambda: True).take(0) is None


def test_a_rollout_of_a_later_version_is_left_where_it_is_and_others_are_trained(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    later = put(0)
    path = exchange.root / "rollouts" / f"{later}.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"protocol":"1"', b'"protocol":"2"'))
    put(1), put(2)
    feed = RolloutFeed(exchange, 0, 1, never)
    assert take(feed, 0) == [1, 2]
    assert later in exchange.list_rollouts()
    assert exchange.list_quarantined() == []


def test_a_rollout_made_after_its_lease_had_ended_is_not_trained(exchange: Exchange) -> None:
    old = exchange.acquire_slot(lambda: [FAR])
    exchange.beat(old, SlotStatus(), released=True)
    in_time = {rollout_name(seq): rollout_of([1.0, 1.0], lease_epoch=old.epoch) for seq in (0, 1)}
    exchange.put_rollouts(old, in_time)
    assert exchange.acquire_slot(lambda: [FAR]).first_seq == 2
    late = rollout_name(2)
    # As from a holder that froze after it had asked and before it published.
    builders.put(exchange, {late: rollout_of([1.0, 1.0], lease_epoch=old.epoch)}, epoch=99)
    builders.put(exchange, {rollout_name(3): rollout_of([1.0, 1.0], lease_epoch=2)}, epoch=99)
    feed = RolloutFeed(exchange, 0, 1, never)
    assert take(feed, 0) == [0, 1]
    with pytest.raises(Stop):
        feed.take(1)
    assert exchange.list_quarantined() == [late]


def test_what_the_learner_waits_for_is_told_by_slot_version_and_time(
    exchange: Exchange, put: Callable[..., RolloutName], caplog: pytest.LogCaptureFixture
) -> None:
    exchange = exchange_at(
        exchange.root,
        run_of(
            learner={"batch": {"groups": 2}, "stallSeconds": 1e-9},
            algorithm={"groupSize": 2, "staleness": {"maxSteps": 4}},
            samplers=[{"name": "far", "replicas": 2}],
        ),
        clock=lambda: 1_767_225_600.0,
    )
    put(0, step=1), put(1, step=6)  # too old for step 7, and young enough
    lease = exchange.acquire_slot(lambda: [FAR])
    exchange.beat(lease, SlotStatus(state="waiting: queue", version="v00000006-i0001", rejected=3))
    looks = iter([False, False, False, True])
    assert RolloutFeed(exchange, 7, 1, lambda: next(looks)).take(7) is None
    since = time.strftime("%H:%M:%S", time.localtime(1_767_225_600.0))
    assert caplog.messages[-1] == (
        f"step 7 has waited since {since} for 2 groups made with weights of step 3 or newer, and 1 are there."
        " The slots: far-0: waiting: queue, on weights v00000006-i0001, has refused 3 versions; far-1: has not started"
    )


def test_a_journalled_step_of_other_prompts_is_not_replayed(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    names = [put(seq) for seq in range(2)]
    take(RolloutFeed(exchange, 0, 1, never), 0)
    edited = exchange_at(
        exchange.root,
        run_of(
            learner={"batch": {"groups": 2}}, algorithm={"groupSize": 2}, rewards=[{"name": "accuracy", "weight": 2.0}]
        ),
        sleep=no_sleep,
    )
    wanted = {rollout_name(seq): rollout_of([1.0, 1.0], provenance=edited.provenance) for seq in (2, 3)}
    builders.put(edited, wanted)
    feed = RolloutFeed(edited, 0, 2, never)
    assert take(feed, 0) == [2, 3]
    assert edited.read_journal()[0].dropped == names
    assert (feed.mismatched, feed.dropped) == (2, 2)


OTHER_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "template": ({"promptTemplate": "think"}, "as before"),
    "data": ({}, "another digest"),
}


@pytest.mark.parametrize("changed", OTHER_PROMPTS)
def test_rollouts_of_other_prompts_are_dropped_journalled_and_counted(
    exchange: Exchange, put: Callable[..., RolloutName], changed: str
) -> None:
    data, digest = OTHER_PROMPTS[changed]
    before = Provenance.of(exchange.spec, "as before")
    builders.put(exchange, {rollout_name(seq): rollout_of([1.0, 1.0], provenance=before) for seq in range(3)})
    run = run_of(learner={"batch": {"groups": 2}}, algorithm={"groupSize": 2}, data=data)
    edited = exchange_at(exchange.root, run, sleep=no_sleep)
    edited.mark_prepared(data={"train": DataCount(rows=1, skipped=0, digest=digest)})
    wanted = {rollout_name(seq): rollout_of([1.0, 1.0], provenance=edited.provenance) for seq in (3, 4)}
    builders.put(edited, wanted)
    feed = RolloutFeed(edited, 0, 1, never)
    assert take(feed, 0) == [3, 4]
    entry = edited.read_journal()[0]
    assert (entry.dropped, entry.mismatched) == ([rollout_name(seq) for seq in range(3)], 3)
    assert (feed.mismatched, feed.dropped, edited.list_quarantined()) == (3, 3, [])


def test_what_poison_a_restarted_learner_finds_in_the_journal_counts_as_the_first(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(4):
        put(seq)
    died = RolloutFeed(exchange, 0, 1, never)
    batch = died.take(0)
    assert batch is not None
    died.set_aside(batch, "a loss of inf")
    assert exchange.list_quarantined() == batch.names
    resumed = RolloutFeed(exchange, 0, 2, never)
    again = resumed.take(0)
    assert again is not None
    assert [name.seq for name in again.names] == [2, 3]
    assert resumed.poisoned == 2
    with pytest.raises(TrainingError, match="diverged"):
        resumed.set_aside(again, "a loss of inf")
    assert exchange.list_quarantined() == batch.names


# ── a batch ahead ────────────────────────────────────────────────────────────────────────────────────────────────────
def ahead(feed: RolloutFeed, step: int) -> None:
    """Look ahead, and wait until that batch is found."""
    feed.look_ahead(step)
    assert feed._ahead is not None
    feed._ahead[1].result()


def test_a_batch_that_was_looked_for_ahead_is_journalled_and_packed_and_told_when_it_is_taken(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    put(0, step=0), put(1, step=1), put(2, step=1), put(3, step=5), put(4, step=5)
    with RolloutFeed(exchange, 4, 1, never, pack=len) as feed:
        assert take(feed, 4) == [0, 1]
        ahead(feed, 5)
        assert [entry.step for entry in exchange.read_journal()] == [4, 5]
        # For samplers the batch ahead still waits: it counts towards the steps until what they make now is trained.
        assert feed.taken == {"far-0": 1}
        assert dict(feed.waiting(5)[0]) == {"far-0": 3}
        batch = feed.take(5)
        assert batch is not None
        assert [name.seq for name in batch.names] == [2, 3]
        assert batch.packed == 2
        assert feed.taken == {"far-0": 3}


def test_lag_is_counted_at_the_step_that_trains_a_batch_and_not_when_it_is_looked_for(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(3):
        put(seq, step=0)
    with RolloutFeed(exchange, 4, 1, never) as feed:
        assert take(feed, 4) == [0, 1]  # lag 4, the most that is allowed
        put(3, step=4), put(4, step=4)
        ahead(feed, 5)  # while step 4 trains, rollout 2 has a lag of 4; when step 5 does, of 5
        assert feed.dropped == 0
        assert take(feed, 5) == [3, 4]
        assert feed.dropped == 1
    assert [[name.seq for name in entry.dropped] for entry in exchange.read_journal()] == [[], [2]]


def test_what_comes_while_a_step_trains_is_found_ahead(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    patient = exchange_at(exchange.root, exchange.run, sleep=time.sleep)
    put(0), put(1), put(2)
    with RolloutFeed(patient, 0, 1, never) as feed:
        assert take(feed, 0) == [0, 1]
        feed.look_ahead(1)
        put(3)
        assert take(feed, 1) == [2, 3]


@pytest.mark.parametrize(
    ("waited_s", "poll_s", "expected_s"),
    [(0.0, 0.5, 0.02), (1.0, 0.5, 0.1), (10.0, 0.5, 0.5), (50.0, 0.5, 1.0), (1000.0, 0.5, 2.0), (1000.0, 30.0, 30.0)],
)
def test_a_learner_looks_the_less_often_for_rollouts_the_longer_it_has_waited(
    waited_s: float, poll_s: float, expected_s: float
) -> None:
    assert pause_s(waited_s, poll_s) == pytest.approx(expected_s)


def test_online_nothing_is_looked_for_ahead(exchange: Exchange, put: Callable[..., RolloutName]) -> None:
    run = run_of(mode="online", learner={"batch": {"groups": 2}}, algorithm={"groupSize": 2})
    online = exchange_at(exchange.root, run, sleep=no_sleep)
    put(0), put(1)
    with RolloutFeed(online, 0, 1, never) as feed:
        assert take(feed, 0) == [0, 1]
        put(2, step=1), put(3, step=1)
        feed.look_ahead(1)
        assert len(online.read_journal()) == 1
        assert take(feed, 1) == [2, 3]


def test_a_learner_that_dies_with_a_batch_ahead_trains_exactly_it_when_it_resumes(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(4):
        put(seq)
    died = RolloutFeed(exchange, 0, 1, never)
    take(died, 0)
    ahead(died, 1)
    put(4), put(5)
    resumed = RolloutFeed(exchange, 1, 2, never)  # the checkpoint of step 1 was durable
    assert take(resumed, 1) == [2, 3]
    assert take(resumed, 2) == [4, 5]
    assert [(entry.step, entry.incarnation) for entry in exchange.read_journal()] == [(0, 1), (1, 1), (2, 2)]


def test_a_learner_that_ends_in_order_takes_back_what_it_looked_for_ahead(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(4):
        put(seq)
    stopped: list[bool] = []
    with RolloutFeed(exchange, 0, 1, lambda: bool(stopped)) as feed:
        take(feed, 0)
        ahead(feed, 1)
        stopped.append(True)
        assert feed.take(1) is None
    assert [[name.seq for name in entry.names] for entry in exchange.read_journal()] == [[0, 1]]
    with RolloutFeed(exchange, 1, 2, never) as feed:
        feed.look_ahead(1)
        feed.take_back()
    assert len(exchange.read_journal()) == 1
    assert take(RolloutFeed(exchange, 1, 3, never), 1) == [2, 3]


def test_what_is_looked_for_ahead_in_a_replay_is_not_taken_back(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(4):
        put(seq)
    died = RolloutFeed(exchange, 0, 1, never)
    take(died, 0), take(died, 1)
    with RolloutFeed(exchange, 0, 2, never) as feed:
        take(feed, 0)
        ahead(feed, 1)
        feed.take_back()
    assert [[name.seq for name in entry.names] for entry in exchange.read_journal()] == [[0, 1], [2, 3]]


def test_poison_gives_back_the_batch_that_was_looked_for_ahead(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(4):
        put(seq)
    with RolloutFeed(exchange, 0, 1, never) as feed:
        batch = feed.take(0)
        assert batch is not None
        ahead(feed, 1)
        feed.set_aside(batch, "a loss of inf")
        assert [(entry.step, len(entry.names), len(entry.poisoned)) for entry in exchange.read_journal()] == [(0, 0, 2)]
        assert take(feed, 0) == [2, 3]
        assert feed.taken == {"far-0": 3}


def test_an_error_while_looking_ahead_is_raised_when_the_batch_is_needed(
    exchange: Exchange, put: Callable[..., RolloutName]
) -> None:
    for seq in range(4):
        put(seq)
    with RolloutFeed(exchange, 0, 1, never) as feed:
        take(feed, 0)
        exchange.begin_incarnation()
        exchange.incarnation = 0  # a newer learner has begun
        feed.look_ahead(1)
        with pytest.raises(Superseded):
            feed.take(1)
    assert len(exchange.read_journal()) == 1
