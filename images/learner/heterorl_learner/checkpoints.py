"""The learner's checkpoints: the one it resumes from, saving, how many are kept, and what they cover."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heterorl.exchange.exchange import Exchange
from heterorl.spec.run import RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.torch_ddp import TrainingEngine
from heterorl_learner.hf_export import save_model

log = logging.getLogger(__name__)


@dataclass
class TrainerState:
    """What a checkpoint holds beside the engine's own state."""

    step: int = 0
    """Optimizer steps in the weights."""
    num_tokens: int = 0
    """Tokens trained on so far."""


class Checkpoints:
    """Checkpoints of one learner incarnation. All ranks call `resume` and `save` together."""

    def __init__(self, exchange: Exchange, engine: TrainingEngine) -> None:
        self._exchange, self._engine = exchange, engine

    def resume(self) -> TrainerState:
        """Load the newest checkpoint that can be used into the engine; a run without any starts at step 0.

        Raises RunFolderError when there are checkpoints and none can be used, and UnknownProtocol.
        """
        found: tuple[Path, dict[str, Any]] | None = None
        if self._engine.rank == 0:
            self._exchange.sweep()
            found = self._exchange.open_newest_checkpoint()
        found = ranks.agree(found)
        if found is None:
            return TrainerState()
        folder, state = found
        self._engine.load(folder)
        log.info("resumed from the checkpoint of step %d", state["step"])
        return TrainerState(**state)

    def save(self, state: TrainerState) -> None:
        """Save the engine and the state, then delete the checkpoints that need not be kept."""
        if self._engine.rank == 0:
            self._exchange.stage_checkpoint(state.step)
        ranks.barrier()
        folder = self._exchange.staged_checkpoint(state.step)
        self._engine.save(folder)
        save_model(self._exchange, self._engine, folder / "model")
        ranks.barrier()
        if self._engine.rank == 0:
            self._exchange.commit_checkpoint(state.step, asdict(state))
            saved = self._exchange.list_checkpoints()
            for old in sorted(set(saved) - set(to_keep(self._exchange.spec, saved, self._scores()))):
                self._exchange.remove_checkpoint(old)
        ranks.barrier()

    def _scores(self) -> dict[int, float]:
        """Each evaluated step's mean@k on the set of `keepBest`; of a step made anew that of its newest weights."""
        label, results = self._exchange.spec.learner.checkpoint.keep_best, self._exchange.read_evals()
        if label is None:
            return {}
        return {version.step: result.sets[label]["mean"] for version, result in results.items() if label in result.sets}

    @property
    def newest(self) -> int | None:
        """Step of the newest one; None before the first."""
        return max(self._exchange.list_checkpoints(), default=None)

    @property
    def covered(self) -> int:
        """Steps before this one are in the weights of the newest checkpoints: their rollouts can be retired."""
        return min(resumable(self._exchange.spec, self._exchange.list_checkpoints()), default=0)


def resumable(spec: RunSpec, steps: list[int]) -> list[int]:
    """The checkpoints that a run resumes from, of those with these steps."""
    return sorted(steps)[-spec.learner.checkpoint.keep :]


def to_keep(spec: RunSpec, steps: list[int], scores: dict[int, float]) -> list[int]:
    """The newest checkpoints, and with `keepBest` the one with the best score (of equals the later).

    One whose step is yet to be evaluated may be the best: it stays until a later step has its score.
    """
    kept = resumable(spec, steps)
    if spec.learner.checkpoint.keep_best is None:
        return kept
    evaluated = max(scores, default=-1)
    pending = [step for step in steps if step > evaluated and step % spec.evaluation.every_steps == 0]
    scored = [step for step in steps if step in scores]
    best = sorted(scored, key=lambda step: (scores[step], step))[-1:]
    return sorted({*kept, *pending, *best})
