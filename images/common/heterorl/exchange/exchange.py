"""The exchange: how a learner and many samplers work together through one folder, and the only code that knows a path.

Processes never communicate directly. One side writes, the other lists names and reads; either may be absent for hours.

    ROOT/
      run.json                      the resolved manifest                                 runner or operator
      prepared.json                 model and data are in place, and whose they are       prepare
      model/  data/NAME.jsonl       starting weights (HF folder), tokenised problems      prepare
      weights/VERSION/              model.safetensors, since-VERSION.delta, canary.json,  learner
                                    manifest.json
                                    (with LoRA adapter_{config.json,model.safetensors})
      rollouts/NAME.safetensors     one prompt's group of completions, which waits        samplers, each its own names
      taken/NAME.safetensors        those that the learner has trained or dropped         learner
      archive/NAME.safetensors      trained rollouts, when the spec keeps them            learner
      slots/SLOT/                   lease-EPOCH.json, state-EPOCH.json, heartbeat.json    the slot's holder
      incarnations/iNUMBER.json     the claim to be the learner                           learner
      journal.jsonl                 a line a step: what it trains on and what it dropped  learner
      checkpoints/step-STEP/        everything the learner needs, manifest.json           learner
      learner.json                  heartbeat: step, newest version, what was taken       learner
      attempts/NODE-NUMBER.json     a start of a pod of the learner                       the pod's launcher
      attempts/...-end.json         how it ended                                          it, or its successor
      pins/VERSION                  this version is still being evaluated                 runner or launcher
      evals/VERSION.json            results                                               evaluation
      answers/NAME.jsonl            what was answered, by problem                         evaluation, heterorl eval
      quarantine/                   what failed its checks, with the reason               learner, or its writer
      output/  logs/  metrics/      the trained model, logs, JSONL

Rules
  1. A name is published once, after its contents are on the disk, by a rename that replaces nothing; it is never
     written again. A folder's manifest (protocol, kind, sizes, SHA-256 of each file) is written last. A name that
     starts with `.tmp-` does not exist for readers.
  2. Readers check everything and trust no size, name or time. JSON goes through the models of `records`: what is empty,
     torn or foreign is absent, and logged once; fields that a model does not know are ignored, as are names that the
     protocol does not know. A version or rollout that fails is refused or put aside, is counted, and never stops the
     run. A file that vanished was retired: take another.
  3. Nothing is deleted on doubt. A higher protocol, or a kind of folder that this one does not know, is refused as
     UnknownProtocol and stays as it is; what failed its checks goes to quarantine, also when its time to be deleted
     has come; a record that cannot be read goes there before its writer replaces it.
  4. A version is an anchor (`kind: anchor`, whole weights) or a delta (`kind: delta`: files that change the weights of
     earlier versions into these, and the digest of what they lead to); an anchor may hold deltas too. A reader takes
     the files that lead from what it has, or from nothing, to the version in the fewest bytes, and trusts no more than
     the digest of what comes of them. What leads to a version that is kept is kept with it.
     Of a run with LoRA it is an adapter (`kind: adapter`), which names the digest of the starting model: a reader that
     has another one refuses it.
  5. Each version carries a canary: texts and the learner's own log-probabilities of them. A sampler that loaded a
     version scores them in its engine and does not generate if they differ.
  6. A rollout's name carries weights version, slot and sequence number. A slot saves its next number before it
     publishes. A new holder begins after every number of the slot that its state, the names in rollouts/, archive/ and
     quarantine/, or the learner's heartbeat tell of, so a number is never used twice, whichever of them is lost.
  7. A step's selection is in the journal, on the disk, before it is trained. After a crash the learner goes back to
     its newest checkpoint, replays the journal, then selects afresh: no rollout is trained twice on the way to the
     surviving weights, none that was published is lost. When there are checkpoints and none is whole, it begins at
     step 0 only if the manifest says so (`failurePolicy.startOver`).
  8. What a step took is moved from rollouts/ to taken/ once it is in the journal, so that listing what waits stays
     cheap; readers look in both. After a crash the learner sorts the two by its journal. A rollout is deleted (or
     archived) only when the oldest checkpoint kept covers it. The learner is the only one that deletes weights and
     rollouts.
  9. The learner is the process whose incarnation has the highest claim; it asks before each write, last of all before
     a name is given, and leaves (Superseded) if there is a higher one. A claim names the launcher that starts its
     learner again: once it was followed by another launcher's it does so no more, or the two would follow each other in
     turn. In the journal a line that follows one of a later incarnation does not count. An incarnation first publishes
     the weights that it resumed from; a version of an earlier incarnation with a later step than that is of a lost
     future: readers pass over it, the learner deletes it.
 10. A slot is leased: the creator of lease-EPOCH.json with the highest epoch holds it, and asks before each write. A
     lease is free when it was released, when its holder was a process on this machine that is gone, or when its
     heartbeat has stood still for leaseSeconds by the observer's own clock; clocks of different machines are never
     compared. A lease says the first sequence number of its epoch. A rollout says the epoch in which it was made; its
     number must be below the first one of the next epoch, else it was made after its own was over, and is put aside.
     So it takes one listing and at most one small file to judge, and leases, which are never changed, can be cached.

What a crash leaves: a staged folder or file, a journalled step that was not trained (replayed), a torn last line in a
log of lines (cut off), a sequence number that was never published (skipped). What is staged is swept: in weights/ and
checkpoints/ by the next incarnation; of a slot by its next holder; elsewhere by the learner when it is an hour old by
the file server's clock. A process whose staged file was swept is one that was followed by another, and finds that out.

What the checks before a write cannot close is the instant between them and the write, and, on a network file system,
the seconds for which a client may go on seeing a folder as it was (NFS: acdirmax). What is written then does no harm:
a slot's state has a file for each epoch, a rollout is refused by its epoch, a version, journal line or checkpoint by
its incarnation (a checkpoint, when the journal shows that a later incarnation trained an earlier step anew), a
heartbeat lasts until the next one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from heterorl.errors import ExchangeError
from heterorl.exchange import published_folder
from heterorl.exchange.adapters import ADAPTER_WEIGHTS
from heterorl.exchange.canary import Canary
from heterorl.exchange.learner_state import LearnerState
from heterorl.exchange.records import (
    DeltaBase,
    Evaluation,
    FileEntry,
    SlotHeartbeat,
    SlotState,
    SlotStatus,
    WeightsManifest,
)
from heterorl.exchange.rollout import Rollout, RolloutName
from heterorl.exchange.slots import Lease, Slots
from heterorl.exchange.version import Version
from heterorl.exchange.weight_paths import cheapest, cost, folders_on_the_way
from heterorl.exchange.weights import CANARY_FILE, Arrived, Fetched, Weights
from heterorl.spec.run import Slot

LONGEST_PATH = 1.5
"""What a reader that has nothing may have to read of an anchor and deltas, in sizes of the whole weights."""
_SAFETENSORS = ".safetensors"


class Exchange(LearnerState):
    """One run's folder on the shared volume, with all that passes between its learner and its samplers.

    The folder, its manifest and its owner are `RunFolder`'s part; what the learner keeps for itself, and its right to
    write, `LearnerState`'s; leases are `Slots`'.
    """

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def stage_weights(self, version: Version) -> Path:
        """A hidden folder to write model.safetensors (HF names, the run's dtype) into."""
        with self._as_learner():
            return published_folder.stage(self.files, self.root / "weights", str(version))

    def commit_weights(
        self,
        version: Version,
        canary: Canary,
        *,
        deltas: Mapping[str, DeltaBase] = {},
        rebuilt: FileEntry | None = None,
        known: Mapping[str, FileEntry] = {},
    ) -> None:
        """Publish what was staged for this version.

        `deltas`: what each staged delta changes, by file name; `rebuilt`: what the weights are where they
        were not staged whole; `known`: entries of staged files that were hashed while they were written.
        """
        staged = published_folder.staged_path(self.root / "weights", str(version))
        with self._as_learner():
            self.files.write(staged / CANARY_FILE, json.dumps(asdict(canary)).encode())
            files = published_folder.describe(self.files, staged, known)
            is_adapter = ADAPTER_WEIGHTS in files
            manifest = WeightsManifest(
                kind="adapter" if is_adapter else "delta" if rebuilt else "anchor",
                time=self.now(),
                step=version.step,
                files=files,
                model=self._model_digest if is_adapter else None,
                rebuilt=rebuilt,
                deltas=dict(deltas),
            )
            published_folder.publish(
                self.files, staged, self._weights.folder(version), manifest, self.require_incarnation
            )

    def needs_anchor(self, num_bytes: int, deltas: Mapping[DeltaBase, int]) -> bool:
        """Whether the next version, whole weights of `num_bytes`, has to be published whole.

        It has if a reader that has nothing would read more than `LONGEST_PATH` times as much to come to it by deltas
        (their bytes, by what they change). And if a sampler has refused a version since the last anchor:
        what leads there may be damaged.
        """
        ways = self._weights.ways()
        paths = {base: cheapest(ways, base.sha256) for base in deltas}
        costs = [cost(path) + deltas[base] for base, path in paths.items() if path is not None]
        if min(costs, default=math.inf) > LONGEST_PATH * num_bytes:
            return True
        last_anchor = str(max(way.version for way in ways if way.base is None))
        return any(name >= last_anchor for beat in self.heartbeats().values() for name in beat.refused)

    @property
    def _model_digest(self) -> str | None:
        """Of the starting model, as it was prepared."""
        return self.prepared.model.digest if self.prepared and self.prepared.model else None

    def list_versions(self) -> list[Version]:
        """Published versions, oldest first, without those of a lost future."""
        return surviving_versions(self._weights.published())

    def published_at(self, version: Version) -> float:
        """When the learner published it, in seconds by the learner's clock.

        Raises FileNotFoundError if it is retired, CorruptFile and UnknownProtocol as `fetch_weights`.
        """
        return self._weights.manifest(version).time

    def fetch_weights(
        self,
        version: Version,
        to: Path,
        *,
        held: Mapping[str, Path] = {},
        arrived: Arrived = lambda num_bytes: None,
    ) -> Fetched:
        """Make a version's model.safetensors in a folder on this machine, of the files on the volume that are fewest
        bytes, and check every byte of them and of what they give.

        `held`: weights on this machine, by digest (`Fetched.held`). Files that are damaged, or were retired meanwhile,
        are passed by where others lead to the version. Raises CorruptFile with the reason where none do,
        UnknownProtocol for what a later version of HeteroRL published, and FileNotFoundError if the version was retired
        meanwhile.
        """
        return self._weights.fetch(version, to, held, arrived, model=self._model_digest)

    def retire_weights(self, keep: Iterable[Version]) -> list[Version]:
        """Delete the versions that are neither to be kept, nor pinned, nor being fetched, nor on the way to these;
        returns the deleted ones.
        """
        with self._as_learner():
            published = self._weights.published()
            kept = {*keep, *self.list_pinned(), *self._being_fetched()} & set(published)
            if not set(published) - kept:
                return []
            kept |= folders_on_the_way(self._weights.ways(), kept, self.spec.max_lag)
            retired = [version for version in sorted(published, reverse=True) if version not in kept]
            return [version for version in retired if self._delete(self._weights.folder(version), WeightsManifest)]

    def _being_fetched(self) -> set[Version]:
        """Versions that samplers at work are reading."""
        lease_s = self.spec.exchange.lease_seconds
        beats = {slot: beat for slot, beat in self.heartbeats().items() if beat.fetching}
        return {beat.fetching for slot, beat in beats.items() if beat.fetching and self._slots.is_held(slot, lease_s)}

    def quarantine_weights(self, version: Version, reason: str) -> None:
        """Put a version that failed its checks aside."""
        with self._as_learner():
            self._records.quarantine(self._weights.folder(version), reason)

    def pin(self, version: Version) -> None:
        """Keep this version from being retired."""
        self.files.make_dir(self.root / "pins")
        self.files.create(self.root / "pins" / str(version), b"")

    def unpin(self, version: Version) -> None:
        """Let it go."""
        self.files.remove(self.root / "pins" / str(version))

    def list_pinned(self) -> list[Version]:
        """Versions kept from being retired."""
        return self._records.names(self.root / "pins", Version.parse)

    @cached_property
    def _weights(self) -> Weights:
        return Weights(self.root / "weights", self.files, self._records)

    # ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def put_rollouts(self, lease: Lease, rollouts: Mapping[RolloutName, Rollout]) -> None:
        """Publish groups as the holder of their slot.

        Raises Superseded, and nothing is published, when the slot has another holder by now; ExchangeError when a name
        was used before.
        """
        contents = {self._rollout(name): rollout.to_bytes() for name, rollout in rollouts.items()}
        self.files.make_dir(self.root / "rollouts")
        with self._slots.held(lease):
            if existed := self.files.create_all(contents):
                names = ", ".join(path.stem for path in existed)
                raise ExchangeError(f"{names}: published before and never overwritten; do two samplers use one slot?")

    def list_rollouts(self) -> list[RolloutName]:
        """Published rollouts that wait for the learner; some may be taken already, if it crashed."""
        return self._records.names(self.root / "rollouts", RolloutName.parse, _SAFETENSORS)

    def list_taken(self) -> list[RolloutName]:
        """Rollouts that the learner has trained or dropped, and that no checkpoint covers yet."""
        return self._records.names(self.root / "taken", RolloutName.parse, _SAFETENSORS)

    def read_rollout(self, name: RolloutName) -> Rollout:
        """Read and check one group.

        Raises CorruptFile with the reason, UnknownProtocol for what a later version of HeteroRL published, and
        FileNotFoundError if it is gone.
        """
        try:
            data = self.files.read(self._rollout(name))
        except FileNotFoundError:
            data = self.files.read(self._taken(name))
        return Rollout.from_bytes(data)

    def take_away(self, names: Iterable[RolloutName]) -> None:
        """Move what the journal says was taken out of the folder of those that wait; fine for what is there already."""
        self._move(names, self._rollout, self._taken)

    def give_back(self, names: Iterable[RolloutName]) -> None:
        """Let rollouts wait again of which the journal no longer says that they were taken."""
        self._move(names, self._taken, self._rollout)

    def _move(
        self, names: Iterable[RolloutName], source: Callable[[RolloutName], Path], to: Callable[[RolloutName], Path]
    ) -> None:
        with self._as_learner():
            for number, name in enumerate(sorted(names)):
                if number == 0:
                    self.files.make_dir(to(name).parent)
                try:
                    if not self.files.publish(source(name), to(name)):
                        self._records.quarantine(
                            source(name), f"another file of its name is in {to(name).parent.name}/"
                        )
                except FileNotFoundError:
                    continue

    def check_epoch(self, name: RolloutName, lease_epoch: int) -> None:
        """CorruptFile for a rollout whose maker had lost its slot before it was made (`lease_epoch`: as it says)."""
        self._slots.check_epoch(name, lease_epoch)

    def quarantine_rollout(self, name: RolloutName, reason: str) -> None:
        """Put a file that failed its checks aside, with the reason beside it."""
        with self._as_learner():
            for path in (self._rollout(name), self._taken(name)):
                self._records.quarantine(path, reason)

    def list_quarantined(self) -> list[RolloutName]:
        """Rollouts that failed their checks."""
        folders = (self.root / "quarantine" / name for name in ("rollouts", "taken"))
        return [name for folder in folders for name in self._records.names(folder, RolloutName.parse, _SAFETENSORS)]

    def retire_rollouts(self, names: Iterable[RolloutName], *, archive: bool) -> None:
        """Delete or archive rollouts that a durable checkpoint covers; those already gone are fine."""
        with self._as_learner():
            names = set(names)
            retired = [self._taken(name) for name in self.list_taken() if name in names]
            retired += [self._rollout(name) for name in self.list_rollouts() if name in names]
            if archive and retired:
                self.files.make_dir(self.root / "archive")
            for path in retired:
                if not archive:
                    self.files.remove(path)
                elif not self.files.publish(path, self.root / "archive" / path.name):
                    self._records.quarantine(path, "another file of its name is in the archive")
            if archive and retired:
                self.files.settle(self.root / "archive")

    def _rollout(self, name: RolloutName) -> Path:
        return self.root / "rollouts" / f"{name}{_SAFETENSORS}"

    def _taken(self, name: RolloutName) -> Path:
        return self.root / "taken" / f"{name}{_SAFETENSORS}"

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────
    @cached_property
    def _slots(self) -> Slots:
        return Slots(self.root / "slots", self.files, self._records, self.now)

    def acquire_slot(
        self, candidates: Callable[[], Iterable[Slot]], stop: Callable[[], bool] = lambda: False
    ) -> Lease | None:
        """Lease the first free slot of the candidates, waiting for one if need be; None when told to stop first.

        The candidates are asked for at every look: slots may be added while one waits.
        """
        self.check_volume()
        settings = self.spec.exchange
        lease_s = max(settings.lease_seconds, 2 * settings.poll_seconds)  # a heartbeat is read at least twice
        while not stop():
            for slot in candidates():
                if lease := self._slots.try_lease(slot, self._next_seq, lease_s):
                    self._sweep_rollouts(lease.slot)
                    return lease
            self.sleep(self.spec.exchange.poll_seconds)
        return None

    def _next_seq(self, slot: Slot) -> int:
        """The first sequence number that cannot have been used, from all records, any of which may be lost."""
        state, learner = self._slots.load(slot), self.learner
        published = [*self.list_rollouts(), *self.list_taken(), *self.list_quarantined()]
        published += self._records.names(self.root / "archive", RolloutName.parse, _SAFETENSORS)
        return max(
            state.next_seq if state else 0,
            learner.taken.get(str(slot), -1) + 1 if learner else 0,
            *(name.seq + 1 for name in published if name.slot == slot),
            0,
        )

    def _sweep_rollouts(self, slot: Slot) -> None:
        """Remove what an earlier holder of the slot left half-written."""
        for path in self.files.leftovers(self.root / "rollouts"):
            if f"--{slot}--s" in path.name:
                self.files.remove(path)

    def beat(self, lease: Lease, status: SlotStatus, *, released: bool = False) -> None:
        """Keep the lease and show the slot's status; Superseded if another sampler took the slot over."""
        self._slots.beat(lease, status, released=released)

    def heartbeats(self) -> dict[Slot, SlotHeartbeat]:
        """The last heartbeat of every slot that ever had one."""
        return self._slots.heartbeats()

    def save_slot(self, lease: Lease, state: SlotState) -> None:
        """Put the slot's own state (next sequence number, delays drawn) on the disk; Superseded as `beat`."""
        self._slots.save(lease, state)

    def load_slot(self, slot: Slot) -> SlotState | None:
        """The slot's state, for its next holder; None at first."""
        return self._slots.load(slot)

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────
    def write_eval(self, version: Version, result: Evaluation) -> None:
        """Results of one version on every evaluation set."""
        self.files.make_dir(self.root / "evals")
        self._records.write(self._eval(version), result)

    def write_answers(self, name: str, lines: Iterable[bytes]) -> None:
        """What was answered to the problems of one evaluation; replaces what an earlier try left."""
        self.files.make_dir(self.answers_dir)
        self.files.replace(self.answers_dir / f"{name}.jsonl", b"".join(lines))

    def list_evals(self) -> list[Version]:
        """Versions that have results, oldest first."""
        return sorted(self._records.names(self.root / "evals", Version.parse, ".json"))

    def read_evals(self) -> dict[Version, Evaluation]:
        """All results, oldest version first."""
        found = {version: self._records.read(self._eval(version), Evaluation) for version in self.list_evals()}
        return {version: result for version, result in found.items() if result is not None}

    def _eval(self, version: Version) -> Path:
        return self.root / "evals" / f"{version}.json"


def surviving_versions(published: Collection[Version]) -> list[Version]:
    """The versions on the way to the newest incarnation's weights, oldest first.

    An incarnation publishes no step before the one that it resumed from. So later steps of its predecessors, published
    by one that was superseded and did not know it yet, are of a lost future and would pass for the newest.
    """
    first: dict[int, int] = {}
    for version in published:
        first[version.incarnation] = min(version.step, first.get(version.incarnation, version.step))
    return sorted(
        version
        for version in published
        if all(version.step <= step for incarnation, step in first.items() if incarnation > version.incarnation)
    )
