"""The report: curves against values worked by hand, pictures and pages of runs in every state."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from builders import exchange_at, run_of
from heterorl.errors import RunFolderError
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, LearnerHeartbeat
from heterorl.exchange.version import Version
from heterorl.monitoring.series import active_clock, mean_of, series, smooth
from heterorl.report.bundle import script
from heterorl.report.comparison import comparison, mean_and_interval
from heterorl.report.page import PAGE, facts_of, names_of, render_page, write_report
from heterorl.report.series import RunSeries, lives, waiting_shares
from heterorl.ui.run_view import RunView


def make_run(root: Path, name: str = "quickstart", *, seed: int = 0, **spec) -> Path:
    """A run folder before its first step."""
    samplers = [
        {"name": "near", "engine": "transformers"},
        {"name": "far", "engine": "transformers", "delay": {"distribution": "lognormal", "lower": 60, "upper": 1920}},
    ]
    run = run_of(name, **{"seed": seed, "timeScale": 0.01, "samplers": samplers, "learner": {"steps": 40}, **spec})
    exchange_at(root, run).mark_prepared()
    (root / "metrics").mkdir()
    return root


def write_lines(root: Path, name: str, records: list[dict], tail: str = "") -> None:
    (root / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def fill(root: Path, steps: int = 40) -> Path:
    """Metrics as learner and samplers write them: a second a step, the far sampler swaps every tenth."""
    learner = [
        {
            "time": 1000.0 + step, "step": step, "reward": 0.2 + 0.01 * step, "loss": None, "step_time": 1.0,
            "lag/mean": step % 10 / 2, "lag/max": step % 10, "lag/by_pool/far": step % 10,
            "lag/by_pool/near": 0, "mismatch_kl": 1e-3, "weight/variance": 0.1 * step, "weight/ess": 0.9,
            "completions/mean_length": 12.0, "perf/rollout_wait_s": 0.25,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    write_lines(root, "learner", [{"event": "start", "time": 1000.0}, *learner])
    for slot, every in (("near-0", 1), ("far-0", 10)):
        records: list[dict] = [{"event": "start", "time": 1000.0}]
        for step in range(steps):
            held = step // every * every
            if held == step:
                swap = {"fetch_s": 0.1, "load_s": 0.1, "canary/mean_abs_diff": 1e-6 * (1 + step)}
                records.append({"event": "swap", "time": 1000.0 + step, "version_step": held, **swap})
            names = [f"{Version(held, 1)}--{slot}--s{step:010d}"]
            waits = {"rollout/backpressure_s": 0.5, "rollout/weights_wait_s": 0.0}
            work = {"rollout/generate_s": 0.4, "rollout/score_s": 0.1, "names": names}
            records.append({"time": 1000.5 + step, "version_step": held, **waits, **work})
        write_lines(root, f"sampler-{slot}", records)
    Exchange(root).write_learner(LearnerHeartbeat(step=steps))
    return root


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def page_of(*roots: Path) -> str:
    """The page without the seconds that a picture takes."""
    runs = [RunView(name, root) for name, root in zip(names_of(roots), roots)]
    return render_page(runs, [facts_of(root) for root in roots])


def carried_by(page: str) -> dict:
    """What the page's modules would ask a server for."""
    (held,) = re.findall(r'<script id="answers" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(held)


def cells(page: str, row: str) -> list[str]:
    report = carried_by(page)["report"]
    (found,) = [each for each in (*report["settings"], *report["results"]) if each["name"] == row]
    return found["cells"]


# ── curves ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_series_leaves_out_what_is_not_a_number():
    x, y = series([{"step": 1, "a": 2.0}, {"step": 2, "a": None}, {"a": 3}, {"step": 4, "a": 5}], "step", "a")
    assert (x.tolist(), y.tolist()) == ([1, 4], [2, 5])


def test_smoothing_is_an_exponential_mean_without_a_bias_at_the_start():
    assert smooth(np.full(50, 0.3)) == pytest.approx(0.3)
    # span 3, so weights 1, 2/3, 4/9: (2 + 0 * 2/3) / 1 = 2; (5 + 2 * 2/3) / (5/3) = 3.8
    assert smooth(np.array([2.0, 5.0])) == pytest.approx([2.0, 3.8])
    assert len(smooth(np.empty(0))) == 0


def test_mean_of_seeds_covers_what_all_of_them_reach():
    first = (np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0]))
    second = (np.array([1.0, 3.0]), np.array([10.0, 30.0]))
    x, y = mean_of([first, second, (np.empty(0), np.empty(0))])
    assert x.tolist() == [1, 2, 3]
    assert y.tolist() == [5.5, 11, 16.5]  # ((1, 2, 3) + (10, 20, 30)) / 2


