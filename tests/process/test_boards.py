"""The real wandb and trackio beside the work: what they keep, and a service that hangs or fails."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from builders import exchange_at, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation
from heterorl.exchange.version import Version
from heterorl.monitoring.json_lines import read_metrics

# A process of its own each time: a wandb session keeps the settings it began with.
MEASURES = """
import os, sys, time
from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.metrics import Metrics
from heterorl.monitoring.run_story import RunStory

exchange, until_open = Exchange(sys.argv[1]), sys.argv[2] == "True"
monitoring, summary = exchange.spec.monitoring, {"steps": 3, "lag_max": 7.0, "evaluations": {"sums": {"best": 0.5}}}
story = lambda: RunStory(exchange, lambda: summary)
with Metrics.open(exchange.metrics_dir, "learner", monitoring, run="quick", story=story) as metrics:
    started = time.monotonic()
    for step in (1, 2, 3):
        metrics.write(step, {"reward": 0.25 * step, "loss": None})
    print(time.monotonic() - started, flush=True)
    while until_open and any(getattr(sink, "_sink", sink) is None for sink in metrics._sinks):
        time.sleep(0.1)
    ended = time.monotonic()
print(time.monotonic() - ended, flush=True)
os._exit(0)  # as every process of a run does; wandb would wait for its service
"""
GROUP = {
    "step": 2,
    "set": "sums",
    "prompt": "2+3=",
    "reference": "5",
    "completions": [
        {"text": "5", "reward": 1.0, "parts": {"accuracy": 1.0}, "advantage": 0.5, "truncated": False},
        {"text": "6", "reward": 0.0, "parts": {"accuracy": 0.0}, "advantage": -0.5, "truncated": False},
    ],
}


def run_with(folder: Path, **monitoring: Any) -> Exchange:
    """A run whose other processes have written an evaluation and a group of completions."""
    exchange = exchange_at(folder / "quick", run_of("quick", monitoring={"tensorboard": False, **monitoring}))
    exchange.mark_prepared()
    (exchange.root / "evals").mkdir()
    result = Evaluation(average=0.5, sets={"sums": {"mean": 0.5}})
    (exchange.root / "evals" / f"{Version(0, 1)}.json").write_bytes(result.to_bytes())
    exchange.completions_file.write_text(json.dumps(GROUP) + "\n")
    return exchange


def measure(exchange: Exchange, *, until_open: bool, **env: str) -> tuple[float, float]:
    """Seconds that three steps took to report, and that the end took, be it once every board was open."""
    folder = exchange.root.parent
    own = {f"WANDB_{name}_DIR": str(folder / name) for name in ("CONFIG", "CACHE", "DATA")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
    done = subprocess.run(
        [sys.executable, "-c", MEASURES, str(exchange.root), str(until_open)],
        env={**kept, **own, "NETRC": str(folder / "netrc"), "TRACKIO_DIR": str(folder / "trackio"), **env},
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
        check=True,
    )
    steps, end = (float(line) for line in done.stdout.splitlines() if line[:1].isdigit())
    return steps, end


# ── W&B ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
OFFLINE = "wandb/offline-run-*/run-quick-*.wandb"


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log of chunks in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def items(update: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def test_an_offline_run_of_wandb_has_settings_steps_evaluations_completions_and_summary(tmp_path: Path) -> None:
    about = {"project": "far", "entity": "us", "group": "seeds", "tags": ["a", "b"], "notes": "why", "mode": "offline"}
    exchange = run_with(tmp_path, wandb=about)
    measure(exchange, until_open=True, WANDB_TAGS="c,d")
    (file,) = exchange.metrics_dir.glob(OFFLINE)
    records = list(wandb_records(file))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.entity, run.run_group, run.notes, run.display_name) == (
        "far",
        "us",
        "seeds",
        "why",
        "quick",
    )
    assert list(run.tags) == ["c", "d"]  # a variable of wandb goes before the field
    settings = items(run.config.update)
    assert settings["algorithm"]["loss"]["type"] == "gepo"
    assert not {"credentials"} & settings.keys()
    assert "podTemplate" not in settings["learner"]
    history = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [(row["step"], row["reward"]) for row in history if "reward" in row] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [(row["step"], row["eval/sums/mean"]) for row in history if "eval/average" in row] == [(0, 0.5)]
    told: dict[str, Any] = {}
    for record in records:
        told |= items(record.summary.update)
    assert (told["steps"], told["lag_max"], told["evaluations"]) == (3, 7.0, {"sums": {"best": 0.5}})
    (table,) = file.parent.glob("files/media/table/completions_*.table.json")
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], row)) for row in content["data"]]
    assert [(row["prompt"], row["completion"], row["reward"], row["reward/accuracy"]) for row in rows] == [
        ("2+3=", "5", 1.0, 1.0),
        ("2+3=", "6", 0.0, 0.0),
    ]


def test_a_restarted_run_keeps_its_id_and_another_run_of_its_name_has_another(tmp_path: Path) -> None:
    exchange = run_with(tmp_path, wandb={"project": "far", "mode": "offline"})
    for count in (1, 2):
        measure(exchange, until_open=True)
        found = list(exchange.metrics_dir.glob(OFFLINE))
        assert len(found) == count
    assert {file.stem for file in found} == {f"run-{exchange.board_id()}"}
    assert run_with(tmp_path / "elsewhere").board_id() != exchange.board_id()


@contextmanager
def service(answer: int | None) -> Iterator[str]:
    """The address of a service that answers every request with this status, or accepts a connection and never answers."""
    if answer is None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        return

    class Fails(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(answer)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Fails) as failing:
        threading.Thread(target=failing.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{failing.server_port}"
        failing.shutdown()


@pytest.mark.parametrize("answer", [None, 500], ids=["hangs", "fails"])
@pytest.mark.parametrize("board", ["wandb", "trackio"])
def test_a_service_that_does_not_work_holds_up_neither_training_nor_its_end(
    tmp_path: Path, board: str, answer: int | None
) -> None:
    exchange = run_with(tmp_path, **{board: {"project": "far"}})
    with service(answer) as address:
        its = {
            "wandb": {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40},
            "trackio": {"TRACKIO_SERVER_URL": address},
        }
        steps, end = measure(exchange, until_open=False, **its[board])
    assert steps < 1
    assert end < 20
    assert [r["step"] for r in read_metrics(exchange.metrics_dir / "learner.jsonl") if "step" in r] == [1, 2, 3]


class Wandb(BaseHTTPRequestHandler):
    """As much of the service as wandb's client needs; the first requests are answered with a refusal."""

    protocol_version = "HTTP/1.1"
    refusals: list[int]
    """Statuses of the next answers."""
    history: list[dict[str, Any]]
    """Rows that were taken."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/graphql":
            self._answer(self._data(json.loads(body)), self.refusals.pop(0) if self.refusals else 200)
            return
        if self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += map(json.loads, lines)
        self._answer({})

    do_PUT = do_POST

    def _data(self, asked: dict[str, Any]) -> dict[str, Any]:
        owner = {"id": "p", "name": "far", "entity": {"id": "e", "name": "us"}}
        bucket = {"id": "r", "name": asked["variables"].get("name"), "displayName": "quick", "project": owner}
        url = f"http://127.0.0.1:{self.server.server_address[1]}/upload"
        files = [{"name": name, "uploadUrl": url} for name in asked["variables"].get("files", [])]
        answers = {
            "RunResumeStatus": {"model": {**owner, "bucket": None}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "CreateRunFiles": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}},
        }
        return {"data": answers.get(asked["operationName"], {})}

    def _answer(self, body: Any, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("refusal", [403, 500], ids=["which-the-client-gives-up", "which-the-client-retries"])
def test_a_service_that_refused_is_told_everything_once_it_accepts(tmp_path: Path, refusal: int) -> None:
    exchange = run_with(tmp_path, wandb={"project": "far"})
    exchange.completions_file.unlink()
    service = type("Recovering", (Wandb,), {"refusals": [refusal], "history": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        steps, _ = measure(exchange, until_open=True, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
        server.shutdown()
    assert steps < 1
    assert service.refusals == []
    assert [(row["step"], row["reward"]) for row in service.history if "reward" in row] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    assert [row["eval/sums/mean"] for row in service.history if "eval/sums/mean" in row] == [0.5]


# ── Trackio ──────────────────────────────────────────────────────────────────────────────────────────────────────────
SERVES = """
import time, trackio
_, _, _, address = trackio.show(open_browser=False, block_thread=False, share=False)
print(address, flush=True)
time.sleep(600)
"""


def rows(folder: Path, query: str) -> list[Any]:
    """Of a project's file."""
    with closing(sqlite3.connect(folder / "far.db")) as database:
        return database.execute(query).fetchall()


