"""Which checkpoints stay, and what a checkpoint is while it is written."""

import errno
import threading
from pathlib import Path

import pytest
import torch

from builders import exchange_at, run_of, spec_of
from heterorl.exchange.exchange import Exchange
from heterorl.spec.run import RunSpec
from heterorl_learner.checkpoints import Checkpoints, TrainerState, resumable, to_keep
from heterorl_learner.engines.torch_ddp import Saving


def spec(keep: int, keep_best: str | None = "sums") -> RunSpec:
    return spec_of(
        learner={"checkpoint": {"everySteps": 10, "keep": keep, "keepBest": keep_best}},
        evaluation={"everySteps": 20},
        data={"evals": [{"label": "sums"}]},
    )


def test_the_newest_stay():
    assert to_keep(spec(2, keep_best=None), [10, 20, 30, 40], {20: 0.9}) == [30, 40]


def test_the_best_stays_beside_the_newest():
    assert to_keep(spec(1), [20, 40, 60, 70], {0: 0.95, 20: 0.9, 40: 0.5, 60: 0.6}) == [20, 70]
    assert resumable(spec(1), [20, 70]) == [70]  # only what a run resumes from holds rollouts


def test_of_equals_the_later_stays():
    assert to_keep(spec(1), [20, 40, 60], {20: 0.5, 40: 0.5, 60: 0.1}) == [40, 60]


def test_what_is_yet_to_be_evaluated_stays_until_a_later_step_is():
    assert to_keep(spec(1), [20, 30, 40, 60, 70], {20: 0.5}) == [20, 40, 60, 70]
    # 40 has no result and will have none: evaluations come in order
    assert to_keep(spec(1), [20, 40, 60, 70], {20: 0.5, 60: 0.4}) == [20, 70]


def test_without_any_result_all_evaluated_steps_stay():
    assert to_keep(spec(1), [10, 20, 40, 50], {}) == [20, 40, 50]


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class OneNumberEngine:
    """A model of one number, whose checkpoints are written when a test lets them be."""

    rank, adapter_config = 0, None

    def __init__(self) -> None:
        self.number = 1.0
        self.may_write, self.error = threading.Event(), None

    def save(self, folder: Path) -> Saving:
        copied = torch.tensor([self.number])

        def write() -> None:
            assert self.may_write.wait(60)
            if self.error is not None:
                raise self.error
            torch.save(copied, folder / "engine.pt")

        return Saving(write, lambda: {"weight": copied})

    def load(self, folder: Path) -> None:
        self.number = torch.load(folder / "engine.pt").item()


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    exchange = exchange_at(tmp_path / "run", run_of(learner={"checkpoint": {"keep": 2}}))
    exchange.model_dir.mkdir()
    exchange.begin_incarnation()
    return exchange


def test_a_checkpoint_counts_when_it_is_on_the_disk_and_holds_what_was_so_when_it_was_saved(exchange: Exchange) -> None:
    engine, retired = OneNumberEngine(), list[int]()
    with Checkpoints(exchange, engine) as checkpoints:
        checkpoints.retire = retired.append
        state = TrainerState(step=3, num_tokens=30)
        checkpoints.save(state)
        engine.number, state.step, state.num_tokens = 2.0, 4, 40  # training goes on
        checkpoints.check()
        assert (checkpoints.saved, checkpoints.newest, exchange.list_checkpoints(), retired) == (3, None, [], [])
        engine.may_write.set()
        checkpoints.wait()
        assert (checkpoints.newest, exchange.list_checkpoints(), retired) == (3, [3], [3])
    resumed = OneNumberEngine()
    assert Checkpoints(exchange, resumed).resume() == TrainerState(step=3, num_tokens=30)
    assert resumed.number == 1.0


def test_what_went_wrong_with_a_checkpoint_is_raised_later_and_it_covers_nothing(exchange: Exchange) -> None:
    engine, retired = OneNumberEngine(), list[int]()
    engine.error = OSError(errno.ENOSPC, "No space left on device")
    with Checkpoints(exchange, engine) as checkpoints:
        checkpoints.retire = retired.append
        checkpoints.save(TrainerState(step=3))
        checkpoints.check()  # not known yet
        engine.may_write.set()
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
        assert (checkpoints.newest, exchange.list_checkpoints(), retired) == (None, [], [])


def test_the_next_checkpoint_waits_until_the_one_before_is_written(exchange: Exchange) -> None:
    engine = OneNumberEngine()
    with Checkpoints(exchange, engine) as checkpoints:
        checkpoints.save(TrainerState(step=3))
        next_one = threading.Thread(target=checkpoints.save, args=[TrainerState(step=4)])
        next_one.start()
        next_one.join(0.2)
        assert next_one.is_alive()
        engine.may_write.set()
        next_one.join()
        checkpoints.wait()
    assert exchange.list_checkpoints() == [3, 4]
