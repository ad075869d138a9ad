"""Metrics of one process: JSON lines always, Prometheus always, TensorBoard and Weights & Biases when configured.

The JSONL file is the record: `heterorl report`, the live view and the summary read it. It only grows. A learner that
resumed from step c writes c + 1 again, so a line with a step supersedes every earlier line of its own or a later step
(`read_metrics` applies that). Numbers that are not finite are written as null.

    metrics/NAME.jsonl     {"step": 12, "time": 1767225600.0, "reward": 0.25, ...}     one line a step or batch
                           {"event": "swap", "time": ..., "version_step": 12, ...}     what happened in between;
                                                                 `start` and `stop` frame the life of a process
    metrics/NAME.port      port of /metrics while the process runs
    metrics/tensorboard/NAME/   metrics/wandb/
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from heterorl.errors import RunFolderError, UserError
from heterorl.monitoring.http import Endpoint
from heterorl.spec.run import MonitoringSpec, WandbSpec

log = logging.getLogger(__name__)

Record = dict[str, Any]

CUMULATIVE = frozenset({"num_tokens", "lag/dropped", "rollouts", "rejected_versions"})
"""Metrics that only grow; Prometheus shows them as counters (`_total`)."""


class Sink(Protocol):
    """One place where records go."""

    def write(self, record: Record) -> None:
        """Take one record: a step or batch, or an event if it has the key `event`."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class Metrics:
    """Writes what one process measures to all its sinks; without sinks it does nothing (ranks other than 0)."""

    def __init__(self, sinks: Sequence[Sink] = (), *, clock: Callable[[], float] = time.time) -> None:
        self._sinks = list(sinks)
        self._clock = clock

    @classmethod
    def open(
        cls,
        folder: Path,
        name: str,
        monitoring: MonitoringSpec,
        *,
        run: str,
        to_wandb: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Metrics of process `name` (`learner`, `sampler-far-0`) of a run, under its metrics folder.

        `to_wandb`: this is the one process whose numbers go to W&B, if the spec names a project.
        Raises UserError when W&B is configured and not installed, RunFolderError when the folder cannot be written.
        """
        project = _WandbSink(folder, run, monitoring.wandb) if to_wandb and monitoring.wandb.project else None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sinks: list[Sink] = [JsonLines(folder / f"{name}.jsonl")]
            sinks.append(_Prometheus(folder / f"{name}.port", monitoring.prometheus_port, run=run, process=name))
        except OSError as error:
            raise RunFolderError(f"{folder}: metrics cannot be written there: {error}") from error
        if monitoring.tensorboard and (board := _open_tensorboard(folder / "tensorboard" / name)):
            sinks.append(board)
        metrics = cls([*sinks, project] if project else sinks, clock=clock)
        metrics.event("start", {"pid": os.getpid()})
        return metrics

    def write(self, step: int | None, values: Mapping[str, Any]) -> None:
        """Record the values of a learner step, or of a sampler's batch (step None)."""
        self._record({"step": step, **values} if step is not None else dict(values))

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Record something that happened, as a swap."""
        self._record({"event": kind, **values})

    def _record(self, values: Record) -> None:
        record = {"time": round(self._clock(), 3), **{key: _plain(value) for key, value in values.items()}}
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Flush every sink and stop serving."""
        with suppress(RunFolderError):  # a full volume has been reported by the write that met it
            self.event("stop", {})
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: scalars of NumPy and torch become numbers, what is not finite becomes null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    number = value if isinstance(value, float) else value.item()
    return number if math.isfinite(number) else None


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    return ((key, float(value)) for key, value in record.items() if isinstance(value, int | float))


# ── JSON lines ───────────────────────────────────────────────────────────────────────────────────────────────────────
class JsonLines:
    """A growing file of JSON lines with one writer; each line is one write. A torn last line is cut off on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (open for the writer's lifetime)
        self._cut_torn_line()

    def write(self, record: Record) -> None:
        """Append a record; RunFolderError when the volume refuses."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise RunFolderError(f"{self.path}: {error.strerror}; make room there and go on with --resume") from error
        if written != len(line):
            raise RunFolderError(f"{self.path}: no space left; make room there and go on with --resume")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)


