"""The exchange: how a learner and many samplers work together through one folder, and the only code that knows a path.

Processes never communicate directly. One side writes, the other lists names and reads; either may be absent for hours.

    ROOT/
      run.json                      the resolved manifest                                 runner or operator
      prepared.json                 model and data are in place, and whose they are       prepare
      model/  data/NAME.jsonl       starting weights (HF folder), tokenised problems      prepare
      weights/VERSION/              model.safetensors, canary.json, manifest.json         learner
      rollouts/NAME.safetensors     one prompt's group of completions                     samplers, each its own names
      archive/NAME.safetensors      trained rollouts, when the spec keeps them            learner
      slots/SLOT/                   lease-EPOCH.json, heartbeat.json, state.json          the slot's holder
      journal.jsonl                 a line a step: what it trains on and what it dropped  learner
      checkpoints/step-STEP/        everything the learner needs, manifest.json           learner
      learner.json                  heartbeat: step, newest version, what was taken       learner
      attempts-NODE.json            starts of a pod of the learner, and how they ended    the pod's launcher
      pins/VERSION                  this version is still being evaluated                 runner or launcher
      evals/VERSION.json            results                                               evaluation
      quarantine/                   what failed its checks, with the reason               the reader that found it
      output/  logs/  metrics/      the trained model, logs, JSONL

Rules
  1. A name is published once, by rename, after its contents are on the disk; it is never written again. A folder's
     manifest (protocol, kind, sizes, SHA-256 of each file) is written last. A name that starts with `.tmp-` does not
     exist for readers; the learner sweeps its own leftovers when it starts.
  2. Readers check everything and trust no size, name or time. A version or rollout that fails goes to quarantine or is
     refused, is counted, and never stops the run. A file that vanished was retired: take another.
  3. Weights are anchors (`kind: anchor`, whole); `kind: delta` with a `base` has its place in the manifest.
  4. Each version carries a canary: texts and the learner's own log-probabilities of them. A sampler that loaded a
     version scores them in its engine and does not generate if they differ.
  5. A rollout's name carries weights version, slot and sequence number. A slot saves its next number before it
     publishes, so a number is never used twice; a crash can skip one, never repeat one.
  6. A step's selection is in the journal, on the disk, before it is trained. After a crash the learner goes back to
     its newest checkpoint, replays the journal, then selects afresh: no rollout is trained twice on the way to the
     surviving weights, none that was published is lost.
  7. A rollout is deleted (or archived) only when the oldest checkpoint kept covers it. The learner is the only one
     that deletes weights and rollouts.
  8. A slot is leased: the creator of lease-EPOCH.json with the highest epoch holds it. A lease is free when it was
     released, when its holder was a process on this machine that is gone, or when its heartbeat has stood still for
     leaseSeconds by the observer's own clock; clocks of different machines are never compared.

What a crash leaves: a staged folder or file (swept or ignored), a journalled step that was not trained (replayed), a
torn last line in a log of lines (cut off), a sequence number that was never published (skipped).
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from heterorl.errors import CorruptFile, ExchangeError, RunFolderError, Superseded, UnknownProtocol
from heterorl.exchange import published_folder
from heterorl.exchange.canary import Canary
from heterorl.exchange.records import (
    Attempt,
    AttemptsFile,
    CheckpointManifest,
    Evaluation,
    Incarnation,
    JournalEntry,
    LearnerHeartbeat,
    SlotHeartbeat,
    SlotState,
    SlotStatus,
    WeightsManifest,
    parse_canary,
    parse_record,
)
from heterorl.exchange.rollout import Rollout
from heterorl.exchange.run_folder import RunFolder
from heterorl.exchange.slots import Lease, Slots
from heterorl.names import RolloutName, Slot, Version

log = logging.getLogger(__name__)

_SAFETENSORS = ".safetensors"
_MODEL, _CANARY = "model.safetensors", "canary.json"
_ATTEMPTS = re.compile(r"attempts-([0-9]+)\.json")
_INCARNATION = re.compile(r"i([0-9]{4,})\.json")
_CHECKPOINT = re.compile(r"step-([0-9]{8,})")
_ABANDONED_S = 3600.0
"""A staged file that is older by the file server's clock, and whose owner cannot be asked, has none left."""


