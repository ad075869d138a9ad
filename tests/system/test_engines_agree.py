"""The engines compute the same: one process, DDP, and ZeRO 1, 2 and 3 on the same recorded batches.

Two processes under torchrun run all distributed engines one after the other (most of the time goes into imports); this
file is their script as well as the test.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import rollout_of
from heterorl.entry import leave
from heterorl.errors import NotFinite, UserError
from heterorl.spec.run import RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.build import build_engine
from heterorl_learner.engines.torch_ddp import LossFunction, MicroBatch, Sequence, TrainingEngine, micro_batch
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import plan, train_on

STEPS, STOP = 10, 5
TOKEN_BUDGET = 64
WHOLE = ["torch", "zero1", "zero2", "zero3"]
DISTRIBUTED = [*WHOLE, *(f"{strategy} lora" for strategy in WHOLE)]
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Trajectory:
    """What a run leaves: the step's loss over all ranks, the gradient norm, the final weights, and their scores."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    scores: Tensor


def recorded_batch(step: int) -> list[Sequence]:
    """The same on every rank and for every engine; 7 sequences, so that two ranks never have equally much to do."""
    rng = np.random.default_rng(step)
    lengths = [(rng.integers(1, 10), rng.integers(1, 50)) for _ in range(7)]
    return [
        Sequence(
            rng.integers(24, size=prompt).astype(np.int32),
            rng.integers(24, size=completion).astype(np.int32),
            np.zeros(completion, np.float32),
            group=0,
            advantage=rng.uniform(0.5, 1.5),  # of one sign, so that the loss is no small difference of large numbers
        )
        for prompt, completion in lengths
    ]


CANARY = micro_batch(recorded_batch(1000))


def policy_gradient(batch: MicroBatch, logp: Tensor) -> Tensor:
    return -(logp * batch.advantages[batch.seq_ids]).sum() / 100


def flipped(batch: MicroBatch, logp: Tensor) -> Tensor:
    loss = policy_gradient(batch, logp)
    return 2 * loss.detach() - loss  # the same value, the opposite gradient


def run_spec(strategy: str) -> RunSpec:
    """Of a strategy, or of one with LoRA; then the loss keeps near the starting model as well."""
    strategy, _, lora = strategy.partition(" ")
    return RunSpec.model_validate(
        {
            "samplers": [{"name": "near"}],
            "model": {"dtype": "float32", "lora": {"rank": 4 if lora else 0}},
            "learner": {"strategy": strategy, "optimizer": {"weightDecay": 0.01}},
            "algorithm": {"klToReference": {"weight": 1.0 if lora else 0.0}},
        }
    )


def near_the_start(engine: TrainingEngine, loss_function: LossFunction) -> LossFunction:
    """With a penalty on what the engine says of the starting model, if it is one with a reference."""

    def with_penalty(batch: MicroBatch, logp: Tensor) -> Tensor:
        reference = engine.reference_logps(batch)
        loss = loss_function(batch, logp)
        return loss if reference is None else loss + (logp - reference).square().sum() / 100

    return with_penalty


def train(
    engine: TrainingEngine, steps: range, loss_function: LossFunction, publish: bool = False
) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    loss_function = near_the_start(engine, loss_function)
    for step in steps:
        if publish:  # what the learner does between steps must not touch training
            engine.score(CANARY)
            engine.full_state_dict()
        batches = plan(recorded_batch(step), TOKEN_BUDGET, rank=engine.rank, world_size=engine.world_size)
        loss = torch.tensor(engine.forward_backward(batches, loss_function))
        if engine.world_size > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        norms.append(engine.step(3e-4))
    return losses, norms


def run_through(folder: Path, strategy: str, loss_function: LossFunction = policy_gradient) -> Trajectory:
    engine = build_engine(folder, run_spec(strategy))
    losses, norms = train(engine, range(STEPS), loss_function)
    return Trajectory(losses, norms, engine.full_state_dict(), engine.score(CANARY))


def run_with_a_stop(folder: Path, strategy: str, checkpoint: Path) -> Trajectory:
    first = build_engine(folder, run_spec(strategy))
    before = train(first, range(STOP), policy_gradient, publish=True)
    checkpoint.mkdir(parents=True, exist_ok=True)
    first.save(checkpoint).write()
    ranks.barrier()
    second = build_engine(folder, run_spec(strategy))
    second.load(checkpoint)
    after = train(second, range(STOP, STEPS), policy_gradient, publish=True)
    losses, norms = before[0] + after[0], before[1] + after[1]
    return Trajectory(losses, norms, second.full_state_dict(), second.score(CANARY))


