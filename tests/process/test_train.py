"""The learner's loop, alone with its exchange: what it trains with, keeps and deletes, how it resumes, what it tells."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import exchange_at, put, rollout_name, rollout_of, run_of, spec_of
from heterorl.errors import RunFolderError, TrainingError
from heterorl.exchange.canary import Canary
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation
from heterorl.exchange.rollout import Rollout
from heterorl.exchange.version import Version
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import HeteroRLRun
from heterorl_learner.engines.build import build_engine
from heterorl_learner.engines.torch_ddp import LossFunction, Sequence, TrainingEngine, micro_batch
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train import Trainer
from heterorl_learner.train_step import train_on

pytestmark = pytest.mark.usefixtures("every_version_is_published")


def run_with(steps: int, learner: Mapping[str, Any] | None = None, **spec: Any) -> HeteroRLRun:
    return run_of(
        model={"dtype": "float32"},
        learner={
            "steps": steps,
            "batch": {"groups": 1},
            "optimizer": {"learningRate": 0.5},
            "schedule": {"type": "linear", "warmupRatio": 0.0},
            **(learner or {}),
        },
        **{"algorithm": {"groupSize": 2}, "exchange": {"pollSeconds": 0.01}, **spec},
    )


@pytest.fixture
def exchange(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Exchange:
    """A prepared run of 2 steps, with rollouts for 5."""
    exchange = exchange_at(tmp_path / "run", run_with(2))
    exchange.model_dir.symlink_to(tiny_model_dir(tokenizer=True))
    exchange.data_file("train").parent.mkdir()
    exchange.data_file("train").write_text(json.dumps({"prompt_ids": [3, 4, 5]}) + "\n")
    exchange.mark_prepared()
    for seq in range(5):
        put(exchange, {rollout_name(seq): rollout_of()})
    return exchange


@pytest.fixture
def engine(exchange: Exchange) -> TrainingEngine:
    return build_engine(exchange.model_dir, exchange.spec)


class Watch:
    """Where the learner's metrics go; calls back at each step."""

    def __init__(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.records: list[dict[str, Any]] = []
        self._at_step = at_step

    def write(self, record: Mapping[str, Any]) -> None:
        if "step" in record:
            self.records.append(dict(record))
            self._at_step(record["step"])

    def close(self) -> None:
        """Nothing to let go."""


def test_steps_added_to_a_live_run_are_trained_under_the_schedule_of_the_new_total(
    exchange: Exchange, engine: TrainingEngine
) -> None:
    watch = Watch(lambda step: exchange.create(run_with(4)) if step == 1 else None)
    assert Trainer(exchange, engine, Metrics([watch]), lambda: False).train()
    assert [record["step"] for record in watch.records] == [1, 2, 3, 4]
    # Linear from 0.5 to 0: the first of 2 steps, then the second, third and fourth of 4.
    rates = [record["learning_rate"] for record in watch.records]
    assert rates == pytest.approx([0.5, 0.5 * 3 / 4, 0.5 * 2 / 4, 0.5 * 1 / 4])
    assert (exchange.learner.step, exchange.learner.steps, exchange.learner.finished) == (4, 4, True)
    assert Version(4, 1) in exchange.list_versions()
    assert exchange.trained


def test_the_rate_goes_with_the_root_of_the_effective_sample_size(exchange: Exchange, engine: TrainingEngine) -> None:
    exchange.create(run_with(2, {"optimizer": {"learningRate": 0.1, "essScaling": True}}))
    watch = Watch()
    assert Trainer(Exchange(exchange.root), engine, Metrics([watch]), lambda: False).train()
    shares = [record["ratio/ess"] for record in watch.records]
    assert all(0.5 <= share < 0.999 for share in shares)  # of two completions with unequal weights
    # Linear from 0.1 to 0 in two steps: 0.1 and 0.05.
    expected = [rate * share**0.5 for rate, share in zip((0.1, 0.05), shares)]
    assert [record["learning_rate"] for record in watch.records] == pytest.approx(expected)


@pytest.mark.usefixtures("own_process_group")
@pytest.mark.parametrize("strategy", ["torch", "zero2"])
def test_the_reference_is_the_starting_model_however_far_the_learner_is(exchange: Exchange, strategy: str) -> None:
    penalty = {"klToReference": {"weight": 0.1}}
    run = run_with(
        4, {"strategy": strategy}, monitoring={"entropyEverySteps": 2}, algorithm={"groupSize": 2, **penalty}
    )
    exchange.create(run)
    anew = Exchange(exchange.root)
    engine = build_engine(anew.model_dir, anew.spec)
    batch = micro_batch([Sequence(np.array([3]), np.array([4, 5]), np.zeros(2, np.float32), group=0, advantage=0.0)])
    at_start = engine.score(batch)
    watch = Watch()
    assert Trainer(anew, engine, Metrics([watch]), lambda: False).train()
    kl = [record["reference_kl"] for record in watch.records]
    assert kl[0] == pytest.approx(0.0, abs=1e-9)
    assert min(kl[1:]) > 1e-3
    assert not torch.allclose(engine.score(batch), at_start, atol=0.1)
    torch.testing.assert_close(engine.reference_logps(batch), at_start)
    # at steps 0 and 2, after which the records of steps 1 and 3 are written
    assert [("entropy" in record) for record in watch.records] == [True, False, True, False]
    assert 0 < watch.records[0]["entropy"] < math.log(24)


def test_a_run_is_never_made_shorter_while_it_runs(exchange: Exchange, engine: TrainingEngine) -> None:
    watch = Watch(lambda step: exchange.create(run_with(1)))
    assert Trainer(exchange, engine, Metrics([watch]), lambda: False).train()
    assert exchange.learner.step == 2


def test_a_finished_learner_still_tells_the_reward_and_lag_of_its_last_step(
    exchange: Exchange, engine: TrainingEngine
) -> None:
    Trainer(exchange, engine, Metrics(), lambda: False).train()
    # Rewards 1 and 0; weights of step 0, trained when one step was done.
    assert (exchange.learner.reward, exchange.learner.lag) == (0.5, 1.0)


def test_rollouts_are_kept_from_the_edit_on_that_says_so(exchange: Exchange, engine: TrainingEngine) -> None:
    keep = {"exchange": {"pollSeconds": 0.01, "retention": {"keepRollouts": True}}}
    watch = Watch(lambda step: exchange.create(run_with(2, **keep)) if step == 1 else None)
    Trainer(exchange, engine, Metrics([watch]), lambda: False).train()
    archived = sorted(path.name for path in (exchange.root / "archive").iterdir())
    assert [name.partition("--s")[2] for name in archived] == ["0000000000.safetensors", "0000000001.safetensors"]


# ── what it trains with ──────────────────────────────────────────────────────────────────────────────────────────────
def sampled_at(temperature: float, model_dir: Path) -> Rollout:
    """A rollout whose log-probabilities are the starting model's at that temperature, by transformers' plain forward."""
    rollout = rollout_of(lengths=[2, 1])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    logp = []
    for completion in ([7, 8], [9]):
        ids = torch.tensor([[5, 6, *completion]])
        every = torch.log_softmax(model(ids).logits[0].detach() / temperature, dim=-1)
        logp += [float(every[1 + i, token]) for i, token in enumerate(completion)]
    sampling = rollout.provenance.sampling.model_copy(update={"temperature": temperature})
    provenance = rollout.provenance.model_copy(update={"sampling": sampling})
    return rollout_of(lengths=[2, 1], logp=logp, provenance=provenance)


@pytest.mark.parametrize("now", [0.6, 1.0])
def test_a_rollout_is_trained_at_the_temperature_that_it_was_sampled_at(exchange: Exchange, now: float) -> None:
    exchange = exchange_at(exchange.root, run_with(1, generation={"temperature": now}))
    exchange.retire_rollouts(exchange.list_rollouts(), archive=False)
    put(exchange, {rollout_name(9): sampled_at(0.6, exchange.model_dir)})
    record = records_of(exchange)[0]
    # The learner's weights are the sampler's: every ratio is 1, whatever temperature the run samples at by now.
    assert record["ratio/min"] == pytest.approx(1, abs=1e-5)
    assert record["ratio/max"] == pytest.approx(1, abs=1e-5)
    assert record["mismatch_kl"] == pytest.approx(0, abs=1e-6)
    assert record["rollouts/other_sampling"] == (now != 0.6)


def test_rollouts_made_with_other_rewards_are_dropped_and_counted(exchange: Exchange) -> None:
    exchange = exchange_at(exchange.root, run_with(2, rewards=[{"name": "length"}]))
    wanted = rollout_of(provenance=exchange.provenance)
    for seq in (5, 6):
        put(exchange, {rollout_name(seq): wanted})
    records = records_of(exchange)
    assert [record["rollouts/mismatched"] for record in records] == [5, 5]
    assert [record["lag/dropped"] for record in records] == [0, 0]
    assert [[name.seq for name in entry.names] for entry in exchange.read_journal()] == [[5], [6]]
    assert [name.seq for name in exchange.read_journal()[0].dropped] == [0, 1, 2, 3, 4]


def test_the_best_checkpoint_by_an_evaluation_stays(exchange: Exchange) -> None:
    learner = {**SMALL, "checkpoint": {"everySteps": 1, "keep": 1, "keepBest": "sums"}}
    evaluated = {"data": {"evals": [{"label": "sums"}]}, "evaluation": {"everySteps": 1}}
    exchange = exchange_at(exchange.root, run_with(4, learner, **evaluated))

    def evaluate(step: int) -> None:
        if step < 4:
            mean = {1: 0.2, 2: 0.7, 3: 0.4}[step]
            exchange.write_eval(Version(step, 1), Evaluation(average=mean, sets={"sums": {"mean": mean}}))

    engine = build_engine(exchange.model_dir, exchange.spec)
    assert Trainer(exchange, engine, Metrics([Watch(evaluate)]), lambda: False).train()
    assert exchange.list_checkpoints() == [2, 4]


# ── what it keeps and deletes ────────────────────────────────────────────────────────────────────────────────────────
SMALL = {"optimizer": {"learningRate": 1e-3}}
EVERY_VERSION = {"pollSeconds": 0.01, "retention": {"weights": 10}}


def records_of(exchange: Exchange, stop: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
    """Train to the end, or until told to stop; what was recorded of each step."""
    watch = Watch()
    Trainer(exchange, build_engine(exchange.model_dir, exchange.spec), Metrics([watch]), stop).train()
    return watch.records


def test_weights_are_published_at_the_start_every_so_often_and_at_the_end(exchange: Exchange) -> None:
    exchange = exchange_at(exchange.root, run_with(5, {**SMALL, "publish": {"everySteps": 2}}, exchange=EVERY_VERSION))
    records_of(exchange)
    assert [version.step for version in exchange.list_versions()] == [0, 2, 4, 5]


def test_checkpoints_are_saved_every_so_often_and_at_the_end_and_the_newest_few_kept(exchange: Exchange) -> None:
    seen: list[list[int]] = []
    exchange = exchange_at(exchange.root, run_with(5, {**SMALL, "checkpoint": {"everySteps": 2, "keep": 2}}))

    def look(step: int) -> None:
        trainer.checkpoints.wait()
        seen.append(exchange.list_checkpoints())

    engine = build_engine(exchange.model_dir, exchange.spec)
    trainer = Trainer(exchange, engine, Metrics([Watch(look)]), lambda: False)
    trainer.train()
    assert seen == [[], [], [2], [2], [2, 4]]  # told of a step before its checkpoint is saved
    assert exchange.list_checkpoints() == [4, 5]


def test_what_the_oldest_kept_checkpoint_covers_and_only_that_is_retired(exchange: Exchange) -> None:
    exchange = exchange_at(exchange.root, run_with(4, {**SMALL, "checkpoint": {"everySteps": 1, "keep": 2}}))
    records_of(exchange)
    # Checkpoints 3 and 4 are kept. Rollout n was trained by step n + 1: 0, 1 and 2 are in both; going back to 3 takes
    # rollout 3 again; 4 was never trained.
    assert exchange.list_checkpoints() == [3, 4]
    assert [[name.seq for name in names] for names in (exchange.list_taken(), exchange.list_rollouts())] == [[3], [4]]


# ── how it resumes ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def damaged(exchange: Exchange) -> Exchange:
    """The run after four steps, with checkpoints of 2 and 4, of which a byte of the newer one has changed."""
    learner = {**SMALL, "checkpoint": {"everySteps": 2, "keep": 2}}
    exchange = exchange_at(exchange.root, run_with(4, learner, exchange=EVERY_VERSION))
    records_of(exchange)
    flip_a_byte(exchange, 4)
    exchange = exchange_at(exchange.root, run_with(5, learner, exchange=EVERY_VERSION))
    return exchange


def flip_a_byte(exchange: Exchange, step: int) -> None:
    path = exchange.root / "checkpoints" / f"step-{step:08d}" / "engine.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_it_resumes_from_the_checkpoint_before_a_damaged_one_which_is_kept_aside(damaged: Exchange) -> None:
    newest = damaged.root / "checkpoints" / "step-00000004" / "engine.pt"
    contents = newest.read_bytes()
    assert [record["step"] for record in records_of(damaged)] == [3, 4, 5]
    assert damaged.trained
    assert [path.read_bytes() for path in (damaged.root / "quarantine").rglob("engine.pt")] == [contents]
    # Replayed as it was journalled the first time: rollout 2 in the third step, 3 in the fourth.
    assert [[name.seq for name in entry.names] for entry in damaged.read_journal()] == [[0], [1], [2], [3], [4]]


def test_a_resumed_learner_goes_on_with_the_weights_of_its_checkpoint(damaged: Exchange, tmp_path: Path) -> None:
    records_of(damaged, stop=lambda: True)  # resumes at step 2 and publishes what it has
    fetched = [damaged.fetch_weights(Version(2, incarnation), tmp_path / str(incarnation)) for incarnation in (1, 2)]
    before, after = (load_file(version.folder / "model.safetensors") for version in fetched)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_versions_of_a_future_that_was_lost_are_retired_before_any_is_published_pinned_or_not(
    damaged: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged.pin(Version(3, 1))
    assert [version.step for version in damaged.list_versions()] == [0, 1, 2, 3, 4]
    before: list[list[str]] = []
    commit = Exchange.commit_weights

    def looking(exchange: Exchange, version: Version, canary: Canary, **ways: Any) -> None:
        before.append(exchange.files.list(exchange.root / "weights"))
        commit(exchange, version, canary, **ways)

    monkeypatch.setattr(Exchange, "commit_weights", looking)
    records_of(damaged, stop=lambda: True)
    assert before == [[str(Version(step, 1)) for step in (0, 1, 2)]]
    assert damaged.list_versions() == [Version(0, 1), Version(1, 1), Version(2, 1), Version(2, 2)]


def test_it_does_not_begin_anew_when_no_checkpoint_can_be_used(damaged: Exchange) -> None:
    flip_a_byte(damaged, 2)
    with pytest.raises(RunFolderError, match=r"failurePolicy\.startOver: true to start again at step 0"):
        records_of(damaged)
    assert damaged.list_checkpoints() == [2, 4]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_costs_no_rollout(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = {**SMALL, "checkpoint": {"everySteps": 2, "keep": 1}}
    exchange = exchange_at(exchange.root, run_with(5, learner))
    undisturbed = Exchange(shutil.copytree(exchange.root, exchange.root.with_name("undisturbed"), symlinks=True))
    commit = Exchange.commit_checkpoint

    def fails(exchange: Exchange, step: int, state: dict[str, Any]) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(exchange, step, state)

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(Exchange, "commit_checkpoint", fails)
        with pytest.raises(OSError, match="No space left"):
            records_of(exchange)
    assert exchange.list_checkpoints() == [2]
    assert {name.seq for name in [*exchange.list_taken(), *exchange.list_rollouts()]} >= {
        2,
        3,
        4,
    }  # those that the checkpoint of 2 does not hold
    records_of(exchange)
    records_of(undisturbed)
    assert [entry.names for entry in exchange.read_journal()] == [entry.names for entry in undisturbed.read_journal()]
    ours, theirs = (load_file(run.root / "output" / "model.safetensors") for run in (exchange, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_learner_that_is_told_to_stop_takes_back_what_it_had_looked_for_ahead(exchange: Exchange) -> None:
    exchange = exchange_at(exchange.root, run_with(5, SMALL))
    told: list[int] = []
    records_of(exchange, stop=lambda: bool(told) or (exchange.step == 2 and told.append(1) is None))
    assert exchange.learner.step == 2
    assert [entry.step for entry in exchange.read_journal()] == [0, 1]
    records_of(exchange)
    assert [[name.seq for name in entry.names] for entry in exchange.read_journal()] == [[0], [1], [2], [3], [4]]


# ── what is not finite ───────────────────────────────────────────────────────────────────────────────────────────────
POISON = [3e38, -3e38]
"""Rewards that a rollout may have, and whose loss overflows."""


def test_a_poison_batch_is_set_aside_journalled_and_counted_and_training_goes_on(exchange: Exchange) -> None:
    exchange = exchange_at(exchange.root, run_with(2, SMALL))
    exchange.retire_rollouts([rollout_name(0)], archive=False)
    put(exchange, {rollout_name(0): rollout_of(POISON)})
    records = records_of(exchange)
    assert [record["rollouts/poisoned"] for record in records] == [1, 1]
    assert exchange.list_quarantined() == [rollout_name(0)]
    first, second = exchange.read_journal()
    assert (first.names, first.poisoned) == ([rollout_name(1)], [rollout_name(0)])
    assert (second.names, second.poisoned) == ([rollout_name(2)], [])
    # The optimizer saw nothing of it: the step's gradient is that of a run without it.
    assert all(math.isfinite(record["grad_norm"]) for record in records)


def test_a_loss_that_is_not_finite_once_leaves_no_trace(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = Exchange(shutil.copytree(exchange.root, exchange.root.with_name("undisturbed"), symlinks=True))
    expected = records_of(undisturbed)
    forward_backward, factors = TrainingEngine.forward_backward, [math.nan]

    def disturbed(engine: TrainingEngine, batches: Any, loss_function: LossFunction) -> float:
        factor = factors.pop() if factors else 1.0
        return forward_backward(engine, batches, lambda micro, logp: loss_function(micro, logp) * factor)

    monkeypatch.setattr(TrainingEngine, "forward_backward", disturbed)
    found = records_of(exchange)
    assert caplog.text.count("loss and gradient must be finite") == 1
    for key in ("loss", "grad_norm", "learning_rate", "num_tokens", "rollouts/poisoned"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected]), key
    assert [record["rollouts/poisoned"] for record in found] == [0, 0]
    assert exchange.list_quarantined() == []
    assert exchange.read_journal() == undisturbed.read_journal()


def test_a_policy_that_has_diverged_is_told_from_poison_also_after_a_restart(exchange: Exchange) -> None:
    exchange = exchange_at(exchange.root, run_with(2, SMALL))
    exchange.retire_rollouts(exchange.list_rollouts(), archive=False)
    for seq in range(3):
        put(exchange, {rollout_name(seq): rollout_of(POISON)})
    for _ in range(2):
        with pytest.raises(TrainingError, match="with a second batch as well, so the policy has diverged"):
            records_of(exchange)
        assert exchange.list_quarantined() == [rollout_name(0)]
        assert [name.seq for name in [*exchange.list_taken(), *exchange.list_rollouts()]] == [1, 2]


# ── the arithmetic of a step ─────────────────────────────────────────────────────────────────────────────────────────
def test_a_step_whose_completions_are_all_masked_changes_nothing(tiny_model_dir: Callable[..., Path]) -> None:
    spec = spec_of(model={"dtype": "float32"}, algorithm={"groupSize": 2, "maskTruncated": True})
    engine = build_engine(tiny_model_dir(), spec)
    before = engine.full_state_dict()
    batch = StepBatch(3, [rollout_name(0)], [rollout_of([1.0, 0.0], truncated=[True, True])], wait_s=0.0)
    assert train_on(engine, spec, batch) == {"loss": 0.0, "kl_to_sampler": 0.0}
    assert engine.step(1e-3) == 0.0
    after = engine.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
