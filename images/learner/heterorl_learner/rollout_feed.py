"""From the volume to a step's batch: selection, journal, replay after a crash.

    rank 0's thread: select ─▶ read, check ─▶ journal ─▶ pack      for step s + 1 while step s trains
    training:        take ─▶ train

Rank 0 selects, checks every file and writes the journal; the others are told the names and read the same files, so each
computes the whole step's plan and totals by itself and nothing else has to be sent.

A thread looks one batch ahead. Lag is counted at the step that trains the batch. What is journalled ahead is replayed
after a crash like any other step; a learner that ends in order takes it back. Online nothing is looked for ahead, as
no rollout for the next step can exist before its weights do. What the learner says of itself (`taken`, `dropped`)
counts a batch from when it is handed out.

A rollout that is too old, or was made with other rewards or prompts than the run has now, is dropped and journalled.
One that is not what its name says, or that is poison to a step, goes to quarantine; one of a later protocol is left
alone. One of another sampling distribution is trained as what it is, at its own temperature.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Self

from heterorl.errors import CorruptFile, TrainingError, UnknownProtocol, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import JournalEntry, SlotHeartbeat
from heterorl.exchange.refusals import dead_end
from heterorl.exchange.rollout import Rollout, RolloutName
from heterorl.spec.run import Slot
from heterorl_learner import ranks

log = logging.getLogger(__name__)

DEAD_END_S = 30.0
"""How long every sampler must have refused every version before the learner ends the run."""
FIRST_POLL_S = 0.02
"""The first interval between two looks for rollouts; later ones are a tenth of the wait so far, up to pollSeconds, and
a fiftieth of a long one, up to LONGEST_POLL_S."""
LONGEST_POLL_S = 2.0
"""Well within the time that a process has to leave."""
VISIBILITY_S = 60.0
"""How long another rank waits for a file that rank 0 has already read (attribute caches of network file systems)."""
MAX_SLOTS_NAMED = 8


@dataclass(frozen=True)
class StepBatch:
    """The rollouts of one step, the same on every rank."""

    step: int
    names: list[RolloutName]
    rollouts: list[Rollout]
    wait_s: float
    """Seconds spent waiting for them."""
    packed: Any = None
    """What the feed's `pack` made of them; None where it has none."""


@dataclass(frozen=True)
class _Found:
    """A batch that nobody was given yet."""

    rollouts: dict[RolloutName, Rollout]
    packed: Any
    entry: JournalEntry | None
    """The line that was journalled for it; None for a replay."""
    added: Counter[str]
    """What the line adds to the counts."""


class _Mismatched(Exception):
    """A rollout that is whole, and not of this run as it is now."""