# ── corrections ──────────────────────────────────────────────────────────────────────────────────────────────────────
CORRECTIONS: dict[str, dict[str, Any]] = {
    "truncate sequences": {"weight": {"type": "truncate", "level": "sequence", "high": 1.1}},
    "mask tokens": {"weight": {"type": "mask", "level": "token", "low": 0.8, "high": 1.2}},
    "reject by the geometric mean": {"reject": {"type": "geometric", "low": 0.95, "high": 1.05}},
    "reject by k3": {"reject": {"type": "k3", "maxK3": 0.02}},
    "opsm": {"opsmDelta": 0.02},
    "m2po": {"m2poTau": 0.02},
}


def stale_batch(engine: TrainingEngine) -> StepBatch:
    """Five groups whose samplers gave tokens other probabilities than the engine, by a factor of 1.2 or so."""
    rng = np.random.default_rng(5)
    lengths = (3, 5, 2, 6)
    rollouts = []
    for _ in range(5):
        rewards, prompt = rng.normal(size=4), np.array([5, 6], np.int32)
        tokens = np.split(np.arange(7, 23, dtype=np.int32), np.cumsum(lengths)[:-1])
        texts = [Sequence(prompt, part, np.zeros(len(part), np.float32), 0, 0.0) for part in tokens]
        logp = engine.score(micro_batch(texts)).numpy() + rng.normal(scale=0.2, size=16)
        rollouts.append(rollout_of(rewards, lengths, logp=logp))
    return StepBatch(step=1, names=[], rollouts=rollouts, wait_s=0.0)


def corrected(folder: Path, strategy: str) -> dict[str, dict[str, float]]:
    """What each correction makes of the same stale step, with a loss of tokens, of sequences and of groups."""
    engine = build_engine(folder, run_spec(strategy))
    batch, found = stale_batch(engine), {}
    for loss, (name, correction) in itertools.product(("grpo", "gspo", "gepo"), CORRECTIONS.items()):
        algorithm = {"loss": {"type": loss}, "groupSize": 4, "correction": correction}
        learner = {"strategy": strategy, "batch": {"tokensPerMicroBatch": 16}}
        pool = [{"name": "near"}]
        spec = RunSpec.model_validate({"samplers": pool, "algorithm": algorithm, "learner": learner})
        metrics = train_on(engine, spec, batch)
        found[f"{loss}, {name}"] = metrics | {"grad_norm": engine.step(0.0)}  # the weights stay
    return found


def refusals(folder: Path, strategy: str, whole: Trajectory) -> list[str]:
    """What the engine says when only rank 1's gradient, or only rank 1's loss, is not finite; "" if it goes on.

    `whole` is a run of the same steps in which neither happened.
    """
    engine = build_engine(folder, run_spec(strategy))
    train(engine, range(1), policy_gradient)
    before = engine.full_state_dict()

    def broken_gradient(batch: MicroBatch, logp: Tensor) -> Tensor:
        broken = (logp - logp.detach()).abs().sqrt().sum()  # 0, with an infinite slope
        return policy_gradient(batch, logp) + (broken if engine.rank == 1 else 0)

    def broken_loss(batch: MicroBatch, logp: Tensor) -> Tensor:
        return policy_gradient(batch, logp) + (math.inf if engine.rank == 1 else 0)

    messages = []
    for loss_function in (broken_gradient, broken_loss):
        try:
            train(engine, range(1, 2), loss_function)
            messages.append("")
        except NotFinite as error:
            messages.append(str(error))
    after = engine.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(engine, range(1, 3), policy_gradient) == (whole.losses[1:3], whole.norms[1:3])
    return messages


def main(folder: Path, out: Path) -> int:
    """A rank's work; rank 0 writes what it saw."""
    torch.set_num_threads(1)
    for strategy in DISTRIBUTED:
        whole = run_through(folder, strategy)
        stopped = run_with_a_stop(folder, strategy, out / f"checkpoint-{strategy}")
        messages = refusals(folder, strategy, whole)
        corrections = corrected(folder, strategy) if strategy in WHOLE else {}
        if os.environ["RANK"] == "0":
            torch.save({"whole": vars(whole), "stopped": vars(stopped)}, out / f"{strategy}.pt")
            (out / f"{strategy}.json").write_text(json.dumps(corrections))
            (out / f"{strategy}.txt").write_text("\n".join(messages))
    ranks.part()
    return 0


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(tied=True)


