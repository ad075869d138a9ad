"""Every process leaves within ten seconds of SIGTERM, at whatever moment it comes and on a busy machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builders import run_of
from heterorl.entry import LEAVE_S
from heterorl.exchange.exchange import Exchange
from heterorl.exit_codes import PREEMPTED

LEAVES_WITHIN_S = 10.0
TINY = {"source": "tiny", "dtype": "float32", "tiny": {"hiddenSize": 32, "numLayers": 1, "targetAccuracy": 0}}
ENDLESS = {**TINY, "tiny": {"hiddenSize": 128, "numLayers": 3, "targetAccuracy": 0.95, "maxSupervisedSteps": 100_000}}


def folder(root: Path, model: dict) -> Exchange:
    """A run's folder as the runner makes it."""
    sums = {"source": "arithmetic", "arithmetic": {"digits": 1, "rows": 100}}
    exchange = Exchange(root)
    exchange.create(
        run_of(
            model=model,
            data={"train": sums, "evals": [{**sums, "label": "sums"}], "promptTemplate": "raw"},
            generation={"maxPromptTokens": 16, "maxCompletionTokens": 4},
            learner={"steps": 100_000, "threads": 1},
            samplers=[{"name": "near", "engine": "transformers"}],
            evaluation={"everySteps": 10, "engine": "transformers", "samplesPerPrompt": 1024, "batchPrompts": 1},
        )
    )
    return exchange


def start(arguments: list[str], root: Path, log: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments, "--root", str(root)], env=env, stdout=output, stderr=output
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    folder(root, TINY)
    assert start(["heterorl_learner", "prepare"], root, root / "log").wait(120) == 0, (root / "log").read_text()
    learner = start(["heterorl_learner"], root, root / "log")
    while not Exchange(root).list_versions():
        assert learner.poll() is None, (root / "log").read_text()
        time.sleep(0.1)
    learner.kill()
    learner.wait()
    return root


@pytest.mark.parametrize("latest_s", [0.5, 3.0, 9.0])
def test_every_process_that_is_told_to_go_leaves_within_ten_seconds(tmp_path, prepared, latest_s):
    moments = random.Random(latest_s)
    folder(tmp_path / "unprepared", ENDLESS)
    programs = {
        "prepare": (["heterorl_learner", "prepare"], tmp_path / "unprepared"),
        "train": (["heterorl_learner"], prepared),
        "launch": (["heterorl_learner", "launch"], tmp_path / "unprepared"),
        "sample": (["heterorl_sampler", "--pool", "near"], prepared),
        "evaluate": (
            ["heterorl_sampler", "evaluate", "--version", str(Exchange(prepared).list_versions()[0])],
            prepared,
        ),
    }
    running = {name: start(*program, tmp_path / name) for name, program in programs.items()}
    began = time.monotonic()
    tell_at = {name: began + moments.uniform(latest_s / 3, latest_s) for name in running}
    for name in sorted(running, key=tell_at.__getitem__):
        time.sleep(max(0.0, tell_at[name] - time.monotonic()))
        running[name].send_signal(signal.SIGTERM)
    for name, process in running.items():
        code = process.wait(max(0.1, tell_at[name] + LEAVES_WITHIN_S - time.monotonic()))
        assert code in PREEMPTED, (name, code, (tmp_path / name).read_text())


SWALLOWS = """
import sys, time
from heterorl.entry import Program, run
def work(process):
    while True:
        try:
            print("at work", flush=True)
            time.sleep(600)
        except BaseException:
            pass
run("stubborn", {"work": Program(work, "", lambda _: "stubborn")})
"""


def test_work_that_does_not_come_back_is_ended_by_the_watchdog(tmp_path):
    command = [sys.executable, "-c", SWALLOWS, "--root", str(folder(tmp_path, TINY).root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        assert process.wait(LEAVES_WITHIN_S) == 143
        assert time.monotonic() - told >= LEAVE_S
        assert "did not come back in time" in process.stderr.read()


FINISHES = """
import sys, time
from heterorl.entry import Program, run
def work(process):
    with process.stop.finishing(within_s=60):
        print("at work", flush=True)
        process.stop.wait()
        time.sleep(9)
        print("saved", flush=True)
run("saving", {"work": Program(work, "", lambda _: "saving")})
"""


def test_work_that_saves_has_the_time_it_asked_for(tmp_path):
    command = [sys.executable, "-c", FINISHES, "--root", str(folder(tmp_path, TINY).root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout.read() == "saved\n"
