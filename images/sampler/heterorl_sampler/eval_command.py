"""`heterorl eval`: a model folder on data files, as a table or as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import click

from heterorl.blame import explained
from heterorl.cli import run_command
from heterorl.data.answers import AnswerChecker
from heterorl.data.datasets import prepare_rows
from heterorl.data.prompts import PROBLEM, Template
from heterorl.data.tokenizer import load_tokenizer
from heterorl.entry import Stop, leave
from heterorl.errors import ModelError, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Sampling
from heterorl.logs import setup_logging
from heterorl.spec.run import MIN_TEMPERATURE, ColumnsSpec, DatasetSpec, PromptTemplate
from heterorl_sampler.adapters import whole_model
from heterorl_sampler.answer_log import AnswerLog
from heterorl_sampler.engines.build import build_engine
from heterorl_sampler.engines.model_files import context_length, own_dtype
from heterorl_sampler.evaluate import EvalResult, Measure, evaluate

_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


def _checked_temperature(_context: click.Context, _option: click.Parameter, value: float) -> float:
    if value < 0 or 0 < value < MIN_TEMPERATURE:
        raise click.BadParameter(f"{value:g} is neither 0 (greedy decoding) nor at least {MIN_TEMPERATURE:g}")
    return value


def _checked_pattern(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    for _, message in ColumnsSpec.model_construct(answer_pattern=value).broken_rules():
        raise click.BadParameter(message)
    return value


def _checked_file(_context: click.Context, _option: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and (value.is_dir() or not value.parent.is_dir()):
        what = "is a folder" if value.is_dir() else f"lies in {value.parent}, which is no folder"
        raise click.BadParameter(f"{value} {what}; give the path of a file to write")  # before hours of work
    return value


@dataclass(frozen=True)
class EvalOptions:
    """The command line; `command` describes each option."""

    model: Path
    data: Sequence[Path]
    template: PromptTemplate
    system_prompt: str | None
    instruction: str | None
    samples: int
    pass_k: Sequence[int]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop: Sequence[str]
    stop_token_id: Sequence[int]
    limit: int | None
    seed: int
    engine: Literal["vllm", "transformers"]
    gpus: int
    prompt_column: str
    answer_column: str
    answer_pattern: str | None
    strip_suffix: str | None
    out: Path | None
    answers: Path | None
    json: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model", type=_PATH, metavar="MODEL|RUN")
@click.option(
    "--data",
    type=_PATH,
    multiple=True,
    required=True,
    metavar="FILE",
    help="A .jsonl, .json, .csv or .parquet file, a glob, or a folder of save_to_disk; can be repeated.",
)
@click.option(
    "--template", type=click.Choice(get_args(PromptTemplate)), default="raw", help="Prompt template, as in a manifest."
)
@click.option("--system-prompt", metavar="TEXT", help="Text of the system turn [default: the template's].")
@click.option("--instruction", metavar="TEXT", help="Text of the user's turn, with {problem} in it.")
@click.option("--samples", type=_POSITIVE, default=1, metavar="N", help="Completions per problem.")
@click.option(
    "--pass-k", type=_POSITIVE, multiple=True, default=[1], metavar="K", help="A k for pass@k; can be repeated."
)
@click.option(
    "--temperature",
    default=0.6,
    metavar="T",
    callback=_checked_temperature,
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option("--top-p", default=0.95, metavar="P", help="Top-p (nucleus) sampling; 1 disables.")
@click.option("--top-k", default=0, metavar="N", help="Top-k sampling; 0 disables.")
@click.option("--max-tokens", type=_POSITIVE, default=1024, metavar="N", help="Maximum length of a completion.")
@click.option("--stop", multiple=True, metavar="TEXT", help="A text that ends a completion; can be repeated.")
@click.option("--stop-token-id", type=int, multiple=True, metavar="ID", help="A token that does; can be repeated.")
@click.option("--limit", type=_POSITIVE, metavar="N", help="Use only the first N problems of each file.")
@click.option("--seed", default=0, metavar="N", help="Seed of sampling.")
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), default="vllm", help="Inference engine.")
@click.option("--gpus", default=0, metavar="N", help="Number of GPUs; 0 uses the CPU.")
@click.option(
    "--prompt-column",
    default="problem",
    show_default="problem, or question",
    metavar="NAME",
    help="Column with the problem.",
)
@click.option(
    "--answer-column",
    default="answer",
    show_default="answer, or solution",
    metavar="NAME",
    help="Column with the reference answer.",
)
@click.option(
    "--answer-pattern",
    metavar="REGEX",
    callback=_checked_pattern,
    help="Regular expression whose first group is the answer, such as '#### (.+)' for GSM8K.",
)
@click.option("--strip-suffix", metavar="TEXT", help="Text to remove from the end of each problem.")
@click.option(
    "--out", type=_PATH, metavar="FILE", callback=_checked_file, help="Also write the results to this file, as JSON."
)
@click.option(
    "--answers",
    type=_PATH,
    metavar="FILE",
    callback=_checked_file,
    show_default="of RUN: its answers/, for heterorl ui",
    help="Also write a JSON line for each problem: set, row, prompt, reference, completions, which of them are right.",
)
@click.option("--json", is_flag=True, help="Print JSON instead of a table.")
def command(**given: Any) -> None:
    """Evaluate a model on datasets with reference answers.

    MODEL is a Hugging Face folder; of RUN, the folder of a run, it is the trained model.

    \b
    heterorl eval runs/quickstart --data sums.jsonl --engine transformers
    heterorl eval MODEL --data math500.jsonl --samples 4 --answers answers.jsonl
    """
    options = EvalOptions(**given)
    if max(options.pass_k) > options.samples:
        raise click.UsageError(f"--pass-k {max(options.pass_k)} needs as many --samples; it is {options.samples}")
    with explained(options.model):
        _report(options)


def main(arguments: list[str] | None = None) -> int:
    """`heterorl eval`, whose errors look as those of the other commands; returns 0, or exits with another code."""
    run_command(command, "heterorl eval", arguments)
    return 0


def _report(options: EvalOptions) -> None:
    run = run_at(options.model)
    results, logs = evaluate_folder(options, run)
    text = json.dumps(results, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    if options.answers:
        options.answers.write_bytes(b"".join(line for log in logs.values() for line in log.lines))
    elif run:
        for label, log in logs.items():
            run.write_answers(f"eval-{label}", log.lines)
    if options.json:
        click.echo(text)
    else:
        _print_table(results)


def run_at(given: Path) -> Exchange | None:
    """The run whose folder is given, trained; None for a model folder, ModelError if it is neither."""
    if not given.is_dir():
        raise ModelError(f"{given}: no such folder; give a Hugging Face model folder, or the folder of a run")
    run = Exchange(given)
    if not run.run_file.exists():
        return None
    if not run.output_dir.is_dir():
        raise ModelError(f"{given} is a run without {run.output_dir.name}/, which is written after the last step")
    return run


def set_names(paths: Sequence[Path]) -> list[str]:
    """A name for each data file, glob or folder: its own without the ending, numbered where several are alike."""
    names: list[str] = []
    for path in paths:
        stem = re.sub(r"[^\w.-]+", "_", path.stem)
        names.append(next(name for n in count(1) if (name := stem if n == 1 else f"{stem}-{n}") not in names))
    return names


def evaluate_folder(options: EvalOptions, run: Exchange | None) -> tuple[dict[str, EvalResult], dict[str, AnswerLog]]:
    """Evaluate a model folder, or a run's trained model, on files.

    Results by the file's path, and by its name what was answered to each problem.
    """
    with whole_model(run.output_dir if run else options.model) as model_dir:
        return _evaluate(options, run, model_dir)


def _evaluate(
    options: EvalOptions, run: Exchange | None, model_dir: Path
) -> tuple[dict[str, EvalResult], dict[str, AnswerLog]]:
    tokenizer = load_tokenizer(model_dir)
    room = context_length(model_dir) - options.max_tokens
    if room < 1:
        raise UserError(f"--max-tokens {options.max_tokens} leaves no room for a prompt in the context of {model_dir}")
    if options.instruction is not None and PROBLEM not in options.instruction:
        raise UserError(f"--instruction does not contain {PROBLEM}; write it where the text of the problem belongs")
    template = Template.named(options.template, system=options.system_prompt, instruction=options.instruction)
    columns = ColumnsSpec(
        prompt=options.prompt_column,
        answer=options.answer_column,
        answer_pattern=options.answer_pattern,
        strip_suffix=options.strip_suffix,
    )
    prepared = {
        str(path): prepare_rows(
            DatasetSpec(source="file", path=str(path), columns=columns, limit=options.limit),
            Path(),
            tokenizer,
            template,
            room,
            need_gold_parse=True,
        )
        for path in options.data
    }
    measure = Measure(
        Sampling(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            stop=tuple(options.stop),
            stop_token_ids=tuple(options.stop_token_id),
        ),
        samples=options.samples,
        pass_k=options.pass_k,
        seed=options.seed,
    )
    longest = max(len(row["prompt_ids"]) for data in prepared.values() for row in data.rows)
    engine = build_engine(
        options.engine,
        model_dir,
        dtype=own_dtype(model_dir),
        max_model_len=longest + options.max_tokens,
        gpus=options.gpus,
        tensor_parallel=max(1, options.gpus),
    )
    trained = run.learner.step if run and run.learner else None
    logs = {label: AnswerLog(tokenizer, trained, label) for label in set_names(list(map(Path, prepared)))}
    results = {}
    with closing(engine), AnswerChecker(boxed_only=options.template != "raw") as checker:
        for (path, data), log in zip(prepared.items(), logs.values()):
            result = evaluate(engine, tokenizer, data.rows, checker, measure, note=log.note)
            results[path] = result | {"skipped": data.skipped}
    return results, logs


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


if __name__ == "__main__":
    Stop().listen()
    setup_logging("evaluate")
    leave(main)
