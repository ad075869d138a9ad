"""What the canary sees: statistics of its differences under honest rounding and under planted faults.

    python -m bench.canary --gsm8k GSM8K_TRAIN.jsonl [--models .. --dtypes .. --engines .. --rates .. --steps ..]

A learner trains a real model (SmolLM2-135M) and a tiny one; after 1, 8 and 64 optimizer steps, at two learning rates,
an engine loads its weights, right or with a fault planted in them, and scores the canary's texts. Every measurement is
appended to a file as a JSON line and not repeated if it is there already, so that one may stop and go on; the tables of
all in the file go to docs/reports/canary.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.canary_faults import (
    OF_ONE_VERSION,
    OF_TWO_VERSIONS,
    Learner,
    Weights,
    cached_halves,
    save,
    score_after,
    serving_folder,
    through_bfloat16,
)
from bench.page import ROOT
from heterorl.exchange.canary import CANARY_TOKENS, canary_texts
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import EngineName, build_engine
from heterorl_sampler.engines.model_files import Dtype
from heterorl_sampler.engines.transformers import TransformersEngine
from models import convert_smollm2, save_tiny_qwen3

MEASUREMENTS = ROOT / "docs" / "reports" / "canary.jsonl"
STEPS = (0, 1, 8, 64)
"""Optimizer steps between the versions; 0 is the starting weights alone."""
RATES = (1e-6, 1e-4)

FAULTS = {fault.__name__: fault for fault in [*OF_ONE_VERSION, *OF_TWO_VERSIONS]}
STALE_CACHE = "stale_cache"
"""The tokens of the second half, read by the new weights after keys and values that the old ones made of the first."""

Texts = dict[str, list[list[int]]]
"""Two texts of CANARY_TOKENS tokens by what they are made of; with the first kind faults are measured."""

STATISTICS: dict[str, Callable[[NDArray[np.float64]], float]] = {
    "mean abs": lambda d: float(np.abs(d).mean()),
    "median abs": lambda d: float(np.median(np.abs(d))),
    "trimmed mean abs": lambda d: float(np.sort(np.abs(d))[: int(0.95 * len(d))].mean()),
    "rms": lambda d: float(np.sqrt((d**2).mean())),
    "abs mean": lambda d: abs(float(d.mean())),
    "k3": lambda d: float((np.exp(d) - 1 - d).mean()),
    "p99": lambda d: float(np.quantile(np.abs(d), 0.99)),
    "10th largest": lambda d: float(np.sort(np.abs(d))[-10]),
    "max": lambda d: float(np.abs(d).max()),
}
"""Of the differences d [T], engine minus learner, over the tokens of both texts; the mean is trimmed by its top 5 %."""


@dataclass(frozen=True)
class Case:
    """One version in one engine."""

    model: str
    dtype: str
    engine: EngineName
    text: str
    fault: str
    """Empty: none, the difference is honest rounding."""
    rate: float
    """Learning rate of the steps between the two versions of a fault."""
    step: int


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────
class Bench:
    """One model in one data type: versions on one side, engines on the other."""

    def __init__(self, name: str, model: Path, dtype: Dtype, texts: Texts, lessons: list[list[int]]) -> None:
        self._name, self._model, self._dtype, self._texts, self._lessons = name, model, dtype, texts, lessons
        self._engines: dict[EngineName, InferenceEngine] = {}

    def measure(
        self, engines: list[EngineName], rates: list[float], steps: list[int], measured: Container[Case]
    ) -> Iterator[tuple[Case, NDArray[np.float64]]]:
        """Every case that is not among the measured ones, with its differences [T]."""
        for rate in rates:
            plan = {step: [case for case in self._cases(engines, rate, step) if case not in measured] for step in steps}
            if not any(plan.values()):
                continue
            learner = Learner(self._model, self._dtype, rate, self._lessons)
            first = learner.weights()
            for step in sorted(step for step, cases in plan.items() if cases):
                learner.train_to(step)
                yield from self._compare(plan[step], learner, first)

    def _cases(self, engines: list[EngineName], rate: float, step: int) -> Iterator[Case]:
        faults = [fault.__name__ for fault in (OF_TWO_VERSIONS if step else OF_ONE_VERSION)]
        if self._dtype == "bfloat16":
            faults = [fault for fault in faults if fault != through_bfloat16.__name__]
        for engine in engines:
            of_it = partial(Case, self._name, self._dtype, engine, rate=rate if step else 0.0, step=step)
            yield from (of_it(kind, "") for kind in self._texts)
            cached = [STALE_CACHE] if step and engine == "transformers" else []
            yield from (of_it(next(iter(self._texts)), fault) for fault in [*faults, *cached])

    def _compare(
        self, cases: list[Case], learner: Learner, first: Weights
    ) -> Iterator[tuple[Case, NDArray[np.float64]]]:
        now = learner.weights()
        expected = {kind: learner.score(self._texts[kind]) for kind in dict.fromkeys(case.text for case in cases)}
        for case in cases:
            engine = self._engine(case.engine, now)
            if case.fault == STALE_CACHE:
                found = self._on_stale_cache(engine, now, first, self._texts[case.text])
            else:
                fault = FAULTS.get(case.fault)
                self._load(engine, fault(now, first) if fault else now)
                found = engine.score(self._texts[case.text])
            pairs = zip(found, expected[case.text], strict=True)
            yield case, np.concatenate([np.subtract(ours, theirs[-len(ours) :]) for ours, theirs in pairs])

    def _on_stale_cache(
        self, engine: InferenceEngine, now: Weights, first: Weights, texts: list[list[int]]
    ) -> list[list[float]]:
        assert isinstance(engine, TransformersEngine)
        self._load(engine, first)
        caches = cached_halves(engine, texts)
        self._load(engine, now)
        return score_after(engine, texts, caches)

    def _load(self, engine: InferenceEngine, weights: Weights) -> None:
        with tempfile.TemporaryDirectory() as folder:
            engine.load_weights(save(weights, Path(folder)))

    def _engine(self, name: EngineName, weights: Weights) -> InferenceEngine:
        if name not in self._engines:
            folder = serving_folder(self._model, weights, Path(tempfile.mkdtemp(prefix="canary-")))
            self._engines[name] = build_engine(name, folder, dtype=self._dtype, max_model_len=2 * CANARY_TOKENS)
        return self._engines[name]


def tiny(gsm8k: list[dict[str, str]]) -> tuple[Path, Texts, list[list[int]]]:
    """Random weights and random texts: the largest rounding that a model of this size makes."""
    folder = Path(tempfile.mkdtemp(prefix="canary-tiny-"))
    save_tiny_qwen3(folder, tied=True, seed=0)
    rng = np.random.default_rng(0)
    texts = {f"random {i}": [rng.integers(2, 24, CANARY_TOKENS).tolist() for _ in range(2)] for i in range(3)}
    return folder, texts, [rng.integers(2, 24, 64).tolist() for _ in range(16)]


def smollm2(gsm8k: list[dict[str, str]]) -> tuple[Path, Texts, list[list[int]]]:
    """The canary's prose, prompts through the chat template end to end, and worked problems."""
    from transformers import AutoTokenizer

    model = convert_smollm2()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)  # its methods return a union of everything
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True, return_dict=False
        )
        for row in gsm8k
    ]
    worked = [tokenizer.encode(row["question"] + "\n" + row["answer"]) for row in gsm8k]
    texts = {
        "prose": canary_texts(tokenizer, prompts),
        "prompts": _cut([token for prompt in prompts for token in prompt]),
        "GSM8K": _cut([token for text in worked[50:70] for token in text]),
    }
    return model, texts, [text[:64] for text in worked[:16]]


