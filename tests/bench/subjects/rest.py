"""A sampler and a learner at rest: what they ask of the volume while one waits for room in the queue, the other for rollouts.

Both loops run as they are, in time that passes only where they sleep. The peer does what they did at commit b339b8d:
trained files stay in the listed folder until a checkpoint covers them, and every sampler lists it, twice a second, to
find out how many groups wait.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench.benchmark import Pair, Surroundings, at_most, benchmark
from bench.subjects.queue import made_by
from builders import CANARY, Clock, exchange_at, publish, put, run_of
from heterorl.exchange.records import JournalEntry, LearnerHeartbeat, SlotStatus
from heterorl.exchange.rollout import Rollout, RolloutName
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version
from heterorl.spec.run import Slot
from heterorl_learner.rollout_feed import RolloutFeed, select_rollouts

if TYPE_CHECKING:
    from heterorl_sampler.engines.base import InferenceEngine

TRAINED, SLOTS, GROUPS = 4800, 8, 32
NEWEST = Version(TRAINED // GROUPS, 1)
POOL = [Slot("far", index) for index in range(SLOTS)]
MINUTE_S = 60.0
SETTLED_S = 120.0
"""After so long at rest, intervals that grow have come to their greatest."""

# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────
OPERATIONS = {"open", "read", "readall", "write", "stat", "listdir", "fsync", "replace", "rename", "unlink", "mkdir"}
"""What is asked of a file system; what the system answers by itself (seek, close, fstat) is not."""
PAGE_BYTES = 32_768
"""Names come in pages of so many bytes, as the C library asks for them."""


class Passing(Clock):
    """Time that passes where a loop waits, and is over for it at last; an event for those that wait for one."""

    over = math.inf

    def is_set(self) -> bool:
        """Whether to stop."""
        return self.now >= self.over

    def wait(self, timeout: float | None = None) -> bool:
        """As of an event."""
        self.sleep(timeout or 0.0)
        return self.is_set()


class Count:
    """File operations of this process from some time on, seen by Python's profiler: none can pass by it."""

    def __init__(self, clock: Passing, since: float) -> None:
        self._clock, self._since = clock, since
        self.operations: Counter[str] = Counter()

    def see(self, frame: FrameType, event: str, called: Any) -> None:
        """A call of a function of C, if it is one on files."""
        if event == "c_call" and called.__name__ in OPERATIONS:
            module = called.__module__ or type(called.__self__).__module__
            self._add(called.__name__, module in ("posix", "io", "_io"))

    def list(self, path: str | Path) -> list[str]:
        """A listing, with its pages."""
        names = _listdir(path)
        num_bytes = sum(24 + len(os.fsencode(name)) // 8 * 8 for name in names)  # each is a linux_dirent64
        self._add("page", max(1, math.ceil(num_bytes / PAGE_BYTES)))
        return names

    def _add(self, operation: str, times: int) -> None:
        if self._since <= self._clock.now < self._clock.over:
            self.operations[operation] += times


_listdir = os.listdir


def a_minute(rest: Callable[[], object], clock: Passing, *, settle_s: float = 0.0, counted_s: float) -> Counter[str]:
    """Operations in so many seconds of a loop that rests until the clock is over, on whatever threads it begins."""
    count = Count(clock, clock.now + settle_s)
    clock.over = clock.now + settle_s + counted_s
    with mock.patch("os.listdir", count.list), mock.patch("time.monotonic", clock):
        threading.setprofile(count.see)
        sys.setprofile(count.see)
        try:
            rest()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return count.operations


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Fed(Exception):
    """The sampler has not waited."""


def idle_engine() -> InferenceEngine:
    """One that serves any weights, and ends the loop that gives it a group."""
    from heterorl_sampler.engines.base import UNNAMED, Finished, InferenceEngine

    class Idle(InferenceEngine):
        num_groups = 0

        def add(self, prompt: Sequence[int], n: int, sampling: object, seed: int) -> int:
            raise Fed

        def step(self) -> Finished:
            return []

        def drop(self) -> None: ...

        def load_weights(self, folder: Path, version: Version = UNNAMED) -> None:
            self.version = version

        def score(self, token_ids: list[list[int]]) -> list[list[float]]:
            return CANARY.logp

        def close(self) -> None: ...

    return Idle()


class Ours:
    """A run that has trained for long: what it trained is not listed any more, and all else is told by heartbeats."""

    def __init__(self, root: Path, waiting: int, trained: int = TRAINED) -> None:
        """`waiting`: groups a slot."""
        self.clock = Passing()
        run = run_of(samplers=[{"name": POOL[0].pool, "replicas": SLOTS}], learner={"batch": {"groups": GROUPS}})
        self.exchange = exchange_at(root, run, sleep=self.clock.sleep)
        self.incarnation = self.exchange.begin_incarnation()
        publish(self.exchange, NEWEST)
        self.leases = [lease for _ in POOL if (lease := self.exchange.acquire_slot(lambda: run.spec.slots))]
        for lease in self.leases:
            self.exchange.beat(lease, SlotStatus(version=str(NEWEST)))
        done, rollout = names(trained // SLOTS), made_by(self.exchange)
        touch(root / "taken", done)
        self.step = trained // GROUPS
        batches = [done[step * GROUPS : (step + 1) * GROUPS] for step in range(self.step)]
        self.exchange.rewrite_journal(
            JournalEntry(step=step, incarnation=1, names=batch) for step, batch in enumerate(batches)
        )
        touch(root / "rollouts", names(waiting, trained // SLOTS)[GROUPS:])
        for slot in POOL:  # the learner reads no more than a batch
            batch = names(min(waiting, GROUPS // SLOTS), trained // SLOTS, [slot])
            put(self.exchange, {name: of_version(rollout, name.version) for name in batch})

    def feed(self) -> RolloutFeed:
        """The learner's, after its last step."""
        return RolloutFeed(self.exchange, self.step, self.incarnation, self.clock.is_set)

    def tell(self, *, ahead: int = 0, finished: bool = False) -> None:
        """The learner's heartbeat, by what it sees; `ahead`: steps beyond those that are journalled."""
        feed, step = self.feed(), self.step + ahead
        feed._candidates()
        waiting, late = feed.waiting(step)
        self.exchange.write_learner(
            LearnerHeartbeat(
                step=step, taken=dict(feed.taken), waiting=dict(waiting), late=dict(late), finished=finished
            )
        )

    def sampler(self) -> tuple[Any, Any]:
        """Sampler of the first slot, which has loaded the newest weights, and its activity."""
        from heterorl.monitoring.metrics import Metrics
        from heterorl_sampler.activity import Activity
        from heterorl_sampler.prompt_order import PromptOrder
        from heterorl_sampler.sample import Sampler
        from heterorl_sampler.scoring import build_rewards
        from heterorl_sampler.weight_sync import WeightSync

        engine, activity = idle_engine(), Activity(SlotStatus(), self.clock)
        weights = WeightSync(self.exchange, engine, POOL[0], Path(tempfile.mkdtemp(dir=self.exchange.root)))
        while weights.version is None:
            weights.advance()
        order = PromptOrder([{"id": 0, "prompt_ids": [2, 3]}], seed=0, share=0, shares=1)
        rewards = build_rewards(self.exchange.spec)
        decoder: Any = None  # nothing is generated
        stop: Any = self.clock
        with mock.patch("time.monotonic", self.clock):
            sampler = Sampler(
                self.exchange, self.leases[0], activity, weights, engine, order, decoder, rewards, Metrics(), stop
            )
        return sampler, activity

    def decision(self) -> str | None:
        """What the sampler of the first slot waits for; None if it goes ahead."""
        sampler, activity = self.sampler()
        self.clock.over = self.clock.now + 0.1  # one look
        try:
            with mock.patch("time.monotonic", self.clock):
                sampler.run()
        except Fed:
            return None
        return str(activity.status.state.removeprefix("waiting: "))

    def taken(self) -> list[RolloutName] | None:
        """What the learner trains next; None if it waits."""
        self.clock.over = self.clock.now + 5.0
        with mock.patch("time.monotonic", self.clock), self.feed() as feed:
            batch = feed.take(self.step)
        return None if batch is None else sorted(batch.names)

    def sampler_asks(self) -> Counter[str]:
        """A minute of a slot whose queue is full, heartbeats included."""
        from heterorl_sampler.__main__ import Heartbeat

        sampler, activity = self.sampler()
        asked = a_minute(sampler.run, self.clock, settle_s=SETTLED_S, counted_s=MINUTE_S)
        beats = Heartbeat(self.exchange, self.leases[0], activity, threading.Event())
        done: Any = self.clock
        beats._done = done
        return asked + a_minute(beats._run, self.clock, settle_s=SETTLED_S, counted_s=MINUTE_S)

    def learner_asks(self) -> Counter[str]:
        """A minute of a learner that has less than a batch."""
        with self.feed() as feed:
            return a_minute(lambda: feed.take(self.step), self.clock, settle_s=SETTLED_S, counted_s=MINUTE_S)


def of_version(rollout: Rollout, version: Version) -> Rollout:
    """The same as if these weights had made it, under the first lease."""
    return replace(rollout, versions=((version, len(rollout.completion_ids)),), lease_epoch=1)


def touch(folder: Path, found: Sequence[RolloutName]) -> None:
    """Files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in found:
        (folder / f"{name}.safetensors").touch()


def names(count: int, first: int = 0, slots: Sequence[Slot] = POOL) -> list[RolloutName]:
    """So many of each slot, of weights one step old where they were trained, else of the newest."""
    per_step = GROUPS // SLOTS
    return [
        RolloutName(Version(min(seq // per_step, NEWEST.step), 1), slot, seq)
        for seq in range(first, first + count)
        for slot in slots
    ]


# ── as it was ────────────────────────────────────────────────────────────────────────────────────────────────────────
class Before:
    """The same run at commit b339b8d."""

    def __init__(self, root: Path, waiting: int, trained: int = TRAINED) -> None:
        self.clock, self.files, self.root, self.step = Passing(), Files(), root, trained // GROUPS
        spec = run_of().spec
        self.max_lag, self.most = spec.max_lag, spec.exchange.max_pending_groups
        self.poll_s, self.beat_s = spec.exchange.poll_seconds, min(2.0, spec.exchange.lease_seconds / 4)
        for folder in ("rollouts", f"weights/{NEWEST}", f"slots/{POOL[0]}"):
            (root / folder).mkdir(parents=True)
        (root / "run.json").write_text("{}")
        (root / "slots" / str(POOL[0]) / "lease-00000001.json").touch()
        self.known = set(names(trained // SLOTS))
        touch(root / "rollouts", [*self.known, *names(waiting, trained // SLOTS)])

    def tell(self, *, ahead: int = 0, finished: bool = False) -> None:
        """The learner's heartbeat."""
        step = self.step + ahead
        taken = {str(slot): max(name.seq for name in self.known if name.slot == slot) for slot in POOL}
        self.files.replace(
            self.root / "learner.json", json.dumps({"step": step, "taken": taken, "finished": finished}).encode()
        )

    def listed(self) -> list[RolloutName]:
        """All that were published and not deleted yet."""
        return [
            RolloutName.parse(name.removesuffix(".safetensors")) for name in self.files.list(self.root / "rollouts")
        ]

    def decision(self) -> str | None:
        """A sampler's look: the manifest's identity, versions, the learner's heartbeat, and all rollouts."""
        self.files.identity(self.root / "run.json")
        newest = max(map(Version.parse, self.files.list(self.root / "weights")))
        learner = json.loads(self.files.read(self.root / "learner.json"))
        waiting = [
            name
            for name in self.listed()
            if name.seq > learner["taken"][str(name.slot)] and learner["step"] - name.version.step <= self.max_lag
        ]
        if learner["finished"]:
            return "finished"
        if sum(name.slot == POOL[0] for name in waiting) >= self.most and len(waiting) >= GROUPS:
            return "queue"
        return "staleness" if learner["step"] - newest.step > self.max_lag else None

    def taken(self) -> list[RolloutName] | None:
        """A learner's look."""
        waiting = [name for name in self.listed() if name not in self.known]
        found = select_rollouts(waiting, step=self.step, groups=GROUPS, max_steps=self.max_lag, last=None)
        return None if found is None else sorted(found.names)

    def beat(self) -> None:
        """A heartbeat: the slot's leases, then the file."""
        folder = self.root / "slots" / str(POOL[0])
        self.files.list(folder)
        self.files.replace(folder / "heartbeat.json", b"{}")

    def every(self, seconds: float, look: Callable[[], object]) -> Counter[str]:
        """A minute of something that is done at an interval; a tenth of it is counted, as all of it is alike."""

        def rest() -> None:
            look()
            while not self.clock.wait(seconds):
                look()

        asked = a_minute(rest, self.clock, counted_s=MINUTE_S / 10)
        return Counter({operation: 10 * times for operation, times in asked.items()})

    def sampler_asks(self) -> Counter[str]:
        return self.every(self.poll_s, self.decision) + self.every(self.beat_s, self.beat)

    def learner_asks(self) -> Counter[str]:
        return self.every(self.poll_s, self.taken)


# ── the two of them ──────────────────────────────────────────────────────────────────────────────────────────────────
def same_decisions(folder: Path) -> None:
    """With full queues, and with those that are not; when training is over; when it has gone past the weights."""
    full = run_of().spec.exchange.max_pending_groups
    numbers = iter(range(100))

    def both(waiting: int) -> tuple[Ours, Before]:
        here = folder / f"gate-{next(numbers)}"
        return Ours(here / "ours", waiting, 10 * GROUPS), Before(here / "before", waiting, 10 * GROUPS)

    for waiting, said in ((full, {}), (full - 1, {}), (full, {"finished": True}), (1, {"ahead": 1000})):
        sides = both(waiting)
        for side in sides:
            side.tell(**said)
        ours, theirs = (side.decision() for side in sides)
        assert ours == theirs, f"with {waiting} groups a slot and {said} ours waits for {ours}, the other for {theirs}"
    for waiting in (GROUPS // SLOTS - 1, GROUPS // SLOTS):
        mine, other = (side.taken() for side in both(waiting))
        assert mine == other, f"of {waiting} groups a slot ours takes {mine}, the other {other}"


@benchmark(
    "11b",
    what=f"file operations a minute of {SLOTS} samplers and a learner at rest, {TRAINED:,} trained files",
    peer="b339b8d: all rollouts listed twice a second",
    target=at_most(0.05),
    gate="same decisions",
    limit="a few",
    unit="operations",
    gross=at_most(0.5),  # with a tenth of the files
)
def at_rest(at: Surroundings) -> Iterator[Pair]:
    full = run_of().spec.exchange.max_pending_groups
    trained = TRAINED // 10 if at.quick else TRAINED
    sides: dict[type, tuple[Any, Any]] = {}
    for kind in (Ours, Before):
        folder = at.folder / kind.__name__
        sides[kind] = kind(folder / "full", full, trained), kind(folder / "waiting", 1, trained)
        for side in sides[kind]:
            side.tell()

    def asks(kind: type) -> float:
        full, waiting = sides[kind]
        return float(SLOTS * full.sampler_asks().total() + waiting.learner_asks().total())

    yield Pair(lambda: asks(Ours), lambda: asks(Before), lambda: same_decisions(at.folder))
