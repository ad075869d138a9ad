"""Metrics files, the Prometheus page, TensorBoard and W&B; what was served is parsed by Prometheus' own parser."""

import json
import logging
import resource
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tensorboardX.proto.event_pb2 import Event, SessionLog

from builders import exchange_at, run_of
from heterorl.errors import UserError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation
from heterorl.exchange.version import Version
from heterorl.logs import setup_logging
from heterorl.monitoring.background import Background
from heterorl.monitoring.boards import TensorBoard, check_boards, wandb_mode
from heterorl.monitoring.json_lines import JsonLines, MetricsTail, read_metrics
from heterorl.monitoring.metrics import Metrics, conclude
from heterorl.monitoring.run_records import read_samplers
from heterorl.monitoring.run_story import RunStory
from heterorl.spec.run import MonitoringSpec, Slot

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


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ({"step": "x", "reward": 0.5}, {"reward": 0.5}),
        ({"step": 2, "reward": "abc", "loss": None}, {"step": 2, "loss": None}),
        ({"step": True, "time": [1], "kl": {}}, {}),
        ({"step": -3, "version_step": 2.5, "groups": "8"}, {}),
        ({"step": 10**400, "reward": 10**400}, {"step": 10**400}),
        ({"names": 5, "event": 1}, {}),
        ({"names": ["a", 1]}, {}),
        ({"names": ["a"], "event": "swap", "version": "v1"}, {"names": ["a"], "event": "swap", "version": "v1"}),
        ({"event": "start", "software": "none"}, {"event": "start"}),
        ({"of a later version": "words", "count": 3}, {"count": 3}),
    ],
)
def test_of_a_line_of_metrics_only_what_its_writer_writes_is_read(tmp_path, line, read):
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    assert read_metrics(tmp_path / "a.jsonl") == [read]
    assert MetricsTail(tmp_path / "a.jsonl").read() == [read]


def test_numbers_of_a_line_that_are_none_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1, "reward": NaN, "loss": Infinity, "kl": 0.5}\n')
    assert read_metrics(tmp_path / "a.jsonl") == [{"step": 1, "kl": 0.5}]


def test_a_copy_beside_a_slots_lines_and_a_folder_in_their_place_are_ignored(tmp_path):
    (tmp_path / "sampler-far-0.jsonl").write_text('{"names": []}\n')
    (tmp_path / "sampler-far-0 (copy).jsonl").write_text('{"names": ["twice"]}\n')
    (tmp_path / "sampler-near-0.jsonl").mkdir()
    assert read_samplers(tmp_path) == {Slot("far", 0): [{"names": []}], Slot("near", 0): []}


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


def test_a_place_that_never_answers_holds_up_neither_the_work_nor_its_end(caplog):
    hangs = Background("board", lambda: time.sleep(600), room=3, open_s=0.2)
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
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]


def test_tensorboard_holds_numbers_by_step(tmp_path):
    with open_metrics(tmp_path, MonitoringSpec()) as metrics:
        metrics.write(10, {"reward": 0.25, "loss": None, "text": "x"})
        metrics.event("swap", {"fetch_s": 1.0})
        metrics.write(11, {"reward": 0.5})
    assert read_scalars(tmp_path / "tensorboard" / "learner") == [("reward", 10, 0.25), ("reward", 11, 0.5)]


def events(folder: Path) -> list[Event]:
    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_tensorboard_of_the_learner_shows_settings_evaluations_completions_and_summary(tmp_path):
    exchange = exchange_at(tmp_path / "quick", run_of("quick", learner={"steps": 100}))
    exchange.mark_prepared()
    evaluate(exchange, 8, 0.5)
    log_group(exchange, step=9, text="It is 5")
    story = lambda: RunStory(exchange, lambda: {"steps": 10, "status": "running", "lag_max": 7.0})  # noqa: E731
    with open_metrics(exchange.metrics_dir, MonitoringSpec(), story=story) as metrics:
        metrics.write(10, {"reward": 0.25})
    folder = exchange.metrics_dir / "tensorboard" / "learner"
    assert read_scalars(folder)[0] == ("reward", 10, 0.25)
    assert ("eval/sums/mean", 8, 0.5) in read_scalars(folder)
    texts = {
        value.tag: (event.step, value.tensor.string_val[0].decode())
        for event in events(folder)
        for value in event.summary.value
        if value.tensor.string_val
    }
    assert "| algorithm.loss.type | gepo |" in texts["settings/text_summary"][1]
    step, shown = texts["completions/text_summary"]
    assert step == 9
    assert "    completion: It is 5" in shown
    assert texts["summary/text_summary"][1].splitlines()[2:] == ["| steps | 10 |", "| lag_max | 7.0 |"]
    assert any(value.tag == "_hparams_/session_start_info" for e in events(folder) for value in e.summary.value)


def test_a_board_opened_after_the_learner_has_left_hides_none_of_its_steps(tmp_path):
    exchange = exchange_at(tmp_path / "quick", run_of("quick"))
    exchange.mark_prepared()
    with open_metrics(exchange.metrics_dir, MonitoringSpec(), story=lambda: RunStory(exchange)) as metrics:
        metrics.write(10, {"reward": 0.25})
    evaluate(exchange, 10, 0.75)
    conclude(exchange, {"steps": 10})
    folder = exchange.metrics_dir / "tensorboard" / "learner"
    assert [e.step for e in events(folder) if e.session_log.status == SessionLog.START] == [10]
    assert read_scalars(folder) == [("reward", 10, 0.25), ("eval/average", 10, 0.75), ("eval/sums/mean", 10, 0.75)]