def test_clock_cuts_the_time_a_run_was_stopped():
    # Ten records a second apart, a night off, ten more: at most a minute of the night is shown.
    clock = active_clock([*range(10), *range(30_000, 30_010)])
    assert clock(9) == 9
    assert clock(30_000) == 9 + 60
    assert clock(30_005) == 9 + 60 + 5


def test_slot_that_died_holds_nothing_until_it_is_back():
    records = [
        {"event": "start", "time": 0.0},
        {"event": "swap", "time": 1.0, "version_step": 0},
        {"time": 2.0, "version_step": 0},
        {"event": "start", "time": 9.0},
        {"event": "swap", "time": 10.0, "version_step": 5},
        {"event": "stop", "time": 12.0},
    ]
    assert lives(records) == [[(1.0, 0), (2.0, 0)], [(10.0, 5), (12.0, 5)]]


def test_waiting_is_a_share_of_each_sides_time():
    learner = [{"step": s, "time": 10.0 * s, "perf/rollout_wait_s": 3.0, "step_time": 4.0} for s in (1, 2, 3)]
    batch = {
        "rollout/backpressure_s": 1.0,
        "rollout/weights_wait_s": 1.0,
        "rollout/generate_s": 6.0,
        "rollout/score_s": 100.0,  # beside generation
    }
    samplers = {"far-0": [{"event": "start", "time": 9.0}, {"time": 15.0, **batch}]}
    shares = waiting_shares(RunSeries("a", "", learner, samplers, {}))
    assert [axis.tolist() for axis in shares["learner"]] == [[1, 2, 3], [0.75, 0.75, 0.75]]
    assert [axis.tolist() for axis in shares["far"]] == [[1.5], [0.25]]  # time 15 lies between steps 1 and 2


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lag32-gepo-s0", "lag32-gepo"),
        ("lag32-gepo-s12", "lag32-gepo"),
        ("a-seed3", "a"),
        ("1l2s", "1l2s"),
        ("s1", "s1"),
    ],
)
def test_names_that_differ_in_their_seed_belong_together(name, family):
    assert RunSeries(name, "", [], {}, {}).family == family


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_page_stands_alone_and_a_picture_lies_beside_it(tmp_path):
    root = fill(make_run(tmp_path / "run"))
    page_path = write_report([root])
    assert page_path == root / "report.html"
    page = page_path.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    assert "import {" not in page
    width, height = png_size(root / "report.png")
    assert 1500 <= width <= 2500
    assert height > 1000


def test_page_carries_every_curve_over_steps_and_over_time(tmp_path):
    curves = carried_by(page_of(fill(make_run(tmp_path / "run"))))["curves"]
    assert curves["step"]["reward"]["runs"][0]["raw"][0] == list(range(1, 41))
    assert curves["time"]["reward"]["runs"][0]["raw"][0] == list(range(40))  # a second a step
    for key in ("weight/ess", "completions/mean_length", "lag/by_pool/far", "waiting"):
        assert len(curves["step"][key]["runs"][0]["raw"][1]) == 40


