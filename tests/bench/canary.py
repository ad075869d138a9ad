"""What the canary sees: statistics of its differences under honest rounding and under planted faults.

    python tests/bench/canary.py [--steps 64] [--engines transformers vllm] [--dtypes float32 bfloat16]

A learner trains a real model (SmolLM2-135M) and a tiny one; after 1, 8 and 64 optimizer steps, at two learning rates,
an engine loads its weights, right or with a fault planted in them, and scores the canary's texts. The table goes to
docs/reports/canary.md (`make canary-report`, about twenty minutes on two cores).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the fixtures' builders

from builders import spec_of
from conftest import convert_smollm2, save_tiny_qwen3
from heterorl.exchange.canary import canary_texts
from heterorl.spec.run import RunSpec
from heterorl_learner.batching import MicroBatch, Sequence, micro_batch
from heterorl_learner.engines.build import build_engine as build_training_engine
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import build_engine

Weights = dict[str, Tensor]
Scores = list[list[float]]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CHECKPOINTS = (1, 8, 64)

STATISTICS: dict[str, Callable[[NDArray[np.float64]], float]] = {
    "mean abs": lambda d: np.abs(d).mean(),
    "median abs": lambda d: np.median(np.abs(d)),
    "trimmed 5 %": lambda d: np.sort(np.abs(d))[: int(0.95 * len(d))].mean(),
    "rms": lambda d: np.sqrt((d**2).mean()),
    "abs of mean": lambda d: abs(d.mean()),
    "k3": lambda d: (np.exp(d) - 1 - d).mean(),
    "p99": lambda d: np.quantile(np.abs(d), 0.99),
    "10th largest": lambda d: np.sort(np.abs(d))[-10],
    "max": lambda d: np.abs(d).max(),
}
"""Of the differences d [T], engine minus learner, over the tokens of all texts."""


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def stale_head(new: Weights, old: Weights) -> Weights:
    return {**new, HEAD: old[HEAD]}


def one_stale_layer(new: Weights, old: Weights) -> Weights:
    middle = f"model.layers.{_layers(new) // 2}."
    return {name: old[name] if name.startswith(middle) else tensor for name, tensor in new.items()}


def half_applied(new: Weights, old: Weights) -> Weights:
    names = sorted(new)
    return {name: (old if i % 2 else new)[name] for i, name in enumerate(names)}


def all_stale(new: Weights, old: Weights) -> Weights:
    return old


def empty_layer(new: Weights, old: Weights) -> Weights:
    """One layer as a loader leaves it that skips its names: the matrices are zero."""
    middle = f"model.layers.{_layers(new) // 2}."
    return {n: torch.zeros_like(t) if n.startswith(middle) and t.ndim == 2 else t for n, t in new.items()}


def swapped_gate_and_up(new: Weights, old: Weights) -> Weights:
    layer = f"model.layers.{_layers(new) // 2}.mlp"
    gate, up = f"{layer}.gate_proj.weight", f"{layer}.up_proj.weight"
    return {**new, gate: new[up], up: new[gate]}


def permuted_rows(new: Weights, old: Weights) -> Weights:
    """The query heads' rows of one layer in another order, as after a packing with the wrong layout."""
    name = f"model.layers.{_layers(new) // 2}.self_attn.q_proj.weight"
    return {**new, name: new[name].roll(1, 0)}


def through_float8(new: Weights, old: Weights) -> Weights:
    return {name: tensor.to(torch.float8_e4m3fn).to(tensor.dtype) for name, tensor in new.items()}


def through_bfloat16(new: Weights, old: Weights) -> Weights:
    return {name: tensor.to(torch.bfloat16).to(tensor.dtype) for name, tensor in new.items()}


OF_TWO_VERSIONS = [stale_head, one_stale_layer, half_applied, all_stale]
OF_ONE_VERSION = [
    empty_layer,
    swapped_gate_and_up,
    permuted_rows,
    through_float8,
    through_bfloat16,
]


def _layers(weights: Weights) -> int:
    return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))


# ── the learner ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Learner:
    """The product's engine, trained on given texts by cross-entropy."""

    def __init__(self, model: Path, dtype: str, rate: float, texts: list[list[int]]) -> None:
        optimizer = {"learningRate": rate, "maxGradNorm": 1.0}
        self._engine = build_training_engine(model, _spec(dtype, {"gpus": 0, "optimizer": optimizer}))
        self._texts, self._rate, self._step = texts, rate, 0

    def train_to(self, step: int) -> None:
        while self._step < step:
            text = self._texts[self._step % len(self._texts)]
            self._engine.forward_backward([_micro_batch(text)], lambda batch, logp: -logp.mean())
            self._engine.step(self._rate)
            self._step += 1

    def weights(self) -> Weights:
        tensors = self._engine.full_state_dict()
        return {HEAD: tensors[EMBEDDING].clone(), **tensors}

    def score(self, texts: list[list[int]]) -> Scores:
        return [self._engine.score(_micro_batch(text)).tolist() for text in texts]


def _micro_batch(text: list[int]) -> MicroBatch:
    ids = np.array(text, np.int32)
    return micro_batch([Sequence(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), group=0, advantage=0.0)])


