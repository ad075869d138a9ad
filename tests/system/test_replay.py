"""The same recorded rollouts through every training engine, by the real learner process.

The rollouts all come from the starting policy, so nothing but the engine differs. Compared are each step's loss and
gradient norm and the update of the weights; a flipped gradient must fail that comparison.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # ten learner processes, one after the other

STEPS = 10
MANIFEST: dict[str, Any] = {
    "apiVersion": "heterorl.dev/v1alpha1",
    "kind": "HeteroRLRun",
    "metadata": {"name": "recorded"},
    "spec": {
        "model": {"dtype": "float32", "tiny": {"hiddenSize": 64, "numLayers": 2, "targetAccuracy": 0.1}},
        "data": {"train": {"arithmetic": {"digits": 1}}},
        "generation": {"maxPromptTokens": 16, "maxCompletionTokens": 6},
        "learner": {
            "steps": STEPS,
            "threads": 1,
            "batch": {"groups": 8, "tokensPerMicroBatch": 200},
            "optimizer": {"learningRate": 3e-4},
            "schedule": {"warmupRatio": 0.0},
            "checkpoint": {"everySteps": 1000},
        },
        "samplers": [
            {
                "name": "far",
                "engine": "transformers",
                "threads": 1,
                # weights of step 0 for the whole recording
                "delay": {
                    "distribution": "constant",
                    "model": "transit",
                    "unit": "steps",
                    "lower": 60,
                    "upper": 60,
                },
            }
        ],
        "exchange": {"retention": {"keepRollouts": True}, "pollSeconds": 0.05},
    },
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a run whose rollouts were kept."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "run.yaml").write_text(yaml.safe_dump(MANIFEST))
    command = [sys.executable, "-m", "heterorl", "run", "run.yaml", "--runs-dir", "runs"]
    subprocess.run(command, cwd=folder, check=True, timeout=400)
    return folder / "runs" / "recorded"


class Replay:
    """A copy of the recorded run before its first step, with the journal of what it is going to train on."""

    def __init__(self, recorded: Path, root: Path) -> None:
        self.root = root
        for name in ("model", "data", "archive"):
            shutil.copytree(recorded / name, root / ("rollouts" if name == "archive" else name))
        for name in ("rollouts", "taken"):  # the latter are not yet covered by the oldest checkpoint kept
            for path in (recorded / name).glob("v*"):
                shutil.copy(path, root / "rollouts")
        for name in ("prepared.json", "journal.jsonl"):
            shutil.copy(recorded / name, root / name)
        self._run = json.loads((recorded / "run.json").read_text())

    def train(self, strategy: str, processes: int, *, steps: int = STEPS) -> None:
        """Run the learner, or all its ranks, to that step."""
        self._run["spec"]["learner"] |= {"strategy": strategy, "processesPerReplica": processes, "steps": steps}
        (self.root / "run.json").write_text(json.dumps(self._run))
        learner = ["-m", "heterorl_learner", "--root", str(self.root)]
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(ranks + learner if processes > 1 else learner)]
        result = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr

    def curve(self, name: str) -> torch.Tensor:
        """A metric of every step."""
        lines = map(json.loads, (self.root / "metrics" / "learner.jsonl").read_text().splitlines())
        return torch.tensor([line[name] for line in lines if "step" in line], dtype=torch.float64)

    def update(self) -> torch.Tensor:
        """What training added to the weights, flat."""
        start = load_file(self.root / "model" / "model.safetensors")
        end = load_file(self.root / "output" / "model.safetensors")
        return torch.cat([(end[name] - start[name]).double().flatten() for name in sorted(end)])


@pytest.fixture
def replay(recorded: Path, tmp_path: Path) -> Replay:
    return Replay(recorded, tmp_path / "replay")


@pytest.fixture(scope="module")
def reference(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """Plain torch in one process."""
    replay = Replay(recorded, tmp_path_factory.mktemp("reference") / "replay")
    replay.train("torch", 1)
    return replay


def agrees(replay: Replay, reference: Replay) -> bool:
    same_loss = torch.allclose(replay.curve("loss"), reference.curve("loss"), rtol=0, atol=1e-4)
    same_norm = torch.allclose(replay.curve("grad_norm"), reference.curve("grad_norm"), rtol=1e-3)
    distance = (replay.update() - reference.update()).norm() / reference.update().norm()
    return bool(same_loss and same_norm and distance < 1e-3)


def test_a_replay_repeats_the_recording(reference: Replay, recorded: Path) -> None:
    lines = map(json.loads, (recorded / "metrics" / "learner.jsonl").read_text().splitlines())
    assert reference.curve("loss").tolist() == [line["loss"] for line in lines if "step" in line]


@pytest.mark.parametrize("strategy", ["torch", "zero1", "zero2", "zero3"])
def test_two_processes_of_every_engine_train_as_one_does(replay: Replay, reference: Replay, strategy: str) -> None:
    replay.train(strategy, 2)
    assert len(replay.curve("loss")) == STEPS
    assert agrees(replay, reference)


@pytest.mark.parametrize(
    ("strategy", "processes"), [("torch", 1), ("torch", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
)
def test_stopping_at_step_five_and_resuming_changes_nothing(
    replay: Replay, reference: Replay, strategy: str, processes: int
) -> None:
    replay.train(strategy, processes, steps=5)
    replay.train(strategy, processes)
    assert len(replay.curve("loss")) == STEPS
    if (strategy, processes) == ("torch", 1):
        assert torch.equal(replay.update(), reference.update())
    assert agrees(replay, reference)


def test_a_flipped_gradient_would_be_noticed(replay: Replay, reference: Replay) -> None:
    for path in (replay.root / "rollouts").glob("*.safetensors"):
        flip_rewards(path)
    replay.train("torch", 1)
    assert not agrees(replay, reference)


def flip_rewards(path: Path) -> None:
    from dataclasses import replace

    from heterorl.exchange.rollout import Rollout

    rollout = Rollout.from_bytes(path.read_bytes())
    path.write_bytes(replace(rollout, rewards=-rollout.rewards).to_bytes())
