"""What the learner writes for itself: the claim that makes it the learner, journal, heartbeat and checkpoints.

A learner that was frozen, or cut off from the volume, may wake up when a successor is at work. So it asks before each
write whether a newer incarnation was claimed, last of all before a name is given. What it writes in the instant between
asking and writing does no harm either: versions and staged folders carry the incarnation in their names, a line that it
gets into the journal after a successor's is left out, and a name that is taken is not given again.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from heterorl.errors import CorruptFile, RunFolderError, Superseded, UnknownProtocol
from heterorl.exchange import published_folder
from heterorl.exchange.records import (
    Attempt,
    CheckpointManifest,
    Incarnation,
    JournalEntry,
    LearnerHeartbeat,
    WeightsManifest,
    parse_record,
)
from heterorl.exchange.run_folder import RunFolder
from heterorl.exchange.version import Version

log = logging.getLogger(__name__)

LAUNCHER = "HETERORL_LAUNCHER"
"""Environment variable by which a launcher tells the learner that it starts who it is."""

_ATTEMPT = re.compile(r"(0|[1-9][0-9]*)-([0-9]{8,})(-end)?\.json")
_INCARNATION = re.compile(r"i([0-9]{4,})\.json")
_CHECKPOINT = re.compile(r"step-([0-9]{8,})")
_SHARED = ("", "rollouts", "evals", "pins", "incarnations", "attempts")
"""Folders in which several processes stage files."""
_ABANDONED_S = 3600.0
"""A staged file that is older by the file server's clock, and whose owner cannot be asked, has none left."""


