"""The adaptive prompt order against the shuffled one: sums of one to three digits, five seeds, reward against tokens.

    python -m bench.adaptive_order [--measurements FILE]      (with PYTHONPATH=tests)

The quickstart's tiny model learns by the product's own engines, prompt orders and learner step, one after the other in
one process, so that the result depends on seeds alone and not on how fast the machine is. The reward is the expected
one, the probability of the right answer, over problems of its own that both orders share. Measurements are appended to
a file as JSON lines; what is there already is not measured again. Table and picture go to docs/reports.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from builders import exchange_at, run_of
from heterorl.data.tokenizer import load_tokenizer
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import PromptEvidence
from heterorl.exchange.rollout import Completion, Rollout, RolloutName, Sampling
from heterorl.exchange.version import Version
from heterorl.seeds import derive_seed
from heterorl.spec.run import HeteroRLRun, Slot
from heterorl_learner.engines.build import build_engine as build_learner
from heterorl_learner.prepare import prepare
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import learning_rate, train_on
from heterorl_sampler.adaptive_order import build_order
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import build_engine

REPORTS = Path(__file__).parents[2] / "docs" / "reports"
ORDERS, SEEDS = ("shuffled", "adaptive"), range(5)
STEPS, EVERY = 100, 10
SLOT = Slot("near", 0)
STUDENT_95 = 2.776
"""Of Student's distribution with four degrees of freedom."""

Row = dict[str, Any]
Measurement = dict[str, Any]


def run_with(order: str, seed: int) -> HeteroRLRun:
    """The quickstart's model and loss on sums of one to three digits, with one sampler."""
    return run_of(
        seed=seed,
        model={
            "source": "tiny",
            "dtype": "float32",
            "tiny": {"hiddenSize": 64, "numLayers": 2, "targetAccuracy": 0.1},
        },
        data={
            "order": order,
            "train": {"arithmetic": {"minDigits": 1, "digits": 3, "rows": 3000}},
            "evals": [{"label": "sums", "arithmetic": {"minDigits": 1, "digits": 3, "rows": 300, "seed": 1000}}],
        },
        algorithm={"loss": {"type": "gepo"}, "groupSize": 8},
        generation={"maxPromptTokens": 16, "maxCompletionTokens": 8},
        learner={
            "steps": STEPS,
            "batch": {"groups": 32, "tokensPerMicroBatch": 4096},
            "optimizer": {"learningRate": 5e-4},
        },
        samplers=[{"name": SLOT.pool, "engine": "transformers"}],
    )


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def measure(order: str, seed: int, exchange: Exchange) -> Iterator[Measurement]:
    """Train from the prepared model and tell, every `EVERY` steps, tokens generated so far and the expected reward."""
    spec, tokenizer = run_with(order, seed).spec, load_tokenizer(exchange.model_dir)
    rows, held_out = (_rows(exchange.data_file(name)) for name in ("train", "eval-sums"))
    learner = build_learner(exchange.model_dir, spec)
    sampler = build_engine("transformers", exchange.model_dir, dtype="float32", max_model_len=64)
    prompts, per_step = build_order(spec, SLOT, rows, PromptEvidence()), spec.learner.batch.groups
    tokens = taught = 0
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            rewards, share = expected_rewards(sampler, tokenizer, held_out), taught / max(1, step * per_step)
            by_digits = [fmean(rewards[size::3]) for size in range(3)]  # they alternate
            found = {"step": step, "tokens": tokens, "reward": fmean(rewards), "by_digits": by_digits, "taught": share}
            yield {"order": order, "seed": seed, **found}
        chosen = [prompts.row(step * per_step + n, step) for n in range(per_step)]
        sampling, drawn = Sampling.of(spec.generation), derive_seed("generation", seed, step)
        groups = sampler.generate([row["prompt_ids"] for row in chosen], spec.algorithm.group_size, sampling, drawn)
        rollouts = [_rollout(exchange, tokenizer, row, group or [], step) for row, group in zip(chosen, groups)]
        for row, rollout in zip(chosen, rollouts):
            prompts.observe(row, rollout.rewards, step)
        tokens += sum(len(rollout.completion_ids) for rollout in rollouts)
        taught += sum(int(rollout.rewards.min() < rollout.rewards.max()) for rollout in rollouts)
        names = [RolloutName(Version(step, 1), SLOT, n) for n in range(per_step)]
        train_on(learner, spec, StepBatch(step, names, rollouts, wait_s=0.0))
        learner.step(learning_rate(spec.learner, step))
        save_file(learner.full_state_dict(), exchange.root / "model.safetensors")
        sampler.load_weights(exchange.root)


def expected_rewards(engine: InferenceEngine, tokenizer: Any, rows: Sequence[Row]) -> list[float]:
    """Of each row, the probability of its answer and the end of the turn, at temperature 1."""
    targets = [[*tokenizer.encode(row["answer"]), tokenizer.eos_token_id] for row in rows]
    scored = engine.score([row["prompt_ids"] + target for row, target in zip(rows, targets)])
    return [float(np.exp(np.sum(logp[-len(target) :]))) for logp, target in zip(scored, targets)]


