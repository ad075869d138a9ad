"""Results of a run: `summary.json`, with a ledger that accounts for every rollout a sampler published.

    published = trained + dropped + pending + quarantined + lost

Groups that were left out because a reward failed on them, or because all their rewards are equal
(`algorithm.filterGroups`), were never published; they are counted beside it.
"Trained" and "dropped" are what the journal of the surviving lineage says. A rollout is trained twice when it stands in
the journal more than once, and lost when it was published and is found nowhere.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, RunnerState
from heterorl.exchange.version import Version
from heterorl.monitoring.json_lines import Record
from heterorl.monitoring.run_records import column, is_swap, mean, read_samplers, read_steps
from heterorl.monitoring.snapshot import SnapshotReader
from heterorl.spec.run import Slot


@dataclass(frozen=True)
class Ledger:
    """Where every published rollout is."""

    published: frozenset[str]
    trained: Counter[str]
    dropped: frozenset[str]
    pending: frozenset[str]
    quarantined: frozenset[str]

    @property
    def trained_twice(self) -> set[str]:
        """Rollouts trained more than once on the way to the surviving weights."""
        return {name for name, count in self.trained.items() if count > 1}

    @property
    def lost(self) -> set[str]:
        """Rollouts that were published and are found nowhere."""
        return set(self.published) - set(self.trained) - self.dropped - self.pending - self.quarantined


def read_ledger(exchange: Exchange, samplers: dict[Slot, list[Record]]) -> Ledger:
    """The ledger of a run's folder; `samplers` are the slots' metrics."""
    # What lies in the folder is listed before the journal is read: a rollout may go from there to here, never back.
    pending = frozenset(map(str, [*exchange.list_rollouts(), *exchange.list_taken()]))
    quarantined = frozenset(map(str, exchange.list_quarantined()))
    journal = exchange.read_journal()
    return Ledger(
        published=frozenset(name for records in samplers.values() for r in records for name in r.get("names", [])),
        trained=Counter(str(name) for entry in journal for name in entry.names),
        dropped=frozenset(str(name) for entry in journal for name in entry.dropped),
        pending=pending,
        quarantined=quarantined,
    )


def summarise(root: Path) -> dict[str, Any]:
    """The summary of a run's folder, at any moment of the run."""
    exchange = Exchange(root)
    runner = exchange.runner or RunnerState(status="unknown")
    snapshot = SnapshotReader(exchange).read()
    learner, samplers = read_steps(exchange.metrics_dir), read_samplers(exchange.metrics_dir)
    swaps = {slot: [record for record in records if is_swap(record)] for slot, records in samplers.items()}
    ledger = read_ledger(exchange, samplers)
    rewarded = [record for record in learner if record.get("reward") is not None]
    tenth = math.ceil(len(rewarded) / 10)
    return {
        "name": exchange.run.metadata.name,
        "status": runner.status,
        "reason": runner.reason,
        "steps": snapshot.step,
        "steps_wanted": snapshot.steps,
        "wall_s": round(runner.prepare_s + runner.elapsed_s, 1),
        "prepare_s": round(runner.prepare_s, 1),
        "reward_first_tenth": mean(rewarded[:tenth], "reward"),
        "reward_last_tenth": mean(rewarded[-tenth:], "reward"),
        "lag_mean": mean(learner, "lag/mean"),
        "lag_max": max(column(learner, "lag/max"), default=None),
        "rollouts": {str(slot): _published(records) for slot, records in samplers.items()},
        "rollouts_published": len(ledger.published),
        "rollouts_trained": len(ledger.trained),
        "rollouts_trained_twice": len(ledger.trained_twice),
        "rollouts_dropped": len(ledger.dropped),
        "rollouts_pending": len(ledger.pending - set(ledger.trained) - ledger.dropped),
        "rollouts_quarantined": len(ledger.quarantined),
        "rollouts_lost": len(ledger.lost),
        "groups_unrewarded": _in_all(samplers, "unrewarded"),
        "groups_filtered": _in_all(samplers, "filtered"),
        "swaps": {str(slot): len(events) for slot, events in swaps.items()},
        "canary_mean_abs_diff": max(
            (value for events in swaps.values() for value in column(events, "canary/mean_abs_diff")), default=None
        ),
        "restarts": runner.restarts,
        "evaluations": _evaluations(snapshot.evaluations),
    }


def write_summary(root: Path) -> dict[str, Any]:
    """Write `summary.json` and return what it holds."""
    exchange, result = Exchange(root), summarise(root)
    exchange.files.replace(exchange.summary_file, (json.dumps(result, indent=2) + "\n").encode())
    return result


def in_words(result: dict[str, Any]) -> str:
    """The summary in a line or two, for the terminal."""
    minutes, seconds = divmod(round(result["wall_s"]), 60)
    lines = [f"{result['name']}: {result['steps']} of {result['steps_wanted']} steps in {minutes} min {seconds} s"]
    if result["reward_first_tenth"] is not None:
        lines[0] += f", reward {result['reward_first_tenth']:.3f} → {result['reward_last_tenth']:.3f}"
    if result["lag_mean"] is not None:
        lines[0] += f", lag {result['lag_mean']:.1f} (max {result['lag_max']:.0f})"
    if dropped := result["rollouts_dropped"]:
        made = max(dropped, result["rollouts_published"])
        lines[0] += f", {dropped} of {made} rollouts dropped ({dropped / made:.1%})"
    for label, scores in result["evaluations"].items():
        lines.append(f"  {label}: best {scores['best']:.3f}, last {scores['last']:.3f}, gap {scores['gap']:.3f}")
    return "\n".join(lines)


def _evaluations(results: Mapping[Version, Evaluation]) -> dict[str, dict[str, float]]:
    """Best, last and gap of each evaluation set's mean@k, and of their average, as in the paper's table."""
    scores: dict[str, list[float]] = {}
    for result in results.values():
        for label, values in result.sets.items():
            scores.setdefault(label, []).append(values["mean"])
        if len(result.sets) > 1:
            scores.setdefault("average", []).append(result.average)
    return {
        label: {"best": max(found), "last": found[-1], "gap": max(found) - found[-1]} for label, found in scores.items()
    }


def _in_all(samplers: Mapping[Slot, Iterable[Record]], key: str) -> int:
    return sum(int(number) for records in samplers.values() for number in column(records, key))


def _published(records: Iterable[Record]) -> int:
    return sum(len(record.get("names", [])) for record in records)
