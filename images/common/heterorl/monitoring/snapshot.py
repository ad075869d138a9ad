"""How far a run is: the one place that reads it from the volume.

    SnapshotReader ──read──▶ Snapshot ──▶ RunProgress    to the operator (`run_metrics`)
                                      ──▶ LiveProgress   to the terminal (`progress`)
                                      ──▶ summary.json and the report

What shows a run draws on a snapshot, with the lines of its metrics files (`run_records`) where it shows more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heterorl.exchange.crash_budget import attempts_of
from heterorl.exchange.evaluations import due_now
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Attempt, Evaluation, LearnerHeartbeat, SlotHeartbeat
from heterorl.exchange.refusals import refused_by_all
from heterorl.exchange.version import Version
from heterorl.spec.run import RunSpec, Slot


@dataclass(frozen=True)
class ObservedSlot:
    """A slot's last heartbeat, and what the reader has seen of its predecessors."""

    heartbeat: SlotHeartbeat
    heard_at: float
    """When it was last seen to move, by the reader's clock; clocks of different machines are never compared."""
    alive: bool
    """Whether it moved within leaseSeconds and no sampler released the slot."""


@dataclass(frozen=True)
class Snapshot:
    """The run's volume at one moment. Before the preparation it may hold another run: only the attempts are known."""

    spec: RunSpec
    time: float
    """When it was read, in seconds by the reader's clock."""
    attempts: Mapping[int, Sequence[Attempt]]
    """Of this run, oldest first, by the number of the learner's pod."""
    successor: str | None
    """Another run whose volume it is by now."""
    prepared: bool = False
    learner: LearnerHeartbeat | None = None
    finished: bool = False
    """The last step is trained and the output written."""
    versions: Sequence[Version] = ()
    """Published, oldest first."""
    slots: Mapping[Slot, ObservedSlot] = field(default_factory=dict)
    """Those that ever had a heartbeat."""
    evaluations: Mapping[Version, Evaluation] = field(default_factory=dict)
    """Oldest version first."""
    evaluations_due: Sequence[Version] = ()

    @property
    def step(self) -> int:
        """Steps trained."""
        return self.learner.step if self.learner else 0

    @property
    def steps(self) -> int:
        """Steps asked for."""
        return self.spec.learner.steps

    @property
    def newest(self) -> Version | None:
        """The newest version published."""
        return self.versions[-1] if self.versions else None

    @property
    def weights_refused(self) -> str | None:
        """That every live sampler refused the newest version, and why."""
        return refused_by_all(self.versions, [slot.heartbeat for slot in self.slots.values() if slot.alive])

    def last_step_at(self, begun: float) -> float:
        """When the last step was trained; `begun` if it was before that, or none was."""
        return max(begun, self.learner.time if self.learner else 0.0)


class SnapshotReader:
    """Reads one run's volume. It remembers heartbeats, as only one that is seen to move shows a live sampler."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._moved: dict[Slot, tuple[tuple[int, int], float]] = {}

    def read(self) -> Snapshot:
        """The run as it is now; OSError if the volume fails."""
        exchange, spec, now = self._exchange, self._exchange.spec, self._exchange.now()
        attempts, successor = attempts_of(exchange), exchange.successor
        if exchange.prepared is None:
            return Snapshot(spec, now, attempts, successor)
        finished = exchange.trained
        return Snapshot(
            spec,
            now,
            attempts,
            successor,
            prepared=True,
            learner=exchange.learner,
            finished=finished,
            versions=exchange.list_versions(),
            slots={slot: self._observe(slot, beat, now) for slot, beat in exchange.heartbeats().items()},
            evaluations=exchange.read_evals(),
            evaluations_due=due_now(exchange, finished=finished),
        )

    def _observe(self, slot: Slot, beat: SlotHeartbeat, now: float) -> ObservedSlot:
        mark = (beat.epoch, beat.beats)
        if self._moved.get(slot, (None, 0.0))[0] != mark:
            self._moved[slot] = (mark, now)
        heard_at = self._moved[slot][1]
        alive = not beat.released and now - heard_at < self._exchange.spec.exchange.lease_seconds
        return ObservedSlot(beat, heard_at, alive)
