"""Dashboards: TensorBoard files, Weights & Biases. Both raise their errors; `background` handles them."""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from heterorl.errors import UserError
from heterorl.monitoring.json_lines import Record, numbers
from heterorl.spec.run import WandbSpec

_FLUSH_S = 2.0
_WANDB = "https://api.wandb.ai"


class TensorBoard:
    """Scalars by step; a sampler's batches are numbered as they come.

    tensorboardX's own SummaryWriter writes on a thread that dies silently of a full disk, and then blocks its caller.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._path = folder / name
        self._file = RecordWriter(str(self._path))
        self._batches, self._flushed, self._begun, self._kept = 0, time.monotonic(), False, False

    def write(self, record: Record) -> None:
        """Write a step's numbers; events are left out."""
        if "event" in record:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self._batches += 1
        step = record.get("step", self._batches)
        if not self._begun:
            self._begin(step, record["time"])
        values = [
            Summary.Value(tag=key, simple_value=value) for key, value in numbers(record) if key not in ("step", "time")
        ]
        self._put(Event(wall_time=record["time"], step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed >= _FLUSH_S:
            self._flush()

    def close(self) -> None:
        """Flush and close the file; one of which the disk took nothing is removed."""
        try:
            self._flush()
        finally:
            if not self._kept:
                self._path.unlink(missing_ok=True)
            self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._flushed, self._kept = time.monotonic(), True

    def _begin(self, step: int, at: float) -> None:
        """A new file hides what earlier ones say of this and later steps: a resumed run repeats them."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._put(Event(wall_time=at, file_version="brain.Event:2"))
        self._put(Event(wall_time=at, step=step, session_log=SessionLog(status=SessionLog.START)))
        self._begun = True

    def _put(self, event: Any) -> None:
        self._file.write(event.SerializeToString())


class WandbRun:
    """One W&B run, found again by its id when the run resumes."""

    def __init__(self, folder: Path, run: str, settings: WandbSpec) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=settings.project,
            name=settings.name or run,
            id=settings.id or run,
            resume="allow",
            mode=wandb_mode(settings),
            dir=str(folder),
            settings=wandb.Settings(console="off"),
        )
        # Our own axis: W&B's counter refuses to go back, and a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log the numbers of a step; events are left out."""
        if "event" not in record:
            self._run.log(dict(numbers(record)))

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def wandb_mode(settings: WandbSpec) -> Any:
    """online, offline or disabled: WANDB_MODE, or what the spec says."""
    mode = os.environ.get("WANDB_MODE") or settings.mode
    return "offline" if mode == "dryrun" else mode


def check_wandb(settings: WandbSpec) -> None:
    """Refuse W&B that is configured and cannot work: not installed, or online without a key. Asks no server."""
    if not settings.project or wandb_mode(settings) == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "monitoring.wandb.project is set, but wandb is not installed; pip install wandb, or remove the project"
        )
    if wandb_mode(settings) == "online" and not _has_key():
        raise UserError(
            "monitoring.wandb.project is set, but there is no API key of Weights & Biases; set WANDB_API_KEY (on"
            " Kubernetes credentials.wandbApiKey), or mode: offline, or remove the project"
        )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _WANDB).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False
