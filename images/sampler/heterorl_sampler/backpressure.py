"""When a sampler waits instead of generating: what it sees of the run, and pure functions of that."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import LearnerHeartbeat, SlotHeartbeat
from heterorl.exchange.version import Version
from heterorl.spec.run import RunSpec, Slot

LONGEST_PAUSE = 10
"""How many times `exchange.pollSeconds` may lie between two looks at the volume."""


class Lookout:
    """What one slot sees of the run: its manifest, the learner's heartbeat and, online, the other slots'.

    It looks every `exchange.pollSeconds`, and less often the longer there was nothing to do.
    """

    def __init__(self, exchange: Exchange, slot: Slot) -> None:
        self._exchange, self._slot = exchange, slot
        self.spec = exchange.spec
        self.learner = LearnerHeartbeat(step=0)
        self._beats: dict[Slot, SlotHeartbeat] = {}
        self._next_look = time.monotonic()

    def look(self) -> bool:
        """Look if it is time to; whether it was."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self.spec = self._exchange.spec
        self.learner = self._exchange.learner or LearnerHeartbeat(step=0)
        self.look_at_slots()
        self._next_look = now + self.spec.exchange.poll_seconds
        return True

    def look_at_slots(self) -> None:
        """See how far the other slots are, which only matters online."""
        self._beats = self._exchange.heartbeats() if self.spec.mode == "online" else {}

    def pause_s(self, waited_s: float) -> float:
        """Seconds until the next look of a slot that has waited for so long: a tenth of that, within bounds."""
        poll_s = self.spec.exchange.poll_seconds
        pause_s = min(max(poll_s, waited_s / 10), LONGEST_PAUSE * poll_s)
        self._next_look = time.monotonic() + pause_s
        return pause_s

    def made_by_others(self, version: Version) -> int:
        """Groups of a version that other slots have made or are making."""
        fresh_since = self._exchange.now() - self.spec.exchange.lease_seconds
        return made_by_others(self._beats, self._slot, version, fresh_since=fresh_since)


@dataclass(frozen=True)
class Queue:
    """Groups on their way to the learner: not trained, not dropped, not too old to be."""

    own: int = 0
    """This slot's that are finished: published, or being scored."""
    others: int = 0
    """The other slots' that are published."""
    in_scoring: int = 0
    """This slot's that are finished and not published yet."""
    in_engine: int = 0
    """This slot's that are not finished."""
    made: int = 0
    """Of the version that this slot holds: those that it has published, taken or not."""
    making: int = 0
    """Of that version: those of this slot that are not published yet."""
    by_others: int = 0
    """Of that version: what other slots have made or are making."""

    @property
    def total(self) -> int:
        """All that are finished."""
        return self.own + self.others

    @property
    def promised(self) -> int:
        """Of the version: what this slot has made or is making."""
        return self.made + self.making


def queue_of(
    spec: RunSpec,
    slot: Slot,
    version: Version,
    published: Mapping[int, Version],
    in_scoring: Sequence[Version],
    in_engine: int,
    learner: LearnerHeartbeat,
    by_others: int = 0,
) -> Queue:
    """Count what is under way: this slot's by its own numbers, the others' as the learner saw them.

    `published`: this slot's, by sequence number; those up to the last one taken are taken as well, or the learner says
    how many are not. `in_scoring`: versions of its groups that are not published; those in the engine began with
    `version`.
    """
    taken, own = learner.taken.get(str(slot), -1), learner.late.get(str(slot), 0)
    own += sum(seq > taken and learner.step - by.step <= spec.max_lag for seq, by in published.items())
    return Queue(
        own=own + len(in_scoring),
        others=sum(count for other, count in learner.waiting.items() if other != str(slot)),
        in_scoring=len(in_scoring),
        in_engine=in_engine,
        made=sum(by == version for by in published.values()),
        making=in_engine + sum(by == version for by in in_scoring),
        by_others=by_others,
    )


def made_by_others(beats: Mapping[Slot, SlotHeartbeat], slot: Slot, version: Version, *, fresh_since: float) -> int:
    """Groups of the version that other slots have made or are making, by their heartbeats.

    A slot that was released, or whose heartbeat is older than `fresh_since`, is gone with what it did not publish.
    """
    return sum(
        beat.made if beat.released or beat.time < fresh_since else beat.promised
        for other, beat in beats.items()
        if other != slot and beat.version == str(version)
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
    return spec.learner.batch.groups - queue.promised - queue.by_others


def room(spec: RunSpec, prompts_per_batch: int, queue: Queue, slot: Slot) -> int:
    """Groups that may be added to the engine now.

    Twice as many as are generated at a time keep it from running empty. As the queue fills up, no more than it has room
    for, nor less than one batch. Online no more than the version lacks, nor, with those in the engine, than this slot's
    share of a step: the shares of all slots make up a step exactly, so slots that begin at the same moment, when none
    has seen what the others promised, make no group too many. Later what one is late with another takes.
    """
    if spec.mode != "online":
        left = spec.exchange.max_pending_groups - queue.own
        if queue.total < spec.learner.batch.groups:
            left = 2 * prompts_per_batch
        return max(0, min(2 * prompts_per_batch, max(prompts_per_batch, left)) - queue.in_engine)
    groups, slots = spec.learner.batch.groups, spec.slots
    place = slots.index(slot) if slot in slots else 0
    share = groups * (place + 1) // len(slots) - groups * place // len(slots) if slots else groups
    return max(0, min(max(1, min(2 * prompts_per_batch, share)) - queue.in_engine, lacking(spec, queue)))
