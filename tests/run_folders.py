"""Run folders as a run leaves them, however long: for what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from builders import exchange_at, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, LearnerHeartbeat, RunnerState
from heterorl.exchange.version import Version

START = 1_767_225_600.0


def write_run(
    root: Path, *, steps: int, groups: int = 0, problems: int = 0, status: str = "succeeded", seed: int = 0, **spec: Any
) -> Exchange:
    """A run that trained these steps, ten seconds each, with pools near and far.

    It logged groups of 8 completions, and 4 answers to each problem at the first and the last step.
    """
    pools = [{"name": "near"}, {"name": "far"}]
    run = run_of(root.name, **{"learner": {"steps": steps}, "samplers": pools, "seed": seed, **spec})
    exchange = exchange_at(root, run)
    exchange.mark_prepared()
    exchange.save_runner(RunnerState(status=status, prepare_s=12.0, elapsed_s=10.0 * steps))
    exchange.write_learner(LearnerHeartbeat(step=steps, steps=steps, finished=True))
    for step in (0, steps):
        mean = 0.2 + 0.5 * step / steps
        exchange.write_eval(
            Version(step, 1), Evaluation(average=mean, sets={"sums": {"mean": mean, "problems": 100.0}})
        )
    _write(exchange.metrics_dir / "learner.jsonl", [_step(step, steps, seed) for step in range(1, steps + 1)])
    for pool, every in (("near", 1), ("far", 20)):
        _write(exchange.metrics_dir / f"sampler-{pool}-0.jsonl", _sampler(steps, every))
    if groups:
        _write(exchange.completions_file, [_group(number, groups, steps) for number in range(groups)])
    for step in (0, steps) if problems else ():
        _write(exchange.answers_dir / f"{Version(step, 1)}.jsonl", [_problem(row, step) for row in range(problems)])
    return exchange


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _step(step: int, steps: int, seed: int) -> dict[str, Any]:
    wave = math.sin(step * 0.7 + seed)
    return {
        "time": START + 10 * step, "step": step, "reward": 0.2 + 0.5 * step / steps + 0.05 * wave, "reward_std": 0.3,
        "frac_reward_zero_std": 0.1, "loss": 0.01 * wave, "grad_norm": 0.2 + 0.1 * wave, "learning_rate": 1e-6,
        "mismatch_kl": 1e-3 * (2 + wave), "weight/variance": 0.1, "weight/ess": 0.9, "lag/mean": step % 20 / 2,
        "lag/max": step % 20, "lag/by_pool/far": step % 20, "lag/by_pool/near": 1.0, "lag/dropped": 0,
        "completions/mean_length": 200.0, "completions/max_length": 512.0, "completions/clipped_ratio": 0.02,
        "step_time": 10.0, "perf/rollout_wait_s": 2.5, "perf/tokens_per_s": 9000.0 + 500 * wave,
        "rewards/accuracy/mean": 0.4, "rewards/format/mean": 0.8, "clip_ratio/low_mean": 0.1,
    }  # fmt: skip


def _sampler(steps: int, every: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"event": "start", "time": START}]
    for step in range(steps):
        at, held = START + 10 * step, step // every * every
        if held == step:
            records.append({"event": "swap", "time": at + 1, "version_step": held, "canary/mean_abs_diff": 1e-6})
        records.append({
            "time": at + 9, "version_step": held, "groups": 8, "tokens_per_s": 800.0, "rollout/generate_s": 6.0,
            "rollout/score_s": 0.5, "rollout/backpressure_s": 1.0, "rollout/weights_wait_s": 0.0,
        })  # fmt: skip
    return records


def _group(number: int, groups: int, steps: int) -> dict[str, Any]:
    """Its completion i has reward 1 where i < number % 9; every 16th group has one that was truncated."""
    step = 1 + number * steps // groups
    pool = ("near", "far")[number % 2]
    completions = [
        {
            "text": f"{number} plus {i} is ...", "reward": float(i < number % 9),
            "parts": {"accuracy": float(i < number % 9), "format": 1.0}, "advantage": round(float(i < number % 9) - number % 9 / 8, 4),
            "truncated": number % 16 == 0 and i == 7, "tokens": [len(str(number)), 6 + len(str(i)), 3, 4],
            "versions": [[step - 1, 2], [step, 2]], "ratios": [1.0, 0.5, 2.0, None],
        }
        for i in range(8)
    ]  # fmt: skip
    return {
        "step": step, "incarnation": 1, "rollout": f"v{step - 1:08d}-i0001--{pool}-0--s{number:010d}", "row": number,
        "prompt": f"What is {number} plus a few? <script>document.title='broken'</script>", "reference": str(number), "completions": completions,
    }  # fmt: skip


def _problem(row: int, step: int) -> dict[str, Any]:
    """Of its 4 answers, row % 5 are right; at first one fewer of an odd row, if it has any."""
    right = row % 5 - (step == 0 and row % 2 == 1 and row % 5 > 0)
    completions = [
        {"text": f"I say {row + (i >= right)}", "correct": i < right, "truncated": i == 3, "tokens": 3}
        for i in range(4)
    ]
    prompt = f"How much is {row} plus nothing? <script>document.title='broken'</script>"
    return {
        "step": step, "set": "sums", "row": row, "prompt": prompt, "reference": str(row), "completions": completions,
    }  # fmt: skip
