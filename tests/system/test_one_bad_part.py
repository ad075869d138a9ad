"""Whole runs with one part that fails: each ends as it should, no rollout trained twice or lost, nothing deleted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow  # six runs of half a minute, most of which their processes take to start

STEPS = 30
SPEC: dict[str, Any] = {
    "model": {"dtype": "float32", "tiny": {"targetAccuracy": 0, "hiddenSize": 32, "numLayers": 1}},
    "data": {"train": {"source": "arithmetic", "arithmetic": {"digits": 1, "rows": 50}}, "promptTemplate": "raw"},
    "algorithm": {"groupSize": 2},
    "generation": {"maxPromptTokens": 16, "maxCompletionTokens": 4},
    "learner": {"steps": STEPS, "batch": {"groups": 4}, "checkpoint": {"everySteps": 5}, "threads": 1},
    "samplers": [{"name": "near", "engine": "transformers", "threads": 1, "promptsPerBatch": 2}],
    "exchange": {"pollSeconds": 0.05, "leaseSeconds": 3},
    "monitoring": {"tensorboard": False},
}
Run = Any  # of conftest, beside this file
MakeRun = Callable[..., Run]


@pytest.fixture
def tiny_run(tmp_path: Path, new_run: MakeRun) -> MakeRun:
    """Factory of a small run: `tiny_run(samplers=[...], learner={...})` merged over SPEC."""

    def make(**changes: Any) -> Run:
        spec = {
            key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in SPEC.items()
        }
        spec |= {key: value for key, value in changes.items() if not isinstance(SPEC.get(key), dict)}
        manifest = {
            "apiVersion": "heterorl.dev/v1alpha1",
            "kind": "HeteroRLRun",
            "metadata": {"name": "tiny"},
            "spec": spec,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(manifest))
        return new_run(tmp_path / "run.yaml")

    return make


def has_a_right_ledger(run: Run, steps: int = STEPS) -> bool:
    """The journal has each trained step once, no rollout was trained twice, none lost."""
    summary = run.summary()
    assert (summary["steps"], summary["rollouts_trained_twice"], summary["rollouts_lost"]) == (steps, 0, 0)
    entries = journal(run)
    assert [entry["step"] for entry in entries] == list(range(steps))
    trained = [name for entry in entries for name in entry["names"]]
    assert len(trained) == len(set(trained)) == steps * SPEC["learner"]["batch"]["groups"]
    return True


def journal(run: Run) -> list[dict[str, Any]]:
    """Its lines as they stand; what is being appended is left out."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (run.root / "journal.jsonl").read_text().split("\n")[:-1]]
    return []


def stop(run: Run) -> None:
    """As Ctrl-C does."""
    run.process.send_signal(signal.SIGINT)
    assert run.wait(90) == 130, run.said()


