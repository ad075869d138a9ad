"""The learner's loop.

    resume ─▶ take ─▶ forward, backward ─▶ step ─▶ publish, checkpoint when due ─▶ record ──┐
               ▲                                                                            │
               └────────────────────────────────────────────────────────────────────────────┘

It waits for nothing but enough admissible rollouts. Threads of rank 0 look for the next batch, write weights and
checkpoints, and delete what these no longer need; the training thread only copies what is to be written. Every rank
runs the same loop; rank 0 alone touches the volume, except that all ranks read rollouts and write their part of a
checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from heterorl.errors import NotFinite
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import LearnerHeartbeat
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import LearnerSpec
from heterorl_learner import ranks
from heterorl_learner.checkpoints import Checkpoints
from heterorl_learner.completion_log import CompletionLog
from heterorl_learner.engines.torch_ddp import TrainingEngine
from heterorl_learner.hf_export import write_output
from heterorl_learner.publish import Publisher
from heterorl_learner.rollout_feed import RolloutFeed, StepBatch
from heterorl_learner.train_step import ess_factor, learning_rate, num_tokens, pack_step, rollout_metrics, train_on

log = logging.getLogger(__name__)


class Trainer:
    """One incarnation of the learner, on one of its ranks."""

    def __init__(self, exchange: Exchange, engine: TrainingEngine, metrics: Metrics, stop: Callable[[], bool]) -> None:
        self.exchange, self.engine, self.metrics = exchange, engine, metrics
        self.spec = exchange.spec
        self.learner: LearnerSpec = self.spec.learner
        self.incarnation = ranks.agree(exchange.begin_incarnation() if engine.rank == 0 else 0)
        exchange.incarnation = self.incarnation
        self.checkpoints = Checkpoints(exchange, engine)
        self.state = self.checkpoints.resume()
        self.feed = RolloutFeed(
            exchange, self.state.step, self.incarnation, stop, lambda rollouts: pack_step(engine, self.spec, rollouts)
        )
        self.checkpoints.retire = self.feed.retire
        self.publisher = Publisher(exchange, engine, self.incarnation)
        self.told: dict[str, float] = {}  # of the last step, for the heartbeat
        self.completions = CompletionLog(exchange, self.incarnation, wanted=engine.rank == 0)

    def train(self) -> bool:
        """Train to the last step or until told to stop; True if the last step was reached."""
        with self.publisher, self.checkpoints, self.feed:
            self._begin()
            while self._goes_on() and (batch := self.feed.take(self.state.step)):
                if self.state.step + 1 < self.learner.steps:
                    self.feed.look_ahead(self.state.step + 1)
                if (metrics := self._update(batch)) is None:
                    continue  # the batch was poison and is set aside
                if self.state.step % self.learner.publish.every_steps == 0 or self.state.step == self.learner.steps:
                    metrics["perf/publish_s"] = self.publisher.publish(self.state.step)
                self._record(batch, metrics)
                if self.state.step % self.learner.checkpoint.every_steps == 0:
                    self.checkpoints.save(self.state)
                self.checkpoints.check()
            return self._finish()

    def _goes_on(self) -> bool:
        """Whether there are steps to train. Rank 0 reads that anew: they may be added to a live run."""
        self.learner = ranks.agree(self.exchange.spec.learner)
        return self.state.step < self.learner.steps

    def _update(self, batch: StepBatch) -> dict[str, float] | None:
        """Train one step and return its metrics; None, with nothing changed, when its batch is poison.

        That is a loss or gradient that is not finite, twice: once may be the machine's doing.
        """
        started, reason = time.monotonic(), ""
        for _ in range(2):
            self.completions.forget()
            metrics = train_on(self.engine, self.spec, batch, self.completions.see)
            rate = learning_rate(self.learner, self.state.step) * ess_factor(self.learner, metrics)
            try:
                metrics |= {"grad_norm": self.engine.step(rate), "learning_rate": rate}
            except NotFinite as error:
                reason = str(error)
                log.warning("step %d: %s", batch.step, reason)
                continue
            self.state.step += 1
            self.state.num_tokens += num_tokens(batch.rollouts)
            return metrics | {"perf/train_s": time.monotonic() - started}
        self.feed.set_aside(batch, reason)
        return None

    # ── beginning and end ────────────────────────────────────────────────────────────────────────────────────────────
    def _begin(self) -> None:
        if self.engine.rank == 0:
            self.publisher.retire_lost_future(self.state.step)
            self.feed.retire(self.checkpoints.covered)
        self.publisher.publish(self.state.step)
        self._heartbeat()

    def _finish(self) -> bool:
        finished = self.state.step >= self.learner.steps
        if ranks.agree(self.checkpoints.saved != self.state.step):
            self.checkpoints.save(self.state)
        if finished:
            write_output(self.exchange, self.engine)
        self.publisher.wait()
        self.checkpoints.wait()
        self.feed.take_back()
        self.completions.close()
        self._heartbeat(finished=finished)
        log.info("%s at step %d of %d", "finished" if finished else "stopped", self.state.step, self.learner.steps)
        return finished

    # ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _record(self, batch: StepBatch, metrics: dict[str, float]) -> None:
        if self.engine.rank != 0:
            return
        train_s, publish_s = metrics["perf/train_s"], metrics.get("perf/publish_s", 0.0)
        record = rollout_metrics(self.spec, batch) | metrics
        record |= {
            "num_tokens": self.state.num_tokens,
            "lag/dropped": self.feed.dropped - self.feed.mismatched,
            "rollouts/mismatched": self.feed.mismatched,
            "rollouts/poisoned": self.feed.poisoned,
            "step_time": batch.wait_s + train_s + publish_s,
            "perf/publish_s": publish_s,
            "perf/tokens_per_s": num_tokens(batch.rollouts) / train_s,
        }
        self.metrics.write(self.state.step, record)
        self.completions.write(batch)
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
            waiting, late = self.feed.waiting(self.state.step)
            self.exchange.write_learner(
                LearnerHeartbeat(
                    step=self.state.step,
                    steps=self.learner.steps,
                    incarnation=self.incarnation,
                    version=self.publisher.version,
                    checkpoint_step=self.checkpoints.newest,
                    taken=dict(self.feed.taken),
                    waiting=dict(waiting),
                    late=dict(late),
                    dropped=self.feed.dropped,
                    finished=finished,
                    reward=self.told.get("reward"),
                    lag=self.told.get("lag/mean"),
                )
            )
