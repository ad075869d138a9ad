"""The real wandb package beside the work: offline, and with a server that accepts a connection and never answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from heterorl.monitoring.json_lines import read_metrics

# A process of its own each time: a wandb session keeps the settings it began with.
MEASURES = """
import pathlib, sys, time
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import MonitoringSpec

folder, mode, wanted = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
monitoring = MonitoringSpec(tensorboard=False, wandb={"project": "far", "mode": mode})
with Metrics.open(folder, "learner", monitoring, run="quick", to_wandb=True) as metrics:
    started = time.monotonic()
    for step in (1, 2, 3):
        metrics.write(step, {"reward": 0.25 * step, "loss": None})
    print(time.monotonic() - started, flush=True)
    while wanted and not list(folder.glob(wanted)):
        time.sleep(0.1)
    ended = time.monotonic()
print(time.monotonic() - ended, flush=True)
"""


def measure(folder: Path, mode: str, wanted: str = "", **env: str) -> tuple[float, float]:
    """Seconds that three steps took to report, and that the end took once the file `wanted` was there."""
    own = {f"WANDB_{name}_DIR": str(folder / name) for name in ("CONFIG", "CACHE", "DATA")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURES, str(folder), mode, wanted],
        env={**kept, **own, "NETRC": str(folder / "netrc"), **env},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    steps, end = (float(line) for line in done.stdout.splitlines() if line[:1].isdigit())
    return steps, end


def test_an_offline_run_holds_the_steps_under_the_runs_own_id(tmp_path: Path) -> None:
    measure(tmp_path, "offline", "wandb/offline-run-*/run-quick.wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-quick.wandb")
    assert b"reward" in file.read_bytes()


def test_a_login_that_hangs_holds_up_neither_training_nor_its_end(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        steps, end = measure(tmp_path, "online", WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
    assert steps < 1
    assert end < 12
    assert [r["step"] for r in read_metrics(tmp_path / "learner.jsonl") if "step" in r] == [1, 2, 3]
