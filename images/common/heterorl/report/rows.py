"""The report's tables, as text: the settings that matter for a result, and what the run came to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heterorl.spec.run import DatasetSpec, EvalDatasetSpec, RunSpec, SamplerPoolSpec, TrainDatasetSpec

Facts = dict[str, Any]
"""A run's summary, with its `spec`, its `software`, and when it began (`date`, seconds)."""
Cell = Callable[[Facts], str]


def table(rows: dict[str, Cell], facts: list[Facts]) -> list[dict[str, Any]]:
    """Rows {name, cells}: a cell a run, of several lines where it lists something."""
    return [{"name": name, "cells": [cell(fact) for fact in facts]} for name, cell in rows.items()]


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _of_spec(words: Callable[[RunSpec], str]) -> Cell:
    return lambda facts: words(facts["spec"])


def model_name(spec: RunSpec) -> str:
    """The model in a word or two."""
    return {"path": Path(spec.model.path or "").name, "hub": spec.model.name or ""}.get(spec.model.source, "tiny model")


def _dataset(data: DatasetSpec) -> str:
    match data.source:
        case "file":
            words = ", ".join([data.path] if data.path else data.paths)
        case "hub":
            words = " ".join(filter(None, (data.name, data.config, data.split, data.revision)))
        case "reasoningGym":
            gym = data.reasoning_gym
            words = f"reasoning-gym: {', '.join(task.name for task in gym.tasks)}; {gym.rows:,} problems"
        case _:
            sums = data.arithmetic
            digits = f"{sums.min_digits} to {sums.digits}" if sums.min_digits else f"{sums.digits}"
            words = f"sums of {digits} digit{'' if digits == '1' else 's'}, {sums.rows:,} problems"
    return words + (f", the first {data.limit:,}" if data.limit else "")


def _train(data: TrainDatasetSpec) -> str:
    if data.source == "mix":
        return "\n".join(f"{part.label} (weight {part.weight:g}): {_dataset(part)}" for part in data.mix)
    return _dataset(data)


def _evals(evals: list[EvalDatasetSpec]) -> str:
    return "\n".join(f"{data.label}: {_dataset(data)}" for data in evals) or "–"


def _evaluation(spec: RunSpec) -> str:
    e = spec.evaluation
    if not spec.data.evals or not e.every_steps:
        return "–"
    return f"every {e.every_steps:,} steps, {e.samples_per_prompt} at temperature {e.temperature:g}, top-p {e.top_p:g}"


def _rewards(spec: RunSpec) -> str:
    return "\n".join(f"{(r.path or r.name)} × {r.weight:g}" for r in spec.rewards)


def _loss(spec: RunSpec) -> str:
    loss = spec.algorithm.loss
    parameters = getattr(loss, loss.type).model_dump(mode="json", by_alias=True)
    return "\n".join([loss.type, *(f"{key} {value}" for key, value in parameters.items() if value is not None)])


def _rate(spec: RunSpec) -> str:
    optimizer, schedule = spec.learner.optimizer, spec.learner.schedule
    return f"{optimizer.learning_rate:g}, {schedule.type}, warm-up {schedule.warmup_ratio:.0%}"


def _sampling(spec: RunSpec) -> str:
    g = spec.generation
    limits = [f"top-p {g.top_p:g}" if g.top_p < 1 else "", f"top-k {g.top_k}" if g.top_k else ""]
    return ", ".join(filter(None, [f"{g.temperature:g}", *limits]))


def _template(spec: RunSpec) -> str:
    lines = [str(spec.data.prompt_template)]
    lines += [f"system: {spec.data.system_prompt}"] if spec.data.system_prompt is not None else []
    lines += [f"instruction: {spec.data.instruction}"] if spec.data.instruction is not None else []
    return "\n".join(lines)


def _delay(pool: SamplerPoolSpec, time_scale: float) -> str:
    delay = pool.delay
    scale, unit = (time_scale, "s") if delay.unit == "seconds" else (1.0, "steps")
    match delay.distribution:
        case "none":
            return "no delay"
        case "constant":
            span = f"{delay.lower * scale:g} {unit}"
        case "trace":
            span = f"{len(delay.trace.values)} recorded values in {unit}"
        case _:
            span = f"{delay.lower * scale:g} to {delay.upper * scale:g} {unit}"
    return f"{delay.distribution} delay, {span}, {delay.model}"


