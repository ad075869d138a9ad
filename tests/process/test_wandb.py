"""The real wandb package beside the work: offline, and with a server that accepts a connection and never answers."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from heterorl.monitoring.json_lines import read_metrics
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import MonitoringSpec


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What wandb keeps stays in the test's folder; it looks for no key."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def measure(folder: Path, mode: str) -> float:
    """Three steps reported to a project; the seconds they took, without the end."""
    monitoring = MonitoringSpec(tensorboard=False, wandb={"project": "far", "mode": mode})
    with Metrics.open(folder, "learner", monitoring, run="quick", to_wandb=True) as metrics:
        started = time.monotonic()
        for step in (1, 2, 3):
            metrics.write(step, {"reward": 0.25 * step, "loss": None})
        return time.monotonic() - started


def test_an_offline_run_holds_the_steps_under_the_runs_own_id(tmp_path: Path) -> None:
    measure(tmp_path / "metrics", "offline")
    (folder,) = (tmp_path / "metrics" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-quick.wandb")
    assert b"reward" in file.read_bytes()


def test_a_login_that_hangs_holds_up_neither_training_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        started = time.monotonic()
        assert measure(tmp_path / "metrics", "online") < 1
        assert time.monotonic() - started < 15
    records = read_metrics(tmp_path / "metrics" / "learner.jsonl")
    assert [record["step"] for record in records if "step" in record] == [1, 2, 3]
