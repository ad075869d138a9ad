"""The learner's checkpoints: the one it resumes from, saving, how many are kept, and what they cover."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heterorl.exchange.exchange import Exchange
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
        """Save the engine and the state, then delete the oldest checkpoints beyond `learner.checkpoint.keep`."""
        if self._engine.rank == 0:
            self._exchange.stage_checkpoint(state.step)
        ranks.barrier()
        folder = self._exchange.staged_checkpoint(state.step)
        self._engine.save(folder)
        save_model(self._exchange, self._engine, folder / "model")
        ranks.barrier()
        if self._engine.rank == 0:
            self._exchange.commit_checkpoint(state.step, asdict(state))
            for old in self._exchange.list_checkpoints()[: -self._exchange.spec.learner.checkpoint.keep]:
                self._exchange.remove_checkpoint(old)
        ranks.barrier()

    @property
    def newest(self) -> int | None:
        """Step of the newest one; None before the first."""
        return max(self._exchange.list_checkpoints(), default=None)

    @property
    def covered(self) -> int:
        """Steps before this one are in the weights of every checkpoint that is kept: their rollouts can be retired."""
        return min(self._exchange.list_checkpoints(), default=0)