def _cut(tokens: list[int]) -> list[list[int]]:
    return [tokens[:CANARY_TOKENS], tokens[CANARY_TOKENS : 2 * CANARY_TOKENS]]


MODELS = {"tiny": tiny, "SmolLM2-135M": smollm2}


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────
Measured = dict[Case, dict[str, float]]


def report(measured: Measured) -> str:
    """The tables, as Markdown."""
    parts = [REPORT_HEAD]
    for model, dtype in sorted({(case.model, case.dtype) for case in measured}):
        own = {case: values for case, values in measured.items() if (case.model, case.dtype) == (model, dtype)}
        parts += [f"\n## {model}, {dtype}\n", _versions(own), _honest(own), _faults(own)]
    return "\n".join(parts)


def _versions(measured: Measured) -> str:
    """Which were measured."""
    steps = {rate: sorted({case.step for case in measured if case.rate == rate and case.step}) for rate in RATES}
    parts = [f"{rate:g}: {', '.join(map(str, found))}" for rate, found in steps.items() if found]
    return f"Measured after steps, by rate: {'; '.join(parts) or 'the starting weights only'}.\n"


def _honest(measured: Measured) -> str:
    honest = [(case, values) for case, values in measured.items() if not case.fault]
    lines = ["Honest rounding, least to greatest over the versions:\n", _row("engine", "texts", *STATISTICS), _rule(2)]
    for engine, text in dict.fromkeys((case.engine, case.text) for case, _ in honest):
        of_it = [values for case, values in honest if (case.engine, case.text) == (engine, text)]
        spans = [(min(v[name] for v in of_it), max(v[name] for v in of_it)) for name in STATISTICS]
        lines.append(_row(engine, text, *(f"{low:.2g}–{high:.2g}" for low, high in spans)))
    return "\n".join(lines) + "\n"


