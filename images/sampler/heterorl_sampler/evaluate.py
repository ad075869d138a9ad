"""Evaluation: a share of right answers, by the same engines, prompts and answer checks as in training.

heterorl eval MODEL|RUN --data FILE                             a model folder on data files (`eval_command`)
python -m heterorl_sampler evaluate --root ROOT --version V     a published version of a run on its data.evals,
                                                                written to ROOT/evals/ (by the runner, when due)
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from heterorl.data.answers import AnswerChecker
from heterorl.data.datasets import Row
from heterorl.data.reasoning_gym import Verifier
from heterorl.errors import ExchangeError, UserError
from heterorl.exchange.adapters import base_tensors, merge_into
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation
from heterorl.exchange.rollout import Completion, Sampling
from heterorl.exchange.storage import persistently
from heterorl.exchange.version import Version
from heterorl.monitoring.metrics import Metrics
from heterorl.seeds import derive_seed
from heterorl_sampler.adapters import link_all_but_weights
from heterorl_sampler.answer_log import AnswerLog, bytes_a_version, within
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.build import build_engine
from heterorl_sampler.scoring import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("heterorl_sampler.evaluate")

EvalResult = dict[str, float]
Note = Callable[[Row, list[Completion], list[str], list[bool]], object]


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
    verifier: Verifier | None = None,
    note: Note = lambda row, completions, texts, right: None,
) -> EvalResult:
    """Means over the problems: `mean` (mean@k), `pass@K`, completion lengths, the truncated share, counts.

    `rows` are prepared ones, with `prompt_ids` and `answer`; for those of reasoning-gym `verifier` says what is right,
    which is a full mark. `note` is told of each problem, its completions, their texts and which of them are right.
    """
    made = 1 if measure.sampling.temperature == 0 else measure.samples
    decoder = Decoder(tokenizer)
    correct: list[float] = []
    completions: list[Completion] = []
    for start in range(0, len(rows), measure.batch_prompts):
        batch = rows[start : start + measure.batch_prompts]
        seed = derive_seed("evaluation", measure.seed, start)
        groups = engine.generate([row["prompt_ids"] for row in batch], made, measure.sampling, seed)
        for row, group in zip(batch, groups):
            assert group is not None  # nothing stops this generation
            texts, strict = [decoder.text(c.token_ids) for c in group], row.get("require_value", False)
            if verifier:
                right = [verifier.mark(row, text) == 1 for text in texts]
            else:
                right = [checker.check(row["answer"], text, require_value=strict) for text in texts]
            note(row, group, texts, right)
            correct.append(fmean(right))
            completions += group
        log.info("%d of %d problems", len(correct), len(rows))
    lengths = [len(completion.token_ids) for completion in completions]
    solved = [round(share * measure.samples) for share in correct]
    return {
        "mean": fmean(correct),
        **{f"pass@{k}": fmean(pass_at_k(measure.samples, c, k) for c in solved) for k in measure.pass_k},
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
            stop=tuple(generation.stop),
            stop_token_ids=tuple(generation.stop_token_ids),
        ),
        samples=evaluation.samples_per_prompt,
        pass_k=evaluation.pass_k,
        batch_prompts=evaluation.batch_prompts,
        seed=spec.seed + evaluation.seed,
    )
    sets: dict[str, EvalResult] = {}
    answers: list[bytes] = []
    with (
        _served(exchange, version, generation.max_prompt_tokens + measure.sampling.max_tokens) as engine,
        AnswerChecker(boxed_only=spec.data.prompt_template != "raw", require_value=spec.require_value) as checker,
    ):
        tokenizer = exchange.tokenizer()
        for dataset in spec.data.evals:
            rows = list(exchange.rows(f"eval-{dataset.label}"))
            given = AnswerLog(tokenizer, version.step, dataset.label)
            with Verifier([dataset], checker) if dataset.source == "reasoningGym" else nullcontext() as verifier:
                sets[dataset.label] = evaluate(engine, tokenizer, rows, checker, measure, verifier, given.note)
            answers += within(given.lines, bytes_a_version(spec) / len(spec.data.evals), spec.seed)
            log.info("%s on %s: mean@%d %.3f", version, dataset.label, measure.samples, sets[dataset.label]["mean"])
    result = Evaluation(average=fmean(values["mean"] for values in sets.values()), sets=sets)
    with Metrics.open(exchange.metrics_dir, "evaluate", spec.monitoring, run=exchange.run.metadata.name) as metrics:
        metrics.write(version.step, result.metrics)
    _write_answers(exchange, version, answers)
    exchange.write_eval(version, result)
    return result


def _write_answers(exchange: Exchange, version: Version, lines: Sequence[bytes]) -> None:
    """Before the result, so that who sees the result finds them; a volume that is full of them ends no evaluation."""
    if not exchange.spec.monitoring.log_answers.max_megabytes:
        return
    try:
        exchange.write_answers(str(version), lines)
    except OSError as error:
        log.warning("the answers of %s cannot be written: %s", version, error)


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
        if spec.model.lora.is_on:
            merge_into(folder, base_tensors(exchange.model_dir, spec.model.dtype))
        link_all_but_weights(exchange.model_dir, folder)
        gpus = spec.evaluation.gpus
        build = partial(
            build_engine,
            spec.evaluation.engine,
            folder,
            dtype=spec.model.dtype,
            max_model_len=max_model_len,
            gpus=gpus,
            tensor_parallel=max(1, gpus),
        )
        engine = persistently(build, what="the model", folder=exchange.model_dir)
        with closing(engine):
            canary.check(version, engine.score, spec.canary_tolerance)
            yield engine
