"""Evaluation: a share of right answers, by the same engines, prompts and answer checks as in training.

heterorl eval MODEL --data FILE...                              a model folder on data files: a table, or JSON
python -m heterorl_sampler evaluate --root ROOT --version V     a published version of a run on its data.evals,
                                                                written to ROOT/evals/ (by the runner, when due)
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from heterorl.data.answers import AnswerChecker
from heterorl.data.datasets import Row, prepare_rows
from heterorl.data.tokenizer import load_tokenizer
from heterorl.entry import Stop, exit_code, leave
from heterorl.errors import ExchangeError, ModelError, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation
from heterorl.logs import setup_logging
from heterorl.monitoring.metrics import Metrics
from heterorl.names import Version
from heterorl.seeds import derive_seed
from heterorl.spec.run import ColumnsSpec, DatasetSpec
from heterorl_sampler.engines.base import Completion, Dtype, InferenceEngine, Sampling, context_length
from heterorl_sampler.engines.build import build_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("heterorl_sampler.evaluate")

EvalResult = dict[str, float]


# ── the measure ──────────────────────────────────────────────────────────────────────────────────────────────────────
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem; there are {num_samples}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class Measure:
    """How to evaluate: sampling parameters, number of samples, the k of pass@k, and prompts at a time."""

    sampling: Sampling
    samples: int = 1
    """Completions of each problem; at temperature 0 one is made and stands for all."""
    pass_k: Sequence[int] = (1,)
    """The k of pass@k, each at most `samples`."""
    batch_prompts: int = 64
    """Prompts generated together."""
    seed: int = 0
    """Two models with the same seed get the same draws."""


def evaluate(
    engine: InferenceEngine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    checker: AnswerChecker,
    measure: Measure,
) -> EvalResult:
    """Means over the problems: `mean` (mean@k), `pass@K`, completion lengths, the truncated share, counts.

    `rows` are prepared ones, with `prompt_ids` and `answer`.
    """
    made = 1 if measure.sampling.temperature == 0 else measure.samples
    correct: list[float] = []
    completions: list[Completion] = []
    for start in range(0, len(rows), measure.batch_prompts):
        batch = rows[start : start + measure.batch_prompts]
        seed = derive_seed("evaluation", measure.seed, start)
        groups = engine.generate([row["prompt_ids"] for row in batch], made, measure.sampling, seed)
        for row, group in zip(batch, groups):
            assert group is not None  # nothing stops this generation
            texts = tokenizer.batch_decode([c.token_ids for c in group], skip_special_tokens=True)
            correct.append(fmean(checker.check(row["answer"], text) for text in texts))
            completions += group
        log.info("%d of %d problems", len(correct), len(rows))
    lengths = [len(completion.token_ids) for completion in completions]
    right = [round(share * measure.samples) for share in correct]
    return {
        "mean": fmean(correct),
        **{f"pass@{k}": fmean(pass_at_k(measure.samples, c, k) for c in right) for k in measure.pass_k},
        "completions/mean_length": fmean(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(completion.truncated for completion in completions),
        "samples": measure.samples,
        "problems": len(rows),
    }


# ── during a run ─────────────────────────────────────────────────────────────────────────────────────────────────────
def evaluate_version(exchange: Exchange, version: Version) -> Evaluation:
    """Evaluate a published version on the run's evaluation sets and publish the result.

    Raises CorruptFile or CanaryMismatch for weights that are not what the learner published.
    """
    spec = exchange.spec
    if not spec.data.evals:
        raise UserError(f"{exchange.root}: data.evals is empty; add a dataset to evaluate on")
    evaluation, generation = spec.evaluation, spec.generation
    measure = Measure(
        Sampling(
            max_tokens=evaluation.max_completion_tokens or generation.max_completion_tokens,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            top_k=evaluation.top_k,
        ),
        samples=evaluation.samples_per_prompt,
        pass_k=evaluation.pass_k,
        batch_prompts=evaluation.batch_prompts,
        seed=spec.seed + evaluation.seed,
    )
    sets: dict[str, EvalResult] = {}
    with (
        _served(exchange, version, generation.max_prompt_tokens + measure.sampling.max_tokens) as engine,
        AnswerChecker(boxed_only=spec.data.prompt_template != "raw") as checker,
    ):
        tokenizer = load_tokenizer(exchange.model_dir)
        for dataset in spec.data.evals:
            rows = [json.loads(line) for line in exchange.data_file(f"eval-{dataset.label}").read_text().splitlines()]
            sets[dataset.label] = evaluate(engine, tokenizer, rows, checker, measure)
            log.info("%s on %s: mean@%d %.3f", version, dataset.label, measure.samples, sets[dataset.label]["mean"])
    average = fmean(values["mean"] for values in sets.values())
    with Metrics.open(exchange.metrics_dir, "evaluate", spec.monitoring, run=exchange.run.metadata.name) as metrics:
        metrics.write(
            version.step,
            {f"eval/{label}/{key}": value for label, values in sets.items() for key, value in values.items()},
        )
    result = Evaluation(average=average, sets=sets)
    exchange.write_eval(version, result)
    return result


@contextmanager
def _served(exchange: Exchange, version: Version, max_model_len: int) -> Iterator[InferenceEngine]:
    """An engine on a local copy of the starting model's folder with this version's weights, checked by the canary."""
    spec = exchange.spec
    with tempfile.TemporaryDirectory(prefix="heterorl-evaluate-") as scratch:
        folder = Path(scratch)
        try:
            canary = exchange.fetch_weights(version, folder).canary
        except FileNotFoundError as error:
            raise ExchangeError(
                f"weights {version} are not on the volume; they were retired, or never published"
            ) from error
        for path in exchange.model_dir.iterdir():
            if path.is_file() and ".safetensors" not in path.suffixes:
                (folder / path.name).symlink_to(path.resolve())
        gpus = spec.evaluation.gpus
        engine = build_engine(
            spec.evaluation.engine,
            folder,
            dtype=spec.model.dtype,
            max_model_len=max_model_len,
            gpus=gpus,
            tensor_parallel=max(1, gpus),
        )
        with closing(engine):
            canary.check(version, engine.score, spec.canary_tolerance)
            yield engine


# ── heterorl eval ────────────────────────────────────────────────────────────────────────────────────────────────────
def evaluate_folder(args: argparse.Namespace) -> dict[str, EvalResult]:
    """Evaluate a model folder on files; results by the file's path."""
    model_dir: Path = args.model
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such folder; give a Hugging Face model folder")
    tokenizer = load_tokenizer(model_dir)
    room = context_length(model_dir) - args.max_tokens
    if room < 1:
        raise UserError(f"--max-tokens {args.max_tokens} leaves no room for a prompt in the context of {model_dir}")
    columns = ColumnsSpec(
        prompt=args.prompt_column,
        answer=args.answer_column,
        answer_pattern=args.answer_pattern,
        strip_suffix=args.strip_suffix,
    )
    prepared = {
        str(path): prepare_rows(
            DatasetSpec(source="file", path=str(path), columns=columns, limit=args.limit),
            Path(),
            tokenizer,
            args.template,
            room,
            need_gold_parse=True,
        )
        for path in args.data
    }
    measure = Measure(
        Sampling(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k),
        samples=args.samples,
        pass_k=args.pass_k,
        seed=args.seed,
    )
    longest = max(len(row["prompt_ids"]) for data in prepared.values() for row in data.rows)
    engine = build_engine(
        args.engine,
        model_dir,
        dtype=_own_dtype(model_dir),
        max_model_len=longest + args.max_tokens,
        gpus=args.gpus,
        tensor_parallel=max(1, args.gpus),
    )
    results = {}
    with closing(engine), AnswerChecker(boxed_only=args.template != "raw") as checker:
        for name, data in prepared.items():
            results[name] = evaluate(engine, tokenizer, data.rows, checker, measure) | {"skipped": data.skipped}
    return results