class RolloutFeed:
    """Gives the batches of one learner incarnation in order. All ranks call `take` together.

    As a context it ends its thread.
    """

    def __init__(
        self,
        exchange: Exchange,
        step: int,
        incarnation: int,
        stop: Callable[[], bool],
        pack: Callable[[list[Rollout]], Any] = lambda rollouts: None,
    ) -> None:
        """`step`: updates already in the weights; journalled steps from there on are replayed first.

        `pack`: what is to be made of a batch before training needs it.
        """
        self._exchange, self._incarnation, self._stop, self._pack = exchange, incarnation, stop, pack
        self._spec, self._provenance = exchange.spec, exchange.provenance
        self._is_first = ranks.rank() == 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[_Found | None]] | None = None
        self._awaited, self._unwanted = threading.Event(), threading.Event()
        self._lock = threading.RLock()  # of what the thread, training and retirement all use
        self._left: set[RolloutName] = set()  # of a protocol that this version does not know
        self._seen: list[RolloutName] = []  # at the last look
        self._start_with(exchange.read_journal() if self._is_first else [])
        self._replay = {entry.step: entry for entry in self._entries if entry.step >= step}
        if self._is_first:
            exchange.rewrite_journal(self._entries)  # cuts a torn last line
            self._sort_files()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for event in (self._unwanted, self._awaited):
            event.set()
        self._thread.shutdown()

    def _start_with(self, journal: Iterable[JournalEntry]) -> None:
        with self._lock:
            self._counts: Counter[str] = Counter()
            self.taken: dict[str, int] = {}
            self._known: set[RolloutName] = set()
            self._entries: deque[JournalEntry] = deque()
            self._drop_next: list[RolloutName] = []
            self._untold: list[RolloutName] = []  # of the batch ahead
            for entry in journal:
                self._tell(entry, self._note(entry))

    @property
    def dropped(self) -> int:
        """Rollouts that were dropped so far, those of other rewards or prompts included."""
        return self._counts["dropped"]

    @property
    def mismatched(self) -> int:
        """Of them, those of other rewards or prompts."""
        return self._counts["mismatched"]

    @property
    def poisoned(self) -> int:
        """Rollouts that were set aside so far."""
        return self._counts["poisoned"]

    # ── what the trainer calls ───────────────────────────────────────────────────────────────────────────────────────
    def take(self, step: int) -> StepBatch | None:
        """The batch of the step after `step` updates, waiting for it if need be; None when told to stop first."""
        started = time.monotonic()
        found = self._await(step) if self._is_first else None
        names = ranks.agree(None if found is None else list(found.rollouts))
        if names is None:
            return None
        if found is None:
            rollouts = self._read_all(names)
            packed = self._pack([rollouts[name] for name in names])
        else:
            rollouts, packed = found.rollouts, found.packed
        return StepBatch(step, names, [rollouts[name] for name in names], time.monotonic() - started, packed)

    def look_ahead(self, step: int) -> None:
        """Begin to look for the batch of the step after `step` updates, while the one before trains."""
        if self._is_first and self._spec.max_lag > 0:
            self._look(step)

    def take_back(self) -> None:
        """Take back what was journalled ahead and is not going to be trained: training ends in order."""
        self._give_up()

    def _look(self, step: int) -> Future[_Found | None]:
        if self._ahead is None:
            self._ahead = step, self._thread.submit(self._find, step)
        return self._ahead[1]

    def _await(self, step: int) -> _Found | None:
        looking = self._look(step)
        self._awaited.set()
        try:
            found = looking.result()
        finally:
            self._awaited.clear()
        if found is not None and self._stop():
            self._give_up()  # also in the midst of a replay, which the next incarnation goes on with
            return None
        self._ahead = None
        if found is not None and found.entry is not None:
            self._tell(found.entry, found.added)
        return found

    def _give_up(self) -> None:
        if self._ahead is None:
            return
        (step, looking), self._ahead = self._ahead, None
        for event in (self._unwanted, self._awaited):
            event.set()
        found = looking.result()
        for event in (self._unwanted, self._awaited):
            event.clear()
        if found is not None and found.entry is not None:
            self._forget_from(step)

    def set_aside(self, batch: StepBatch, reason: str) -> None:
        """Put a batch into quarantine that gave no finite loss and gradient twice; the step is then taken anew.

        Raises TrainingError, and sets nothing aside, when that happened to the step's batch before: then the rollouts
        are not to blame.
        """
        if not self._is_first:
            return
        self._give_up()
        entry = next(entry for entry in self._entries if entry.step == batch.step)
        if entry.poisoned:
            raise TrainingError(
                f"step {batch.step}: {reason}, with a second batch as well, so the policy has diverged. Its weights are"
                " those of the step before: resume from an older checkpoint with a lower learningRate or maxGradNorm of"
                " learner.optimizer"
            )
        log.error("step %d: its %d rollouts go to quarantine: %s", batch.step, len(batch.names), reason)
        self._forget_from(batch.step)
        poisoned = entry.model_copy(update={"names": [], "poisoned": entry.names})
        self._tell(poisoned, self._journal(poisoned))
        for name in batch.names:
            self._exchange.quarantine_rollout(name, reason)

    def waiting(self, step: int) -> tuple[Counter[str], Counter[str]]:
        """Rollouts by slot that wait and are not too old; and those of them that are behind one that was taken."""
        with self._lock:  # a batch that was looked for ahead still waits
            names = [*(name for name in self._seen if name not in self._known), *self._untold]
        names = [name for name in names if lag(name, step) <= self._spec.max_lag]
        late = (str(name.slot) for name in names if name.seq < self.taken.get(str(name.slot), -1))
        return Counter(str(name.slot) for name in names), Counter(late)

    def retire(self, step: int) -> None:
        """Delete, or archive, what was trained or dropped before `step`, because a durable checkpoint covers it.

        On any thread. A name is known until its file is gone, so that nothing selects it in between.
        """
        names: list[RolloutName] = []
        with self._lock:
            while self._entries and self._entries[0].step < step:
                entry = self._entries.popleft()
                names += [*entry.names, *entry.dropped]
        self._exchange.retire_rollouts(names, archive=self._exchange.spec.exchange.retention.keep_rollouts)
        with self._lock:
            self._known.difference_update(names)

    # ── rank 0, on the thread ────────────────────────────────────────────────────────────────────────────────────────
    def _find(self, step: int) -> _Found | None:
        if self._is_over():
            return None
        if step in self._replay and (replayed := self._replayed(step)):
            return replayed
        patience: _Patience | None = None
        while not self._is_over():
            if found := self._select(step):
                return found
            if not self._awaited.wait(0 if patience else self._spec.exchange.poll_seconds):
                continue
            patience = patience or _Patience(self._exchange.now(), self._spec.learner.stall_seconds)
            self._try_patience(step, patience)
            self._exchange.sleep(pause_s(time.monotonic() - patience.started, self._spec.exchange.poll_seconds))
        return None

    def _is_over(self) -> bool:
        return self._unwanted.is_set() or self._stop()

    def _try_patience(self, step: int, patience: _Patience) -> None:
        """Say what training waits for, now and then; UserError when that cannot come."""
        if time.monotonic() - patience.looked_at >= DEAD_END_S / 2:  # it reads the heartbeat of every slot
            patience.alive_at, patience.looked_at = self._last_hope(step, patience.alive_at), time.monotonic()
        if time.monotonic() >= patience.warn_at:
            usable = [name for name in self._candidates() if lag(name, step) <= self._spec.max_lag]
            log.warning("%s", waited_for(self._exchange, step, len(usable), patience.since))
            patience.warn_at = time.monotonic() + patience.stall_s

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

    def _select(self, step: int) -> _Found | None:
        """Select, read and journal a batch; None while there are too few usable rollouts."""
        read: dict[RolloutName, Rollout] = {}
        while selection := self._selection(step):
            unread = [name for name in selection.names if name not in read]
            if not unread:
                chosen = {name: read[name] for name in selection.names}
                packed = self._pack(list(chosen.values()))
                entry = self._entry(step, selection)
                return _Found(chosen, packed, entry, self._journal(entry))
            for name in unread:
                try:
                    read[name] = self._read(name)
                except FileNotFoundError:
                    return None  # listed but not there yet, or moved away: look again
                except _Mismatched as error:
                    log.warning("rollout %s is dropped: %s", name, error)
                    self._drop_next.append(name)
                except CorruptFile as error:
                    log.error("rollout %s goes to quarantine: %s", name, error)
                    self._exchange.quarantine_rollout(name, str(error))
                except UnknownProtocol as error:
                    log.error("rollout %s is left where it is: %s", name, error)
                    self._left.add(name)
        return None

    def _selection(self, step: int) -> Selection | None:
        with self._lock:
            last = next((entry.names[-1].slot for entry in reversed(self._entries) if entry.names), None)
        return select_rollouts(
            self._candidates(),
            step=step,
            groups=self._spec.learner.batch.groups,
            max_steps=self._spec.max_lag,
            last=last,
        )

    def _candidates(self) -> list[RolloutName]:
        """Published rollouts that were not yet trained, dropped or left alone."""
        with self._lock:
            out = self._known.union(self._left, self._drop_next)
        self._seen = [name for name in self._exchange.list_rollouts() if name not in out]
        return self._seen

    def _entry(self, step: int, selection: Selection) -> JournalEntry:
        """What the journal says of a selection, with what it said when an earlier one for this step was poison."""
        before = self._entries[-1] if self._entries and self._entries[-1].step == step else None
        return JournalEntry(
            step=step,
            incarnation=self._incarnation,
            names=selection.names,
            dropped=[*(before.dropped if before else []), *selection.dropped, *self._drop_next],
            mismatched=(before.mismatched if before else 0) + len(self._drop_next),
            poisoned=before.poisoned if before else [],
        )

    def _journal(self, entry: JournalEntry) -> Counter[str]:
        """Put a line on the disk; returns what it adds to the counts."""
        self._exchange.append_journal(entry)
        self._exchange.take_away([*entry.names, *entry.dropped])
        self._drop_next = []
        with self._lock:
            self._untold = entry.names
            return self._note(entry)

    def _replayed(self, step: int) -> _Found | None:
        try:
            found = {name: self._read(name) for name in self._replay[step].names}
            return _Found(found, self._pack(list(found.values())), None, Counter()) if found else None
        except (FileNotFoundError, CorruptFile, _Mismatched) as error:
            log.error("step %d cannot be replayed (%s); this and later steps are selected again", step, error)
        self._forget_from(step)
        return None

    def _forget_from(self, step: int) -> None:
        """Take the journal back to the steps before this one."""
        self._start_with([entry for entry in self._exchange.read_journal() if entry.step < step])
        self._replay = {}
        self._exchange.rewrite_journal(self._entries)
        self._sort_files()

    def _sort_files(self) -> None:
        """Have every file where the journal says: what was taken apart from what waits."""
        self._exchange.take_away(self._known.intersection(self._exchange.list_rollouts()))
        self._exchange.give_back(set(self._exchange.list_taken()) - self._known)

    def _read(self, name: RolloutName) -> Rollout:
        rollout = self._exchange.read_rollout(name)
        self._exchange.check_epoch(name, rollout.lease_epoch)
        if len(rollout.lengths) != self._spec.algorithm.group_size:
            raise CorruptFile(f"{len(rollout.lengths)} completions; groupSize is {self._spec.algorithm.group_size}")
        if rollout.oldest != name.version:
            raise CorruptFile(f"its oldest token was made by weights {rollout.oldest}, not {name.version} as named")
        if why := rollout.provenance.mismatch(self._provenance):
            raise _Mismatched(why)
        return rollout

    def _note(self, entry: JournalEntry) -> Counter[str]:
        """Take a line of the journal in: its rollouts are no candidates any more. What it adds to the counts."""
        added = _counts(entry)
        with self._lock:
            if self._entries and self._entries[-1].step == entry.step:
                added.subtract(_counts(self._entries.pop()))  # the later line of a step stands
            self._entries.append(entry)
            self._known.update([*entry.names, *entry.dropped, *entry.poisoned])
        return added

    def _tell(self, entry: JournalEntry, added: Counter[str]) -> None:
        """From now on the learner says that it has taken these rollouts."""
        self._counts.update(added)
        self._untold = []
        taken = dict(self.taken)
        for name in [*entry.names, *entry.dropped, *entry.poisoned]:
            taken[str(name.slot)] = max(name.seq, taken.get(str(name.slot), -1))
        self.taken = taken  # at once, for who reads it meanwhile

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