def _spec(dtype: str, learner: dict[str, object]) -> RunSpec:
    return spec_of(model={"dtype": dtype}, learner=learner)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────
def measure(
    model: Path, dtype: str, engines: list[str], steps: int, texts: dict[str, list[list[int]]], lessons: list[list[int]]
) -> Iterator[tuple[str, str, str, str, int, NDArray[np.float64]]]:
    """Yields (engine, kind of text, rate, fault, step, differences); the fault "" is honest rounding."""
    served = Path(tempfile.mkdtemp(prefix="canary-model-"))
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, served)
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    cases: list[tuple[str, str, int, Path, dict[str, Scores]]] = []
    loads = Path(tempfile.mkdtemp(prefix="canary-loads-", dir="/dev/shm"))

    def case(rate: str, fault: str, step: int, weights: Weights, scores: dict[str, Scores]) -> None:
        folder = loads / str(len(cases))
        folder.mkdir()
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors")
        cases.append((rate, fault, step, folder, scores))

    running: dict[str, InferenceEngine] = {}

    def flush() -> Iterator[tuple[str, str, str, str, int, NDArray[np.float64]]]:
        for name in engines:
            if name not in running:
                save_file(first, served / "model.safetensors")
                running[name] = build_engine(name, served, dtype=dtype, max_model_len=512)  # type: ignore[arg-type]
            for rate, fault, step, folder, scores in cases:
                running[name].load_weights(folder)
                for kind, of_kind in [next(iter(texts.items()))] if fault else texts.items():
                    found = running[name].score(of_kind)
                    yield (
                        name,
                        kind,
                        rate,
                        fault,
                        step,
                        np.concatenate([np.subtract(a, b) for a, b in zip(found, scores[kind])]),
                    )
        for *_, folder, _ in cases:
            shutil.rmtree(folder, ignore_errors=True)
        cases.clear()

    for rate in (1e-6, 1e-4):
        learner = Learner(model, dtype, rate, lessons)
        first = learner.weights()
        scores = {kind: learner.score(of_kind) for kind, of_kind in texts.items()}
        if rate == 1e-6:
            case("", "", 0, first, scores)
            for fault in OF_ONE_VERSION:
                case("", fault.__name__, 0, fault(first, first), scores)
            yield from flush()
        for step in [s for s in CHECKPOINTS if s <= steps]:
            learner.train_to(step)
            now = learner.weights()
            scores = {kind: learner.score(of_kind) for kind, of_kind in texts.items()}
            case(f"{rate:g}", "", step, now, scores)
            for fault in OF_TWO_VERSIONS:
                case(f"{rate:g}", fault.__name__, step, fault(now, first), scores)
            yield from flush()
    shutil.rmtree(served)
    shutil.rmtree(loads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="+", default=["tiny", "SmolLM2-135M"])
    parser.add_argument("--raw", type=Path, help="also append every measurement there, as JSON lines")
    parser.add_argument("--gsm8k", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [json.loads(line) for line in args.gsm8k.read_text().splitlines()[:200]]
    for model_name in args.models:
        if model_name == "tiny":
            model = Path(tempfile.mkdtemp(prefix="canary-tiny-"))
            save_tiny_qwen3(model, tied=True, seed=0)
            rng = np.random.default_rng(0)
            lessons = [rng.integers(2, 24, 128).tolist() for _ in range(16)]
            texts = {f"random {i}": [rng.integers(2, 24, 272).tolist() for _ in range(2)] for i in range(3)}
        else:
            from transformers import AutoTokenizer

            model = convert_smollm2(Path.home() / ".cache" / "heterorl" / "SmolLM2-135M-Instruct")
            tokenizer = AutoTokenizer.from_pretrained(model)
            prompts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": row["question"]}], add_generation_prompt=True, return_dict=False
                )
                for row in rows
            ]
            lessons = [tokenizer.encode(row["question"] + "\n" + row["answer"])[:64] for row in rows[:16]]
            glued = [token for prompt in prompts for token in prompt]
            worked = tokenizer.encode("\n\n".join(row["question"] + "\n" + row["answer"] for row in rows[50:70]))
            texts = {
                "prose": canary_texts(tokenizer, prompts),
                "prompts": [glued[:272], glued[273:545]],
                "GSM8K": [worked[:272], worked[272:544]],
            }
        for dtype in args.dtypes:
            started = time.time()
            for engine, kind, rate, fault, step, d in measure(model, dtype, args.engines, args.steps, texts, lessons):
                record = {
                    "model": model_name,
                    "dtype": dtype,
                    "engine": engine,
                    "text": kind,
                    "rate": rate,
                    "fault": fault,
                    "step": step,
                }
                record |= {name: float(statistic(d)) for name, statistic in STATISTICS.items()}
                print(
                    " ".join(f"{v:.2e}" if isinstance(v, float) else str(v or "-") for v in record.values()), flush=True
                )
                if args.raw:
                    with args.raw.open("a") as file:
                        file.write(json.dumps(record) + "\n")
            print(f"{model_name} {dtype}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