def test_of_two_learners_on_one_folder_the_later_one_stays_and_the_other_run_ends(tiny_run: MakeRun) -> None:
    run = tiny_run(learner={"steps": 4000})
    run.start()
    run.until_step(3)
    command = [sys.executable, "-m", "heterorl_learner", "--root", str(run.root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        try:
            # It takes over; the runner's learner leaves, and is not started again to take over in its turn.
            assert run.wait(90) == 1
            assert "has taken over" in run.said()
            assert other.poll() is None
            # A learner that is stopped while it replays leaves the remaining lines to the next one.
            run.until(lambda: journal(run)[-1]["incarnation"] == 2 or run.learner()["incarnation"] == 2)
        finally:
            other.terminate()
            other.wait(30)
    assert not (run.root / "summary.json").exists()
    run.start("--resume")
    run.until(lambda: journal(run)[-1]["incarnation"] == 3)
    stop(run)
    assert run.summary()["restarts"] == {}  # who was superseded has not crashed
    assert has_a_right_ledger(run, run.learner()["step"])


def test_a_sampler_frozen_past_its_lease_leaves_when_it_is_woken(tiny_run: MakeRun) -> None:
    run = tiny_run(learner={"steps": 4000})
    run.start()
    run.until_step(3)
    frozen = run.child("heterorl_sampler", "near")
    frozen.suspend()
    command = [sys.executable, "-m", "heterorl_sampler", "--root", str(run.root), "--pool", "near", "--index", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as successor:
        try:
            run.until(lambda: run.slot("near-0").get("epoch", 0) >= 2)
            step = run.learner()["step"]
            run.until_step(step + 3)  # training went on with the successor's rollouts
            frozen.resume()
            run.until(lambda: not frozen.is_running())
            stop(run)
        finally:
            successor.terminate()
            successor.wait(15)
    assert run.summary()["restarts"] == {}
    assert has_a_right_ledger(run, run.learner()["step"])


def test_a_checkpoint_of_a_later_version_is_refused_and_everything_kept(tiny_run: MakeRun) -> None:
    run = tiny_run(learner={"steps": 4000})
    run.start()
    run.until(lambda: (run.learner().get("checkpoint_step") or 0) >= 5)
    stop(run)
    newest = max((run.root / "checkpoints").glob("step-*")) / "manifest.json"
    newest.write_text(json.dumps({**json.loads(newest.read_text()), "protocol": 99}))
    kept = {folder: sorted((run.root / folder).rglob("*")) for folder in ("checkpoints", "rollouts", "weights")}
    journal = (run.root / "journal.jsonl").read_bytes()
    run.start("--resume")
    assert run.wait(90) == 2
    assert "protocol 99" in run.said()
    assert {folder: sorted((run.root / folder).rglob("*")) for folder in ("checkpoints", "weights")} == {
        folder: kept[folder] for folder in ("checkpoints", "weights")
    }
    assert {path for path in kept["rollouts"] if path.suffix == ".safetensors"} <= set(
        (run.root / "rollouts").iterdir()
    )
    assert (run.root / "journal.jsonl").read_bytes() == journal


NO_DEVICE = """
import sys
if "broken" in sys.orig_argv:
    import heterorl_sampler.engines.build as build
    def build_engine(*_, **__):
        raise RuntimeError("No CUDA GPUs are available")
    build.build_engine = build_engine
"""


def test_one_of_four_samplers_whose_device_is_gone_does_not_end_the_run(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text(NO_DEVICE)
    monkeypatch.setenv("PYTHONPATH", str(own), prepend=os.pathsep)
    pool = {"engine": "transformers", "threads": 1, "promptsPerBatch": 2}
    pools = [{**pool, "name": "near", "replicas": 3}, {**pool, "name": "broken"}]
    run = tiny_run(samplers=pools, learner={"steps": 4000}, failurePolicy={"siteRestarts": 0})
    run.start()
    run.until(lambda: "broken-0 failed" in run.said())
    run.until_step(run.learner().get("step", 0) + 5)  # training goes on with the three others
    stop(run)
    assert "this node's GPU cannot be used: No CUDA GPUs are available" in run.said()
    assert run.summary()["rollouts"].get("broken-0", 0) == 0
    assert has_a_right_ledger(run, run.learner()["step"])


def test_a_judge_that_raises_for_one_problem_leaves_its_groups_out(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judge.py").write_text(
        "def score(completions, answer, **columns):\n"
        "    if answer[0] == '7':\n"
        "        raise ConnectionError('the judge does not answer')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    run = tiny_run(rewards=[{"name": "custom", "path": "judge.score"}])
    run.start()
    assert run.wait(300) == 0, run.said()
    assert run.slot("near-0")["unrewarded"] > 0
    assert "the judge does not answer" in (run.root / "logs" / "sampler-near-0.log").read_text()
    assert has_a_right_ledger(run)


UNRELIABLE = """
import os, time
HERE = os.environ["JUDGED"]

def score(completions, **columns):
    with open(HERE, "a+") as calls:  # survives the process, which is killed now and then
        calls.seek(0)
        n = len(calls.read())
        act = "e" if n == 20 else "h" if n % 50 == 7 else "r" if n % 10 == 3 else "."
        calls.write(act)
    if act == "r": raise ConnectionError("the judge does not answer")
    if act == "h": time.sleep(1000)
    if act == "e": bytearray(64 << 30)
    return [float(len(text)) for text in completions]
"""


def test_a_judge_that_fails_hangs_and_eats_memory_costs_the_groups_it_fails_on(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unreliable.py").write_text(UNRELIABLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("JUDGED", str(tmp_path / "calls"))
    judge = {"name": "custom", "path": "unreliable.score", "onError": "skipGroup", "timeLimitSeconds": 5}
    run = tiny_run(rewards=[{"name": "accuracy"}, judge])
    run.start()
    assert run.wait(300) == 0, run.said()
    assert has_a_right_ledger(run)
    # Every call has become a failure or a rollout, but for those of a batch in the midst of which the run ended.
    calls, batch = Counter((tmp_path / "calls").read_text()), SPEC["samplers"][0]["promptsPerBatch"]
    failures, summary = run.slot("near-0")["reward_failures"], run.summary()
    assert failures.keys() == {"score/error", "score/time", "score/memory"}
    for kind, act in (("error", "r"), ("time", "h"), ("memory", "e")):
        assert calls[act] - 1 <= failures[f"score/{kind}"] <= calls[act]
    assert sum(failures.values()) - batch <= summary["groups_unrewarded"] <= sum(failures.values())
    assert calls["."] - batch <= summary["rollouts_published"] <= calls["."]
    assert run.slot("near-0")["unrewarded"] == summary["groups_unrewarded"]
    log = (run.root / "logs" / "sampler-near-0.log").read_text()
    assert 'unreliable.py", line 11, in score' in log
    assert log.count("Traceback") < sum(failures.values())


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], Path]]:
    """Puts a file system of its own, full to the last byte, over a folder; returns what fills it."""
    mounted: list[Path] = []

    def fill(folder: Path) -> Path:
        kept = folder.with_name("kept")
        shutil.copytree(folder, kept)
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
        subprocess.run(mount, check=True)
        mounted.append(folder)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        filler = folder / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"0" * 4096)
            except OSError:
                return filler

    yield fill
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_metrics_disk_is_told_and_training_goes_on(
    tiny_run: MakeRun, small_disk: Callable[[Path], Path]
) -> None:
    if os.geteuid() != 0:
        reason = "a disk of its own needs the right to mount one"
        (pytest.fail if os.environ.get("HETERORL_REQUIRE") == "all" else pytest.skip)(reason)
    run = tiny_run(learner={"steps": 4000})
    run.start()
    run.until_step(3)
    stop(run)
    stopped_at = run.learner()["step"]
    filler = small_disk(run.root / "metrics")
    run.start("--resume")
    run.until_step(stopped_at + 5)
    log = run.root / "logs" / "learner.log"
    assert "learner.jsonl cannot be written: OSError: [Errno 28] No space left on device" in log.read_text()
    filler.unlink()
    lines = run.root / "metrics" / "learner.jsonl"
    run.until(lambda: f'"step": {stopped_at + 5},' in lines.read_text(), 90)  # written once there is room
    stop(run)
    assert run.summary()["restarts"] == {}
    assert has_a_right_ledger(run, run.learner()["step"])
