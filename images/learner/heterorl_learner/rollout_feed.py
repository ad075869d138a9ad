"""From the volume to a step's batch: selection, journal, replay after a crash.

Rank 0 selects, checks every file and writes the journal; the others are told the names and read the same files, so each
computes the whole step's plan and totals by itself and nothing else has to be sent.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from heterorl.errors import CorruptFile, UnknownProtocol, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import JournalEntry
from heterorl.exchange.refusals import dead_end
from heterorl.exchange.rollout import Rollout
from heterorl.names import RolloutName, Slot
from heterorl_learner import ranks

log = logging.getLogger(__name__)

DEAD_END_S = 30.0
"""How long every sampler must have refused every version before the learner ends the run."""
VISIBILITY_S = 60.0
"""How long another rank waits for a file that rank 0 has already read (attribute caches of network file systems)."""


@dataclass(frozen=True)
class StepBatch:
    """The rollouts of one step, the same on every rank."""

    step: int
    names: list[RolloutName]
    rollouts: list[Rollout]
    wait_s: float
    """Seconds spent waiting for them."""


class RolloutFeed:
    """Gives the batches of one learner incarnation in order. All ranks call `take` together."""

    def __init__(self, exchange: Exchange, step: int, incarnation: int, stop: Callable[[], bool]) -> None:
        """`step`: updates already in the weights; journalled steps from there on are replayed first."""
        self._exchange, self._incarnation, self._stop = exchange, incarnation, stop
        self._spec = exchange.spec
        self._is_first = ranks.rank() == 0
        self.dropped = 0
        self.taken: dict[str, int] = {}
        self._entries: deque[JournalEntry] = deque()
        self._known: set[RolloutName] = set()
        self._left: set[RolloutName] = set()  # of a protocol that this version does not know
        if self._is_first:
            journal = exchange.read_journal()
            exchange.rewrite_journal(journal)  # cuts a torn last line
            for entry in journal:
                self._note(entry)
            self._replay = {entry.step: entry for entry in journal if entry.step >= step}

    def take(self, step: int) -> StepBatch | None:
        """The batch of the step after `step` updates, waiting for it if need be; None when told to stop first."""
        started = time.monotonic()
        found = self._find(step) if self._is_first else None
        names = ranks.agree(None if found is None else list(found))
        if names is None:
            return None
        if found is None:
            found = self._read_all(names)
        return StepBatch(step, names, [found[name] for name in names], time.monotonic() - started)

    def retire(self, step: int) -> None:
        """Delete, or archive, what was trained or dropped before `step`, because a durable checkpoint covers it."""
        names: list[RolloutName] = []
        while self._entries and self._entries[0].step < step:
            entry = self._entries.popleft()
            names += [*entry.names, *entry.dropped]
        self._exchange.retire_rollouts(names, archive=self._exchange.spec.exchange.retention.keep_rollouts)
        self._known.difference_update(names)

    # ── rank 0 ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _find(self, step: int) -> dict[RolloutName, Rollout] | None:
        if self._stop():
            return None  # also in the midst of a replay, which the next incarnation goes on with
        if step in self._replay and (replayed := self._replayed(step)):
            return replayed
        alive_at = time.monotonic()
        warn_at = time.monotonic() + self._spec.learner.stall_seconds
        while not self._stop():
            if found := self._select(step):
                return found
            alive_at = self._last_hope(step, alive_at)
            self._exchange.sleep(self._spec.exchange.poll_seconds)
            if time.monotonic() >= warn_at:
                log.warning(
                    "no admissible rollouts for %.0f s; are the samplers alive?", self._spec.learner.stall_seconds
                )
                warn_at = time.monotonic() + self._spec.learner.stall_seconds
        return None

    def _last_hope(self, step: int, alive_at: float) -> float:
        """When a rollout could last have come; UserError when none can any more, as every sampler refuses the weights.

        Only after a while, since a version that is being written at this moment may be accepted.
        """
        exchange, now = self._exchange, time.monotonic()
        reason = dead_end(self._spec, step, exchange.list_versions(), exchange.heartbeats())
        if reason is None:
            return now
        if now - alive_at >= DEAD_END_S:
            raise UserError(
                f"{reason}. The learner waits for rollouts that cannot come: see that learner and samplers run the same"
                " versions of their libraries; exchange.canary.tolerance is how much their rounding may differ"
            )
        return alive_at

    def _select(self, step: int) -> dict[RolloutName, Rollout] | None:
        settled = self._known | self._left
        selection = select_rollouts(
            (name for name in self._exchange.list_rollouts() if name not in settled),
            step=step,
            groups=self._spec.learner.batch.groups,
            max_steps=self._spec.max_lag,
            last=self._entries[-1].names[-1].slot if self._entries else None,
        )
        if selection is None:
            return None
        rollouts = {}
        for name in selection.names:
            try:
                rollouts[name] = self._read(name)
            except FileNotFoundError:
                return None  # listed but not there yet, or moved away: look again
            except CorruptFile as error:
                log.error("rollout %s goes to quarantine: %s", name, error)
                self._exchange.quarantine_rollout(name, str(error))
                return None
            except UnknownProtocol as error:
                log.error("rollout %s is left where it is: %s", name, error)
                self._left.add(name)
                return None
        entry = JournalEntry(step=step, incarnation=self._incarnation, names=selection.names, dropped=selection.dropped)
        self._exchange.append_journal(entry)
        self._note(entry)
        return rollouts

    def _replayed(self, step: int) -> dict[RolloutName, Rollout] | None:
        try:
            return {name: self._read(name) for name in self._replay[step].names}
        except (FileNotFoundError, CorruptFile) as error:
            log.error("step %d cannot be replayed (%s); this and later steps are selected afresh", step, error)
        journal = [entry for entry in self._exchange.read_journal() if entry.step < step]
        self._exchange.rewrite_journal(journal)
        self._replay, self._known, self._entries, self.taken, self.dropped = {}, set(), deque(), {}, 0
        for entry in journal:
            self._note(entry)
        return None

    def _read(self, name: RolloutName) -> Rollout:
        rollout = self._exchange.read_rollout(name)
        self._exchange.check_epoch(name, rollout.meta.get("lease_epoch", 0))
        if len(rollout.lengths) != self._spec.algorithm.group_size:
            raise CorruptFile(f"{len(rollout.lengths)} completions; groupSize is {self._spec.algorithm.group_size}")
        if int(rollout.versions.min()) != name.version.step:
            raise CorruptFile(
                f"made by weights of step {rollout.versions.min()}, not {name.version.step} as it is named"
            )
        return rollout

    def _note(self, entry: JournalEntry) -> None:
        self._entries.append(entry)
        self.dropped += len(entry.dropped)
        for name in [*entry.names, *entry.dropped]:
            self._known.add(name)
            self.taken[str(name.slot)] = max(name.seq, self.taken.get(str(name.slot), -1))

    # ── the others ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _read_all(self, names: list[RolloutName]) -> dict[RolloutName, Rollout]:
        give_up = time.monotonic() + VISIBILITY_S
        rollouts = {}
        for name in names:
            while name not in rollouts:
                try:
                    rollouts[name] = self._exchange.read_rollout(name)
                except FileNotFoundError:
                    if time.monotonic() >= give_up:
                        raise
                    self._exchange.sleep(0.1)
        return rollouts


# ── selection: a pure function of names ──────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Selection:
    """What to train and what is too old, both in order."""

    names: list[RolloutName]
    dropped: list[RolloutName]


def lag(name: RolloutName, step: int) -> int:
    """Learner step minus the step of the weights; weights of a lost future (of a learner that died) count as fresh."""
    return max(0, step - name.version.step)


def select_rollouts(
    waiting: Iterable[RolloutName], *, step: int, groups: int, max_steps: int, last: Slot | None
) -> Selection | None:
    """Take `groups` of the waiting rollouts for the step that follows `step` updates; None while there are too few.

    Admissible is a lag of at most `max_steps`. The oldest version goes first; within a version the first rollout of
    every slot precedes the second of any, starting with the slot after `last` (the last one of the step before).
    """
    waiting = sorted(waiting, key=lambda name: (name.version.step, name.seq, name.slot))
    admissible = [name for name in waiting if lag(name, step) <= max_steps]
    if len(admissible) < groups:
        return None
    slots = sorted({name.slot for name in admissible})
    begin = next((i for i, slot in enumerate(slots) if last is not None and slot > last), 0)
    turns: Counter[tuple[int, Slot]] = Counter()
    order = {}
    for name in admissible:
        lane = (name.version.step, name.slot)
        order[name] = (name.version.step, turns[lane], (slots.index(name.slot) - begin) % len(slots))
        turns[lane] += 1
    chosen = sorted(admissible, key=order.__getitem__)[:groups]
    return Selection(chosen, [name for name in waiting if lag(name, step) > max_steps])
