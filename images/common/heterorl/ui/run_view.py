"""What is shown of one run: read anew when it is asked for, of the growing files only what is new."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from heterorl.errors import HeteroRLError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import RunnerState
from heterorl.logs import shown
from heterorl.monitoring.json_lines import MetricsTail
from heterorl.monitoring.progress import LiveProgress, ProgressReader
from heterorl.monitoring.run_records import is_step, learner_file, sampler_file
from heterorl.monitoring.series import Series, active_clock, family_of, mean_of, smooth, smoothed
from heterorl.spec.run import Slot
from heterorl.ui.answers import AnswerIndex
from heterorl.ui.columns import StepTable, decimated, plain, rounded, within
from heterorl.ui.completions import CompletionIndex
from heterorl.ui.settings import settings_of
from heterorl.ui.timeline import Lane

_SPARK = 60
_SILENT_S = 90.0
"""A run that goes on writes something, at least heartbeats, more often than this."""
_ENDED = ("succeeded", "failed", "stopped")
WAITING, EVALUATION = "waiting", "evaluation/"


class RunView:
    """One run's folder. Every method may be called from any thread; RunFolderError and the like say what is wrong."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.steps = StepTable()
        self._exchange = Exchange(root)
        self._learner = MetricsTail(learner_file(self._exchange.metrics_dir))
        self._samplers: dict[Slot, tuple[MetricsTail, Lane]] = {}
        self._completions = CompletionIndex(self._exchange.completions_file)
        self._answers = AnswerIndex(self._exchange.answers_dir)
        self._progress: ProgressReader | None = None
        self._lock = threading.RLock()
        self._beginnings = 0

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _read_steps(self) -> None:
        added = [record for record in self._learner.read() if is_step(record)]
        if self._learner.beginnings != self._beginnings:
            self.steps, self._beginnings = StepTable(), self._learner.beginnings
        self.steps.add(added)

    def _lanes(self) -> dict[Slot, Lane]:
        for path in sorted(self._exchange.metrics_dir.glob("sampler-*.jsonl")):
            try:
                slot = Slot.parse(path.stem.removeprefix("sampler-"))
            except ValueError:
                continue
            if slot not in self._samplers:
                self._samplers[slot] = (MetricsTail(sampler_file(self._exchange.metrics_dir, slot)), Lane())
        for tail, lane in self._samplers.values():
            lane.add(tail.read())
        return {slot: lane for slot, (_, lane) in self._samplers.items()}

    # ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────
    def card(self) -> dict[str, Any]:
        """The run in a list of runs; one that cannot be read says why."""
        with self._lock:
            card: dict[str, Any] = {"id": self.name, "folder": shown(self.root), "family": family_of(self.name)}
            try:
                return plain({**card, **self._card()})  # type: ignore[no-any-return]
            except (HeteroRLError, OSError, ValueError) as error:
                return {**card, "state": "unreadable", "why": str(error), "step": 0, "steps": 0, "spark": []}

    def _card(self) -> dict[str, Any]:
        self._read_steps()
        spec, heartbeat = self._exchange.spec, self._exchange.learner
        state, why = self._state()
        x, y = self.steps.curve("reward")
        return {
            "title": self._exchange.run.metadata.name,
            "state": state,
            "why": why,
            "loss": spec.algorithm.loss.type,
            "samplers": len(spec.slots),
            "step": heartbeat.step if heartbeat else 0,
            "steps": spec.learner.steps,
            "reward": float(np.mean(y[-20:])) if len(y) else None,
            "lag": self.steps.last("lag/mean"),
            "spark": rounded(decimated((x, smooth(y)), _SPARK)[1]),
            "changed": self._last_sign(),
            "revision": self.steps.revision,
        }

    def _state(self) -> tuple[str, str]:
        """The state in a word, and why in a line where that says more."""
        runner = self._exchange.runner
        if runner and runner.status in _ENDED:
            return runner.status, "" if runner.status == "succeeded" else runner.reason
        if runner is None and self._exchange.trained:
            return "succeeded", ""
        last = self._last_sign()
        if last and time.time() - last > _SILENT_S:
            return "silent", f"nothing was written since {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"
        return ("running" if self._exchange.learner else "preparing"), ""

    def _last_sign(self) -> float | None:
        """When anything that a living run writes was last written."""
        root = self.root
        found = [root / "learner.json", root / "runner.json", root / "run.json"]
        for pattern in ("metrics/*.jsonl", "slots/*/heartbeat.json", "logs/*.log"):
            found += root.glob(pattern)
        times = []
        for path in found:
            try:
                times.append(path.stat().st_mtime)
            except OSError:
                continue
        return max(times, default=None)

    def overview(self) -> dict[str, Any]:
        """The card with the samplers, the evaluations, and what is in the way."""
        with self._lock:
            card = self.card()
            if card["state"] == "unreadable":
                return card
            if self._progress is None:
                self._progress = ProgressReader(self._exchange)
            progress = self._progress.read()
            going = card["state"] in ("running", "preparing")
            return plain(  # type: ignore[no-any-return]
                {
                    **card,
                    "in_the_way": self._in_the_way(card, progress),
                    "eta_s": progress.eta_s if going else None,
                    "elapsed_s": self._elapsed(),
                    "reward_last": progress.reward,
                    "rewards": self._first_and_last("reward"),
                    "lag_mean": progress.lag_mean,
                    "lag_max": progress.lag_max,
                    "tokens_per_s": progress.learner_tokens_per_s,
                    "waiting": progress.waiting,
                    "dropped": progress.dropped,
                    "slots": [self._slot(slot, progress) for slot in progress.slots],
                    "evaluations": self._evaluations(progress),
                    "keys": [*self.steps.keys, *(f"{EVALUATION}{label}" for label in _labels(progress))],
                    "groups_logged": self._groups_logged(),
                }
            )

    def _groups_logged(self) -> bool:
        try:
            return self._exchange.completions_file.stat().st_size > 0
        except OSError:
            return False

    def _in_the_way(self, card: dict[str, Any], progress: LiveProgress) -> list[str]:
        """In the words of the live view and of the conditions on Kubernetes."""
        found = [card["why"]] if card["why"] else []
        if card["state"] in ("running", "preparing", "silent"):
            found += [words for words in (progress.weights_refused, progress.waiting_for) if words]
        return found

    def _elapsed(self) -> float | None:
        runner = self._exchange.runner or RunnerState(status="")
        if runner.elapsed_s:
            return runner.prepare_s + runner.elapsed_s
        times, _ = self.steps.curve("step", "time")
        return float(times[-1] - times[0]) if len(times) > 1 else None

    def _first_and_last(self, key: str) -> list[float]:
        """Means over the first and the last tenth of the steps."""
        _, values = self.steps.curve(key)
        tenth = -(-len(values) // 10)
        return [float(values[:tenth].mean()), float(values[-tenth:].mean())] if tenth else []

    def _slot(self, slot: Slot, progress: LiveProgress) -> dict[str, Any]:
        row = progress.slots[slot]
        lag = None if row.version is None or progress.newest is None else max(0, progress.newest.step - row.version)
        heartbeat = self._exchange.heartbeats().get(slot)
        refused = heartbeat.refused if heartbeat else {}
        return {"slot": str(slot), "lag": lag, **asdict(row), "refused": refused}

    def _evaluations(self, progress: LiveProgress) -> list[dict[str, Any]]:
        return [{"step": version.step, "sets": result.sets} for version, result in sorted(progress.evals.items())]

    # ── curves ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def curve(self, key: str, x: str) -> Series:
        """A column of the learner's steps, or an evaluation set's mean, over the steps or the seconds of work."""
        with self._lock:
            self._read_steps()
            if key.startswith(EVALUATION):
                found = self._evaluation_curve(key.removeprefix(EVALUATION))
            elif key == WAITING:
                found = self._waiting_curve()
            else:
                found = self.steps.curve(key)
            if x == "step" or not len(found[0]):
                return found
            steps, times = self.steps.curve("time")
            if not len(times):
                return np.empty(0), np.empty(0)
            clock = active_clock(times.tolist())
            return np.array([clock(time) for time in np.interp(found[0], steps, times)]), found[1]

    def smooth_curve(self, key: str, raw: Series) -> Series:
        """The curve `raw` of that key, smoothed; evaluations are too few for it."""
        if key.startswith(EVALUATION):
            return raw
        if key == WAITING:
            return smoothed(raw)
        with self._lock:
            soft = self.steps.smoothed(key)[1]
        known = min(len(raw[0]), len(soft))  # steps may have come or gone since `raw` was read
        return raw[0][:known], soft[:known]

    def _evaluation_curve(self, label: str) -> Series:
        points = [
            (version.step, result.sets[label]["mean"])
            for version, result in sorted(self._exchange.read_evals().items())
            if result.sets.get(label, {}).get("mean") is not None
        ]
        columns = np.array(points, np.float64).reshape(-1, 2)
        return columns[:, 0], columns[:, 1]

    def _waiting_curve(self) -> Series:
        x, waited = self.steps.curve("perf/rollout_wait_s")
        at, whole = self.steps.curve("step_time")
        shared = np.intersect1d(x, at)
        waited, whole = waited[np.isin(x, shared)], whole[np.isin(at, shared)]
        return shared, np.clip(waited / np.maximum(whole, 1e-9), 0.0, 1.0)

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def timeline(self, begin: float | None, end: float | None, stretches: int) -> dict[str, Any]:
        """The lanes of all slots between two moments (seconds since the epoch), cut into stretches."""
        with self._lock:
            self._read_steps()
            lanes = self._lanes()
            times, steps = self.steps.curve("step", "time")
            starts = [lane.spans[0][0] for lane in lanes.values() if lane.spans] + times[:1].tolist()
            ends = [lane.end for lane in lanes.values() if lane.end is not None] + times[-1:].tolist()
            if not starts:
                return {"lanes": [], "from": None, "to": None}
            first, last = min(starts), max(ends)
            low, high = first if begin is None else begin, last if end is None else end
            edges = np.linspace(low, max(high, low + 1e-3), stretches + 1)
            middles = (edges[:-1] + edges[1:]) / 2
            learner = np.interp(middles, times, steps) if len(times) else np.zeros(0)
            return {
                "from": low,
                "to": float(edges[-1]),
                "first": first,
                "last": last,
                "learner": rounded(np.floor(learner), 9),
                "lanes": [
                    {"slot": str(slot), "pool": slot.pool, **lane.stretches(edges, (times, steps))}
                    for slot, lane in sorted(lanes.items())
                ],
            }

    def completions(self) -> CompletionIndex:
        """The log of completions, read up to its end. Keep to one thread while using it: see `lock`."""
        self._completions.update()
        return self._completions

    def answers(self) -> AnswerIndex:
        """What was answered in evaluations, read up to the newest. Keep to one thread while using it: see `lock`."""
        self._answers.update()
        return self._answers

    @property
    def lock(self) -> threading.RLock:
        """Of everything that is read here."""
        return self._lock

    def settings(self) -> list[dict[str, Any]]:
        """The manifest, field by field."""
        return settings_of(self._exchange.spec)


def _labels(progress: LiveProgress) -> list[str]:
    return sorted({label for result in progress.evals.values() for label in result.sets})


def curves_of(
    runs: Sequence[RunView], keys: Sequence[str], x: str, low: float | None, high: float | None, points: int
) -> dict[str, Any]:
    """Each key's curves: of every run raw and smoothed, and the mean over the seeds of one family."""
    found: dict[str, Any] = {}
    for key in keys:
        lines, families = [], dict[str, list[Series]]()
        for run in runs:
            raw = run.curve(key, x)
            soft = run.smooth_curve(key, raw)
            families.setdefault(family_of(run.name), []).append(soft)
            lines.append(
                {"run": run.name, "raw": _points(raw, low, high, points), "smooth": _points(soft, low, high, points)}
            )
        means = {
            family: _points(mean_of(curves), low, high, points)
            for family, curves in families.items()
            if len(curves) > 1
        }
        found[key] = {"runs": lines, "means": means}
    return found


def _points(curve: Series, low: float | None, high: float | None, points: int) -> list[list[float | None]]:
    x, y = decimated(within(curve, low, high), points)
    return [rounded(x, 9), rounded(y)]
