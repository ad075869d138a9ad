"""Evaluation: the estimator against counting, the loop and both entry points on a real tiny model."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import pytest
from safetensors.torch import load_file, save_file

from builders import exchange_at, run_of
from heterorl.data.answers import AnswerChecker
from heterorl.data.tokenizer import load_tokenizer
from heterorl.errors import CanaryMismatch, ExchangeError
from heterorl.exchange.canary import Canary
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Completion, Sampling
from heterorl.exchange.version import Version
from heterorl_sampler.engines.transformers import TransformersEngine
from heterorl_sampler.eval_command import main, set_names
from heterorl_sampler.evaluate import Measure, evaluate, evaluate_version, pass_at_k

GREEDY = Sampling(max_tokens=6, temperature=0)
PROMPTS = ["1+1=", "2*3=", "9-4=", "10/5=", "7", "(3+3)="]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(tokenizer=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, dtype="float32")


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(boxed_only=False) as checker:
        yield checker


@pytest.fixture(scope="module")
def rows(folder: Path, engine: TransformersEngine) -> list[dict]:
    """Even problems have the model's own greedy completion for reference, odd ones what equals nothing."""
    tokenizer = load_tokenizer(folder)
    rows = []
    for place, prompt in enumerate(PROMPTS):
        prompt_ids = tokenizer.encode(prompt)
        (group,) = engine.generate([prompt_ids], 1, GREEDY, seed=0)
        own = tokenizer.decode(group[0].token_ids, skip_special_tokens=True)
        answer = own if place % 2 == 0 else "}"
        rows.append({"id": place, "prompt": prompt, "prompt_ids": prompt_ids, "answer": answer})
    return rows


# ── the measure ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 1), (6, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n: int, c: int) -> None:
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        assert pass_at_k(n, c, k) == pytest.approx(fmean(any(s) for s in itertools.combinations(samples, k)))


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples of each problem; there are 2"):
        pass_at_k(2, 1, 3)


class Scripted:
    """An engine that completes problem p's sample s with what the script says, and notes the calls."""

    def __init__(self, script: dict[int, list[Completion]]) -> None:
        self.script, self.seeds, self.sizes = script, [], []

    def generate(self, prompts, n, sampling, seed, stop=None):
        self.seeds.append(seed)
        self.sizes.append(len(prompts))
        assert all(len(self.script[prompt[0]]) == n for prompt in prompts)
        return [self.script[prompt[0]] for prompt in prompts]


