"""Metrics files, the Prometheus page, TensorBoard and W&B; what was served is parsed by Prometheus' own parser."""

import json
import logging
import resource
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from heterorl.errors import UserError
from heterorl.logs import setup_logging
from heterorl.monitoring.background import Background
from heterorl.monitoring.boards import TensorBoard, check_wandb, wandb_mode
from heterorl.monitoring.json_lines import JsonLines, read_metrics
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import MonitoringSpec, WandbSpec

QUIET = MonitoringSpec(tensorboard=False)


def open_metrics(folder: Path, monitoring: MonitoringSpec = QUIET, name="learner", **options) -> Metrics:
    return Metrics.open(folder, name, monitoring, run="quick", clock=lambda: 1000.0, **options)


def written(folder: Path, name="learner") -> list[dict]:
    """Records between a process's start and its stop."""
    return [r for r in read_metrics(folder / f"{name}.jsonl") if r.get("event") not in ("start", "stop")]


def until(condition) -> None:
    """Wait for what a thread beside does."""
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def scrape(folder: Path, name="learner") -> dict[str, tuple[float, dict[str, str], str]]:
    port = int((folder / f"{name}.port").read_text())
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    samples = [(family.type, sample) for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: (sample.value, sample.labels, kind) for kind, sample in samples}