def test_modules_become_one_script_in_the_order_of_their_imports(tmp_path):
    (tmp_path / "a.js").write_text('import { half } from "./c.js";\nimport { b } from "./b.js";\nb(half);\n')
    (tmp_path / "b.js").write_text('import { half, K } from "./c.js";\nexport async function b() { return half(K); }\n')
    (tmp_path / "c.js").write_text(
        "export const K = 4;\nexport function half(x) { return x / 2; }\nfunction own() {}\n"
    )
    bundled = script(tmp_path, "a")
    assert re.findall(r"^const (module_\w+) =", bundled, re.MULTILINE) == ["module_c", "module_b", "module_a"]
    assert "const { half, K } = module_c;\nasync function b()" in bundled
    assert "return { K, half };" in bundled
    assert not re.search(r"^(import|export) ", script(PAGE, "report"), re.MULTILINE)


def test_interval_is_students_and_a_single_seed_has_none():
    values = [0.5, 0.7, 0.6, 0.9]
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean, half) == (pytest.approx(0.675), pytest.approx((high - low) / 2, rel=1e-3))
    for count in (2, 31, 32, 200):
        _, half = mean_and_interval([0.0] * (count // 2) + [1.0] * (count - count // 2))
        expected = stats.t.ppf(0.975, count - 1) * stats.sem([0.0] * (count // 2) + [1.0] * (count - count // 2))
        assert half == pytest.approx(expected, rel=3e-3)
    assert mean_and_interval([0.5]) == (0.5, None)


def test_runs_are_compared_by_family_on_the_sets_that_all_seeds_have():
    def scores(**best):
        return {label: {"best": value, "last": value - 0.1, "gap": 0.1} for label, value in best.items()}

    found = comparison(["a-s0", "a-s1", "b"], [scores(sums=0.5, hard=0.2), scores(sums=0.7), scores(sums=0.4)])
    assert found["sets"] == ["sums"]
    assert [(row["family"], row["seeds"]) for row in found["rows"]] == [("a", 2), ("b", 1)]
    first, second = (row["sets"]["sums"] for row in found["rows"])
    # two values 0.2 apart: half of the interval is 12.706 x 0.1 x sqrt(2) / sqrt(2)
    assert first["best"] == (pytest.approx(0.6), pytest.approx(1.2706))
    assert first["gap"] == (pytest.approx(0.1), pytest.approx(0.0))
    assert second["last"] == (pytest.approx(0.3), None)


def test_table_says_what_the_run_came_to(tmp_path):
    page = page_of(fill(make_run(tmp_path / "run")))
    assert cells(page, "Steps") == ["40 of 40"]
    assert cells(page, "Reward, first → last tenth") == ["0.225 → 0.585"]  # steps 1..4 and 37..40 of 0.2 + 0.01 step
    assert cells(page, "Lag, mean and maximum") == ["2.2 and 9 steps"]  # mean of 0, 0.5, ..., 4.5
    assert cells(page, "Weight swaps by sampler") == ["far-0 4, near-0 40"]
    assert cells(page, "Largest canary difference") == ["4.0e-05"]
    assert cells(page, "Samplers") == [
        "near: 1 × transformers, no delay\nfar: 1 × transformers, lognormal delay, 0.6 to 19.2 s, hold"
    ]


def test_table_of_settings_says_how_the_run_was_made(tmp_path):
    root = fill(make_run(tmp_path / "run", generation={"temperature": 0.6, "topK": 20}))
    made_by = {"python": "3.11.2", "torch": "2.13.0", "commit": "f" * 40}
    start = {"event": "start", "time": 0.0, "software": made_by}
    lines = (root / "metrics" / "learner.jsonl").read_text()
    (root / "metrics" / "learner.jsonl").write_text(json.dumps(start) + "\n" + lines)
    page = page_of(root)
    expected = {
        "Training data": "sums of 2 digits, 4,096 problems", "Rewards": "accuracy × 1", "Temperature": "0.6, top-k 20",
        "Learning rate": "1e-06, constant, warm-up 3%", "Batch": "32 groups, 256 completions",
        "Group": "8 completions of a prompt", "Prompt template": "raw", "Versions": "python 3.11.2, torch 2.13.0",
        "Commit": "f" * 40, "Date": "1970-01-01 00:16 UTC",
    }  # fmt: skip
    assert {name: cells(page, name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert cells(page, "Loss")[0].startswith("gepo\n")


def test_several_runs_are_drawn_over_each_other(tmp_path):
    evaluated = {"data": {"evals": [{"label": "sums"}]}, "evaluation": {"everySteps": 20, "engine": "transformers"}}
    roots = []
    for loss, seed in (("gepo", 0), ("gepo", 1), ("grpo", 0)):
        algorithm = {"loss": {"type": loss}}
        root = make_run(
            tmp_path / f"{loss}-{seed}", f"late-{loss}-s{seed}", seed=seed, algorithm=algorithm, **evaluated
        )
        Exchange(fill(root)).write_eval(Version(20, 1), Evaluation(average=0.6, sets={"sums": {"mean": 0.6}}))
        roots.append(root)
    page = write_report(roots, tmp_path / "out").read_text()
    assert [loss.split()[0] for loss in cells(page, "Loss")] == ["gepo", "gepo", "grpo"]
    assert cells(page, "Seed") == ["0", "1", "0"]
    assert png_size(tmp_path / "out" / "report.png")[1] > 1000
    assert not (roots[0] / "report.html").exists()


def test_runs_of_one_name_go_by_their_folders(tmp_path):
    roots = [fill(make_run(tmp_path / folder)) for folder in ("monday", "tuesday")]
    assert carried_by(page_of(*roots))["report"]["names"] == ["monday", "tuesday"]


def test_evaluations_are_listed_by_best_last_and_gap(tmp_path):
    root = make_run(tmp_path / "run", data={"evals": [{"label": "sums"}]})
    for step, mean in ((0, 0.2), (20, 0.6), (40, 0.5)):
        Exchange(root).write_eval(Version(step, 1), Evaluation(average=mean, sets={"sums": {"mean": mean}}))
    assert cells(page_of(root), "Evaluation, best / last / gap") == ["sums: 0.600 / 0.500 / 0.100"]


def test_runs_that_crashed_or_have_only_begun_are_drawn_as_far_as_they_came(tmp_path):
    begun, crashed = make_run(tmp_path / "begun", "begun"), make_run(tmp_path / "crashed", "crashed")
    write_lines(crashed, "learner", [{"step": 1, "time": 5.0, "reward": None}], tail='{"step": 2, "rew')
    write_lines(crashed, "sampler-far-0", [{"event": "start", "time": 4.0}], tail='{"tim')
    (crashed / "runner.json").write_text(json.dumps({"status": "failed", "reason": "learner: <killed> & gone"}))
    page = write_report([begun, crashed]).read_text()
    assert cells(page, "Steps") == ["0 of 40", "0 of 40"]
    assert cells(page, "Reward, first → last tenth") == ["– → –", "– → –"]
    assert cells(page, "Status")[1] == "failed: learner: <killed> & gone"


@pytest.mark.parametrize("state", ["begun", "one step"])
def test_run_alone_is_drawn_however_little_there_is(tmp_path, state):
    root = make_run(tmp_path / "run")
    if state == "one step":
        fill(root, steps=1)
    assert png_size(write_report([root]).with_suffix(".png"))[1] > 1000


def test_folder_without_a_run_is_an_error_for_people(tmp_path):
    with pytest.raises(RunFolderError, match=r"run\.json is missing"):
        write_report([tmp_path])


def test_folder_that_cannot_be_written_is_an_error_for_people(tmp_path):
    (tmp_path / "out").write_text("a file stands here")
    with pytest.raises(RunFolderError, match="choose another folder with --out"):
        write_report([make_run(tmp_path / "run")], tmp_path / "out")
