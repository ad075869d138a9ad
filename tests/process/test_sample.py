"""One slot at work on a real exchange: its prompts go on where they stopped, and what is finished is never lost."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from builders import exchange_at, run_of
from heterorl.entry import Stop
from heterorl.errors import SiteError, UserError
from heterorl.exchange.canary import Canary
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import PromptEvidence, SlotStatus
from heterorl.exchange.rollout import Rollout, RolloutName
from heterorl.exchange.slots import Lease
from heterorl.exchange.version import Version
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import HeteroRLRun, Slot
from heterorl_learner.rollout_feed import waited_for
from heterorl_sampler.__main__ import Heartbeat, serve
from heterorl_sampler.activity import Activity
from heterorl_sampler.adaptive_order import build_order
from heterorl_sampler.engines.base import UNNAMED, Finished
from heterorl_sampler.engines.build import build_engine
from heterorl_sampler.engines.transformers import Reading, TransformersEngine
from heterorl_sampler.prompt_order import PromptOrder
from heterorl_sampler.sample import Sampler, load_rewards
from heterorl_sampler.scoring import Decoder, build_rewards
from heterorl_sampler.weight_sync import WeightSync

FAR = Slot("far", 0)
ROWS = [{"id": i, "prompt": "", "prompt_ids": [2 + i, 5], "answer": str(i), "columns": {}} for i in range(8)]


@pytest.fixture
def exchange(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Exchange:
    """A run of one sampler whose learner has published its first weights."""
    run = run_of(
        model={"dtype": "float32"},
        samplers=[{"name": "far", "engine": "transformers", "promptsPerBatch": 3}],
        algorithm={"groupSize": 2},
        generation={"maxCompletionTokens": 4},
        learner={"batch": {"groups": 1}},
        exchange={"pollSeconds": 0.01, "maxPendingGroups": 6},
    )
    exchange = exchange_at(tmp_path / "run", run)
    model, version = tiny_model_dir(tokenizer=True), Version(0, 1)
    shutil.copy(model / "model.safetensors", exchange.stage_weights(version))
    engine = build_engine("transformers", model, dtype="float32", max_model_len=64)
    exchange.commit_weights(version, Canary([[3, 4, 5]], engine.score([[3, 4, 5]])))
    return exchange


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine scores the last batch as well."""
    monkeypatch.setattr("heterorl_sampler.sample.LAST_SCORES_S", 60.0)


class Until(Stop):
    """Stops the sampler after so many batches of three, as SIGTERM would, or once it has waited so often for something.

    While it waits for rewards or fetches weights, something may still come.
    """

    def __init__(self, batches: int, waits: int = 60, status: SlotStatus | None = None) -> None:
        super().__init__()
        self.groups, self.waits, self.status = 3 * batches, waits, status or SlotStatus()

    def finished(self, groups: int) -> None:
        self.groups -= groups
        if self.groups <= 0:
            self.set()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits -= self.status.state != "waiting: rewards" and self.status.fetching is None
        if self.waits == 0:
            self.set()
        return super().wait(timeout)


class Watched(TransformersEngine):
    """Tells of every group it has generated."""

    until: Until

    def _choose_reading(self, tolerance: float) -> Reading:
        return "together"  # only the run's batches count, not those by which an engine tries itself

    def step(self) -> Finished:
        finished = super().step()
        self.until.finished(len(finished))
        return finished


PROMPTS = PromptOrder(ROWS, seed=0, share=0, shares=1)


def work(
    exchange: Exchange,
    model: Path,
    tmp_path: Path,
    batches: int,
    make_engine: type[Watched] = Watched,
    order: PromptOrder = PROMPTS,
) -> SlotStatus:
    """Lease the slot and sample so many batches, or until nothing but waiting is left; returns the slot's status."""
    lease, status = exchange.acquire_slot(lambda: [FAR]), SlotStatus()
    assert lease is not None
    scratch = tmp_path / "scratch"
    engine = make_engine(model, dtype="float32", max_running=6)  # three prompts
    engine.until = Until(batches, status=status)
    decoder = Decoder(AutoTokenizer.from_pretrained(model))
    try:
        with build_rewards(exchange.spec) as rewards:
            load_rewards(exchange, rewards)
            weights = WeightSync(exchange, engine, lease.slot, scratch)
            Sampler(
                exchange, lease, Activity(status), weights, engine, order, decoder, rewards, Metrics(), engine.until
            ).run()
    finally:
        exchange.beat(lease, status, released=True)
    return status