def _samplers(spec: RunSpec) -> str:
    return "\n".join(f"{g.name}: {g.replicas} × {g.engine}, {_delay(g, spec.time_scale)}" for g in spec.samplers)


def _learner(spec: RunSpec) -> str:
    ranks = spec.learner.replicas * spec.learner.processes_per_replica
    return f"{spec.learner.strategy}, {ranks} process{'es' if ranks > 1 else ''}"


def _versions(facts: Facts) -> str:
    found = {name: number for name, number in facts["software"].items() if name != "commit"}
    return ", ".join(f"{name} {number}" for name, number in found.items()) or "–"


def _date(facts: Facts) -> str:
    return f"{datetime.fromtimestamp(facts['date'], UTC):%Y-%m-%d %H:%M} UTC" if facts["date"] else "–"


SETTINGS: dict[str, Cell] = {
    "Model": _of_spec(lambda s: f"{model_name(s)}, {s.model.dtype}"),
    "Training data": _of_spec(lambda s: _train(s.data.train)),
    "Evaluation data": _of_spec(lambda s: _evals(s.data.evals)),
    "Evaluated": _of_spec(_evaluation),
    "Prompt template": _of_spec(_template),
    "Rewards": _of_spec(_rewards),
    "Loss": _of_spec(_loss),
    "Advantage": _of_spec(lambda s: f"scale: {s.algorithm.advantage.scale}"),
    "Learning rate": _of_spec(_rate),
    "Batch": _of_spec(
        lambda s: f"{s.learner.batch.groups} groups, {s.learner.batch.groups * s.algorithm.group_size:,} completions"
    ),
    "Group": _of_spec(lambda s: f"{s.algorithm.group_size} completions of a prompt"),
    "Temperature": _of_spec(_sampling),
    "Prompt, completion at most": _of_spec(
        lambda s: f"{s.generation.max_prompt_tokens:,}, {s.generation.max_completion_tokens:,} tokens"
    ),
    "Staleness at most": _of_spec(lambda s: f"{s.algorithm.staleness.max_steps} steps, {s.algorithm.staleness.policy}"),
    "Samplers": _of_spec(_samplers),
    "Learner": _of_spec(_learner),
    "Seed": _of_spec(lambda s: str(s.seed)),
    "Versions": _versions,
    "Commit": lambda f: f["software"].get("commit", "–"),
    "Date": _date,
}


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _counts(by_slot: dict[str, int]) -> str:
    return ", ".join(f"{slot} {count:,}" for slot, count in by_slot.items()) or "–"


def _scores(facts: Facts) -> str:
    scores = facts["evaluations"].items()
    return "\n".join(f"{name}: {s['best']:.3f} / {s['last']:.3f} / {s['gap']:.3f}" for name, s in scores) or "–"


RESULTS: dict[str, Cell] = {
    "Status": lambda f: f"{f['status']}{': ' + f['reason'] if f['reason'] else ''}",
    "Steps": lambda f: f"{f['steps']:,} of {f['steps_wanted']:,}",
    "Wall time": lambda f: f"{f['wall_s'] / 60:.1f} min, including {f['prepare_s'] / 60:.1f} min of preparation",
    "Reward, first → last tenth": lambda f: f"{_number(f['reward_first_tenth'])} → {_number(f['reward_last_tenth'])}",
    "Evaluation, best / last / gap": _scores,
    "Lag, mean and maximum": lambda f: f"{_number(f['lag_mean'], 1)} and {_number(f['lag_max'], 0)} steps",
    "Rollouts by sampler": lambda f: _counts(f["rollouts"]),
    "Rollouts trained": lambda f: f"{f['rollouts_trained']:,} of {f['rollouts_published']:,} published",
    "… dropped as too old": lambda f: f"{f['rollouts_dropped']:,}",
    "… pending": lambda f: f"{f['rollouts_pending']:,}",
    "… quarantined": lambda f: str(f["rollouts_quarantined"]),
    "… trained twice, lost": lambda f: f"{f['rollouts_trained_twice']}, {f['rollouts_lost']}",
    "Weight swaps by sampler": lambda f: _counts(f["swaps"]),
    "Largest canary difference": lambda f: (
        "–" if f["canary_mean_abs_diff"] is None else f"{f['canary_mean_abs_diff']:.1e}"
    ),
    "Restarts after crashes": lambda f: _counts({k: n for k, n in f["restarts"].items() if n}),
}