# ── JSON lines ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_each_record_is_one_line_and_readable_at_once(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.write(1, {"reward": 0.25, "lag/by_pool/far": 3})
        until(lambda: len(read_metrics(tmp_path / "learner.jsonl")) == 2)
        assert read_metrics(tmp_path / "learner.jsonl")[1:] == [
            {"time": 1000.0, "step": 1, "reward": 0.25, "lag/by_pool/far": 3}
        ]
        metrics.event("swap", {"version_step": 1, "canary/mean_abs_diff": 1e-6})
        metrics.write(None, {"rollouts": 8})
    lines = (tmp_path / "learner.jsonl").read_text().splitlines()
    assert [sorted(json.loads(line)) for line in lines[2:-1]] == [
        ["canary/mean_abs_diff", "event", "time", "version_step"],
        ["rollouts", "time"],
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.write(
            1, {"a": float("nan"), "b": np.float32("inf"), "c": torch.tensor(float("nan")), "d": [1.0, -np.inf]}
        )
    assert '"a": null, "b": null, "c": null, "d": [1.0, null]' in (tmp_path / "learner.jsonl").read_text()


def test_scalars_of_numpy_and_torch_are_plain_numbers(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.write(1, {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.0), "d": np.bool_(True)})
    assert written(tmp_path)[0] == {
        "time": 1000.0, "step": 1, "a": 0.5, "b": 3, "c": 2.0, "d": True,
    }  # fmt: skip


@pytest.mark.parametrize("torn", ['{"step": 2, "rew', '{"step": 2, "reward": 0.5}'], ids=["half", "without newline"])
def test_torn_last_line_is_cut_when_the_file_is_opened_again(tmp_path, torn):
    (tmp_path / "learner.jsonl").write_text('{"step": 1}\n' + torn)
    with open_metrics(tmp_path) as metrics:
        metrics.write(2, {"reward": 1.0})
    records = [json.loads(line) for line in (tmp_path / "learner.jsonl").read_text().splitlines()]
    assert [records[0], records[2]] == [{"step": 1}, {"time": 1000.0, "step": 2, "reward": 1.0}]


def test_reader_ignores_a_half_written_line_and_a_missing_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 1}\n\n[1]\n\xff\xfe\n{"step": 2}\n{"st')
    assert [r["step"] for r in read_metrics(tmp_path / "a.jsonl")] == [1, 2]
    assert read_metrics(tmp_path / "b.jsonl") == []


def test_resumed_learner_supersedes_the_steps_it_repeats(tmp_path):
    # Steps 1..5, a swap in between, then a crash and a resume from the checkpoint of step 2; step 5 is not repeated yet.
    lines = [
        {"step": 1},
        {"step": 2},
        {"step": 3, "r": 0},
        {"event": "crash"},
        {"step": 4, "r": 0},
        {"step": 5, "r": 0},
    ]
    lines += [{"step": 3, "r": 1}, {"step": 4, "r": 1}]
    (tmp_path / "learner.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path / "learner.jsonl") == [
        {"step": 1}, {"step": 2}, {"event": "crash"}, {"step": 3, "r": 1}, {"step": 4, "r": 1},
    ]  # fmt: skip


def test_batches_without_a_step_are_all_kept(tmp_path):
    with open_metrics(tmp_path) as metrics:
        for _ in range(3):
            metrics.write(None, {"version_step": 7})
    assert len(written(tmp_path)) == 3


def test_file_says_when_a_process_started_and_stopped(tmp_path):
    for _ in range(2):
        with open_metrics(tmp_path):
            pass
    assert [r["event"] for r in read_metrics(tmp_path / "learner.jsonl")] == ["start", "stop", "start", "stop"]


@pytest.fixture
def full_disk():
    """Files may have 20 bytes: the kernel takes so many and refuses the rest, until the test makes room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_the_disk_does_not_take_whole_leaves_nothing_behind(tmp_path, full_disk):
    lines = JsonLines(tmp_path / "learner.jsonl")
    lines.write({"step": 1})
    for _ in range(2):
        with pytest.raises(OSError, match=r"No space left|File too large"):
            lines.write({"step": 2})
    assert (tmp_path / "learner.jsonl").read_text() == '{"step": 1}\n'
    full_disk()
    lines.write({"step": 2})
    lines.close()
    assert [record["step"] for record in read_metrics(tmp_path / "learner.jsonl")] == [1, 2]


def test_a_full_disk_is_told_once_and_nothing_is_missing_once_there_is_room(tmp_path, full_disk, caplog):
    caplog.set_level(logging.INFO)
    file = tmp_path / "learner.jsonl"
    lines = Background(str(file), lambda: JsonLines(file), pauses_s=(0.02,))
    started = time.monotonic()
    for step in range(1, 6):
        lines.write({"step": step, "reward": 0.5})
    assert time.monotonic() - started < 1
    until(lambda: "cannot be written" in caplog.text)
    time.sleep(0.2)  # some more tries
    full_disk()
    until(lambda: len(read_metrics(file)) == 5)
    lines.close()
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3, 4, 5]
    assert caplog.text.count("cannot be written") == 1
    assert "written again" in caplog.text


def test_a_place_that_never_answers_holds_up_neither_the_work_nor_its_end(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("heterorl.monitoring.background._UNOPENED_S", 0.2)
    hangs = Background("board", lambda: time.sleep(600), room=3)
    started = time.monotonic()
    for step in range(5):
        hangs.write({"step": step})
    hangs.close()
    assert time.monotonic() - started < 2
    assert "board: 5 records were not written" in caplog.text  # three wait, two had no room


def test_a_metrics_folder_that_cannot_be_made_is_told_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "metrics").write_text("a file stands here")
    with open_metrics(tmp_path / "metrics", MonitoringSpec()) as metrics:
        metrics.write(1, {"reward": 1.0})
        until(lambda: caplog.text.count("cannot be written") == 2)
    assert "training continues" in caplog.text


def test_without_sinks_nothing_happens():
    with Metrics() as metrics:
        metrics.write(1, {"reward": 1.0})
        metrics.event("swap", {})


# ── Prometheus ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_metrics_page_shows_the_last_values_with_labels(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.write(1, {"rewards/accuracy/mean": 0.5, "num_tokens": 100, "loss": 1.0})
        metrics.write(2, {"rewards/accuracy/mean": 0.75, "num_tokens": 260, "loss": float("nan"), "text": "x"})
        metrics.event("swap", {"fetch_s": 0.5})
        metrics.event("swap", {"fetch_s": 0.25})
        page = scrape(tmp_path)
    labels = {"run": "quick", "process": "learner"}
    assert page["heterorl_rewards_accuracy_mean"] == (0.75, labels, "gauge")
    assert page["heterorl_step"] == (2, labels, "gauge")
    assert page["heterorl_num_tokens_total"] == (260, labels, "counter")
    assert page["heterorl_loss"] == (1.0, labels, "gauge")
    assert page["heterorl_events_total"] == (2, labels | {"event": "swap"}, "counter")
    assert page["heterorl_swap_fetch_s"] == (0.25, labels, "gauge")
    assert page["process_resident_memory_bytes"][0] > 1e6
    assert not any("text" in name for name in page)


def test_two_processes_with_one_configured_port_both_serve(tmp_path, caplog):
    with open_metrics(tmp_path) as first:
        first.write(1, {"loss": 1.0})
        taken = MonitoringSpec(tensorboard=False, prometheus_port=int((tmp_path / "learner.port").read_text()))
        with open_metrics(tmp_path, taken, name="sampler-far-0") as second:
            second.write(None, {"loss": 2.0})
            assert scrape(tmp_path, "sampler-far-0")["heterorl_loss"][0] == 2.0
    assert "taking any free one" in caplog.text


def test_port_is_noted_only_while_it_is_served(tmp_path):
    with open_metrics(tmp_path):
        assert (tmp_path / "learner.port").exists()
    assert not (tmp_path / "learner.port").exists()


# ── TensorBoard, W&B ─────────────────────────────────────────────────────────────────────────────────────────────────
def read_scalars(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboardX.proto.event_pb2 import Event

    scalars = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 12 + length + 4
    return scalars


def test_tensorboard_holds_numbers_by_step(tmp_path):
    with open_metrics(tmp_path, MonitoringSpec()) as metrics:
        metrics.write(10, {"reward": 0.25, "loss": None, "text": "x"})
        metrics.event("swap", {"fetch_s": 1.0})
        metrics.write(11, {"reward": 0.5})
    assert read_scalars(tmp_path / "tensorboard" / "learner") == [("reward", 10, 0.25), ("reward", 11, 0.5)]


def test_a_full_tensorboard_folder_ends_nothing_and_is_written_again(tmp_path, full_disk, caplog, monkeypatch):
    monkeypatch.setattr("heterorl.monitoring.boards._FLUSH_S", 0.0)
    board = Background("board", lambda: TensorBoard(tmp_path / "board"), pauses_s=(0.02,))
    board.write({"time": 1.0, "step": 1, "reward": 0.25})
    until(lambda: "board cannot be written" in caplog.text)
    full_disk()
    board.write({"time": 2.0, "step": 2, "reward": 0.5})
    board.close()
    assert read_scalars(tmp_path / "board") == [("reward", 1, 0.25), ("reward", 2, 0.5)]


def test_process_without_tensorboard_installed_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    caplog.set_level(logging.INFO, "heterorl.monitoring.metrics")
    with open_metrics(tmp_path, MonitoringSpec()) as metrics:
        metrics.write(1, {"reward": 0.25})
    assert "tensorboardX is not installed" in caplog.text


WANDB = MonitoringSpec(tensorboard=False, wandb={"project": "far", "mode": "offline"})


def test_wandb_that_is_configured_but_missing_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb, or remove the project"):
        open_metrics(tmp_path, WANDB, to_wandb=True)
    assert not list(tmp_path.iterdir())
    open_metrics(tmp_path, WANDB).close()  # only the process that was asked to reports there


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """No way to log in to W&B, and what it keeps stays in the test's folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def online(**more):
    return WandbSpec(project="far", **more)


@pytest.mark.usefixtures("no_key")
def test_wandb_online_without_a_key_is_the_users_error_and_no_server_is_asked(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no API key .*WANDB_API_KEY.*mode: offline"):
        check_wandb(online())
    check_wandb(online(mode="offline"))
    check_wandb(WandbSpec())  # no project: off
    (tmp_path / "netrc").write_text("machine wandb.example login user password secret\n")
    check_wandb(online())
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password secret\n")
    with pytest.raises(UserError):
        check_wandb(online())
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    check_wandb(online())


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize(
    ("variable", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("", "online")]
)
def test_wandb_mode_of_the_environment_goes_before_the_specs(monkeypatch, variable, mode):
    monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(online()) == mode


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("own_logging")
def test_logs_are_lines_for_people(capsys):
    setup_logging("far-0")
    logging.getLogger("heterorl_sampler.loop").info("adopted %s", "v00000012-i0001")
    logging.getLogger("heterorl").warning("slow volume")
    logging.getLogger("urllib3").info("noise")
    first, second = capsys.readouterr().err.splitlines()
    assert first[8:] == " far-0: adopted v00000012-i0001"
    assert second[8:] == " far-0: warning: slow volume"


@pytest.mark.usefixtures("own_logging")
def test_logs_are_json_lines_for_collectors(capsys, monkeypatch):
    monkeypatch.setenv("HETERORL_LOG_FORMAT", "json")
    setup_logging("learner")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("heterorl_learner").exception("step failed")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert (record["level"], record["process"], record["message"]) == ("error", "learner", "step failed")
    assert record["time"].endswith("+00:00")
    assert "ValueError: two\nlines" in record["exception"]
