"""When a sampler waits instead of generating: pure functions of what it sees on the volume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from heterorl.exchange.records import LearnerHeartbeat, SlotHeartbeat
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
    own_of_version: int = 0
    """This slot's of the version that it holds, taken or not."""
    promised: int = 0
    """Of that version, what other slots are making."""


def pending(
    spec: RunSpec,
    published: Collection[RolloutName],
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
    return Queue(
        own,
        len(waiting),
        sum(name.version == version for name in waiting),
        len(in_scoring),
        own_of_version=sum(name.slot == slot and name.version == version for name in {*published, *in_scoring}),
    )


def promised_by_others(
    beats: Mapping[Slot, SlotHeartbeat],
    published: Iterable[RolloutName],
    slot: Slot,
    version: Version,
    *,
    fresh_since: float,
) -> int:
    """Groups of the version that other slots are making: promised in their heartbeats and not published yet.

    A slot that was released, or whose heartbeat is older than `fresh_since`, is gone with what it promised.
    """
    done = Counter(name.slot for name in published if name.version == version)
    return sum(
        max(0, beat.promised - done[other])
        for other, beat in beats.items()
        if other != slot and beat.version == str(version) and not beat.released and beat.time >= fresh_since
    )


def reason_to_wait(
    spec: RunSpec, version: Version, newest: Version, learner: LearnerHeartbeat, queue: Queue
) -> str | None:
    """Why not to generate now (`finished`, `weights`, `rewards`, `queue`, `staleness`), or None to go ahead.

    Online, a version gets as many groups as a step trains, counting those that are being made, and then all samplers
    wait for the next. A full queue holds a
    slot back only while the learner has enough for a step, so that no slot ever waits for one that is gone. Weights
    that are already too old are not worth generating with; the `wait` policy pauses as soon as a rollout would be too
    old by the time the queue before it has been trained.
    """
    if learner.finished:
        return "finished"
    if spec.mode == "online" and (version != newest or lacking(spec, queue) <= 0):
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


def lacking(spec: RunSpec, queue: Queue) -> int:
    """Groups of the version that no slot has made or is making, of those that a step trains."""
    return spec.learner.batch.groups - queue.of_version - queue.promised


def batch_size(spec: RunSpec, prompts_per_batch: int, queue: Queue, slot: Slot) -> int:
    """Prompts to generate for next: online no more than the version lacks, nor than this slot's share of a step.

    The shares of all slots make up a step exactly: so slots that begin at the same moment, when none has seen what the
    others promised, make no group too many. Later what one is late with another takes.
    """
    if spec.mode != "online":
        return prompts_per_batch
    groups, slots = spec.learner.batch.groups, spec.slots
    place = slots.index(slot) if slot in slots else 0
    share = groups * (place + 1) // len(slots) - groups * place // len(slots) if slots else groups
    return max(1, min(prompts_per_batch, share, lacking(spec, queue)))