def _own_dtype(model_dir: Path) -> Dtype:
    """The data type the model was saved in; bfloat16 for all that is not float32."""
    config = json.loads((model_dir / "config.json").read_text())
    return "float32" if "float32" in (config.get("dtype"), config.get("torch_dtype")) else "bfloat16"


def _print_table(results: dict[str, EvalResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(results.values()))
    shares = ["mean", *(key for key in first if key.startswith("pass@"))]
    table = Table("data", "problems", *shares, "length", "longest", "truncated", box=None, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for path, values in results.items():
        table.add_row(
            Path(path).stem,
            f"{values['problems']:.0f}" + (f" (+{values['skipped']:.0f} too long)" if values["skipped"] else ""),
            *(f"{values[key]:.3f}" for key in shares),
            f"{values['completions/mean_length']:.1f}",
            f"{values['completions/max_length']:.0f}",
            f"{values['completions/clipped_ratio']:.1%}",
        )
    if len(results) > 1:
        table.add_row("average", "", *(f"{fmean(values[key] for values in results.values()):.3f}" for key in shares))
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heterorl eval", description="Evaluate a model on datasets with reference answers."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder, such as output/ of a run")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl or .parquet files")
    parser.add_argument("--template", choices=["think", "noThink", "raw"], default="raw", help="prompt template [raw]")
    parser.add_argument("--samples", type=_positive, default=1, help="completions per problem [1]")
    parser.add_argument(
        "--pass-k", type=_positive, nargs="+", default=[1], metavar="K", help="values of k for pass@k [1]"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.6, help="sampling temperature; 0 is greedy decoding [0.6]"
    )
    parser.add_argument("--top-p", type=float, default=0.95, help="top-p (nucleus) sampling; 1 disables [0.95]")
    parser.add_argument("--top-k", type=int, default=0, help="top-k sampling; 0 disables [0]")
    parser.add_argument("--max-tokens", type=_positive, default=1024, help="maximum length of a completion [1024]")
    parser.add_argument("--limit", type=_positive, help="use only the first N problems of each file")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling [0]")
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm", help="inference engine [vllm]")
    parser.add_argument("--gpus", type=int, default=0, help="number of GPUs; 0 uses the CPU [0]")
    parser.add_argument("--prompt-column", default="problem", help="column with the problem [problem, or question]")
    parser.add_argument(
        "--answer-column", default="answer", help="column with the reference answer [answer, or solution]"
    )
    parser.add_argument(
        "--answer-pattern", help="regular expression whose first group is the answer, such as '#### (.+)' for GSM8K"
    )
    parser.add_argument("--strip-suffix", help="text to remove from the end of each problem")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results to this file, as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def main(arguments: list[str] | None = None) -> int:
    """`heterorl eval`: parse, evaluate a folder, print; the exit code is 0, or that of the failure."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if max(args.pass_k) > args.samples:
        parser.error(f"--pass-k {max(args.pass_k)} needs as many --samples; it is {args.samples}")
    return exit_code(lambda: _report(args), args.model)


def _report(args: argparse.Namespace) -> None:
    results = evaluate_folder(args)
    text = json.dumps(results, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        _print_table(results)


if __name__ == "__main__":
    Stop().listen()
    setup_logging("evaluate")
    leave(main)