def _faults(measured: Measured) -> str:
    limits = {name: max(values[name] for case, values in measured.items() if not case.fault) for name in STATISTICS}
    lines = [
        "Faults, as multiples of the greatest value under honest rounding (mean over the engines):\n",
        _row("fault", "rate", "steps", "mean abs itself", *STATISTICS),
        _rule(4),
    ]
    faulty = dict.fromkeys((case.fault, case.rate, case.step) for case in measured if case.fault)
    for fault, rate, step in faulty:
        of_it = [v for case, v in measured.items() if (case.fault, case.rate, case.step) == (fault, rate, step)]
        mean = {name: sum(values[name] for values in of_it) / len(of_it) for name in STATISTICS}
        times = (f"{mean[name] / limits[name]:.2g}" if limits[name] else "–" for name in STATISTICS)
        lines.append(
            _row(fault.replace("_", " "), f"{rate:g}" if step else "", step or "", f"{mean['mean abs']:.2g}", *times)
        )
    return "\n".join(lines) + "\n"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _rule(labels: int) -> str:
    return "|" + "---|" * labels + "---:|" * len(STATISTICS)


REPORT_HEAD = """# What the canary sees

Made by `make canary-report`. The learner scores two texts of 272 tokens, an engine that loaded its weights does too; d
is the difference of a token's log-probability. Texts: the canary's prose, prompts put end to end, worked problems of
GSM8K; for the tiny model random tokens. Versions: the starting weights and those after 1, 8 and 64 steps of AdamW at
two learning rates. Faults are planted in the tensors that the engine loads (`tests/bench/canary_faults.py`). Stale
cache: tokens of the second half, read after keys and values that the starting weights made of the first; no engine
reads a cache to score the canary, so this is what completions would be off by, and the canary does not see it.
"""


def main() -> None:
    """Measure what is asked for and not in the file yet, then write the report of all in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, help="train.jsonl of GSM8K; without it the report is written anew")
    parser.add_argument(
        "--measurements", type=Path, default=MEASUREMENTS, metavar="FILE", help="appended to; report beside"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    args = parser.parse_args()
    torch.manual_seed(0)
    measured = read(args.measurements)
    rows = [json.loads(line) for line in args.gsm8k.read_text().splitlines()[:200]] if args.gsm8k else []
    for model in args.models if args.gsm8k else []:
        folder, texts, lessons = MODELS[model](rows)
        for dtype in args.dtypes:
            bench = Bench(model, folder, dtype, texts, lessons)
            for case, d in bench.measure(args.engines, args.rates, args.steps, measured):
                measured[case] = {name: float(f"{statistic(d):.4g}") for name, statistic in STATISTICS.items()}
                with args.measurements.open("a") as file:
                    file.write(json.dumps({**asdict(case), "values": measured[case]}) + "\n")
                print(*asdict(case).values(), f"{measured[case]['mean abs']:.2e}", flush=True)
    args.measurements.with_suffix(".md").write_text(report(measured))


def read(measurements: Path) -> Measured:
    """What was measured before; nothing where there is no file."""
    lines = [json.loads(line) for line in measurements.read_text().splitlines()] if measurements.exists() else []
    return {Case(**line): values for line in lines if (values := line.pop("values"))}


if __name__ == "__main__":
    main()