def test_means_lengths_and_truncation_are_counted_over_all_problems(folder: Path, checker: AnswerChecker) -> None:
    tokenizer = load_tokenizer(folder)

    def said(text: str, cut: bool = False) -> Completion:
        ids = tokenizer.encode(text) + ([] if cut else [tokenizer.eos_token_id])
        return Completion(ids, [-1.0] * len(ids), cut)

    script = {
        2: [said("5"), said("5"), said("6"), said("55", cut=True)],  # two right of four
        3: [said("1"), said("2"), said("3"), said("4")],  # none
        4: [said("8"), said("8"), said("8"), said("8")],  # all
    }
    rows = [{"prompt_ids": [2], "answer": "5"}, {"prompt_ids": [3], "answer": "9"}, {"prompt_ids": [4], "answer": "8"}]
    engine = Scripted(script)
    measure, noted = Measure(Sampling(max_tokens=4), 4, (1, 2, 4), batch_prompts=2), []
    result = evaluate(engine, tokenizer, rows, checker, measure, note=lambda *answered: noted.append(answered))
    assert noted == [
        (rows[0], script[2], ["5", "5", "6", "55"], [True, True, False, False]),
        (rows[1], script[3], ["1", "2", "3", "4"], [False] * 4),
        (rows[2], script[4], ["8"] * 4, [True] * 4),
    ]
    assert result["mean"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert result["pass@1"] == pytest.approx(result["mean"])
    assert result["pass@2"] == pytest.approx((5 / 6 + 0 + 1) / 3)  # of the 6 pairs of problem 1 one has none right
    assert result["pass@4"] == pytest.approx(2 / 3)
    assert result["completions/mean_length"] == 2  # eleven of a digit and the end token, one of two digits
    assert result["completions/max_length"] == 2
    assert result["completions/clipped_ratio"] == pytest.approx(1 / 12)
    assert (result["samples"], result["problems"]) == (4, 3)
    assert engine.sizes == [2, 1]
    assert len(set(engine.seeds)) == 2


def test_greedy_makes_one_completion_that_stands_for_all(engine, folder, rows, checker) -> None:
    result = evaluate(engine, load_tokenizer(folder), rows, checker, Measure(GREEDY, samples=4, pass_k=(1, 4)))
    assert result["mean"] == result["pass@1"] == result["pass@4"] == 0.5


# ── during a run ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def run(tmp_path: Path, folder: Path, engine: TransformersEngine, rows: list[dict]) -> Exchange:
    """A run's folder with one published version and two evaluation sets."""
    evals = [{"source": "file", "path": "unused", "label": label} for label in ("even", "all")]
    spec = {
        "model": {"dtype": "float32"},
        "data": {"evals": evals},
        "generation": {"maxPromptTokens": 16, "maxCompletionTokens": 6},
        "samplers": [{"name": "near"}],
        "evaluation": {"everySteps": 1, "temperature": 0, "engine": "transformers", "batchPrompts": 4},
        "monitoring": {"tensorboard": False},
    }
    exchange = exchange_at(tmp_path / "run", run_of(**spec))
    shutil.copytree(folder, exchange.model_dir)
    exchange.data_file("eval-all").parent.mkdir()
    for label, chosen in (("all", rows), ("even", rows[::2])):
        exchange.data_file(f"eval-{label}").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    publish(exchange, Version(3, 1), folder, engine)
    return exchange


def publish(exchange: Exchange, version: Version, weights: Path, scored_by: TransformersEngine) -> None:
    texts = [[2 + i % 20 for i in range(40)], [3 + i % 7 for i in range(40)]]
    staged = exchange.stage_weights(version)
    shutil.copy(weights / "model.safetensors", staged)
    exchange.commit_weights(version, Canary(texts, scored_by.score(texts)))


def test_a_published_version_is_evaluated_on_every_set_and_the_result_published(run: Exchange) -> None:
    evaluate_version(run, Version(3, 1))
    result = run.read_evals()[Version(3, 1)]
    assert {label: values["mean"] for label, values in result.sets.items()} == {"even": 1.0, "all": 0.5}
    assert result.average == 0.75
    lines = [json.loads(line) for line in (run.metrics_dir / "evaluate.jsonl").read_text().splitlines()]
    assert [(line["step"], line["eval/all/mean"]) for line in lines if "step" in line] == [(3, 0.5)]


def test_what_was_answered_to_each_problem_is_written_beside_the_result(run: Exchange, rows) -> None:
    evaluate_version(run, Version(3, 1))
    (file,) = run.answers_dir.iterdir()
    assert file.name == "v00000003-i0001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["set"], line["row"], line["step"]) for line in lines] == [
        *(("even", place, 3) for place in (0, 2, 4)),
        *(("all", place, 3) for place in range(6)),
    ]
    assert [line["prompt"] for line in lines[3:]] == PROMPTS
    # the reference of an even problem is the model's own answer, that of an odd one what equals nothing
    assert [[made["correct"] for made in line["completions"]] for line in lines[3:]] == [[True], [False]] * 3
    assert [line["completions"][0]["text"] for line in lines[3::2]] == [row["answer"] for row in rows[::2]]


def test_a_budget_of_nothing_writes_no_answers(run: Exchange) -> None:
    tree = json.loads(run.run_file.read_text())
    tree["spec"]["monitoring"]["logAnswers"] = {"maxMegabytes": 0}
    run.run_file.write_text(json.dumps(tree))
    evaluate_version(Exchange(run.root), Version(3, 1))
    assert not run.answers_dir.exists()
    assert list(run.read_evals()) == [Version(3, 1)]


def test_it_is_the_published_weights_that_are_evaluated(run: Exchange, tiny_model_dir) -> None:
    other = tiny_model_dir(seed=1)
    publish(run, Version(4, 1), other, TransformersEngine(other, dtype="float32"))
    assert evaluate_version(run, Version(4, 1)).average < 0.5


def test_weights_that_fail_the_canary_or_are_gone_give_no_result(run: Exchange, folder: Path, engine, tmp_path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.1
    save_file(tensors, tmp_path / "model.safetensors")
    publish(run, Version(4, 1), tmp_path, engine)
    with pytest.raises(CanaryMismatch, match=r"v00000004-i0001.*differ by"):
        evaluate_version(run, Version(4, 1))
    with pytest.raises(ExchangeError, match=r"v00000009-i0001 are not on the volume"):
        evaluate_version(run, Version(9, 1))
    assert run.read_evals() == {}


# ── heterorl eval ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    lines = {
        "sums": [{"problem": "1+1=", "answer": "2"}] * 3,
        "long": [{"question": "1" * n, "answer": "7"} for n in (5, 1030)],
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "sums.jsonl"), str(tmp_path / "long.jsonl")]