@pytest.fixture(scope="module")
def single(folder: Path) -> Callable[[str], Trajectory]:
    """Plain torch in one process and one thread, with LoRA or without: what all others are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {lora: run_through(folder, f"torch{lora}") for lora in ("", " lora")}
    torch.set_num_threads(threads)
    return lambda strategy: found[" lora" if strategy.endswith(" lora") else ""]


@pytest.fixture(scope="module")
def corrections_of_one(folder: Path) -> dict[str, dict[str, float]]:
    """By one process."""
    return corrected(folder, "torch")


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote."""
    out = tmp_path_factory.mktemp("engines")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder), str(out)]
    result = subprocess.run(
        [sys.executable, *launch],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    return out


@pytest.fixture(scope="module")
def distributed(out: Path) -> dict[str, dict[str, Trajectory]]:
    return {
        strategy: {name: Trajectory(**run) for name, run in torch.load(out / f"{strategy}.pt").items()}
        for strategy in DISTRIBUTED
    }


def assert_agree(found: Trajectory, expected: Trajectory, start: dict[str, Tensor]) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert set(found.weights) == set(expected.weights) == set(start)
    assert update_difference(found, expected, start) < 1e-3
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)


def update_difference(found: Trajectory, expected: Trajectory, start: dict[str, Tensor]) -> float:
    """|difference of the weights| over |change of the weights since the start|, in the Euclidean norm."""

    def norm(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum((one[name] - other[name]).double().square().sum().item() for name in start) ** 0.5

    return norm(found.weights, expected.weights) / norm(expected.weights, start)


@pytest.fixture(scope="module")
def start(folder: Path) -> Callable[[str], dict[str, Tensor]]:
    """What the engine of a strategy publishes first."""
    found = {lora: build_engine(folder, run_spec(f"torch{lora}")).full_state_dict() for lora in ("", " lora")}
    return lambda strategy: found[" lora" if strategy.endswith(" lora") else ""]


def test_the_recorded_batches_give_ranks_different_numbers_of_packs_and_some_none() -> None:
    plans = [
        [plan(recorded_batch(step), TOKEN_BUDGET, rank=rank, world_size=2) for rank in range(2)]
        for step in range(STEPS)
    ]
    assert len({len(of_rank[0]) for of_rank in plans}) > 1
    assert any(len(batch.lengths) == 0 for of_rank in plans for batches in of_rank for batch in batches)


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_two_processes_train_as_one_does(
    strategy: str,
    single: Callable[[str], Trajectory],
    distributed: dict[str, dict[str, Trajectory]],
    start: Callable[[str], dict[str, Tensor]],
) -> None:
    assert_agree(distributed[strategy]["whole"], single(strategy), start(strategy))


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_stopping_and_resuming_changes_nothing(
    strategy: str, distributed: dict[str, dict[str, Trajectory]], start: Callable[[str], dict[str, Tensor]]
) -> None:
    whole, stopped = distributed[strategy]["whole"], distributed[strategy]["stopped"]
    assert stopped.losses == whole.losses
    assert stopped.norms == whole.norms
    for name in start(strategy):
        assert torch.equal(stopped.weights[name], whole.weights[name]), name


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_all_ranks_refuse_a_step_in_which_one_has_a_number_that_is_not_finite_and_go_on_without_a_trace(
    strategy: str, out: Path
) -> None:
    gradient, loss = (out / f"{strategy}.txt").read_text().splitlines()
    assert "gradient norm of nan" in gradient
    assert "gradient norm of nan" in loss
    assert "inf on rank 1" in loss


@pytest.mark.usefixtures("own_process_group")
@pytest.mark.parametrize("strategy", WHOLE)
def test_corrections_look_at_whole_sequences_groups_and_steps_however_ranks_share_them(
    strategy: str, out: Path, corrections_of_one: dict[str, dict[str, float]]
) -> None:
    found = json.loads((out / f"{strategy}.json").read_text())
    assert found.keys() == corrections_of_one.keys()
    for name, expected in corrections_of_one.items():
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_the_corrections_of_the_comparison_correct_something(corrections_of_one: dict[str, dict[str, float]]) -> None:
    norms = {name: round(metrics["grad_norm"], 6) for name, metrics in corrections_of_one.items()}
    for loss in ("grpo", "gspo", "gepo"):
        assert len({norm for name, norm in norms.items() if name.startswith(loss)}) == len(CORRECTIONS)


def test_a_checkpoint_of_another_number_of_ranks_is_refused_with_what_to_do(folder: Path, out: Path) -> None:
    engine = build_engine(folder, run_spec("zero1"))
    with pytest.raises(UserError, match="optimizer state of 2 ranks, but this learner has 1"):
        engine.load(out / "checkpoint-zero1")


def test_a_flipped_gradient_fails_the_comparison(
    folder: Path, single: Callable[[str], Trajectory], start: Callable[[str], dict[str, Tensor]]
) -> None:
    wrong, right, before = run_through(folder, "torch", flipped), single("torch"), start("torch")
    with pytest.raises(AssertionError):
        assert_agree(wrong, right, before)
    assert wrong.losses[0] == right.losses[0]  # the first loss cannot tell
    assert update_difference(wrong, right, before) > 1


if __name__ == "__main__":
    leave(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