def pause_s(waited_s: float, poll_s: float) -> float:
    """Seconds to the next look for rollouts of a learner that has waited for so long."""
    soon = min(poll_s, max(FIRST_POLL_S, waited_s / 10))
    return max(soon, min(LONGEST_POLL_S, waited_s / 50))


@dataclass
class _Patience:
    """How long training has waited for a batch. Times are of a clock of this process, but for `since`."""

    since: float
    """By the exchange's clock."""
    stall_s: float

    def __post_init__(self) -> None:
        self.started = self.alive_at = self.looked_at = time.monotonic()
        self.warn_at = self.started + self.stall_s


def _counts(entry: JournalEntry) -> Counter[str]:
    return Counter(dropped=len(entry.dropped), mismatched=entry.mismatched, poisoned=len(entry.poisoned))


def waited_for(exchange: Exchange, step: int, waiting: int, since: float) -> str:
    """What a learner waits for that gets no batch: how many rollouts, of which weights, from whom, and since when."""
    spec, beats = exchange.spec, exchange.heartbeats()
    oldest = max(0, step - spec.max_lag)
    slots = [f"{slot}: {_state_of(beats.get(slot))}" for slot in spec.slots]
    if (more := len(slots) - MAX_SLOTS_NAMED) > 0:
        slots[MAX_SLOTS_NAMED:] = [f"and {more} more"]
    return (
        f"step {step} has waited since {time.strftime('%H:%M:%S', time.localtime(since))} for"
        f" {spec.learner.batch.groups} groups made with weights of step {oldest} or newer, and {waiting} are there."
        f" The slots: {'; '.join(slots)}"
    )


