"""The learner's loop.

    resume ─▶ take ─▶ forward, backward ─▶ step ─▶ publish, checkpoint when due ─▶ record ──┐
               ▲                                                                            │
               └────────────────────────────────────────────────────────────────────────────┘

It waits for nothing but enough admissible rollouts. Every rank runs the same loop; rank 0 alone touches the volume,
except that all ranks read rollouts and write their part of a checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import LearnerHeartbeat
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import LearnerSpec
from heterorl_learner import ranks
from heterorl_learner.completion_log import completions_log
from heterorl_learner.engines.base import TrainingEngine
from heterorl_learner.hf_export import write_model
from heterorl_learner.publish import Publisher
from heterorl_learner.rollout_feed import RolloutFeed, StepBatch
from heterorl_learner.train_step import learning_rate, num_tokens, rollout_metrics, train_on

log = logging.getLogger(__name__)


@dataclass
class TrainerState:
    """What a checkpoint holds beside the engine's own state."""

    step: int = 0
    """Optimizer steps in the weights."""
    num_tokens: int = 0
    """Tokens trained on so far."""


class Trainer:
    """One incarnation of the learner, on one of its ranks."""

    def __init__(self, exchange: Exchange, engine: TrainingEngine, metrics: Metrics, stop: Callable[[], bool]) -> None:
        self.exchange, self.engine, self.metrics = exchange, engine, metrics
        self.spec = exchange.spec
        self.incarnation: int = ranks.agree(exchange.begin_incarnation() if engine.rank == 0 else None)
        exchange.incarnation = self.incarnation
        self.state = self._resume()
        self.feed = RolloutFeed(exchange, self.state.step, self.incarnation, stop)
        self.publisher = Publisher(exchange, engine, self.incarnation)
        self.learner: LearnerSpec = ranks.agree(exchange.spec.learner)
        self.told: dict[str, float] = {}  # of the last step, for the heartbeat
        self.log_completions = completions_log(exchange) if engine.rank == 0 else lambda batch: None

    def train(self) -> bool:
        """Train to the last step or until told to stop; True if the last step was reached."""
        self._begin()
        while self._goes_on():
            learner = self.learner
            batch = self.feed.take(self.state.step)
            if batch is None:
                break
            started = time.monotonic()
            metrics = train_on(self.engine, self.spec, batch)
            rate = learning_rate(learner, self.state.step)
            grad_norm = self.engine.step(rate)
            trained_s = time.monotonic() - started
            self.state.step += 1
            if self.state.step % learner.publish.every_steps == 0 or self.state.step == learner.steps:
                self.publisher.publish(self.state.step)
            publish_s = time.monotonic() - started - trained_s
            self._record(batch, metrics | {"grad_norm": grad_norm, "learning_rate": rate}, trained_s, publish_s)
            if self.state.step % learner.checkpoint.every_steps == 0:
                self._checkpoint()
        return self._finish()

    def _goes_on(self) -> bool:
        """Whether there are steps to train. Rank 0 reads that anew: they may be added to a live run."""
        self.learner = ranks.agree(self.exchange.spec.learner)
        return self.state.step < self.learner.steps

    # ── beginning and end ────────────────────────────────────────────────────────────────────────────────────────────
    def _resume(self) -> TrainerState:
        """Load the newest checkpoint that passes its checks; without one, start from the prepared model."""
        found: tuple[Path, dict[str, Any]] | None = None
        if self.engine.rank == 0:
            self.exchange.sweep()
            found = self.exchange.open_newest_checkpoint()
        found = ranks.agree(found)
        if found is None:
            return TrainerState()
        folder, state = found
        self.engine.load(folder)
        log.info("resumed from the checkpoint of step %d", state["step"])
        return TrainerState(**state)

    def _begin(self) -> None:
        if self.engine.rank == 0:
            # What a learner that died published after this checkpoint belongs to a future that will not come.
            versions = self.exchange.list_versions()
            for version in versions:
                if version.step > self.state.step:
                    self.exchange.unpin(version)
            self.exchange.retire_weights(v for v in versions if v.step <= self.state.step)
            self.feed.retire(self._covered())
        self.publisher.publish(self.state.step)
        self._heartbeat()

    def _finish(self) -> bool:
        finished = self.state.step >= self.learner.steps
        if ranks.agree(self.state.step not in self.exchange.list_checkpoints()):
            self._checkpoint()
        if finished:
            write_model(self.exchange, self.engine, self.exchange.output_dir)
        self.publisher.close()
        self._heartbeat(finished=finished)
        log.info("%s at step %d of %d", "finished" if finished else "stopped", self.state.step, self.learner.steps)
        return finished

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _checkpoint(self) -> None:
        step = self.state.step
        if self.engine.rank == 0:
            self.exchange.stage_checkpoint(step)
        ranks.barrier()
        folder = self.exchange.staged_checkpoint(step)
        self.engine.save(folder)
        write_model(self.exchange, self.engine, folder / "model")
        ranks.barrier()
        if self.engine.rank == 0:
            self.exchange.commit_checkpoint(step, asdict(self.state))
            for old in self.exchange.list_checkpoints()[: -self.spec.learner.checkpoint.keep]:
                self.exchange.remove_checkpoint(old)
            self.feed.retire(self._covered())
        ranks.barrier()

    def _covered(self) -> int:
        """Rollouts of steps before this one are in every checkpoint that is kept."""
        return min(self.exchange.list_checkpoints(), default=0)

    # ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _record(self, batch: StepBatch, metrics: dict[str, float], trained_s: float, publish_s: float) -> None:
        tokens = num_tokens(batch.rollouts)
        self.state.num_tokens += tokens
        if self.engine.rank != 0:
            return
        record = rollout_metrics(batch) | metrics
        record |= {
            "num_tokens": self.state.num_tokens,
            "lag/dropped": self.feed.dropped,
            "step_time": batch.wait_s + trained_s + publish_s,
            "perf/train_s": trained_s,
            "perf/publish_s": publish_s,
            "perf/tokens_per_s": tokens / trained_s,
        }
        self.metrics.write(self.state.step, record)
        self.log_completions(batch)
        self.told = record
        self._heartbeat()
        log.info(
            "step %d/%d  reward %.3f  lag %.1f (max %d)  loss %.4f  grad_norm %.3f  waited %.1f s",
            self.state.step,
            self.learner.steps,
            record["reward"],
            record["lag/mean"],
            record["lag/max"],
            record["loss"],
            record["grad_norm"],
            batch.wait_s,
        )

    def _heartbeat(self, *, finished: bool = False) -> None:
        if self.engine.rank == 0:
            self.exchange.write_learner(
                LearnerHeartbeat(
                    step=self.state.step,
                    steps=self.learner.steps,
                    incarnation=self.incarnation,
                    version=self.publisher.version,
                    checkpoint_step=max(self.exchange.list_checkpoints(), default=None),
                    taken=dict(self.feed.taken),
                    dropped=self.feed.dropped,
                    finished=finished,
                    reward=self.told.get("reward"),
                    lag=self.told.get("lag/mean"),
                )
            )
