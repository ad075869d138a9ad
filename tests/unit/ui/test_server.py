"""The addresses of `heterorl ui`: what they answer of runs in every state, and who is let in."""

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from builders import exchange_at, run_of
from heterorl.errors import RunFolderError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, LearnerHeartbeat, RunnerState, SlotStatus
from heterorl.exchange.version import Version
from heterorl.spec.run import Slot
from heterorl.ui.library import Library
from heterorl.ui.listing import print_runs
from heterorl.ui.server import build_app

HERE = "http://127.0.0.1"


def make_run(root: Path, name: str = "", *, steps: int = 20, status: str | None = "running", **spec: Any) -> Exchange:
    """A run's folder after these steps: reward step / 100, a second a step."""
    run = run_of(name or root.name, **{"learner": {"steps": 100}, **spec})
    exchange = exchange_at(root, run)
    exchange.mark_prepared()
    exchange.metrics_dir.mkdir()
    lines = [{"step": s, "time": 1000.0 + s, "reward": s / 100, "lag/mean": 2.0, "step_time": 1.0,
              "perf/rollout_wait_s": 0.25} for s in range(1, steps + 1)]  # fmt: skip
    (exchange.metrics_dir / "learner.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exchange.write_learner(LearnerHeartbeat(step=steps, steps=100))
    if status:
        exchange.save_runner(RunnerState(status=status, prepare_s=5.0, elapsed_s=60.0))
    return exchange


def client_of(*folders: Path, token: str | None = None, base: str = HERE) -> TestClient:
    return TestClient(build_app(Library(folders), token=token), base_url=base, follow_redirects=False)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(tmp_path)


def get(client: TestClient, address: str, **parameters: Any) -> Any:
    answer = client.get(f"/api/{address}", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ── which runs ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_empty_folder_has_no_runs_and_one_that_comes_later_is_found(tmp_path, client):
    assert get(client, "runs") == {"folders": [str(tmp_path)], "runs": []}
    make_run(tmp_path / "a")
    assert [run["id"] for run in get(client, "runs")["runs"]] == ["a"]


def test_the_folder_in_which_the_page_was_started_is_shown_by_its_whole_name(tmp_path, client, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get(client, "runs")["folders"] == [str(tmp_path)]


def test_runs_are_found_by_themselves_below_a_folder_and_below_that(tmp_path):
    make_run(tmp_path / "x" / "deep" / "a")
    make_run(tmp_path / "b")
    assert [run["id"] for run in get(client_of(tmp_path / "x", tmp_path / "b"), "runs")["runs"]] == ["b", "deep/a"]


def test_two_runs_of_one_name_from_different_folders_are_both_shown(tmp_path):
    first, second = make_run(tmp_path / "x" / "a", steps=3), make_run(tmp_path / "y" / "a", steps=5)
    runs = get(client_of(first.root, second.root), "runs")["runs"]
    assert len({run["id"] for run in runs}) == 2
    assert {run["step"] for run in runs} == {3, 5}


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is not a folder"):
        Library([tmp_path / "nowhere"])


# ── the state of a run ───────────────────────────────────────────────────────────────────────────────────────────────
def test_a_card_says_how_far_a_run_is(tmp_path, client):
    make_run(tmp_path / "gepo-s1")
    (card,) = get(client, "runs")["runs"]
    assert {key: card[key] for key in ("state", "step", "steps", "loss", "samplers", "family", "lag")} == {
        "state": "running", "step": 20, "steps": 100, "loss": "gepo", "samplers": 1, "family": "gepo", "lag": 2.0,
    }  # fmt: skip
    assert card["reward"] == pytest.approx(0.105)  # mean of 0.01 to 0.20
    assert len(card["spark"]) == 20


def test_a_run_whose_files_no_longer_change_shows_no_sign_of_life(tmp_path, client):
    exchange = make_run(tmp_path / "a")
    old = time.time() - 3600
    for path in exchange.root.rglob("*"):
        os.utime(path, (old, old))
    (card,) = get(client, "runs")["runs"]
    assert card["state"] == "silent"
    assert "nothing was written since" in card["why"]


@pytest.mark.parametrize("status", ["succeeded", "failed", "stopped"])
def test_a_run_that_ended_is_shown_as_it_ended(tmp_path, client, status):
    exchange = make_run(tmp_path / "a")
    exchange.save_runner(RunnerState(status=status, reason="the disk is full"))
    (card,) = get(client, "runs")["runs"]
    assert (card["state"], card["why"]) == (status, "" if status == "succeeded" else "the disk is full")


def test_a_run_on_kubernetes_has_no_runner_and_is_running_while_it_writes(tmp_path, client):
    make_run(tmp_path / "a", status=None)
    assert get(client, "runs")["runs"][0]["state"] == "running"


@pytest.mark.parametrize("manifest", ["", "{", '{"apiVersion": "other/v1"}', "[]"])
def test_a_manifest_that_cannot_be_read_spoils_no_other_run(tmp_path, client, manifest):
    make_run(tmp_path / "good")
    bad = make_run(tmp_path / "bad")
    bad.run_file.write_text(manifest)
    found = {run["id"]: run for run in get(client, "runs")["runs"]}
    assert found["good"]["state"] == "running"
    assert found["bad"]["state"] == "unreadable"
    assert found["bad"]["why"]
    assert get(client, "run", run="bad")["state"] == "unreadable"


def test_a_damaged_and_a_half_written_line_leave_the_others(tmp_path, client):
    exchange = make_run(tmp_path / "a", steps=3)
    with open(exchange.metrics_dir / "learner.jsonl", "ab") as file:
        file.write(b'{"step": 4, "rew\x00\xff\n{"step": 5, "reward": 0.5}\n[1]\n{"step": 6, "reward": 0.')
    answer = get(client, "curves", run="a", key="reward")
    assert answer["reward"]["runs"][0]["raw"] == [[1, 2, 3, 5], [0.01, 0.02, 0.03, 0.5]]


def test_what_is_in_the_way_is_said_in_the_words_of_the_live_view(tmp_path, client):
    exchange = make_run(tmp_path / "a")
    with open(exchange.metrics_dir / "learner.jsonl", "a") as file:
        file.write('{"event": "start", "time": 1000.0}\n')
    Exchange(exchange.root, clock=lambda: 1020.0).write_learner(LearnerHeartbeat(step=20, steps=100))
    lease = exchange.acquire_slot(lambda: [Slot("far", 0)])
    assert lease is not None
    exchange.beat(lease, SlotStatus(state="waiting: queue"))
    (words,) = get(client, "run", run="a")["in_the_way"]
    assert words.startswith("no step since 00:17 UTC: ")  # 1020 s after the epoch
    assert "far-0 is waiting: queue (serves no weights)" in words


def test_an_overview_has_samplers_evaluations_and_means_over_tenths(tmp_path, client):
    exchange = make_run(tmp_path / "a")
    exchange.write_eval(Version(0, 1), Evaluation(average=0.25, sets={"sums": {"mean": 0.25}}))
    run = get(client, "run", run="a")
    assert run["rewards"] == pytest.approx([0.015, 0.195])  # of steps 1, 2 and 19, 20
    assert run["evaluations"] == [{"step": 0, "sets": {"sums": {"mean": 0.25}}}]
    assert [slot["slot"] for slot in run["slots"]] == ["far-0"]
    assert "evaluation/sums" in run["keys"]
    assert run["elapsed_s"] == 65.0


def test_runs_are_listed_in_the_terminal_with_the_reason_below(tmp_path):
    make_run(tmp_path / "good")
    make_run(tmp_path / "bad").save_runner(RunnerState(status="failed", reason="the disk is full"))
    console = Console(file=io.StringIO(), width=80)
    print_runs([tmp_path], console)
    printed = console.file.getvalue()
    assert re.search(r"good +running +20/100 +0\.105 +2\.0 +\d+ s ago", printed)
    assert re.search(r"bad +failed", printed)
    assert printed.endswith("bad: the disk is full\n")
    print_runs([tmp_path / "good" / "metrics"], console)
    assert "no runs below" in console.file.getvalue()


# ── curves and settings ──────────────────────────────────────────────────────────────────────────────────────────────
def test_curves_of_seeds_come_with_their_mean(tmp_path, client):
    make_run(tmp_path / "gepo-s0", steps=4)
    make_run(tmp_path / "gepo-s1", steps=2)
    make_run(tmp_path / "grpo-s0", steps=2)
    answer = get(client, "curves", run=["gepo-s0", "gepo-s1", "grpo-s0"], key=["reward", "waiting"])
    assert [line["run"] for line in answer["reward"]["runs"]] == ["gepo-s0", "gepo-s1", "grpo-s0"]
    assert list(answer["reward"]["means"]) == ["gepo"]
    assert answer["reward"]["means"]["gepo"][0] == [1, 2]
    assert answer["waiting"]["runs"][0]["raw"] == [[1, 2, 3, 4], [0.25] * 4]


def test_curves_over_time_leave_out_the_time_a_run_was_stopped(tmp_path, client):
    exchange = make_run(tmp_path / "a", steps=3)
    with open(exchange.metrics_dir / "learner.jsonl", "a") as file:
        file.write('{"step": 4, "time": 90000.0, "reward": 0.5}\n')
    x, _ = get(client, "curves", run="a", key="reward", x="time")["reward"]["runs"][0]["raw"]
    assert x == [0, 1, 2, 62]  # a pause of a day counts as a minute


def test_ten_thousand_steps_are_answered_with_the_points_asked_for(tmp_path, client):
    make_run(tmp_path / "a", steps=10_000)
    for part in ({}, {"from": 2000, "to": 3000}):
        x, _ = get(client, "curves", run="a", key="reward", points=300, **part)["reward"]["runs"][0]["raw"]
        assert len(x) <= 300
        assert (x[0], x[-1]) == ((1, 10_000) if not part else (1999, 3001))


def test_settings_say_what_differs_from_the_defaults(tmp_path, client):
    make_run(tmp_path / "a", algorithm={"loss": {"type": "grpo"}})
    rows = {row["path"]: row for row in get(client, "settings", run="a")["a"]}
    assert (rows["algorithm.loss.type"]["value"], rows["algorithm.loss.type"]["default"]) == ("grpo", "gepo")
    assert rows["samplers.far.name"]["required"]
    differing = {path for path, row in rows.items() if row["differs"]}
    assert differing == {"algorithm.loss.type", "learner.steps", "samplers.far.name"}
    assert rows["learner.optimizer.learningRate"]["meaning"].startswith("Peak learning rate")


@pytest.mark.parametrize(
    ("address", "parameters", "status"),
    [
        ("run", {"run": "nobody"}, 404),
        ("run", {"run": "../a"}, 404),
        ("group", {"run": "a", "number": 99}, 404),
        ("curves", {"run": "a", "key": "reward", "x": "moon"}, 400),
        ("curves", {"run": "a", "key": "reward", "from": "nan"}, 400),
        ("completions", {"run": "a", "page": "x"}, 400),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(tmp_path, client, address, parameters, status):
    make_run(tmp_path / "a")
    assert client.get(f"/api/{address}", params=parameters).status_code == status


# ── who is let in ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("base", ["http://localhost:6070", "http://127.0.0.1:6070", "http://[::1]:6070"])
def test_this_machine_is_let_in_without_a_token(tmp_path, base):
    assert client_of(tmp_path, base=base).get("/api/runs").status_code == 200


def test_a_name_that_another_site_made_point_here_is_refused(tmp_path):
    assert client_of(tmp_path, base="http://evil.example:6070").get("/api/runs").status_code == 403


def test_the_token_is_asked_for_once_and_then_kept_in_a_cookie(tmp_path):
    client = client_of(tmp_path, token="secret", base="http://node.example:6070")
    for address in ("/", "/api/runs", "/page/main.js", "/?token=wrong", "/?token=s%C3%A9cret"):
        assert client.get(address).status_code == 401
    answer = client.get("/?token=secret")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert client.get("/api/runs").status_code == 200


def test_nothing_outside_the_page_is_served_and_nothing_is_written(tmp_path, client):
    exchange = make_run(tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in exchange.root.rglob("*") if path.is_file()}
    for address in ("/page/../server.py", "/page/%2e%2e/server.py", "/run.json", "/page/"):
        assert client.get(address).status_code in (404, 405), address
    assert client.post("/api/runs").status_code == 405
    for address in ("runs", "run?run=a", "timeline?run=a", "completions?run=a", "settings?run=a"):
        assert client.get(f"/api/{address}").status_code == 200
    assert {path: path.stat().st_mtime_ns for path in exchange.root.rglob("*") if path.is_file()} == before


def test_the_page_may_load_nothing_from_elsewhere(client):
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    page = Path(__file__).parents[3] / "images/common/heterorl/ui/page"
    for path in page.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, path.name
        assert "https://" not in text, path.name
