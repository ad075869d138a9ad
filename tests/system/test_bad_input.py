"""Bad input through the command line: one line that names the way out, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from heterorl.exchange.exchange import Exchange
from heterorl.local.preflight import with_absolute_paths
from heterorl.spec.load import load_run

MANIFEST: dict[str, Any] = {
    "apiVersion": "heterorl.dev/v1alpha1",
    "kind": "HeteroRLRun",
    "metadata": {"name": "bad"},
    "spec": {
        "model": {"dtype": "float32", "tiny": {"targetAccuracy": 0, "hiddenSize": 32, "numLayers": 1}},
        "data": {"train": {"source": "file", "path": "train.jsonl"}},
        "generation": {"maxPromptTokens": 16, "maxCompletionTokens": 4},
        "learner": {"steps": 2, "batch": {"groups": 2}},
        "samplers": [{"name": "near", "engine": "transformers"}],
    },
}
Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Run the manifest with some fields changed, `--set` style, and maybe data or environment of one's own."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(MANIFEST))
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')

    def start(
        *arguments: str, data: str | None = None, env: dict[str, str] | None = None, runs: str = "runs"
    ) -> subprocess.CompletedProcess[str]:
        if data is not None:
            (tmp_path / "train.jsonl").write_text(data)
        return subprocess.run(
            [sys.executable, "-m", "heterorl", "run", "run.yaml", "--runs-dir", runs, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


@pytest.fixture
def folder(start: Start, tmp_path: Path) -> Exchange:
    """The run's folder as an earlier start left it."""
    exchange = Exchange(tmp_path / "runs" / "bad")
    exchange.create(with_absolute_paths(load_run(tmp_path / "run.yaml"), tmp_path, must_exist=True))
    return exchange


def refused(result: subprocess.CompletedProcess[str], *words: str) -> bool:
    """Exit code 2, no stack trace, and one line of ours that has all the words."""
    said = result.stderr + result.stdout
    assert result.returncode == 2, (result.returncode, said)
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("heterorl: ") or " error: " in line]
    assert any(all(word in line for word in words) for line in lines), said
    return True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("learner.stepz=3", ["spec.learner.stepz", "steps"]),
        ("learner.steps=many", ["spec.learner.steps", "many"]),
        ("learner.steps='3'", ["spec.learner.steps"]),
        ("algorithm.loss.type=gepoo", ["gepoo", "gepo"]),
        ("rewards=[{name: accurracy}]", ["accurracy", "accuracy"]),
        ("data.train.path=absent.jsonl", ["absent.jsonl", "data"]),
        ("samplers.near.gpus=64", ["64 GPUs are asked for", "gpus: 0"]),
        ("learner={steps: 2, gpus: 64, processesPerReplica: 64}", ["64 GPUs are asked for", "gpus: 0"]),
    ],
)
def test_a_field_that_cannot_work_is_refused_before_anything_is_written(
    start: Start, tmp_path: Path, change: str, words: list[str]
) -> None:
    assert refused(start("--set", change), *words)
    assert not (tmp_path / "runs" / "bad").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"problem": "1+1=", "answer": "2"}\n{"problem": "1+2="}\n', ["train.jsonl", "2", "answer"]),
        ('{"problem": "1+1=", "answer": ""}\n', ["train.jsonl", "1", "answer"]),
        ("", ["train.jsonl", "empty"]),
        ('{"problem": "1+1=", "answer": "2"\n', ["train.jsonl", "1", "JSON"]),
    ],
)
def test_bad_data_is_refused_with_its_lines_and_leaves_no_folder(
    start: Start, tmp_path: Path, data: str, words: list[str]
) -> None:
    assert refused(start(data=data), *words)
    assert not (tmp_path / "runs" / "bad").exists()


def test_too_long_prompts_are_counted_and_skipped(folder: Exchange, tmp_path: Path) -> None:
    rows = [{"problem": "1+1=", "answer": "2"}, {"problem": "1+" * 20 + "1=", "answer": "21"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = [sys.executable, "-m", "heterorl_learner", "prepare", "--root", str(folder.root)]
    subprocess.run(prepare, check=True, timeout=300)
    assert folder.prepared is not None
    train = folder.prepared.data["train"]
    assert (train.rows, train.skipped) == (1, 1)


def test_a_model_folder_without_a_tokenizer_is_refused(
    start: Start, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    model = tiny_model_dir()
    result = start("--set", "model.source=path", "--set", f"model.path={model}")
    assert refused(result, str(model), "tokenizer")
    assert not (tmp_path / "runs" / "bad").exists()


def test_vllm_asked_for_and_not_installed_is_refused(start: Start, tmp_path: Path) -> None:
    hide = tmp_path / "hide"
    hide.mkdir()
    # As on a machine without it: whoever looks for vllm finds nothing.
    (hide / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    result = start("--set", "samplers.near.engine=vllm", env={"PYTHONPATH": str(hide)})
    assert refused(result, "vllm", "install")
    assert not (tmp_path / "runs" / "bad").exists()


def test_the_folder_of_another_run_is_not_touched(start: Start, folder: Exchange) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")}
    assert refused(start(), "runs/bad", "--resume")
    assert refused(start("--resume", "--set", "algorithm.groupSize=4"), "groupSize", "4")
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("*")} == before


def test_a_run_folder_in_use_is_refused(start: Start, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "heterorl",
        "run",
        "run.yaml",
        "--runs-dir",
        "runs",
        "--set",
        "learner.steps=100000",
    ]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "runs" / "bad" / "run.json").exists():
            assert first.poll() is None
        assert refused(start("--resume", "--set", "learner.steps=100000"), "runs/bad", "in use", str(first.pid))
    finally:
        first.terminate()
        first.wait(60)


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A volume of 2 MiB."""
    volume = tmp_path / "small"
    volume.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(volume)], check=False)
    if mount.returncode:
        reason = "a small volume needs the right to mount one"
        (pytest.fail if os.environ.get("HETERORL_REQUIRE") == "all" else pytest.skip)(reason)
    yield volume
    subprocess.run(["umount", str(volume)], check=True)


def test_a_full_volume_is_refused_before_anything_is_written(start: Start, small_volume: Path) -> None:
    assert refused(start(runs=str(small_volume)), "space")
    assert list(small_volume.iterdir()) == []