def _state_of(beat: SlotHeartbeat | None) -> str:
    if beat is None:
        return "has not started"
    more = f", has refused {beat.rejected} versions" if beat.rejected else ""
    more += f", {beat.trouble}" if beat.trouble else ""
    return f"{'released' if beat.released else beat.state or 'started'}, on weights {beat.version or 'none'}{more}"


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
    too_old: list[RolloutName] = []
    by_step: defaultdict[int, list[RolloutName]] = defaultdict(list)
    for name in waiting:
        (too_old if lag(name, step) > max_steps else by_step[name.version.step]).append(name)
    if sum(map(len, by_step.values())) < groups:
        return None
    slots = sorted({name.slot for names in by_step.values() for name in names})
    begin = next((i for i, slot in enumerate(slots) if last is not None and slot > last), 0)
    chosen: list[RolloutName] = []
    for _, names in sorted(by_step.items()):  # only of the oldest versions is the order of any use
        chosen += _in_turn(names, slots[begin:] + slots[:begin])
        if len(chosen) >= groups:
            break
    return Selection(chosen[:groups], sorted(too_old, key=lambda name: (name.version.step, name.seq, name.slot)))


def _in_turn(names: list[RolloutName], slots: list[Slot]) -> list[RolloutName]:
    """The first rollout of every slot, in the slots' order, before the second of any."""
    lanes: dict[Slot, list[RolloutName]] = {slot: [] for slot in slots}
    for name in sorted(names, key=lambda name: name.seq):
        lanes[name.slot].append(name)
    return [name for turn in zip_longest(*lanes.values()) for name in turn if name is not None]