def walked(exchange: Exchange) -> list[tuple[int, int]]:
    """(sequence number, row) of every published group."""
    return [(name.seq, exchange.read_rollout(name).meta["row_id"]) for name in sorted(exchange.list_rollouts())]


def test_the_next_holder_of_a_slot_continues_with_its_next_prompts(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model_dir(tokenizer=True)
    work(exchange, model, tmp_path, 1)
    first = walked(exchange)
    work(exchange, model, tmp_path, 1)
    assert walked(exchange)[:3] == first
    assert [seq for seq, _ in walked(exchange)] == [0, 1, 2, 3, 4, 5]  # two batches of three
    assert len({row for _, row in walked(exchange)}) == 6  # no row twice within the epoch of eight


class Killed(Exception):
    """As a power failure: nothing of the sampler runs after it."""


def test_a_sampler_killed_while_it_publishes_uses_no_number_again(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, publish = tiny_model_dir(tokenizer=True), exchange.put_rollouts

    def killed(lease: Lease, rollouts: Mapping[RolloutName, Rollout]) -> None:
        publish(lease, rollouts)
        for name in rollouts:  # trained and deleted before the slot has its next holder
            (exchange.root / "rollouts" / f"{name}.safetensors").unlink()
        raise Killed

    monkeypatch.setattr(exchange, "put_rollouts", killed)
    with pytest.raises(Killed):
        work(exchange, model, tmp_path, 1)
    saved = exchange.load_slot(FAR)
    assert saved is not None
    assert saved.next_seq == 6  # three in generation, and as many queued behind them


def test_a_full_queue_holds_the_sampler_back(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    status = work(exchange, tiny_model_dir(tokenizer=True), tmp_path, 99)
    assert status.state == "waiting: queue"
    assert len(exchange.list_rollouts()) == 6  # maxPendingGroups


def test_online_what_another_slot_begins_while_these_weights_are_loaded_is_not_made_again(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    spec = exchange.run.resolved()["spec"]
    shared = changed(
        exchange,
        samplers=[{**spec["samplers"][0], "replicas": 2}],
        learner={"batch": {**spec["learner"]["batch"], "groups": 6}},
        mode="online",
    )
    lease = shared.acquire_slot(lambda: [Slot("far", 1)])
    assert lease is not None

    class SlowToLoad(Watched):
        def load_weights(self, folder: Path, version: Version = UNNAMED) -> None:
            super().load_weights(folder, version)
            shared.beat(lease, SlotStatus(version=str(version), made=1, promised=4))

    work(shared, tiny_model_dir(tokenizer=True), tmp_path, 99, SlowToLoad)
    assert len(shared.list_rollouts()) == 2  # of the version's six


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_stopped_sampler_publishes_its_finished_groups_and_its_successor_does_the_others(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path, finished: int
) -> None:
    class StoppedHalfway(Watched):
        """Is told to stop when one of the first three groups is finished and the others are not."""

        def step(self) -> Finished:
            while self._batch is None or self._batch.num_groups:
                if made := [(number, group) for number, group in super().step() if number == finished]:
                    self.until.set()
                    return made
            return []

    model = tiny_model_dir(tokenizer=True)
    order = [row["id"] for row in map(PROMPTS.row, range(6))]
    work(exchange, model, tmp_path, 1, StoppedHalfway)
    assert walked(exchange) == [(finished, order[finished])]
    work(exchange, model, tmp_path, 1)
    assert walked(exchange) == list(enumerate(order[:4]))  # those that were left come first
    saved = exchange.load_slot(FAR)
    assert saved is not None
    assert (saved.next_seq, saved.left) == (4, [])


def edited(exchange: Exchange, **pool: object) -> None:
    """The operator's edit of the sampler's pool, or of all pools with `samplers`."""
    tree = exchange.run.resolved()
    tree["spec"]["samplers"] = pool.pop("samplers", None) or [{**tree["spec"]["samplers"][0], **pool}]
    exchange.create(HeteroRLRun.model_validate(tree))


def publish_again(exchange: Exchange, version: Version) -> None:
    first = exchange.root / "weights" / str(Version(0, 1))
    shutil.copy(first / "model.safetensors", exchange.stage_weights(version))
    exchange.commit_weights(version, Canary(**json.loads((first / "canary.json").read_text())))


@pytest.mark.parametrize(("lower", "step"), [(0.0, 1), (1000.0, 0)])
def test_a_sampler_goes_on_under_an_edited_delay(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path, lower: float, step: int
) -> None:
    class Edited(Watched):
        edited = False

        def step(self) -> Finished:
            if self.until.groups == 3 * 99 and not self.edited:
                self.edited = True
                edited(exchange, delay={"distribution": "constant", "lower": lower})
                publish_again(exchange, Version(1, 1))
            return super().step()

    status = work(exchange, tiny_model_dir(tokenizer=True), tmp_path, 99, Edited)
    assert status.version_step == step  # it started without a delay, under which it would be 1


def test_a_sampler_whose_pool_is_removed_goes_on_until_its_pod_goes(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    class LosesItsGroup(Watched):
        def step(self) -> Finished:
            edited(exchange, samplers=[{"name": "other"}])
            return super().step()

    work(exchange, tiny_model_dir(tokenizer=True), tmp_path, 2, LosesItsGroup)
    assert [seq for seq, _ in walked(exchange)] == [0, 1, 2, 3, 4, 5]


def test_a_sampler_waits_until_its_pool_is_in_the_spec_and_the_run_is_prepared(exchange: Exchange) -> None:
    stop = Until(99, waits=3)
    serve(exchange, "far", None, stop)
    exchange.mark_prepared()
    stop = Until(99, waits=3)
    serve(exchange, "added", None, stop)
    assert stop.is_set()
    assert exchange.heartbeats() == {}


def changed(exchange: Exchange, **blocks: object) -> Exchange:
    """The run with other values in its spec, for a block those that are named, as a process that starts now sees it."""
    tree = exchange.run.resolved()
    for name, values in blocks.items():
        tree["spec"][name] = {**tree["spec"][name], **values} if isinstance(values, dict) else values
    exchange.create(HeteroRLRun.model_validate(tree))
    return Exchange(exchange.root)


def test_an_adaptive_order_knows_what_its_slots_last_holder_knew(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    adaptive, model = changed(exchange, data={"order": "adaptive"}), tiny_model_dir(tokenizer=True)
    order = build_order(adaptive.spec, FAR, ROWS, PromptEvidence())
    work(adaptive, model, tmp_path, 2, order=order)
    saved = adaptive.load_slot(FAR)
    assert saved is not None
    assert saved.prompts == order.evidence
    published = {name: adaptive.read_rollout(name) for name in adaptive.list_rollouts()}
    assert set(saved.prompts.seen) == {rollout.meta["row_id"] for rollout in published.values()}
    assert sum(count for count, _, _ in saved.prompts.seen.values()) == 2 * len(published)  # completions
    lease = adaptive.acquire_slot(lambda: [FAR])
    taken_over = adaptive.load_slot(FAR)
    assert lease is not None
    assert taken_over is not None
    assert (taken_over.next_seq, taken_over.prompts) == (6, saved.prompts)


# ── groups that teach nothing ────────────────────────────────────────────────────────────────────────────────────────
def test_groups_whose_rewards_are_equal_are_filtered_and_counted(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path, judged: Callable[..., Exchange]
) -> None:
    filtering = judged(
        changed(exchange, algorithm={"filterGroups": "zeroVariance"}), "if n % 2: return [0.3, 0.3 + 1e-3]"
    )
    status = work(filtering, tiny_model_dir(tokenizer=True), tmp_path, 3)
    drawn = [PROMPTS.row(seq)["id"] for seq in range(9)]
    assert walked(filtering) == [(seq, row) for seq, row in enumerate(drawn) if row % 2]
    assert all(len(filtering.read_rollout(name).rewards) == 2 for name in filtering.list_rollouts())  # whole groups
    assert (status.filtered, status.unrewarded) == (sum(row % 2 == 0 for row in drawn), 0)


@pytest.mark.parametrize("mode", ["hetero", "online"])
def test_a_sampler_whose_groups_are_all_filtered_goes_on_and_says_so(
    exchange: Exchange,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    judged: Callable[..., Exchange],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    monkeypatch.setattr("heterorl_sampler.sample.BARREN_GROUPS", 6)
    monkeypatch.setattr("heterorl.exchange.records.BARREN_GROUPS", 6)
    algorithm = {"filterGroups": "zeroVariance", "staleness": {"maxSteps": 64, "policy": "wait"}}
    filtering = judged(changed(exchange, algorithm=algorithm), "pass")  # everyone gets 1
    tree = filtering.run.resolved()
    tree["spec"]["mode"] = mode
    filtering.create(HeteroRLRun.model_validate(tree))
    batches = 3 if mode == "online" else 9  # online, a group at a time: the learner trains on one
    status = work(Exchange(filtering.root), tiny_model_dir(tokenizer=True), tmp_path, batches)
    made = 3 * batches
    assert (status.filtered, status.filtered_in_a_row, status.rollouts) == (made, made, made)
    assert filtering.list_rollouts() == []
    assert status.reward == 1
    assert "the last 6 groups taught nothing and were left out (algorithm.filterGroups)" in caplog.text
    assert "the same reward, 1 in the last of them" in caplog.text
    assert "all rewards are equal within each of its latest groups" in waited_for(filtering, 0, 0, time.time())


# ── rewards that fail, work that hangs ───────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Exchange]:
    """Factory of the run with a custom reward: `on_row` is the statement that it begins with, `n` the row's number."""

    def make(exchange: Exchange, on_row: str, **reward: object) -> Exchange:
        module = f"judge_{next(numbers)}"
        (tmp_path / f"{module}.py").write_text(
            "import pathlib, time\n"
            "def judge(completions, answer, **columns):\n"
            "    n = int(answer[0])\n"
            f"    {on_row}\n"
            "    return [1.0 for _ in completions]\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("heterorl_sampler.scoring.RETRY_S", 0.01)
        tree = exchange.run.resolved()
        tree["spec"]["rewards"] = [{"name": "custom", "path": f"{module}.judge", **reward}]
        tree["spec"]["exchange"]["maxPendingGroups"] = 99
        exchange.create(HeteroRLRun.model_validate(tree))
        return Exchange(exchange.root)  # as a process that starts now

    numbers = itertools.count()
    return make


def test_a_reward_that_fails_on_one_row_costs_that_group_only(
    exchange: Exchange,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    judged: Callable[..., Exchange],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fails = judged(exchange, "if n == 3: raise ValueError('no verdict')")
    status = work(fails, tiny_model_dir(tokenizer=True), tmp_path, 3)
    rows = [row for _, row in walked(exchange)]
    assert len(rows) + status.unrewarded == 9  # three batches of three; eight rows are an epoch
    assert 3 not in rows
    assert status.unrewarded in (1, 2)
    assert status.reward_failures == {"judge/error": 3 * status.unrewarded}  # each called three times
    assert "failed on row 3: ValueError: no verdict" in caplog.text
    assert ", line 4, in judge" in caplog.text


@pytest.mark.parametrize("policy", ["retry", "zero", "fail"])
def test_a_reward_that_fails_on_every_row_is_the_users_error_and_names_row_and_line(
    exchange: Exchange,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    judged: Callable[..., Exchange],
    policy: str,
) -> None:
    fails = judged(exchange, "raise ValueError('no verdict')", onError=policy, errorBudget=3)
    with pytest.raises(UserError, match=r"failed on row \d: ValueError: no verdict \(.*judge_0.py, line 4\)"):
        work(fails, tiny_model_dir(tokenizer=True), tmp_path, 99)
    made = [exchange.read_rollout(name).rewards.tolist() for name in exchange.list_rollouts()]
    assert made == ([[0, 0]] * 2 if policy == "zero" else [])


def test_a_reward_that_works_elsewhere_and_not_here_is_this_nodes_failure(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path, judged: Callable[..., Exchange]
) -> None:
    model = tiny_model_dir(tokenizer=True)
    work(exchange, model, tmp_path, 1)
    with pytest.raises(SiteError, match=r"no verdict.*fails here"):
        work(judged(exchange, "raise ValueError('no verdict')", onError="fail"), model, tmp_path, 99)
    with pytest.raises(SiteError, match=r"cannot be imported.*fails here"):
        work(judged(exchange, ") not Python"), model, tmp_path, 99)


def test_a_reward_that_cannot_be_imported_is_the_users_error_before_anything_is_generated(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path, judged: Callable[..., Exchange]
) -> None:
    with pytest.raises(UserError, match=r"cannot be imported: SyntaxError: .*judge_0.py, line 4"):
        work(judged(exchange, ") not Python"), tiny_model_dir(tokenizer=True), tmp_path, 99)


def test_generation_goes_on_while_rewards_are_computed_until_the_queue_is_full(
    exchange: Exchange, tiny_model_dir: Callable[..., Path], tmp_path: Path, judged: Callable[..., Exchange]
) -> None:
    """Nothing is scored before the third batch is generated."""
    third = tmp_path / "third"

    class Telling(Watched):
        def step(self) -> Finished:
            finished = super().step()
            if self.until.groups <= 3 * 96 and not third.exists():
                assert exchange.list_rollouts() == []
                third.touch()
            return finished

    waits = f"while not pathlib.Path({str(third)!r}).exists(): time.sleep(0.01)"
    status = work(judged(exchange, waits), tiny_model_dir(tokenizer=True), tmp_path, 99, Telling)
    assert [seq for seq, _ in walked(exchange)][:9] == list(range(9))
    assert status.unrewarded == 0


def test_what_is_being_scored_counts_as_queued(
    exchange: Exchange,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    judged: Callable[..., Exchange],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("heterorl_sampler.sample.LAST_SCORES_S", 0.1)
    hangs = judged(exchange, "time.sleep(1000)", timeLimitSeconds=900)
    tree = hangs.run.resolved()
    tree["spec"]["exchange"]["maxPendingGroups"] = 6
    hangs.create(HeteroRLRun.model_validate(tree))

    def stop_there(until: Until, timeout: float | None = None) -> bool:
        if until.status.state == "waiting: rewards":
            until.set()
        return until.is_set()

    monkeypatch.setattr(Until, "wait", stop_there)
    status = work(Exchange(hangs.root), tiny_model_dir(tokenizer=True), tmp_path, 99)
    assert status.state == "waiting: rewards"
    assert status.rollouts == 6
    assert exchange.list_rollouts() == []


def test_the_numbers_of_what_was_not_scored_at_a_stop_go_to_the_next_holder(
    exchange: Exchange,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    judged: Callable[..., Exchange],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("heterorl_sampler.sample.LAST_SCORES_S", 3.0)
    model, order = tiny_model_dir(tokenizer=True), [PROMPTS.row(seq)["id"] for seq in range(9)]
    work(judged(exchange, f"if n == {order[1]}: time.sleep(1000)", timeLimitSeconds=900), model, tmp_path, 2)
    done, saved = dict(walked(exchange)), exchange.load_slot(FAR)
    assert saved is not None
    assert done.keys() <= {0, 2}  # those that were finished before the one that hangs
    assert sorted([*done, *saved.left]) == list(range(saved.next_seq))
    work(judged(exchange, "pass"), model, tmp_path, 2)
    assert walked(exchange) == list(enumerate(order))[: 6 + len(done)]


def test_a_sampler_that_is_stuck_says_where_and_ends_as_a_failure_of_its_node(
    exchange: Exchange, caplog: pytest.LogCaptureFixture
) -> None:
    lease = exchange.acquire_slot(lambda: [FAR])
    assert lease is not None
    ended: list[int] = []
    activity = Activity(SlotStatus())
    activity.progress("scoring row 7")
    tree = exchange.run.resolved()
    tree["spec"]["exchange"]["leaseSeconds"] = 0.4
    exchange.create(HeteroRLRun.model_validate(tree))
    with Heartbeat(Exchange(exchange.root), lease, activity, threading.Event(), stuck_s=0.3, end=ended.append):
        time.sleep(1.0)
    assert ended == [3]
    assert "scoring row 7" in caplog.text