@dataclass(frozen=True)
class Fetched:
    """A version, checked and copied to this machine."""

    version: Version
    folder: Path
    """Holds model.safetensors."""
    canary: Canary


class Exchange(RunFolder):
    """One run's folder on the shared volume, as used by the learner, the samplers and all other processes."""

    incarnation: int | None = None
    """Of the learner, once this process has begun one or was told its first rank's: it is asked before each write."""

    @cached_property
    def _slots(self) -> Slots:
        return Slots(self.root / "slots", self.files, self._records, self.now)

    # ── the learner's right to write ─────────────────────────────────────────────────────────────────────────────────
    def begin_incarnation(self) -> int:
        """Become the learner: claim the next incarnation, which ends the right to write of all before it."""
        self.check_volume()
        while True:
            number = self._last_incarnation() + 1
            claim = Incarnation(id=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(), time=self.now())
            self.files.make_dir(self.root / "incarnations")
            if self.files.create(self.root / "incarnations" / f"i{number:04d}.json", claim.to_bytes()):
                self.incarnation = number
                return number

    def _last_incarnation(self) -> int:
        """The highest that was ever used, also where the folder of claims was lost."""
        seen = {version.incarnation for version in [*self.list_versions(), *self.list_evals()]}
        seen |= {entry.incarnation for entry in self.read_journal()}
        heartbeat = self.learner
        return max(seen | {self._newest_claim(), heartbeat.incarnation if heartbeat else 0})

    def _newest_claim(self) -> int:
        return max(self._records.names(self.root / "incarnations", _numbered(_INCARNATION)), default=0)

    def require_incarnation(self) -> None:
        """Superseded for a learner that a newer one has followed. One that never began an incarnation is not asked."""
        if self.incarnation is not None and (newest := self._newest_claim()) > self.incarnation:
            raise Superseded(
                f"another learner has begun on {self.root} (incarnation {newest}, this one is {self.incarnation}); this"
                " learner leaves and writes nothing more"
            )

    @contextmanager
    def _as_learner(self) -> Iterator[None]:
        self.require_incarnation()
        try:
            yield
        except FileNotFoundError:  # a successor has swept what was staged
            self.require_incarnation()
            raise

    def sweep(self) -> None:
        """Remove what crashed processes left half-written: a predecessor's at once, that of others when it is old."""
        with self._as_learner():
            staged = [path for name in ("weights", "checkpoints") for path in self.files.leftovers(self.root / name)]
            others = [path for name in ("", "rollouts", "evals") for path in self.files.leftovers(self.root / name)]
            if self.incarnation is not None and others:
                now = self.files.modified(self.root / "incarnations" / f"i{self.incarnation:04d}.json")
                staged += [path for path in others if now - self._age_mark(path, now) > _ABANDONED_S]
            for path in staged:
                self.files.remove(path)

    def _age_mark(self, path: Path, now: float) -> float:
        try:
            return self.files.modified(path)
        except FileNotFoundError:
            return now

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def stage_weights(self, version: Version) -> Path:
        """A hidden folder to write model.safetensors (HF names, the run's dtype) into."""
        with self._as_learner():
            return published_folder.stage(self.files, self.root / "weights", str(version))

    def commit_weights(self, version: Version, canary: Canary) -> None:
        """Publish what was staged for this version."""
        staged = published_folder.staged_path(self.root / "weights", str(version))
        with self._as_learner():
            self.files.write(staged / _CANARY, json.dumps(asdict(canary)).encode())
            listing = published_folder.describe(self.files, staged)
            manifest = WeightsManifest(time=self.now(), step=version.step, files=listing)
            published_folder.publish(self.files, staged, self._version(version), manifest, self.require_incarnation)

    def list_versions(self) -> list[Version]:
        """Published versions, oldest first."""
        return sorted(self._records.names(self.root / "weights", Version.parse))

    def published_at(self, version: Version) -> float:
        """When the learner published it, in seconds by the learner's clock.

        Raises FileNotFoundError if it is retired, CorruptFile and UnknownProtocol as `fetch_weights`.
        """
        return published_folder.read_manifest(self.files, self._version(version), WeightsManifest).time

    def fetch_weights(self, version: Version, to: Path, *, check: Callable[[], None] = lambda: None) -> Fetched:
        """Copy a version to a folder on this machine, checking every byte; what `check` raises meanwhile ends it.

        Raises CorruptFile with the reason, UnknownProtocol for what a later version of HeteroRL published, and
        FileNotFoundError if the version was retired meanwhile.
        """
        source = self._version(version)
        manifest = published_folder.read_manifest(self.files, source, WeightsManifest)
        if lacking := {_MODEL, _CANARY} - set(manifest.files):
            raise CorruptFile(f"weights {version}: the manifest does not list {', '.join(sorted(lacking))}")
        to.mkdir(parents=True, exist_ok=True)
        with published_folder.standing(self.files, source):
            for name, expected in manifest.files.items():
                if Path(name).name != name:
                    raise CorruptFile(f"weights {version}: {name!r} is not a plain file name")
                published_folder.check_size(self.files, source / name, expected)
                digest = self.files.copy(source / name, to / name, check=check)
                published_folder.check_digest(source / name, digest, expected)
        return Fetched(version, to, parse_canary((to / _CANARY).read_bytes(), f"weights {version}: {_CANARY}"))

    def retire_weights(self, keep: Iterable[Version]) -> list[Version]:
        """Delete every version that is neither to be kept nor pinned; returns the deleted ones."""
        with self._as_learner():
            kept = {*keep, *self.list_pinned()}
            retired = [version for version in self.list_versions() if version not in kept]
            return [version for version in retired if self._delete(self._version(version), WeightsManifest)]

    def quarantine_weights(self, version: Version, reason: str) -> None:
        """Put a version that failed its checks aside."""
        with self._as_learner():
            self._records.quarantine(self._version(version), reason)

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

    def _version(self, version: Version) -> Path:
        return self.root / "weights" / str(version)

    def _delete(self, folder: Path, model: type[WeightsManifest] | type[CheckpointManifest]) -> bool:
        """Delete a published folder that is no longer needed; False for one that is of another version's, or damaged.

        The one stays where it is, the other is put aside: who is to judge it may want to see it.
        """
        try:
            published_folder.read_manifest(self.files, folder, model)
        except UnknownProtocol as error:
            log.error("%s", error)
            return False
        except CorruptFile as error:
            self._records.quarantine(folder, str(error))
            return False
        except FileNotFoundError:
            return True
        self.files.remove(folder)
        return True

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
        """Published rollouts that were neither deleted nor quarantined, trained ones included."""
        return self._records.names(self.root / "rollouts", RolloutName.parse, _SAFETENSORS)

    def read_rollout(self, name: RolloutName) -> Rollout:
        """Read and check one group.

        Raises CorruptFile with the reason, UnknownProtocol for what a later version of HeteroRL published, and
        FileNotFoundError if it is gone.
        """
        return Rollout.from_bytes(self.files.read(self._rollout(name)))

    def check_epoch(self, name: RolloutName, lease_epoch: int) -> None:
        """CorruptFile for a rollout whose maker had lost its slot before it was made (`lease_epoch`: as it says)."""
        self._slots.check_epoch(name, lease_epoch)

    def quarantine_rollout(self, name: RolloutName, reason: str) -> None:
        """Put a file that failed its checks aside, with the reason beside it."""
        with self._as_learner():
            self._records.quarantine(self._rollout(name), reason)

    def list_quarantined(self) -> list[RolloutName]:
        """Rollouts that failed their checks."""
        return self._records.names(self.root / "quarantine" / "rollouts", RolloutName.parse, _SAFETENSORS)

    def retire_rollouts(self, names: Iterable[RolloutName], *, archive: bool) -> None:
        """Delete or archive rollouts that a durable checkpoint covers; those already gone are fine."""
        with self._as_learner():
            retired = sorted(set(names) & set(self.list_rollouts()))
            if archive and retired:
                self.files.make_dir(self.root / "archive")
            for path in map(self._rollout, retired):
                if not archive:
                    self.files.remove(path)
                elif not self.files.publish(path, self.root / "archive" / path.name):
                    self._records.quarantine(path, "another file of its name is in the archive")
            if archive and retired:
                self.files.settle(self.root / "archive")

    def _rollout(self, name: RolloutName) -> Path:
        return self.root / "rollouts" / f"{name}{_SAFETENSORS}"

    # ── the learner's journal, heartbeat and checkpoints ─────────────────────────────────────────────────────────────
    def append_journal(self, entry: JournalEntry) -> None:
        """Put a step's selection on the disk, before it is trained."""
        with self._as_learner():
            self.files.append(self._journal, entry.to_bytes() + b"\n")

    def read_journal(self) -> list[JournalEntry]:
        """All steps in order. UnknownProtocol, as only the version that wrote it can go on from it.

        Of a step the later line stands, unless an earlier incarnation wrote it: a learner that was superseded and did
        not know it yet. A torn last line is left out, as is one that cannot be read, which is told.
        """
        return _surviving(self._read_journal()[0])

    def rewrite_journal(self, entries: Iterable[JournalEntry]) -> None:
        """Replace the journal: cuts a torn line, or steps that cannot be replayed.

        A journal with lines that cannot be read is put into quarantine first, as it was.
        """
        with self._as_learner():
            if damage := self._read_journal()[1]:
                self._records.keep_copy(self._journal, damage)
            self.files.replace(self._journal, b"".join(entry.to_bytes() + b"\n" for entry in entries))

    def _read_journal(self) -> tuple[list[JournalEntry], str]:
        """The lines that can be read, and what is wrong with the first of the others."""
        try:
            lines = self.files.read(self._journal).split(b"\n")
        except FileNotFoundError:
            return [], ""
        entries, damage = [], ""
        for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end is torn
            try:
                entries.append(parse_record(JournalEntry, line, f"{self._journal.name}, line {number}"))
            except CorruptFile as error:
                damage = damage or str(error)
        if damage:
            log.error("%s; lines that cannot be read are left out", damage)
        return entries, damage

    def write_learner(self, heartbeat: LearnerHeartbeat) -> None:
        """The learner's heartbeat; its time is set here."""
        with self._as_learner():
            self._records.write(self.root / "learner.json", heartbeat.model_copy(update={"time": self.now()}))

    @property
    def learner(self) -> LearnerHeartbeat | None:
        """The learner's last heartbeat; None before the first."""
        return self._records.read(self.root / "learner.json", LearnerHeartbeat)

    @property
    def trained(self) -> bool:
        """Whether the last step that is asked for now is trained, and the output written."""
        learner = self.learner
        return learner is not None and learner.finished and learner.step >= self.spec.learner.steps

    @property
    def _journal(self) -> Path:
        return self.root / "journal.jsonl"

    def stage_checkpoint(self, step: int) -> Path:
        """A hidden folder for the learner's state; every rank may write into it once rank 0 has staged it."""
        with self._as_learner():
            return published_folder.stage(self.files, self.root / "checkpoints", self._staged_name(step))

    def staged_checkpoint(self, step: int) -> Path:
        """The folder that rank 0 staged."""
        return published_folder.staged_path(self.root / "checkpoints", self._staged_name(step))

    def commit_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Make the staged checkpoint durable, with the learner's small state in its manifest."""
        final, staged = self._checkpoint(step), self.staged_checkpoint(step)
        with self._as_learner():
            if self.files.exists(final):
                self._records.quarantine(final, "the learner made this checkpoint anew")
            listing = published_folder.describe(self.files, staged)
            manifest = CheckpointManifest(time=self.now(), step=step, state=state, files=listing)
            published_folder.publish(self.files, staged, final, manifest, self.require_incarnation)

    def list_checkpoints(self) -> list[int]:
        """Steps of finished checkpoints, oldest first."""
        return sorted(self._records.names(self.root / "checkpoints", _numbered(_CHECKPOINT)))

    def open_checkpoint(self, step: int) -> tuple[Path, dict[str, Any]]:
        """Folder and small state of a checkpoint, checked byte by byte.

        Raises CorruptFile with the reason, and UnknownProtocol for what a later version of HeteroRL saved.
        """
        folder = self._checkpoint(step)
        manifest = published_folder.read_manifest(self.files, folder, CheckpointManifest)
        with published_folder.standing(self.files, folder):
            for name, expected in manifest.files.items():
                published_folder.check_size(self.files, folder / name, expected)
                published_folder.check_digest(folder / name, self.files.digest(folder / name), expected)
        return folder, manifest.state

    def open_newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that passes its checks, as `open_checkpoint`; None when there are none at all.

        Newer ones that fail go to quarantine. When all fail, nothing is moved and RunFolderError is raised: a run does
        not start again at step 0 because a disk was bad, unless somebody clears the folder. UnknownProtocol, when a
        later version of HeteroRL saved a newer one than the newest that is whole.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.list_checkpoints()):
            try:
                found = self.open_checkpoint(step)
            except FileNotFoundError:
                continue
            except CorruptFile as error:
                log.error("checkpoint of step %d is damaged (%s); trying the one before", step, error)
                damaged[step] = str(error)
                continue
            for failed, reason in damaged.items():
                self.quarantine_checkpoint(failed, reason)
            return found
        if damaged:
            raise RunFolderError(
                f"{self.root / 'checkpoints'}: none of the checkpoints can be used ({'; '.join(damaged.values())}); put"
                " one back that is whole, or move them all out of this folder to start again at step 0"
            )
        return None

    def remove_checkpoint(self, step: int) -> None:
        """Delete a checkpoint that newer ones make dispensable."""
        with self._as_learner():
            self._delete(self._checkpoint(step), CheckpointManifest)

    def quarantine_checkpoint(self, step: int, reason: str) -> None:
        """Put a checkpoint that failed its checks aside."""
        with self._as_learner():
            self._records.quarantine(self._checkpoint(step), reason)

    def _checkpoint(self, step: int) -> Path:
        return self.root / "checkpoints" / f"step-{step:08d}"

    def _staged_name(self, step: int) -> str:
        """With the incarnation, so that two learners never write into one folder."""
        return f"step-{step:08d}-i{self.incarnation or 0:04d}"

    def save_attempts(self, node: int, attempts: list[Attempt]) -> None:
        """Put the starts of one of the learner's pods on the disk (`heterorl.exchange.crash_budget`)."""
        self._records.write(self.root / f"attempts-{node}.json", AttemptsFile(attempts=attempts))

    def load_attempts(self) -> dict[int, list[Attempt]]:
        """The starts of the learner's pods, by the pod's number."""
        found = {}
        for name in self.files.list(self.root):
            if match := _ATTEMPTS.fullmatch(name):
                file = self._records.read(self.root / name, AttemptsFile)
                found[int(match[1])] = list(file.attempts) if file else []
        return found

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def acquire_slot(
        self, candidates: Callable[[], Iterable[Slot]], stop: Callable[[], bool] = lambda: False
    ) -> Lease | None:
        """Lease the first free slot of the candidates, waiting for one if need be; None when told to stop first.

        The candidates are asked for at every look: slots may be added while one waits.
        """
        self.check_volume()
        while not stop():
            for slot in candidates():
                if lease := self._slots.try_lease(slot, self._next_seq, self.spec.exchange.lease_seconds):
                    self._sweep_rollouts(lease.slot)
                    return lease
            self.sleep(self.spec.exchange.poll_seconds)
        return None

    def _next_seq(self, slot: Slot) -> int:
        """The first sequence number that cannot have been used, from all records, any of which may be lost."""
        state, learner = self._slots.load(slot), self.learner
        published = [*self.list_rollouts(), *self.list_quarantined()]
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

    def list_evals(self) -> list[Version]:
        """Versions that have results, oldest first."""
        return sorted(self._records.names(self.root / "evals", Version.parse, ".json"))

    def read_evals(self) -> dict[Version, Evaluation]:
        """All results, oldest version first."""
        found = {version: self._records.read(self._eval(version), Evaluation) for version in self.list_evals()}
        return {version: result for version, result in found.items() if result is not None}

    def _eval(self, version: Version) -> Path:
        return self.root / "evals" / f"{version}.json"


def _numbered(pattern: re.Pattern[str]) -> Callable[[str], int]:
    """Reads the number in a name; ValueError for another name."""

    def parse(name: str) -> int:
        if not (match := pattern.fullmatch(name)):
            raise ValueError(name)
        return int(match[1])

    return parse


def _surviving(entries: Iterable[JournalEntry]) -> list[JournalEntry]:
    """The line of each step that stands, in order of the steps."""
    standing: dict[int, JournalEntry] = {}
    newest = 0
    for entry in entries:
        newest = max(newest, entry.incarnation)
        if entry.incarnation == newest:
            standing[entry.step] = entry
    return [standing[step] for step in sorted(standing)]
