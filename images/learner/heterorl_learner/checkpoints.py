"""The learner's checkpoints: the one it resumes from, saving, how many are kept, and what they cover.

all ranks: copy ──▶ rank 0's thread: write, checksum, rename, delete old checkpoints and the rollouts they covered
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from heterorl.exchange.exchange import Exchange
from heterorl.spec.run import RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.torch_ddp import Saving, TrainingEngine
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
    """Checkpoints of one learner incarnation. All ranks call `resume` and `save` together.

    A checkpoint is copied into memory by `save` and written by a thread of rank 0, one at a time. It counts when it is
    on the disk: then `retire` is called there with the step before which rollouts are no longer needed. What goes wrong
    is raised by the next call of `save`, `check` or `wait`. As a context it ends its thread, which first finishes.
    """

    def __init__(self, exchange: Exchange, engine: TrainingEngine) -> None:
        self._exchange, self._engine = exchange, engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.newest: int | None = None
        """Step of the newest one on the disk; None before the first."""
        self.saved: int | None = None
        """Step of the one that was saved last; it may still be being written."""
        self.retire: Callable[[int], None] = lambda step: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.shutdown()

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
        self.newest = self.saved = state["step"]
        return TrainerState(**state)

    def save(self, state: TrainerState) -> None:
        """Copy the engine and the state, and have them written; waits if the checkpoint before still is."""
        self.wait()
        if self._engine.rank == 0:
            self._exchange.stage_checkpoint(state.step)
        ranks.barrier()
        saving = self._engine.save(self._exchange.staged_checkpoint(state.step))
        self.saved = state.step
        if self._engine.rank == 0:
            self._pending = self._thread.submit(self._write, replace(state), saving)

    def check(self) -> None:
        """Raise what went wrong with the checkpoint before, if that is known by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when what was saved is on the disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    # ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _write(self, state: TrainerState, saving: Saving) -> None:
        saving.write()
        model = self._exchange.staged_checkpoint(state.step) / "model"
        save_model(self._exchange, saving.weights(), self._engine.adapter_config, model)
        self._exchange.commit_checkpoint(state.step, asdict(state))
        self.newest = state.step
        saved = self._exchange.list_checkpoints()
        for old in sorted(set(saved) - set(to_keep(self._exchange.spec, saved, self._scores()))):
            self._exchange.remove_checkpoint(old)
        self.retire(self.covered)

    def _scores(self) -> dict[int, float]:
        """Each evaluated step's mean@k on the set of `keepBest`; of a step made anew that of its newest weights."""
        label, results = self._exchange.spec.learner.checkpoint.keep_best, self._exchange.read_evals()
        if label is None:
            return {}
        return {version.step: result.sets[label]["mean"] for version, result in results.items() if label in result.sets}

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