class LearnerState(RunFolder):
    """A run's folder as its learner keeps it."""

    incarnation: int | None = None
    """Of the learner, once this process has begun one or was told its first rank's: it is asked before each write."""
    launcher: str = ""
    """Who starts this learner again when it ends; empty where nobody does."""

    # ── the learner's right to write ─────────────────────────────────────────────────────────────────────────────────
    def begin_incarnation(self) -> int:
        """Become the learner: claim the next incarnation, which ends the right to write of all before it.

        Superseded where that would be in turn: once another launcher's learner has followed this launcher's, this one
        has nothing more to start. So of two launchers that live the later one stays, whoever starts its learner again.
        """
        self.check_volume()
        while True:
            if (other := self.successor_of_launcher) is not None:
                raise Superseded(f"{other}; this learner leaves and writes nothing")
            number = self._last_incarnation() + 1
            claim = Incarnation(
                id=uuid.uuid4().hex,
                launcher=self.launcher,
                host=socket.gethostname(),
                pid=os.getpid(),
                time=self.now(),
                clock_ahead_s=self.clock_ahead_s(),
            )
            self.files.make_dir(self.root / "incarnations")
            if self.files.create(self.root / "incarnations" / f"i{number:04d}.json", claim.to_bytes()):
                self.incarnation = number
                return number

    def _last_incarnation(self) -> int:
        """The highest that was ever used, also where the folder of claims was lost."""
        published = self._records.names(self.root / "weights", Version.parse)
        published += self._records.names(self.root / "evals", Version.parse, ".json")
        seen = {version.incarnation for version in published}
        seen |= {entry.incarnation for entry in self.read_journal()}
        heartbeat = self.learner
        return max(seen | {self._newest_claim(), heartbeat.incarnation if heartbeat else 0})

    def _newest_claim(self) -> int:
        return max(self._claims(), default=0)

    @property
    def successor_of_launcher(self) -> str | None:
        """Who took over for good from the learners of this launcher, in words; None while they may go on."""
        claims = self._claims()
        newest = self.claim(claims[-1]) if claims else None
        if newest is None or newest.launcher == self.launcher or not self.launcher:
            return None
        if not any(claim and claim.launcher == self.launcher for claim in map(self.claim, reversed(claims))):
            return None
        return (
            f"another learner (incarnation {claims[-1]}, process {newest.pid} of host {newest.host}) has taken over"
            f" {self.root}, which was started beside this one"
        )

    def _claims(self) -> list[int]:
        return sorted(self._records.names(self.root / "incarnations", _numbered(_INCARNATION)))

    def claim(self, number: int) -> Incarnation | None:
        """Who claimed an incarnation of the learner, and where; None where that cannot be told."""
        return self._records.read(self.root / "incarnations" / f"i{number:04d}.json", Incarnation)

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
            others = [path for name in _SHARED for path in self.files.leftovers(self.root / name)]
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

    # ── the learner's journal, heartbeat and checkpoints ─────────────────────────────────────────────────────────────
    def append_journal(self, entry: JournalEntry) -> None:
        """Put a step's selection on the disk, before it is trained."""
        with self._as_learner():
            self.files.append(self._journal, entry.to_bytes() + b"\n")

    def read_journal(self) -> list[JournalEntry]:
        """All steps in order. UnknownProtocol, as only the version that wrote it can go on from it.

        Of a step the later line stands, unless an earlier incarnation wrote it: a learner that was superseded and did
        not know it yet. A torn last line is left out, as is one that cannot be read, which is logged.
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
    def step(self) -> int:
        """Steps trained; 0 before the learner's first heartbeat."""
        return learner.step if (learner := self.learner) else 0

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
            manifest = CheckpointManifest(
                time=self.now(), step=step, incarnation=self.incarnation or 0, state=state, files=listing
            )
            published_folder.publish(self.files, staged, final, manifest, self.require_incarnation)

    def list_checkpoints(self) -> list[int]:
        """Steps of finished checkpoints, oldest first."""
        return sorted(self._records.names(self.root / "checkpoints", _numbered(_CHECKPOINT)))

    def open_checkpoint(self, step: int) -> tuple[Path, dict[str, Any]]:
        """Folder and small state of a checkpoint, checked byte by byte.

        Raises CorruptFile with the reason, and UnknownProtocol for what a later version of HeteroRL saved.
        """
        folder, manifest = self._checkpoint(step), self._checkpoint_manifest(step)
        with published_folder.standing(self.files, folder):
            for name, expected in manifest.files.items():
                published_folder.check_size(self.files, folder / name, expected)
                published_folder.check_digest(folder / name, self.files.digest(folder / name), expected)
        return folder, manifest.state

    def open_newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that passes its checks, as `open_checkpoint`; None when there are none at all.

        Newer ones that fail go to quarantine. When all fail, nothing is moved and RunFolderError is raised: a run does
        not start again at step 0 because a disk was bad, unless `failurePolicy.startOver` says so. UnknownProtocol,
        when a later version of HeteroRL saved a newer one than the newest that is whole.
        """
        found, damaged, journal = None, dict[int, str](), self.read_journal()
        for step in reversed(self.list_checkpoints()):
            try:
                opened = self.open_checkpoint(step)
                self._require_lineage(step, journal)
            except FileNotFoundError:
                continue
            except CorruptFile as error:
                log.error("checkpoint of step %d cannot be used (%s); trying the previous one", step, error)
                damaged[step] = str(error)
                continue
            found = opened
            break
        if found is None and damaged and not self.spec.failure_policy.start_over:
            raise RunFolderError(
                f"{self.root / 'checkpoints'}: none of the checkpoints can be used ({'; '.join(damaged.values())}); put"
                " one back that is whole, or set failurePolicy.startOver: true to start again at step 0, and resume"
            )
        for failed, reason in damaged.items():
            self.quarantine_checkpoint(failed, reason)
        return found

    def _require_lineage(self, step: int, journal: Iterable[JournalEntry]) -> None:
        """CorruptFile for what a superseded learner saved after all: its successor had trained other steps by then."""
        made_by = self._checkpoint_manifest(step).incarnation
        for entry in journal:
            if entry.incarnation > made_by and entry.step < step:
                raise CorruptFile(
                    f"incarnation {made_by} saved it, and step {entry.step} was trained anew by {entry.incarnation}"
                )

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

    def _checkpoint_manifest(self, step: int) -> CheckpointManifest:
        return published_folder.read_manifest(self.files, self._checkpoint(step), CheckpointManifest)

    def _staged_name(self, step: int) -> str:
        """With the incarnation, so that two learners never write into one folder."""
        return f"step-{step:08d}-i{self.incarnation or 0:04d}"

    def begin_attempt(self, node: int, attempt: Attempt) -> int:
        """Note a start of one of the learner's pods (`heterorl.exchange.crash_budget`); returns its number."""
        self.files.make_dir(self.root / "attempts")
        number = max(self.load_attempts().get(node, {}), default=0) + 1
        while not self.files.create(self._attempt(node, number), attempt.to_bytes()):
            number += 1
        return number

    def end_attempt(self, node: int, number: int, attempt: Attempt) -> None:
        """Note how it ended, unless somebody has."""
        self.files.create(self._attempt(node, number, "-end"), attempt.to_bytes())

    def load_attempts(self) -> dict[int, dict[int, Attempt]]:
        """The starts of the learner's pods, with their ends, by the pod's number and then their own, in order."""
        found: dict[int, dict[int, Attempt]] = {}
        for node, number, end in sorted(self._records.names(self.root / "attempts", _attempt_of)):  # ends after starts
            path = self._attempt(node, number, end)
            if path not in self._attempts and (read := self._records.read(path, Attempt)) is not None:
                self._attempts[path] = read  # never written again
            if (attempt := self._attempts.get(path)) is not None:
                found.setdefault(node, {})[number] = attempt
        return found

    def _attempt(self, node: int, number: int, end: str = "") -> Path:
        return self.root / "attempts" / f"{node}-{number:08d}{end}.json"

    @cached_property
    def _attempts(self) -> dict[Path, Attempt]:
        """Those read so far."""
        return {}


def _numbered(pattern: re.Pattern[str]) -> Callable[[str], int]:
    """Reads the number in a name; ValueError for another name."""

    def parse(name: str) -> int:
        if not (match := pattern.fullmatch(name)):
            raise ValueError(name)
        return int(match[1])

    return parse


def _attempt_of(name: str) -> tuple[int, int, str]:
    """Pod, number, and `-end` or nothing."""
    if not (match := _ATTEMPT.fullmatch(name)):
        raise ValueError(name)
    return int(match[1]), int(match[2]), match[3] or ""


def _surviving(entries: Iterable[JournalEntry]) -> list[JournalEntry]:
    """The line of each step that stands, in order of the steps."""
    standing: dict[int, JournalEntry] = {}
    newest = 0
    for entry in entries:
        newest = max(newest, entry.incarnation)
        if entry.incarnation == newest:
            standing[entry.step] = entry
    return [standing[step] for step in sorted(standing)]
