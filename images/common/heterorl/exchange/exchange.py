"""The exchange: how a learner and many samplers work together through one folder, and the only code that knows a path.

Nobody talks to anybody. One side writes, the other lists names and reads; either may be absent for hours.

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
      quarantine/                   what failed its checks, with the reason               whoever found it
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
  8. A slot is leased: whoever creates lease-EPOCH.json with the highest epoch holds it. A lease is free when it was
     released, when its holder was a process on this machine that is gone, or when its heartbeat has stood still for
     leaseSeconds by the observer's own clock; clocks of different machines are never compared.

What a crash leaves: a staged folder or file (swept or ignored), a journalled step that was not trained (replayed), a
torn last line in a log of lines (cut off), a sequence number that was never published (skipped).
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from heterorl.errors import VOLUME_IN_USE, CorruptFile, ExchangeError, RunFolderError
from heterorl.exchange.live_spec import LiveSpec
from heterorl.exchange.rollout import PROTOCOL, Rollout
from heterorl.exchange.storage import STAGING, Files
from heterorl.names import RolloutName, Slot, Version
from heterorl.spec.mutability import IMMUTABLE, changes, within
from heterorl.spec.run import HeteroRLRun, RunSpec

__all__ = [
    "CANARY_TOKENS",
    "Canary",
    "Exchange",
    "Fetched",
    "JournalEntry",
    "Lease",
    "Rollout",
    "RolloutName",
    "Slot",
    "Version",
]

_ROLLOUT_SUFFIX = ".safetensors"
_ATTEMPTS = re.compile(r"attempts-(\d+)\.json")

CANARY_TOKENS = 272
"""Tokens of a canary text: more than two blocks of any engine's KV cache (128 on a CPU), so that a stale one shows."""


@dataclass(frozen=True)
class Canary:
    """Texts and what the learner makes of them, to be checked by every engine that loads the version."""

    token_ids: list[list[int]]
    """Token ids of each text."""
    logp: list[list[float]]
    """Log-probability of tokens 1.. of each text given those before, at temperature 1."""

    def max_abs_diff(self, scores: list[list[float]]) -> float:
        """Largest difference between an engine's scores and the learner's; infinite if one is not a number."""
        pairs = [
            (a, b) for ours, theirs in zip(self.logp, scores, strict=True) for a, b in zip(ours, theirs, strict=True)
        ]
        differences = [abs(a - b) for a, b in pairs]
        return max(differences) if all(d == d for d in differences) else float("inf")


@dataclass(frozen=True)
class Fetched:
    """A version, checked and copied to this machine."""

    version: Version
    folder: Path
    """Holds model.safetensors."""
    canary: Canary


@dataclass(frozen=True)
class JournalEntry:
    """What one learner step trains on."""

    step: int
    incarnation: int
    names: list[str]
    """Rollouts trained in this step."""
    dropped: list[str] = field(default_factory=list)
    """Rollouts found too old when this step was selected."""


@dataclass
class Lease:
    """A slot held by this process; `beat` keeps it."""

    slot: Slot
    epoch: int
    beats: int = 0


