"""Metrics of one process: JSON lines always, Prometheus always, TensorBoard and Weights & Biases when configured.

The JSONL file is the record: `heterorl report`, the live view and the summary read it (`json_lines`). Numbers that are
not finite are written as null. Monitoring never holds up or ends the work: see `background`.

    metrics/NAME.jsonl     {"step": 12, "time": 1767225600.0, "reward": 0.25, ...}     one line a step or batch
                           {"event": "swap", "time": ..., "version_step": 12, ...}     what happened in between;
                                                                 `start` and `stop` frame the life of a process
    metrics/NAME.port      port of /metrics while the process runs
    metrics/tensorboard/NAME/   metrics/wandb/
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from heterorl.monitoring.background import Background, Sink
from heterorl.monitoring.boards import TensorBoard, WandbRun, check_wandb
from heterorl.monitoring.json_lines import JsonLines, Record
from heterorl.monitoring.prometheus import PrometheusPage
from heterorl.monitoring.software import software
from heterorl.spec.run import MonitoringSpec

log = logging.getLogger(__name__)

_UPLOAD_S = 60.0
"""How long the end of a process may wait for W&B to take what is left."""


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
        Raises UserError when W&B is configured and cannot work (`check_wandb`). What cannot be written later is told
        once and tried again beside the work.
        """
        if to_wandb:
            check_wandb(monitoring.wandb)
        file = folder / f"{name}.jsonl"
        sinks: list[Sink] = [
            PrometheusPage(folder / f"{name}.port", monitoring.prometheus_port, run=run, process=name),
            Background(str(file), lambda: JsonLines(file)),
        ]
        if monitoring.tensorboard and _has_tensorboard():
            board = folder / "tensorboard" / name
            sinks.append(Background(str(board), lambda: TensorBoard(board)))
        if to_wandb and monitoring.wandb.project:
            sinks.append(
                Background("Weights & Biases", lambda: WandbRun(folder, run, monitoring.wandb), close_s=_UPLOAD_S)
            )
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
