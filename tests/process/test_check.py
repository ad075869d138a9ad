"""`heterorl check` and `heterorl init` as a user meets them: what they print, how they end, what they leave behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heterorl.cli import main
from heterorl.spec.load import load_run

ROWS = [{"question": f"{i}+{i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder one works in, with a data file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def heterorl(*arguments: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "heterorl", *arguments],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_what_init_writes_passes_the_check_which_shows_all_of_it_and_leaves_nothing(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    main(["init", "first.yaml", "--model", "tiny", "--data", "rows.jsonl"])
    before = sorted(folder.rglob("*"))
    done = heterorl("check", "first.yaml", "--set", "samplers.near.engine=transformers", scratch=scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line.partition(" ")[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert told == ["machine", "folder", "model", "data", *3 * ["prompt"], "memory", *2 * ["reward"], "ok:"]
    assert "          | 1+1?\n          16 '1', 10 '+', 16 '1', 30 '?'\n" in done.stdout
    assert "reward    row 0: right answer '0' scores 1 (accuracy 1)\n" in done.stdout
    assert "reward    row 0: wrong answer '2' scores 0 (accuracy 0)\n" in done.stdout
    assert sorted(folder.rglob("*")) == before
    assert not [path for path in scratch.iterdir() if path.name.startswith("heterorl")]


def test_a_check_ends_with_the_users_error_and_one_line(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    main(["init", "first.yaml", "--model", "tiny", "--data", "rows.jsonl"])
    sets = ["samplers.near.engine=transformers", "data.train.columns.answer=result", "data.train.onBadRow=refuse"]
    done = heterorl("check", "first.yaml", *(part for change in sets for part in ("--set", change)), scratch=scratch)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].endswith(
        "rows.jsonl: no column `result`; found: question, answer (each of its 4 rows);"
        " name other columns under columns, or correct the data"
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert not [path for path in scratch.iterdir() if path.name.startswith("heterorl")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train.path=absent.jsonl", "data.train.path: .*absent.jsonl does not exist"),
        ("samplers.near.gpus=64", "64 GPUs are asked for"),
        ("learner.stepz=1", "spec.learner.stepz: unknown field; did you mean steps"),
    ],
)
def test_what_this_machine_refuses_is_told_before_any_process_is_started(
    folder: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["init", "first.yaml", "--model", "tiny", "--data", "rows.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main(["check", "first.yaml", "--set", "samplers.near.engine=transformers", "--set", change])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_init_never_writes_over_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["init", "--model", "tiny", "--data", "rows.jsonl"])
    assert ended.value.code == 2
    assert "run.yaml exists and is not overwritten" in capsys.readouterr().err
    assert (folder / "run.yaml").read_text() == "mine"


def test_init_finds_columns_mark_and_template(folder: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model = tiny_model_dir(tokenizer=True)
    rows = [{"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}]
    (folder / "talk.json").write_text(json.dumps(rows))
    main(["init", "deep/My first_run.yaml", "--model", str(model), "--data", "talk.json"])
    run = load_run(folder / "deep" / "My first_run.yaml")
    train = run.spec.data.train
    assert run.metadata.name == "my-first-run"
    assert (train.path, train.columns.prompt, train.columns.answer) == (
        "../talk.json",
        "prompt",
        "reward_model.ground_truth",
    )
    assert (run.spec.data.prompt_template, run.spec.data.instruction) == ("chat", None)
    assert (run.spec.model.source, run.spec.model.path) == ("path", str(model))
    assert run.spec.generation.max_prompt_tokens + run.spec.generation.max_completion_tokens <= 1024  # its context
    main(["init", "gsm8k.yaml", "--model", "Qwen/Qwen3-0.6B", "--data", "rows.jsonl"])
    run = load_run(folder / "gsm8k.yaml")
    assert (run.spec.model.source, run.spec.model.name) == ("hub", "Qwen/Qwen3-0.6B")
    assert run.spec.data.train.columns.answer_pattern == "#### (.+)"
    assert "{problem}" in (run.spec.data.instruction or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny", "--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--model", "absent", "--data", "rows.jsonl"], "absent: neither a folder nor a name on the Hub"),
        (["--model", ".", "--data", "rows.jsonl"], ".: config.json cannot be read"),
        (["--model", "tiny", "--data", "rows.jsonl", "--answer-column", "gold"],
         "rows.jsonl: no column `gold`; found: question, answer; name it by --answer-column"),
        (["--model", "tiny", "--data", "odd.jsonl"],
         "odd.jsonl: no column that usually holds the problem; found: a, b.c; name it by --prompt-column"),
        (["--model", "tiny", "--data", "empty.jsonl"], "empty.jsonl: no rows found"),
    ],
)  # fmt: skip
def test_init_says_what_it_cannot_find_and_writes_nothing(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "odd.jsonl").write_text('{"a": 1, "b": {"c": 2}}\n')
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["init", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "run.yaml").exists()