class Exchange:
    """One run's folder on the shared volume. Root, clock, sleep and file operations are arguments, for tests.

    `spec_file` is where the manifest is read when it is not the folder's run.json: on Kubernetes, a ConfigMap.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        files: Files | None = None,
        spec_file: Path | None = None,
    ) -> None:
        self.root = Path(root)
        self.now = clock
        self.sleep = sleep
        self.files = files or Files()
        self._reads_elsewhere = spec_file is not None
        self._live = LiveSpec(spec_file or self.run_file, self.root, self.files)

    # ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def run_file(self) -> Path:
        """The resolved manifest; it can be given to `heterorl run` again."""
        return self.root / "run.json"

    @property
    def model_dir(self) -> Path:
        """The starting model: an HF folder."""
        return self.root / "model"

    @property
    def output_dir(self) -> Path:
        """The trained model: an HF folder."""
        return self.root / "output"

    @property
    def logs_dir(self) -> Path:
        """One log a process."""
        return self.root / "logs"

    @property
    def metrics_dir(self) -> Path:
        """NAME.jsonl a process."""
        return self.root / "metrics"

    @property
    def completions_file(self) -> Path:
        """Samples of what the model wrote, when the spec asks for them."""
        return self.root / "completions.jsonl"

    @property
    def summary_file(self) -> Path:
        """What the run came to."""
        return self.root / "summary.json"

    @property
    def lock_file(self) -> Path:
        """Held by the local runner while it uses the folder."""
        return self.root / "run.lock"

    @property
    def runner_file(self) -> Path:
        """The local runner's own state: elapsed time, restarts."""
        return self.root / "runner.json"

    def data_file(self, name: str) -> Path:
        """Tokenised problems: `train` or `eval-LABEL`."""
        return self.root / "data" / f"{name}.jsonl"

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def create(self, run: HeteroRLRun) -> None:
        """Make the folder with its resolved manifest."""
        self.files.make_dir(self.root)
        self._write_json(self.run_file, run.resolved())

    def occupy(self) -> None:
        """Make the volume this run's, before anything is put on it; RunFolderError if it holds another run.

        With `resume: true` this run goes on from what the other one left: model, data, checkpoints and all the rest.
        """
        found = self._read_json(self.run_file)
        if found is not None and _id_of(held := HeteroRLRun.model_validate(found)) != self.run_id:
            name = held.metadata.name
            if not self.spec.resume:
                raise RunFolderError(
                    f"{VOLUME_IN_USE}: {self.root} holds run {name}; set spec.resume: true to go on from it, or use"
                    " another claim"
                )
            fixed = [entry for entry in IMMUTABLE if not entry.startswith("exchange.")]
            if changed := [".".join(path) for path, *_ in changes(held, self.run) if within(path, fixed)]:
                raise RunFolderError(
                    f"{VOLUME_IN_USE}: {self.root} holds run {name}, which had another {', '.join(changed)}; go on from"
                    " it with the same, or use another claim"
                )
        self.create(self.run)
        if (marker := self._read_json(self._marker)) is not None:
            self.mark_prepared(marker)

    @property
    def run(self) -> HeteroRLRun:
        """The resolved manifest as it is now: what may change in a live run follows the edits of its file."""
        return self._live.read()

    @property
    def spec(self) -> RunSpec:
        """The resolved spec as it is now; keep what must not change under your hands."""
        return self.run.spec

    @property
    def run_id(self) -> str:
        """What tells this run from others on its volume: the uid Kubernetes gave it, or its name."""
        return _id_of(self.run)

    def mark_prepared(self, info: dict[str, Any]) -> dict[str, Any]:
        """Say that model and data are complete, and whose they are; returns what is said."""
        marker = {**info, "run": self.run_id}
        self._write_json(self._marker, marker)
        return marker

    @property
    def prepared(self) -> dict[str, Any] | None:
        """What `mark_prepared` said; None while preparation is not complete, or is another run's.

        A run folder on one machine has a lock and is never another run's; there the manifest is in it.
        """
        marker = self._read_json(self._marker)
        ours = marker is not None and (not self._reads_elsewhere or marker.get("run") == self.run_id)
        return marker if ours else None

    @property
    def successor(self) -> str | None:
        """Name of another run whose volume this is by now; None while it is ours, or nobody's."""
        marker = self._read_json(self._marker)
        if marker is None or not self._reads_elsewhere or marker.get("run") == self.run_id:
            return None
        found = self._read_json(self.run_file)
        return str(found["metadata"]["name"] if found else marker["run"])

    @property
    def _marker(self) -> Path:
        return self.root / "prepared.json"

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def stage_weights(self, version: Version) -> Path:
        """A hidden folder to write model.safetensors (HF names, the run's dtype) into."""
        return self._stage(self.root / "weights", str(version))

    def commit_weights(self, version: Version, canary: Canary) -> None:
        """Publish what was staged for this version."""
        staged = self.root / "weights" / f"{STAGING}{version}"
        self.files.write(staged / "canary.json", json.dumps(asdict(canary)).encode())
        self._commit(staged, str(version), {"kind": "anchor", "base": None, "step": version.step})

    def list_versions(self) -> list[Version]:
        """Published versions, oldest first."""
        return sorted(_parsed(Version.parse, self.files.list(self.root / "weights")))

    def published_at(self, version: Version) -> float:
        """When the learner published it, in seconds by the learner's clock; FileNotFoundError if it is retired."""
        return float(self._manifest(self.root / "weights" / str(version))["time"])

    def fetch_weights(self, version: Version, to: Path) -> Fetched:
        """Copy a version to a folder on this machine, checking every byte.

        Raises CorruptFile with the reason, and FileNotFoundError if the version was retired meanwhile.
        """
        source = self.root / "weights" / str(version)
        manifest = self._manifest(source)
        to.mkdir(parents=True, exist_ok=True)
        for name, expected in manifest["files"].items():
            if Path(name).name != name:
                raise CorruptFile(f"weights {version}: {name!r} is no plain file name")
            self._check_size(source / name, expected)
            if self.files.copy(source / name, to / name) != expected["sha256"]:
                raise CorruptFile(f"weights {version}: the checksum of {name} does not fit its manifest")
        return Fetched(version, to, Canary(**json.loads((to / "canary.json").read_bytes())))

    def retire_weights(self, keep: Iterable[Version]) -> list[Version]:
        """Delete every version that is neither to be kept nor pinned; returns the deleted ones."""
        kept = {*keep, *self.list_pinned()}
        retired = [version for version in self.list_versions() if version not in kept]
        for version in retired:
            self.files.remove(self.root / "weights" / str(version))
        return retired

    def pin(self, version: Version) -> None:
        """Keep this version from being retired."""
        self.files.make_dir(self.root / "pins")
        self.files.create(self.root / "pins" / str(version), b"")

    def unpin(self, version: Version) -> None:
        """Let it go."""
        self.files.remove(self.root / "pins" / str(version))

    def list_pinned(self) -> list[Version]:
        """Versions kept from being retired."""
        return _parsed(Version.parse, self.files.list(self.root / "pins"))

    # ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def put_rollouts(self, rollouts: Mapping[RolloutName, Rollout]) -> None:
        """Publish groups; ExchangeError, and nothing is published, if a name was used before."""
        for name in rollouts:
            if self._rollout(name).exists():
                raise ExchangeError(f"rollout {name} was published before; two samplers use one slot?")
        self.files.make_dir(self.root / "rollouts")
        self.files.replace_all({self._rollout(name): rollout.to_bytes() for name, rollout in rollouts.items()})

    def list_rollouts(self) -> list[RolloutName]:
        """Published rollouts that were neither deleted nor quarantined, trained ones included."""
        names = self.files.list(self.root / "rollouts")
        return _parsed(
            RolloutName.parse, (n.removesuffix(_ROLLOUT_SUFFIX) for n in names if n.endswith(_ROLLOUT_SUFFIX))
        )

    def read_rollout(self, name: RolloutName) -> Rollout:
        """Read and check one group; CorruptFile with the reason, FileNotFoundError if it is gone."""
        return Rollout.from_bytes(self.files.read(self._rollout(name)))

    def quarantine_rollout(self, name: RolloutName, reason: str) -> None:
        """Put a bad file aside, with the reason beside it."""
        folder = self.root / "quarantine"
        self.files.make_dir(folder)
        self.files.rename(self._rollout(name), folder / f"{name}{_ROLLOUT_SUFFIX}")
        self._write_json(folder / f"{name}.json", {"reason": reason, "time": self.now()})

    def list_quarantined(self) -> list[RolloutName]:
        """Rollouts that failed their checks."""
        names = self.files.list(self.root / "quarantine")
        return _parsed(
            RolloutName.parse, (n.removesuffix(_ROLLOUT_SUFFIX) for n in names if n.endswith(_ROLLOUT_SUFFIX))
        )

    def retire_rollouts(self, names: Iterable[RolloutName], *, archive: bool) -> None:
        """Delete or archive rollouts that a durable checkpoint covers; those already gone are fine."""
        present = set(self.files.list(self.root / "rollouts"))
        for name in names:
            if f"{name}{_ROLLOUT_SUFFIX}" not in present:
                continue
            if archive:
                self.files.make_dir(self.root / "archive")
                self.files.rename(self._rollout(name), self.root / "archive" / f"{name}{_ROLLOUT_SUFFIX}")
            else:
                self.files.remove(self._rollout(name))

    def _rollout(self, name: RolloutName) -> Path:
        return self.root / "rollouts" / f"{name}{_ROLLOUT_SUFFIX}"

    # ── the learner's journal, heartbeat and checkpoints ─────────────────────────────────────────────────────────────
    def append_journal(self, entry: JournalEntry) -> None:
        """Put a step's selection on the disk, before it is trained."""
        self.files.append(self.root / "journal.jsonl", json.dumps(asdict(entry)).encode() + b"\n")

    def read_journal(self) -> list[JournalEntry]:
        """All steps in order; the later line of a step stands. A torn last line is left out."""
        try:
            lines = self.files.read(self.root / "journal.jsonl").split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        entries = {entry.step: entry for entry in (JournalEntry(**json.loads(line)) for line in lines)}
        return [entries[step] for step in sorted(entries)]

    def rewrite_journal(self, entries: Iterable[JournalEntry]) -> None:
        """Replace the journal: cuts a torn line, or steps that cannot be replayed."""
        lines = b"".join(json.dumps(asdict(entry)).encode() + b"\n" for entry in entries)
        self.files.replace(self.root / "journal.jsonl", lines)

    def write_learner(self, status: dict[str, Any]) -> None:
        """The learner's heartbeat: step, steps, incarnation, version, taken {slot: seq}, finished, progress."""
        self._write_json(self.root / "learner.json", {**status, "time": self.now()})

    @property
    def learner(self) -> dict[str, Any]:
        """The learner's last heartbeat; empty before the first."""
        return self._read_json(self.root / "learner.json") or {}

    @property
    def trained(self) -> bool:
        """Whether the last step that is asked for now is trained, and the output written."""
        learner = self.learner
        return bool(learner.get("finished")) and learner.get("step", 0) >= self.spec.learner.steps

    def stage_checkpoint(self, step: int) -> Path:
        """A hidden folder for the learner's state; every rank may write into it once rank 0 has staged it."""
        return self._stage(self.root / "checkpoints", f"step-{step:08d}")

    def staged_checkpoint(self, step: int) -> Path:
        """The folder that rank 0 staged."""
        return self.root / "checkpoints" / f"{STAGING}step-{step:08d}"

    def commit_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Make the staged checkpoint durable, with the learner's small state in its manifest."""
        final = self.root / "checkpoints" / f"step-{step:08d}"
        self.files.remove(final)  # only a checkpoint that failed its checks can stand here
        self._commit(self.staged_checkpoint(step), final.name, {"kind": "checkpoint", "step": step, "state": state})

    def list_checkpoints(self) -> list[int]:
        """Steps of finished checkpoints, oldest first."""
        names = self.files.list(self.root / "checkpoints")
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def open_checkpoint(self, step: int) -> tuple[Path, dict[str, Any]]:
        """Folder and small state of a checkpoint, checked byte by byte; raises CorruptFile."""
        folder = self.root / "checkpoints" / f"step-{step:08d}"
        manifest = self._manifest(folder)
        for name, expected in manifest["files"].items():
            self._check_size(folder / name, expected)
            if self.files.digest(folder / name) != expected["sha256"]:
                raise CorruptFile(f"checkpoint {folder.name}: the checksum of {name} does not fit its manifest")
        return folder, manifest["state"]

    def remove_checkpoint(self, step: int) -> None:
        """Delete a checkpoint."""
        self.files.remove(self.root / "checkpoints" / f"step-{step:08d}")

    def sweep(self) -> None:
        """Remove what a crashed learner left half-written."""
        for folder in ("weights", "checkpoints"):
            for path in (self.root / folder).glob(f"{STAGING}*"):
                self.files.remove(path)

    def save_attempts(self, node: int, attempts: list[dict[str, Any]]) -> None:
        """Put the starts of one of the learner's pods on the disk (`heterorl.exchange.crash_budget`)."""
        self._write_json(self.root / f"attempts-{node}.json", {"attempts": attempts})

    def load_attempts(self) -> dict[int, list[dict[str, Any]]]:
        """The starts of the learner's pods, by the pod's number."""
        found = {}
        for name in self.files.list(self.root):
            if match := _ATTEMPTS.fullmatch(name):
                found[int(match[1])] = (self._read_json(self.root / name) or {"attempts": []})["attempts"]
        return found

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def acquire_slot(
        self, candidates: Callable[[], Iterable[Slot]], stop: Callable[[], bool] = lambda: False
    ) -> Lease | None:
        """Lease the first free slot of the candidates, waiting for one if need be; None when told to stop first.

        The candidates are asked for at every look: slots may be added while one waits.
        """
        seen: dict[Slot, tuple[tuple[int, int], float]] = {}
        while not stop():
            for slot in candidates():
                epoch = self._lease_epoch(slot)
                if not self._is_free(slot, epoch, seen):
                    continue
                lease = Lease(slot, epoch + 1)
                holder = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "id": uuid.uuid4().hex}
                self.files.make_dir(self._slot(slot))
                path = self._slot(slot) / f"lease-{lease.epoch:08d}.json"
                if self.files.create(path, json.dumps({**holder, "started": _started(os.getpid())}).encode()):
                    return lease
            self.sleep(self.spec.exchange.poll_seconds)
        return None

    def beat(self, lease: Lease, status: dict[str, Any], *, released: bool = False) -> None:
        """Keep the lease and show the slot's status; ExchangeError if somebody else took it over."""
        if self._lease_epoch(lease.slot) != lease.epoch:
            raise ExchangeError(f"slot {lease.slot} was taken over by another sampler; this one must stop")
        lease.beats += 1
        record = {**status, "epoch": lease.epoch, "beats": lease.beats, "released": released, "time": self.now()}
        self._write_json(self._slot(lease.slot) / "heartbeat.json", record)

    def heartbeats(self) -> dict[Slot, dict[str, Any]]:
        """The last heartbeat of every slot that ever had one."""
        slots = _parsed(Slot.parse, self.files.list(self.root / "slots"))
        found = {slot: self._read_json(self._slot(slot) / "heartbeat.json") for slot in slots}
        return {slot: record for slot, record in found.items() if record}

    def save_slot(self, slot: Slot, state: dict[str, Any]) -> None:
        """Put the slot's own state (next sequence number, delays drawn) on the disk."""
        self._write_json(self._slot(slot) / "state.json", state)

    def load_slot(self, slot: Slot) -> dict[str, Any]:
        """The slot's state, for whoever holds it next; empty at first."""
        return self._read_json(self._slot(slot) / "state.json") or {}

    def _slot(self, slot: Slot) -> Path:
        return self.root / "slots" / str(slot)

    def _lease_epoch(self, slot: Slot) -> int:
        names = [name for name in self.files.list(self._slot(slot)) if name.startswith("lease-")]
        return max((int(name.removeprefix("lease-").removesuffix(".json")) for name in names), default=0)

    def _is_free(self, slot: Slot, epoch: int, seen: dict[Slot, tuple[tuple[int, int], float]]) -> bool:
        if epoch == 0:
            return True
        beat = self._read_json(self._slot(slot) / "heartbeat.json") or {}
        if beat.get("epoch") == epoch and beat.get("released"):
            return True
        try:
            holder = self._read_json(self._slot(slot) / f"lease-{epoch:08d}.json") or {}
        except ValueError:  # being written at this moment, or its writer died over it: then time will tell
            holder = {}
        if (holder.get("host"), holder.get("boot")) == (socket.gethostname(), _boot_id()):
            return _started(holder.get("pid", 0)) != holder.get("started")
        mark = (epoch, beat.get("beats", 0) if beat.get("epoch") == epoch else 0)
        last, since = seen.get(slot, (None, 0.0))
        if mark != last:
            seen[slot] = (mark, self.now())
            return False
        return self.now() - since >= self.spec.exchange.lease_seconds

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────
    def write_eval(self, version: Version, result: dict[str, Any]) -> None:
        """Results of one version on every evaluation set."""
        self.files.make_dir(self.root / "evals")
        self._write_json(self.root / "evals" / f"{version}.json", result)

    def read_evals(self) -> dict[Version, dict[str, Any]]:
        """All results, oldest version first."""
        names = sorted(_parsed(Version.parse, (n.removesuffix(".json") for n in self.files.list(self.root / "evals"))))
        found = {version: self._read_json(self.root / "evals" / f"{version}.json") for version in names}
        return {version: result for version, result in found.items() if result is not None}

    # ── manifests ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _stage(self, parent: Path, name: str) -> Path:
        staged = parent / f"{STAGING}{name}"
        if staged.exists():
            self.files.remove(staged)
        self.files.make_dir(staged)
        return staged

    def _commit(self, staged: Path, name: str, about: dict[str, Any]) -> None:
        target = staged.with_name(name)
        if target.exists():
            raise ExchangeError(f"{name} was published before and is never overwritten")
        paths = sorted(path for path in staged.rglob("*") if path.is_file())
        for path in paths:
            self.files.sync_file(path)
        listing = {
            path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": self.files.digest(path)}
            for path in paths
        }
        manifest = {"protocol": PROTOCOL, "time": self.now(), **about, "files": listing}
        self.files.write(staged / "manifest.json", json.dumps(manifest).encode())
        self.files.sync_dir(staged)
        self.files.rename(staged, target)

    def _manifest(self, folder: Path) -> dict[str, Any]:
        try:
            manifest = json.loads(self.files.read(folder / "manifest.json"))
            protocol = manifest["protocol"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{folder.name}: the manifest cannot be read: {error}") from error
        if protocol != PROTOCOL:
            raise CorruptFile(f"{folder.name}: protocol {protocol!r}; this version reads {PROTOCOL}")
        return dict(manifest)

    def _check_size(self, path: Path, expected: dict[str, Any]) -> None:
        found = path.stat().st_size
        if found != expected["bytes"]:
            raise CorruptFile(
                f"{path.parent.name}/{path.name} has {found} bytes; its manifest says {expected['bytes']}"
            )

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        self.files.replace(path, json.dumps(value).encode())

    def _read_json(self, path: Path) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.files.read(path)))
        except FileNotFoundError:
            return None


def _id_of(run: HeteroRLRun) -> str:
    return run.metadata.uid or run.metadata.name


_Name = TypeVar("_Name")


def _parsed(parse: Callable[[str], _Name], names: Iterable[str]) -> list[_Name]:
    found = []
    for name in names:
        try:
            found.append(parse(name))
        except ValueError:
            continue  # somebody else's file is none of ours
    return found


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> float | None:
    """When a process of this machine started, to the second; None if it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time())
    except psutil.NoSuchProcess:
        return None
