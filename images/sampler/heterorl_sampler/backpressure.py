"""When a sampler waits instead of generating: pure functions of what it sees on the volume."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from heterorl.exchange.records import LearnerHeartbeat
from heterorl.exchange.rollout import RolloutName, Version
from heterorl.spec.run import RunSpec, Slot


@dataclass(frozen=True)
class Queue:
    """Groups that the learner has yet to take: not trained, not dropped, not too old to be.

    Those count as well that this slot has generated and that are being scored.
    """

    own: int
    """This slot's."""
    total: int
    """All slots'."""
    of_version: int
    """All slots', of the version this slot holds."""
    in_scoring: int = 0
    """This slot's that are not published yet."""


def pending(
    spec: RunSpec,
    published: Iterable[RolloutName],
    in_scoring: Collection[RolloutName],
    learner: LearnerHeartbeat,
    slot: Slot,
    version: Version,
) -> Queue:
    """Count what waits. A slot's rollouts are taken in order, so its last taken number tells the rest."""
    taken, step = learner.taken, learner.step
    waiting = [
        name
        for name in {*published, *in_scoring}
        if name.seq > taken.get(str(name.slot), -1) and step - name.version.step <= spec.max_lag
    ]
    own = sum(name.slot == slot for name in waiting)
    return Queue(own, len(waiting), sum(name.version == version for name in waiting), len(in_scoring))


def reason_to_wait(
    spec: RunSpec, version: Version, newest: Version, learner: LearnerHeartbeat, queue: Queue
) -> str | None:
    """Why not to generate now (`finished`, `weights`, `rewards`, `queue`, `staleness`), or None to go ahead.

    Online, a version gets as many groups as a step trains and then all samplers wait for the next. A full queue holds a
    slot back only while the learner has enough for a step, so that no slot ever waits for one that is gone. Weights
    that are already too old are not worth generating with; the `wait` policy pauses as soon as a rollout would be too
    old by the time the queue before it has been trained.
    """
    if learner.finished:
        return "finished"
    if spec.mode == "online" and (version != newest or queue.of_version >= spec.learner.batch.groups):
        return "weights"
    if queue.in_scoring >= spec.exchange.max_pending_groups:
        return "rewards"
    if queue.own >= spec.exchange.max_pending_groups and queue.total >= spec.learner.batch.groups:
        return "queue"
    turn = learner.step
    if spec.algorithm.staleness.policy == "wait":
        turn += queue.total // spec.learner.batch.groups
    if turn - version.step > spec.max_lag:
        return "staleness"
    return None


def batch_size(spec: RunSpec, prompts_per_batch: int, queue: Queue) -> int:
    """Prompts to generate for next: online no more than this slot's even share of what the version still lacks."""
    if spec.mode != "online":
        return prompts_per_batch
    lacking = spec.learner.batch.groups - queue.of_version
    share = -(-spec.learner.batch.groups // max(1, len(spec.slots)))
    return max(1, min(prompts_per_batch, share, lacking))