def test_trackio_has_settings_steps_evaluations_completions_and_summary_in_a_local_folder(tmp_path: Path) -> None:
    exchange = run_with(tmp_path, trackio={"project": "far", "group": "seeds"})
    measure(exchange, until_open=True)
    ((name, config),) = rows(tmp_path / "trackio", "SELECT run_name, config FROM configs")
    logged = rows(tmp_path / "trackio", "SELECT run_name, step, metrics FROM metrics")
    assert {run for run, _, _ in logged} == {name} == {exchange.board_id()}
    assert json.loads(config)["algorithm.loss.type"] == "gepo"
    found = [(step, key, value) for _, step, metrics in logged for key, value in json.loads(metrics).items()]
    assert [(step, value) for step, key, value in found if key == "reward"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert (0, "eval/sums/mean", 0.5) in found
    assert (3, "summary/lag_max", 7.0) in found
    ((step, table),) = ((step, value) for step, key, value in found if key == "completions")
    assert step == 2
    assert [row["completion"] for row in table["_value"]] == ["5", "6"]


def test_a_server_of_trackio_that_hung_is_told_everything_once_it_goes_on(tmp_path: Path) -> None:
    exchange = run_with(tmp_path, trackio={"project": "far"})
    exchange.completions_file.unlink()
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "served")}
    with subprocess.Popen([sys.executable, "-c", SERVES], stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            address = next(line for line in server.stdout if line.startswith("http")).strip()
            server.send_signal(signal.SIGSTOP)
            threading.Timer(5, server.send_signal, [signal.SIGCONT]).start()
            steps, _ = measure(exchange, until_open=True, TRACKIO_SERVER_URL=address)
        finally:
            server.kill()
    assert steps < 1
    logged = [
        (step, json.loads(metrics)) for step, metrics in rows(tmp_path / "served", "SELECT step, metrics FROM metrics")
    ]
    assert [(step, row["reward"]) for step, row in logged if "reward" in row] == [(1, 0.25), (2, 0.5), (3, 0.75)]
