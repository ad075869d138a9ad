"""What the lines of a run's metrics files say: the learner's steps, the samplers' batches and swaps, and who waited."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from heterorl.exchange.storage import persistently
from heterorl.monitoring.json_lines import Record, read_metrics
from heterorl.spec.run import Slot


def learner_file(folder: Path) -> Path:
    """The learner's lines, in a run's metrics folder."""
    return folder / "learner.jsonl"


def sampler_file(folder: Path, slot: Slot) -> Path:
    """A slot's lines."""
    return folder / f"sampler-{slot}.jsonl"


def read_steps(folder: Path) -> list[Record]:
    """The learner's steps, each once."""
    return [record for record in read_metrics(learner_file(folder)) if is_step(record)]


def read_samplers(folder: Path) -> dict[Slot, list[Record]]:
    """Every line of each slot that has any, events included; a copy beside a slot's file is none."""
    found = {}
    for path in persistently(lambda: sorted(folder.glob("sampler-*.jsonl")), what=folder.name):
        with suppress(ValueError):
            found[Slot.parse(path.stem.removeprefix("sampler-"))] = path
    return {slot: read_metrics(path) for slot, path in found.items()}


def is_step(record: Record) -> bool:
    """Whether the learner's line is of a step."""
    return "event" not in record and record.get("step") is not None


def is_batch(record: Record) -> bool:
    """Whether the sampler's line is of a batch of rollouts."""
    return "event" not in record


def is_swap(record: Record) -> bool:
    """Whether the sampler's line is of other weights that it loaded."""
    return record.get("event") == "swap"


def column(records: Iterable[Record], key: str) -> list[float]:
    """What is known of a key, in the order written."""
    return [record[key] for record in records if record.get(key) is not None]


def mean(records: Iterable[Record], key: str) -> float | None:
    """Mean of what is known of a key; None when nothing is."""
    values = column(records, key)
    return fmean(values) if values else None


def sampler_wait_s(record: Record) -> float:
    """Seconds of a batch that its sampler waited: for room in the queue, its turn, weights, or slow rewards."""
    return sum(float(record.get(f"rollout/{why}_s") or 0.0) for why in ("backpressure", "weights_wait", "rewards_wait"))


def sampler_wait_share(record: Record) -> float | None:
    """The same as a share of the batch's time."""
    wait = sampler_wait_s(record)
    work = record.get("rollout/generate_s") or 0.0
    return wait / (wait + work) if wait + work > 0 else None


def learner_wait_share(steps: Iterable[Record]) -> float | None:
    """Share of the steps' time that the learner waited for rollouts."""
    known = [r for r in steps if r.get("perf/rollout_wait_s") is not None and r.get("step_time")]
    whole = sum(column(known, "step_time"))
    return min(sum(column(known, "perf/rollout_wait_s")) / whole, 1.0) if whole else None
