"""Metrics of one process: JSON lines always, Prometheus always, dashboards (`boards`) when configured.

The JSONL file is the record: `heterorl report`, the live view and the summary read it (`json_lines`). Numbers that are
not finite are written as null. Monitoring never holds up or ends the work: see `background`.

    metrics/NAME.jsonl     {"step": 12, "time": 1767225600.0, "reward": 0.25, ...}     one line a step or batch
                           {"event": "swap", "time": ..., "version_step": 12, ...}     what happened in between;
                                                                 `start` and `stop` frame the life of a process
    metrics/NAME.port      port of /metrics while the process runs
    metrics/tensorboard/NAME/   metrics/wandb/   metrics/board.json (what the run is called on dashboards)
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.background import Background, Sink
from heterorl.monitoring.boards import TensorBoard, TrackioRun, WandbRun, check_boards, told
from heterorl.monitoring.json_lines import JsonLines, Record
from heterorl.monitoring.prometheus import PrometheusPage
from heterorl.monitoring.run_story import RunStory
from heterorl.monitoring.software import software
from heterorl.spec.run import MonitoringSpec

log = logging.getLogger(__name__)

_UPLOAD_S = 60.0
"""How long the end of a process may wait for a service to take what is left."""


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
        story: Callable[[], RunStory] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Metrics of process `name` (`learner`, `sampler-far-0`) of a run, under its metrics folder.

        `story`: of the one process that tells dashboards of the whole run, W&B and Trackio among them; asked for anew
        whenever one is opened.
        Raises UserError when one is configured and cannot work (`check_boards`). What cannot be written later is told
        once and tried again beside the work.
        """
        if story is not None:
            check_boards(monitoring)
        file = folder / f"{name}.jsonl"
        sinks: list[Sink] = [
            PrometheusPage(folder / f"{name}.port", monitoring.prometheus_port, run=run, process=name),
            Background(str(file), lambda: JsonLines(file)),
        ]
        sinks += _boards(folder, name, monitoring, story)
        metrics = cls(sinks, clock=clock)
        metrics.event("start", {"pid": os.getpid(), "software": software()})
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
        self.event("stop", {})
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def conclude(exchange: Exchange, summary: Mapping[str, Any]) -> None:
    """Tell the dashboards what came after the learner had left: the last evaluations, and how the run ended."""
    monitoring, story = exchange.spec.monitoring, lambda: RunStory(exchange, lambda: summary)
    boards = _boards(exchange.metrics_dir, "learner", monitoring, story, open_s=_UPLOAD_S)
    for board in boards:
        board.write({"event": "end"})
    for board in boards:
        board.close()


def _boards(
    folder: Path, name: str, monitoring: MonitoringSpec, story: Callable[[], RunStory] | None, *, open_s: float = 5.0
) -> list[Background]:
    found: list[Background] = []
    if monitoring.tensorboard and _has_tensorboard():
        files = folder / "tensorboard" / name
        board = partial(told, partial(TensorBoard, files), story)
        found.append(Background(str(files), board, close_s=max(5.0, open_s), open_s=open_s))
    if story is not None and monitoring.wandb.project:
        wandb = partial(WandbRun, folder, monitoring.wandb)
        found.append(Background("Weights & Biases", partial(told, wandb, story), close_s=_UPLOAD_S, open_s=open_s))
    if story is not None and monitoring.trackio.project:
        trackio = partial(TrackioRun, monitoring.trackio)
        found.append(Background("Trackio", partial(told, trackio, story), close_s=_UPLOAD_S, open_s=open_s))
    return found


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


def _has_tensorboard() -> bool:
    if importlib.util.find_spec("tensorboardX") is None:
        log.info("no TensorBoard files: tensorboardX is not installed")
        return False
    return True