def _rollout(exchange: Exchange, tokenizer: Any, row: Row, group: list[Completion], step: int) -> Rollout:
    texts = tokenizer.batch_decode([completion.token_ids for completion in group], skip_special_tokens=True)
    tokens = [token for completion in group for token in completion.token_ids]
    return Rollout(
        prompt_ids=np.array(row["prompt_ids"], np.int32),
        completion_ids=np.array(tokens, np.int32),
        lengths=np.array([len(completion.token_ids) for completion in group], np.int32),
        logp=np.array([logp for completion in group for logp in completion.logp], np.float32),
        versions=((Version(step, 1), len(tokens)),),
        rewards=np.array([text == row["answer"] for text in texts], np.float32),
        truncated=np.array([completion.truncated for completion in group], np.bool_),
        provenance=exchange.provenance,
    )


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────
class Curves:
    """Measurements as curves over generated tokens, at the same numbers of tokens for all."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self._runs = {
            (order, seed): [m for m in measurements if (m["order"], m["seed"]) == (order, seed)]
            for order in ORDERS
            for seed in SEEDS
        }
        self.end = min(run[-1]["tokens"] for run in self._runs.values())
        self.grid = np.linspace(0, self.end, 101)
        self.rewards = {order: np.array([self._curve(order, seed) for seed in SEEDS]) for order in ORDERS}

    def _curve(self, order: str, seed: int) -> NDArray[np.float64]:
        run = self._runs[order, seed]
        curve: NDArray[np.float64] = np.interp(self.grid, [m["tokens"] for m in run], [m["reward"] for m in run])
        return curve

    def last(self, order: str, key: str) -> NDArray[np.float64]:
        """The mean over seeds of a value at the last step."""
        mean: NDArray[np.float64] = np.mean([self._runs[order, seed][-1][key] for seed in SEEDS], axis=0)
        return mean

    def difference(self, part: slice) -> tuple[float, float]:
        """Adaptive minus shuffled over a part of each seed's curve: mean, and half of its 95 % confidence interval."""
        each = (self.rewards["adaptive"] - self.rewards["shuffled"])[:, part].mean(axis=1)
        return float(each.mean()), STUDENT_95 * float(each.std(ddof=1)) / len(each) ** 0.5


def report(curves: Curves) -> str:
    """The page: a table, and the verdict as it falls."""
    lines = ["| generated tokens | shuffled | adaptive | difference |", "|---:|---:|---:|---:|"]
    for part in (0, 25, 50, 75, 100):
        means = [curves.rewards[order][:, part] for order in ORDERS]
        mean, half = curves.difference(slice(part, part + 1))
        shown = " | ".join(f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for values in means)
        lines.append(f"| {curves.grid[part]:,.0f} | {shown} | {mean:+.3f} ± {half:.3f} |")
    whole, half = curves.difference(slice(None))
    verdict = "better" if whole > half else "worse" if whole < -half else "neither better nor worse"
    digits = [" / ".join(f"{value:.2f}" for value in curves.last(order, "by_digits")) for order in ORDERS]
    taught = [f"{curves.last(order, 'taught'):.0%}" for order in ORDERS]
    return PAGE.format(
        table="\n".join(lines), verdict=verdict, whole=f"{whole:+.3f} ± {half:.3f}", digits=digits, taught=taught,
        steps=STEPS, seeds=len(SEEDS),
    )  # fmt: skip


def draw(curves: Curves, path: Path) -> None:
    """Reward against generated tokens: every seed thin, the mean of each order thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), dpi=90, layout="constrained")
    for order, color in zip(ORDERS, ("tab:gray", "tab:blue")):
        axes.plot(curves.grid, curves.rewards[order].T, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(curves.grid, curves.rewards[order].mean(axis=0), color=color, linewidth=2, label=order)
    axes.set(xlabel="generated tokens", ylabel="expected reward, held-out sums")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


PAGE = """# The adaptive prompt order

`data.order: adaptive` against `shuffled` ([tasks.md](../tasks.md#the-order-of-prompts)) on built-in sums whose operands have one, two or three digits, as many of
each: the quickstart's tiny model and loss, {steps} steps of 32 groups of 8 at learning rate 5e-4, lag 0, {seeds} seeds of the order and of sampling, which all start from the same
model. The reward is the expected one on 300 sums drawn with another seed, at temperature 1. `make adaptive-order-report` repeats it.

![Reward against generated tokens](adaptive-order.png)

Mean and standard deviation over the seeds at the same number of generated tokens; the difference is that of each seed, with a 95 % confidence interval:

{table}

**Verdict: adaptive is {verdict} here.** Averaged over the whole run its reward differs by {whole}. Of the groups, {taught[0]} (shuffled)
and {taught[1]} (adaptive) held right and wrong completions and so had something to teach. Rewards for one, two and three digits after
the last step: {digits[0]} (shuffled), {digits[1]} (adaptive). This is one small task and one learning rate, at which
the reward of most runs first falls; it says nothing of large models.
"""


def fill(path: Path, missing: Sequence[tuple[str, int]]) -> None:
    """Measure these orders and seeds from one model, and append what was measured, run by run."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = exchange_at(Path(folder) / "run", run_with(ORDERS[0], seed=0))
        prepare(exchange)
        for order, seed in missing:
            made = list(measure(order, seed, exchange))
            with path.open("a") as lines:
                lines.writelines(json.dumps(measurement) + "\n" for measurement in made)
            print(order, seed, [round(measurement["reward"], 3) for measurement in made], flush=True)


def main() -> None:
    """Measure what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=Path, default=Path("adaptive-order-measurements.jsonl"))
    path: Path = parser.parse_args().measurements
    torch.set_num_threads(1)
    known = _rows(path) if path.exists() else []
    done = {(m["order"], m["seed"]) for m in known if m["step"] == STEPS}
    missing = [(order, seed) for seed in SEEDS for order in ORDERS if (order, seed) not in done]
    if missing:
        fill(path, missing)
    curves = Curves(_rows(path))
    (REPORTS / "adaptive-order.md").write_text(report(curves))
    draw(curves, REPORTS / "adaptive-order.png")


if __name__ == "__main__":
    main()
