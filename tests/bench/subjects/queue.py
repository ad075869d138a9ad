"""The queue of rollouts: what the learner waits beyond their arrival, and what it costs to choose among many."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import reference
from bench.benchmark import Pair, Surroundings, at_most, benchmark, seconds
from builders import FAR, exchange_at, put, rollout_name, rollout_of, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Provenance, Rollout, RolloutName
from heterorl.exchange.version import Version
from heterorl.spec.run import Slot
from heterorl_learner.rollout_feed import RolloutFeed, select_rollouts

GROUPS = 32
SLOTS = 8
READY = 10_000
MAX_STEPS = 1024
TRACE = Path(__file__).parents[1] / "arrivals.json"


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class Folder:
    """Ready files of eight slots, a batch of each version; a step takes the oldest batch, and another has arrived."""

    def __init__(self, root: Path, ready: int) -> None:
        self.exchange = exchange_at(root, run_of(samplers=[{"name": "far", "replicas": SLOTS}]))
        self.path = root / "rollouts"
        self.path.mkdir()
        self.oldest = self.next = 0
        while self.next * GROUPS < ready:
            self._arrive()

    def _arrive(self) -> None:
        for name in self._batch(self.next):
            (self.path / f"{name}.safetensors").touch()
        self.next += 1

    def _batch(self, step: int) -> list[RolloutName]:
        per_slot = GROUPS // SLOTS
        seqs = range(step * per_slot, (step + 1) * per_slot)
        return [RolloutName(Version(step, 1), Slot("far", index), seq) for index in range(SLOTS) for seq in seqs]

    def step(self) -> None:
        """A batch goes and one comes."""
        for name in self._batch(self.oldest):
            (self.path / f"{name}.safetensors").unlink()
        self.oldest += 1
        self._arrive()

    def ours(self) -> list[str]:
        """The names that the learner takes next."""
        waiting = self.exchange.list_rollouts()
        selection = select_rollouts(waiting, step=self.next, groups=GROUPS, max_steps=MAX_STEPS, last=FAR)
        assert selection is not None
        return [str(name) for name in selection.names]

    def theirs(self) -> list[str]:
        """Those that the reference takes."""
        found = reference.listed(self.path, step=self.next, max_steps=MAX_STEPS, count=GROUPS)
        assert found is not None
        return [name.removesuffix(".safetensors") for name in found]


@benchmark(
    "11-pick",
    what=f"choosing a batch among {READY:,} ready files",
    peer="reference queue: one listing, without its sleeps",
    target=at_most(0.5),
    gate="same files admitted",
    limit="one listing of the folder",
)
def pick(at: Surroundings) -> Iterator[Pair]:
    folder = Folder(at.folder / "run", READY // 5 if at.quick else READY)

    def gate() -> None:
        for _ in range(3):
            assert sorted(folder.ours()) == folder.theirs(), "ours and the reference take other files"
            folder.step()

    yield Pair(seconds(folder.ours, before=folder.step), seconds(folder.theirs), gate)


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Replay:
    """The recorded arrivals, in real time, and a learner that takes a batch, is busy for the recorded time, and so on."""

    def __init__(self, steps: int) -> None:
        trace = json.loads(TRACE.read_text())
        self.arrivals_s: list[float] = trace["arrivals_s"]
        self.at_once: int = trace["groups"]
        self.train_s: list[float] = trace["train_s"][:steps]
        self.taken: list[list[int]] = []

    def waited(self, publish: Callable[[range], None], take: Callable[[int], list[int]]) -> float:
        """Seconds from when both learner and files were ready to when the learner had them, summed over the steps."""
        began, total = time.monotonic(), 0.0
        ready: list[float] = []  # when each file was there
        self.taken = []
        arriving = threading.Thread(target=self._arrive, args=(began, publish, ready))
        arriving.start()
        for step, busy_s in enumerate(self.train_s):
            asked = time.monotonic()
            self.taken.append(sorted(take(step)))
            total += time.monotonic() - max(asked, ready[GROUPS * (step + 1) - 1])
            time.sleep(busy_s)
        arriving.join()
        return total

    def _arrive(self, began: float, publish: Callable[[range], None], ready: list[float]) -> None:
        for at_s in self.arrivals_s[: len(self.train_s) * GROUPS // self.at_once]:
            time.sleep(max(0.0, began + at_s - time.monotonic()))
            numbers = range(len(ready), len(ready) + self.at_once)
            publish(numbers)
            ready += [time.monotonic()] * self.at_once


def made_by(exchange: Exchange) -> Rollout:
    """A small group, as this run makes them."""
    return replace(rollout_of([1.0] * 8), provenance=Provenance.of(exchange.spec, ""))


def wait_of_ours(replay: Replay, fresh: Callable[[], Path]) -> float:
    """With the exchange and the learner's feed."""
    exchange = exchange_at(fresh() / "run", run_of(learner={"batch": {"groups": GROUPS}}))
    exchange.incarnation = exchange.begin_incarnation()
    rollout = made_by(exchange)
    feed = RolloutFeed(exchange, 0, exchange.incarnation, lambda: False)

    def take(step: int) -> list[int]:
        batch = feed.take(step)
        assert batch is not None
        return [name.seq for name in batch.names]

    return replay.waited(lambda seqs: put(exchange, {rollout_name(seq): rollout for seq in seqs}), take)


def wait_of_theirs(replay: Replay, fresh: Callable[[], Path]) -> float:
    """With files that are renamed into a folder, read by a look at it, and moved away."""
    folder = fresh()
    queue, done = folder / "queue", folder / "done"
    queue.mkdir()
    done.mkdir()
    content = reference.pickled({"rewards": [1.0] * 8})

    def publish(seqs: range) -> None:
        for seq in seqs:
            (folder / "staged").write_bytes(content)
            (folder / "staged").rename(queue / f"v{0:08d}--s{seq:010d}.pt")

    def take(step: int) -> list[int]:
        names = reference.waited_for(partial(reference.listed, queue, step=step, max_steps=MAX_STEPS, count=GROUPS))
        for name in names:
            reference.unpickled((queue / name).read_bytes())
            (queue / name).rename(done / name)
        return [int(name.partition("--s")[2].removesuffix(".pt")) for name in names]

    return replay.waited(publish, take)


@benchmark(
    "11-wait",
    what="learner's wait beyond the arrival of its files, on the arrivals of a recorded quickstart",
    peer="reference queue: looks with a second between them",
    target=at_most(0.2),
    gate="same files admitted",
    limit="0",
)
def wait(at: Surroundings) -> Iterator[Pair]:
    replay = Replay(4 if at.quick else 5)
    numbers = iter(range(10_000))

    def fresh() -> Path:
        folder = at.folder / str(next(numbers))
        folder.mkdir()
        return folder

    def gate() -> None:
        short = Replay(3)
        wait_of_ours(short, fresh)
        ours = short.taken
        wait_of_theirs(short, fresh)
        assert ours == short.taken, "ours and the reference take other files"

    yield Pair(lambda: wait_of_ours(replay, fresh), lambda: wait_of_theirs(replay, fresh), gate)