def exit_code_of(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


def test_a_model_folder_is_evaluated_on_files(folder: Path, files: list[str], tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--samples", "2", "--pass-k", "1", "--pass-k", "2", "--max-tokens", "6", "--limit", "2"]
    out = tmp_path / "result.json"
    data = ["--data", files[0], "--data", files[1]]
    assert exit_code_of([str(folder), "--engine", "transformers", *options, *data, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    for text in ("sums", "pass@2", "1 (+1 too long)", "average"):
        assert text in table
    results = json.loads(out.read_text())
    assert [(values["problems"], values["skipped"]) for values in results.values()] == [(2, 0), (1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda args: [str(Path(args[0]).parent / "none"), *args[1:]], "no such folder"),
        (lambda args: [*args[:-1], "none.jsonl"], "none.jsonl: no such file"),
        (lambda args: [*args, "--max-tokens", "2000"], "leaves no room for a prompt"),
        (lambda args: [*args, "--template", "think"], "no chat template"),
        (lambda args: [*args, "--answer-pattern", "("], "'(' is not a valid regular expression"),
        (lambda args: [*args, "--answers", "none/answers.jsonl"], "lies in none, which is no folder"),
    ],
)
def test_what_is_wrong_is_said_and_the_exit_code_is_two(folder, files, change, message, capsys) -> None:
    assert exit_code_of(change([str(folder), "--engine", "transformers", "--max-tokens", "6", "--data", files[0]])) == 2
    err = capsys.readouterr().err
    assert err.startswith("heterorl: ")
    assert message in err


def test_the_trained_model_of_a_run_is_evaluated_and_its_answers_are_written(
    folder, run, files, tmp_path, capsys
) -> None:
    arguments = [str(run.root), "--engine", "transformers", "--max-tokens", "3", "--samples", "2", "--data", files[0]]
    assert exit_code_of(arguments) == 2
    assert "is a run without output/, which is written after the last step" in capsys.readouterr().err
    shutil.copytree(folder, run.output_dir)
    answers = tmp_path / "answers.jsonl"
    assert exit_code_of([*arguments, "--json", "--answers", str(answers)]) == 0
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(line["set"], line["row"], line["prompt"], line["reference"]) for line in lines] == [
        ("sums", row, "1+1=", "2") for row in range(3)
    ]
    marks = [[made["correct"] for made in line["completions"]] for line in lines]
    assert list(map(len, marks)) == [2] * 3
    (result,) = json.loads(capsys.readouterr().out).values()
    assert result["mean"] == pytest.approx(fmean(map(fmean, marks)))
    assert not run.answers_dir.exists()


def test_answers_of_a_runs_model_are_put_into_its_folder(folder, run, files) -> None:
    shutil.copytree(folder, run.output_dir)
    data = ["--data", files[0], "--data", files[1]]
    assert exit_code_of([str(run.root), "--engine", "transformers", "--max-tokens", "3", "--limit", "1", *data]) == 0
    assert sorted(path.name for path in run.answers_dir.iterdir()) == ["eval-long.jsonl", "eval-sums.jsonl"]


def test_sets_are_named_after_their_files_and_numbered_where_these_are_alike() -> None:
    paths = [Path("a/math.jsonl"), Path("b/math.csv"), Path("all/*.parquet"), Path("math")]
    assert set_names(paths) == ["math", "math-2", "_", "math-3"]


def test_a_model_without_a_tokenizer_is_refused(tiny_model_dir, files, capsys) -> None:
    assert exit_code_of([str(tiny_model_dir()), "--engine", "transformers", "--data", files[0]]) == 2
    assert "has no tokenizer (tokenizer.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["model"], ["model", "--data", "x", "--pass-k", "2"], ["model", "--data", "x", "--temperature", "0.005"]],
)
def test_arguments_that_do_not_fit_together_are_refused(arguments: list[str], capsys) -> None:
    assert exit_code_of(arguments) == 2
    assert capsys.readouterr().err.startswith(("heterorl: ", "Usage: "))