# ── what dashboards are told of a run ────────────────────────────────────────────────────────────────────────────────
def evaluate(exchange: Exchange, step: int, mean: float) -> None:
    (exchange.root / "evals").mkdir(exist_ok=True)
    result = Evaluation(average=mean, sets={"sums": {"mean": mean}})
    (exchange.root / "evals" / f"{Version(step, 1)}.json").write_bytes(result.to_bytes())


def log_group(exchange: Exchange, step: int, text: str = "5", **more: Any) -> None:
    completion = {"text": text, "reward": 1.0, "parts": {"accuracy": 1.0}, "advantage": 0.5, "truncated": False}
    group = {"step": step, "set": "sums", "prompt": "2+3=", "reference": "5", "completions": [completion], **more}
    with open(exchange.completions_file, "a") as file:
        file.write(json.dumps(group) + "\n")


def test_each_evaluation_is_told_once_and_a_damaged_one_not_at_all(tmp_path):
    exchange = exchange_at(tmp_path / "quick", run_of("quick"))
    story = RunStory(exchange)
    assert story.evaluations() == []
    evaluate(exchange, 0, 0.25)
    (exchange.root / "evals" / f"{Version(4, 1)}.json").write_bytes(b"\0\0")
    assert [(told["step"], told["eval/sums/mean"]) for told in story.evaluations()] == [(0, 0.25)]
    evaluate(exchange, 8, 0.5)
    assert [(told["step"], told["eval/average"]) for told in story.evaluations()] == [(8, 0.5)]


def test_a_hundredth_of_the_run_lies_between_two_tables_of_completions_but_for_the_last(tmp_path):
    exchange = exchange_at(tmp_path / "quick", run_of("quick", learner={"steps": 500}))
    story = RunStory(exchange)
    shown = []
    for step in range(1, 13):
        log_group(exchange, step)
        shown.append([row["step"] for row in story.completions()])
    assert shown == [[1], *[[]] * 4, [2, 3, 4, 5, 6], *[[]] * 4, [7, 8, 9, 10, 11], []]
    assert [row["step"] for row in story.completions(last=True)] == [12]
    assert story.completions(last=True) == []


def test_a_damaged_group_of_completions_is_left_out(tmp_path):
    exchange = exchange_at(tmp_path / "quick", run_of("quick"))
    log_group(exchange, 1, completions=[{"text": "no reward"}])
    log_group(exchange, 1, completions=7)
    log_group(exchange, 1, text="whole")
    assert [row["completion"] for row in RunStory(exchange).completions()] == ["whole"]


def test_settings_tell_what_a_run_does_and_nothing_of_where_or_with_which_secrets(tmp_path):
    template = {"env": [{"name": "TOKEN", "value": "hush"}]}
    run = run_of(
        "quick",
        learner={"podTemplate": template},
        samplers=[{"name": "near", "podTemplate": template}],
        credentials={"hubToken": {"name": "hub", "key": "token"}},
    )
    settings = RunStory(exchange_at(tmp_path / "quick", run)).settings
    assert settings["samplers"][0]["name"] == "near"
    assert "podTemplate" not in json.dumps(settings)
    assert not {"hush", "hub"} & set(json.dumps(settings).split('"'))


def test_a_run_keeps_its_name_on_dashboards_and_a_damaged_record_of_it_is_put_aside(tmp_path):
    exchange = exchange_at(tmp_path / "quick", run_of("quick"))
    first = exchange.board_id()
    assert first.startswith("quick-")
    assert Exchange(exchange.root).board_id() == first
    (exchange.metrics_dir / "board.json").write_bytes(b"\0" * 20)
    again = Exchange(exchange.root).board_id()
    assert again != first
    assert Exchange(exchange.root).board_id() == again
    assert (exchange.root / "quarantine/metrics/board.json").read_bytes() == b"\0" * 20


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


@pytest.mark.parametrize(("board", "install"), [("wandb", "wandb"), ("trackio", r"'heterorl\[trackio\]'")])
def test_a_dashboard_that_is_configured_but_missing_names_the_way_out(tmp_path, monkeypatch, board, install):
    monkeypatch.setitem(sys.modules, board, None)
    wanted = MonitoringSpec(tensorboard=False, **{board: {"project": "far"}})
    with pytest.raises(UserError, match=rf"{board}.project is set.*pip install {install}, or remove the project"):
        open_metrics(tmp_path, wanted, story=dict)
    assert not list(tmp_path.iterdir())
    open_metrics(tmp_path, wanted).close()  # only the process that was asked to reports there


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
    return MonitoringSpec(wandb={"project": "far", **more})


@pytest.mark.usefixtures("no_key")
def test_wandb_online_without_a_key_is_the_users_error_and_no_server_is_asked(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no API key .*WANDB_API_KEY.*mode: offline"):
        check_boards(online())
    check_boards(online(mode="offline"))
    check_boards(MonitoringSpec())  # no project: off
    (tmp_path / "netrc").write_text("machine wandb.example login user password secret\n")
    check_boards(online())
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password secret\n")
    with pytest.raises(UserError):
        check_boards(online())
    (tmp_path / "netrc").write_text("machine wandb.example login user\n")  # a name and no key
    with pytest.raises(UserError):
        check_boards(online())
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    check_boards(online())


@pytest.mark.usefixtures("no_key")
def test_the_key_of_a_wandb_server_on_a_port_is_found_under_host_and_port(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:8080")
    (tmp_path / "netrc").write_text("machine localhost:8080 login user password secret\n")
    check_boards(online())


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize(
    ("variable", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("", "online")]
)
def test_wandb_mode_of_the_environment_goes_before_the_specs(monkeypatch, variable, mode):
    monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(online().wandb) == mode


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