def read_metrics(path: Path) -> list[Record]:
    """All records that stand, in the order written; an absent file has none.

    Lines with a step supersede every earlier line of their own or a later step. Lines that are torn are left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records: list[Record] = []
    last_step = -1
    for record in filter(None, map(_parse, lines)):
        if (step := record.get("step")) is not None:
            if step <= last_step:
                records = [earlier for earlier in records if earlier.get("step", -1) < step]
            last_step = step
        records.append(record)
    return records


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


# ── Prometheus ───────────────────────────────────────────────────────────────────────────────────────────────────────
class _Prometheus:
    """Serves the last value of every metric at /metrics, labelled with run and process.

    It listens on `HETERORL_METRICS_HOST` (this machine alone unless set), on the spec's port unless
    `HETERORL_METRICS_PORT` names another, and notes its port in a file.
    """

    def __init__(self, port_file: Path, port: int, **labels: str) -> None:
        self._labels = labels
        self._values: dict[str, float] = {}
        self._events: Counter[str] = Counter()
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        pages = {"/metrics": lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry))}
        host = os.environ.get("HETERORL_METRICS_HOST", "127.0.0.1")
        port = int(os.environ.get("HETERORL_METRICS_PORT", port))
        try:
            self._endpoint = Endpoint(host, port, pages)
        except OSError as error:
            # Several processes of a run share one spec, on one machine also the port: none of them is worth a crash.
            log.warning("port %d for /metrics cannot be used (%s); taking any free one", port, error.strerror)
            self._endpoint = Endpoint(host, 0, pages)
        self._endpoint.__enter__()
        self._port_file = port_file
        port_file.write_text(f"{self._endpoint.port}\n")

    def write(self, record: Record) -> None:
        prefix = ""
        if event := record.get("event"):
            self._events[event] += 1
            prefix = f"{event}/"
        # A new dict each time: the server's threads iterate over the old one.
        self._values = {**self._values, **{prefix + key: value for key, value in _numbers(record)}}

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at each scrape."""
        names, values = list(self._labels), list(self._labels.values())
        for key, value in self._values.items():
            family = CounterMetricFamily if key in CUMULATIVE else GaugeMetricFamily
            metric = family(prometheus_name(key), key, labels=names)
            metric.add_metric(values, value)
            yield metric
        events = CounterMetricFamily("heterorl_events", "Events since the process started", labels=[*names, "event"])
        for event, count in self._events.copy().items():
            events.add_metric([*values, event], count)
        yield events

    def close(self) -> None:
        self._port_file.unlink(missing_ok=True)
        self._endpoint.__exit__()


def prometheus_name(key: str) -> str:
    """A metric's name there: `rewards/accuracy/mean` is `heterorl_rewards_accuracy_mean`."""
    return "heterorl_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)


# ── TensorBoard, Weights & Biases ────────────────────────────────────────────────────────────────────────────────────
class _TensorBoard:
    """Scalars by step; a sampler's batches are numbered as they come."""

    def __init__(self, make_writer: Callable[..., Any], folder: Path) -> None:
        self._make_writer = make_writer
        self._folder = folder
        self._writer: Any = None
        self._batches = 0

    def write(self, record: Record) -> None:
        if "event" in record:
            return
        self._batches += 1
        step = record.get("step", self._batches)
        if self._writer is None:
            # Only now is it known where a resumed run starts; purge_step hides what it repeats.
            self._writer = self._make_writer(str(self._folder), purge_step=step, flush_secs=10)
        for key, value in _numbers(record):
            if key not in ("step", "time"):
                self._writer.add_scalar(key, value, step, walltime=record["time"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _open_tensorboard(folder: Path) -> _TensorBoard | None:
    try:
        module = importlib.import_module("tensorboardX")
    except ModuleNotFoundError:
        log.info("no TensorBoard files: tensorboardX is not installed")
        return None
    return _TensorBoard(module.SummaryWriter, folder)


class _WandbSink:
    """One W&B run, found again by its id when the run resumes."""

    def __init__(self, folder: Path, run: str, settings: WandbSpec) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError:
            raise UserError(
                "monitoring.wandb.project is set, but wandb is not installed; pip install wandb, or remove the project"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=settings.project,
            name=settings.name or run,
            id=settings.id or run,
            resume="allow",
            mode=settings.mode,
            dir=str(folder),
        )
        # Our own axis: W&B's counter refuses to go back, and a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        if "event" not in record:
            self._run.log(dict(_numbers(record)))

    def close(self) -> None:
        self._run.finish()
