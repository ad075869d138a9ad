"""One run's folder: its places, its manifest, and whose it is."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from heterorl.data.tokenizer import load_tokenizer
from heterorl.errors import VOLUME_IN_USE, RunFolderError
from heterorl.exchange.live_spec import LiveSpec
from heterorl.exchange.mount import check_mount
from heterorl.exchange.record_store import RecordStore
from heterorl.exchange.records import BoardId, DataCount, ModelOrigin, Prepared, RunnerState
from heterorl.exchange.rollout import Provenance
from heterorl.exchange.storage import Files, persistently
from heterorl.spec.mutability import IMMUTABLE, changes, within
from heterorl.spec.run import HeteroRLRun, RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunFolder:
    """What `Exchange` is built on. Root, clock, sleep and file operations are arguments, for tests.

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
        self._records = RecordStore(self.root, self.files, clock)
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
        """Groups of completions that were trained, as text, within the budget of the spec."""
        return self.root / "completions.jsonl"

    @property
    def answers_dir(self) -> Path:
        """Answers of evaluations by problem, as text: a file an evaluation, within the budget of the spec."""
        return self.root / "answers"

    @property
    def summary_file(self) -> Path:
        """Results of the run."""
        return self.root / "summary.json"

    @property
    def lock_file(self) -> Path:
        """Held by the local runner while it uses the folder."""
        return self.root / "run.lock"

    @property
    def runner(self) -> RunnerState | None:
        """The local runner's state as it was saved last; None before the first, and on Kubernetes."""
        return self._records.read(self.root / "runner.json", RunnerState)

    def save_runner(self, state: RunnerState) -> None:
        """Put the local runner's state on the disk."""
        self._records.write(self.root / "runner.json", state)

    def board_id(self) -> str:
        """What no other run is called on a dashboard, and this one keeps over restarts: its name with a suffix."""
        name, uid = self.run.metadata.name, self.run.metadata.uid
        if uid:
            return f"{name}-{uid}"
        path = self.metrics_dir / "board.json"
        found = self._records.read(path, BoardId)
        if found is None:
            found = BoardId(id=f"{name}-{uuid.uuid4().hex[:8]}")
            self.files.make_dir(path.parent)
            self._records.write(path, found)
        return found.id

    def data_file(self, name: str) -> Path:
        """Tokenised problems: `train` or `eval-LABEL`."""
        return self.root / "data" / f"{name}.jsonl"

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """The tokenised problems of a data file, in its order."""
        return map(json.loads, self.files.read(self.data_file(name)).splitlines())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The starting model's tokenizer; ModelError when there is none that can be read."""
        return persistently(lambda: load_tokenizer(self.model_dir), what="the tokenizer", folder=self.model_dir)

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def create(self, run: HeteroRLRun) -> None:
        """Make the folder with its resolved manifest."""
        self.files.make_dir(self.root)
        self.files.replace(self.run_file, json.dumps(run.resolved()).encode())

    def occupy(self) -> None:
        """Make the volume this run's, before anything is put on it; RunFolderError if it holds another run.

        With `resume: true` this run goes on from what the other one left: model, data, checkpoints and all the rest.
        A run of the same name that has put nothing there was deleted, as names are unique beside a claim, and leaves
        the volume free.
        """
        held = self._held_run()
        name = held.metadata.name if held else ""
        gone = name == self.run.metadata.name and self.is_empty
        if held is not None and _id_of(held) != self.run_id and not gone:
            if not self.spec.resume:
                raise RunFolderError(
                    f"{VOLUME_IN_USE}: {self.root} holds run {name}; set spec.resume: true to continue from it, or use"
                    " another claim"
                )
            fixed = [entry for entry in IMMUTABLE if not entry.startswith("exchange.")]
            if changed := [".".join(path) for path, *_ in changes(held, self.run) if within(path, fixed)]:
                raise RunFolderError(
                    f"{VOLUME_IN_USE}: {self.root} holds run {name}, which had another {', '.join(changed)}; go on from"
                    " it with the same, or use another claim"
                )
        self.create(self.run)
        if (marker := self._records.read(self._marker, Prepared)) is not None:
            self.mark_prepared(marker.model, marker.data)

    def release(self) -> None:
        """Leave a volume free on which this run has put nothing, so that any run may use it."""
        held = self._held_run() if self._reads_elsewhere else None
        if held is not None and _id_of(held) == self.run_id and self.is_empty:
            self.files.remove(self.run_file)

    @property
    def is_empty(self) -> bool:
        """Whether no preparation was completed here, and nothing is there that would follow one."""
        followed = any(self.files.list(self.root / name) for name in ("weights", "checkpoints", "output"))
        return not followed and self._marker.name not in self.files.list(self.root)

    def check_volume(self) -> None:
        """Try what the protocol needs of the mount, before anything is entrusted to it; RunFolderError if it cannot."""
        folders = ("rollouts", "taken", "archive", "quarantine")
        check_mount(self.files, self.root, *(self.root / name for name in folders))

    def clock_ahead_s(self) -> float | None:
        """How far this machine's clock is ahead of the file server's, within half a second; None where that takes long.

        All machines ask the same server, so their answers can be compared, whatever its own clock says.
        """
        for _ in range(3):
            before = self.now()
            stamp = self.files.stamp(self.root)
            after = self.now()
            if 0 <= after - before <= 1.0:
                return (before + after) / 2 - stamp
        return None

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

    def mark_prepared(self, model: ModelOrigin | None = None, data: Mapping[str, DataCount] | None = None) -> Prepared:
        """Write the marker that model and data are complete, and whose they are; returns it."""
        marker = Prepared(run=self.run_id, model=model, data=dict(data or {}))
        self._records.write(self._marker, marker)
        return marker

    @property
    def prepared(self) -> Prepared | None:
        """What `mark_prepared` said; None while preparation is not complete, or is another run's.

        A run folder on one machine has a lock and is never another run's; there the manifest is in it.
        """
        marker = self._records.read(self._marker, Prepared)
        ours = marker is not None and (not self._reads_elsewhere or marker.run == self.run_id)
        return marker if ours else None

    @property
    def provenance(self) -> Provenance:
        """How rollouts are made as the run is now."""
        data = self.prepared.data.get("train") if self.prepared else None
        return Provenance.of(self.spec, data.digest if data else "")

    @property
    def successor(self) -> str | None:
        """Name of another run whose volume this is by now; None while it is ours or has no run."""
        marker = self._records.read(self._marker, Prepared)
        if marker is None or not self._reads_elsewhere or marker.run == self.run_id:
            return None
        try:
            held = self._held_run()
        except RunFolderError:
            held = None
        return held.metadata.name if held else marker.run

    def _held_run(self) -> HeteroRLRun | None:
        """The run that the folder says it holds; None for a fresh one."""
        try:
            return HeteroRLRun.model_validate_json(self.files.read(self.run_file))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise RunFolderError(
                f"{VOLUME_IN_USE}: {self.run_file} is not a manifest that this version of HeteroRL can read"
                f" ({error.errors()[0]['msg']}), so it cannot be told whose volume it is; put the manifest back, go on"
                " with the version that wrote it, or use another claim"
            ) from error

    @property
    def _marker(self) -> Path:
        return self.root / "prepared.json"


def _id_of(run: HeteroRLRun) -> str:
    return run.metadata.uid or run.metadata.name
