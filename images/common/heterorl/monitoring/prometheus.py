"""The last value of every metric of one process, for Prometheus."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from heterorl.monitoring.http import Endpoint
from heterorl.monitoring.json_lines import Record, numbers

log = logging.getLogger(__name__)

CUMULATIVE = frozenset(
    {"num_tokens", "lag/dropped", "rollouts/mismatched", "rollouts/poisoned", "rollouts", "rejected_versions"}
)
"""Metrics that only grow; Prometheus shows them as counters (`_total`)."""


class PrometheusPage:
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
        self._port_file, self._noted = port_file, False
        self._note_port()

    def write(self, record: Record) -> None:
        """Take the values over."""
        self._note_port()
        prefix = ""
        if event := record.get("event"):
            self._events[event] += 1
            prefix = f"{event}/"
        # A new dict each time: the server's threads iterate over the old one.
        self._values = {**self._values, **{prefix + key: value for key, value in numbers(record)}}

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
        """Serve no more."""
        with suppress(OSError):
            self._port_file.unlink(missing_ok=True)
        self._endpoint.__exit__()

    def _note_port(self) -> None:
        """Write the port down, at the next record if the volume does not take it now."""
        if self._noted:
            return
        with suppress(OSError):
            self._port_file.parent.mkdir(parents=True, exist_ok=True)
            self._port_file.write_text(f"{self._endpoint.port}\n")
            self._noted = True


def prometheus_name(key: str) -> str:
    """A metric's name there: `rewards/accuracy/mean` is `heterorl_rewards_accuracy_mean`."""
    return "heterorl_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
