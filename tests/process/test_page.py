"""The page of `heterorl ui` in a real browser: Debian's Chromium, without a window."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from heterorl.report.page import write_report
from run_folders import write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
PATIENCE_MS = 60_000


@contextmanager
def serving(*folders: Path) -> Iterator[str]:
    """`heterorl ui` on these folders; gives its address."""
    command = [sys.executable, "-m", "heterorl", "ui", "--port", "0", *map(str, folders)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.send_signal(signal.SIGINT)


@pytest.fixture
def expected_problems() -> list[str]:
    """Words of what the browser may report on its console."""
    return []


@pytest.fixture
def visit(browser: Any, expected_problems: list[str]) -> Iterator[Callable[..., Any]]:
    """Opens a page on run folders; the test fails if anything unexpected was reported on its console."""
    problems: list[str] = []
    with ExitStack() as stack:

        def open_page(*folders: Path, at: str = "#/", width: int = 1280, **context: Any) -> Any:
            address = stack.enter_context(serving(*folders))
            page = stack.enter_context(
                browser.new_context(viewport={"width": width, "height": 900}, **context)
            ).new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(address + at)
            return page

        yield open_page
    assert [problem for problem in problems if not any(words in problem for words in expected_problems)] == []


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 steps and 100,000 completions."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "long", steps=10_000, groups=12_500)
    return folder


def test_an_empty_folder_says_so_and_shows_a_run_once_there_is_one(tmp_path, visit):
    page = visit(tmp_path)
    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    write_run(tmp_path / "first", steps=20)
    expect(page.get_by_role("link", name="first")).to_be_visible()
    expect(page.get_by_text("20 of 20 steps")).to_be_visible()


def test_a_page_of_a_run_that_is_not_there_yet_shows_it_once_it_is(tmp_path, visit, expected_problems):
    expected_problems.append("404")
    page = visit(tmp_path, at="#/run/later/curves")
    expect(page.get_by_role("alert")).to_contain_text("there is no run 'later'")
    write_run(tmp_path / "later", steps=20)
    expect(page.get_by_role("region", name="Reward", exact=True).get_by_role("img")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_run_is_followed_while_it_goes_on(tmp_path, visit):
    steps = 30
    command = [
        *(sys.executable, "-m", "heterorl", "run", str(QUICKSTART), "--runs-dir", str(tmp_path), "--set", "name=live"),
        *("--set", f"learner.steps={steps}", "--set", "evaluation.everySteps=0", "--set", "data.evals=[]"),
        *("--set", "model.tiny.targetAccuracy=0", "--set", "learner.batch.groups=8"),
        *("--set", "monitoring.logCompletions.groupsPerStep=3"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        try:
            page = visit(tmp_path)
            page.set_default_timeout(5 * PATIENCE_MS)
            page.get_by_role("link", name="live").click()
            bar = page.get_by_role("progressbar").first
            seen = set()
            while (step := int(bar.get_attribute("aria-valuenow"))) < steps:
                seen.add(step)
                assert run.poll() in (None, 0)
                page.wait_for_timeout(200)
            assert len(seen) > 1, "never seen between its first and its last step"
            expect(page.get_by_text("succeeded")).to_be_visible(timeout=5 * PATIENCE_MS)
            assert run.wait() == 0
            page.get_by_role("link", name="Completions").click()
            expect(page.get_by_role("status").filter(has_text=f"completions in {3 * steps} groups")).to_be_visible()
        finally:
            run.terminate()


def test_completions_are_filtered_and_a_group_is_opened(long_run, visit):
    page = visit(long_run, at="#/run/long/completions")
    found = page.get_by_role("status").filter(has_text="completion")
    expect(found).to_have_text("100,000 completions in 12,500 groups")
    expect(page.get_by_role("listitem").filter(has_text="step")).to_have_count(25)
    page.get_by_role("combobox", name="Sampler pool").select_option("near")
    expect(found).to_have_text("50,000 completions in 6,250 groups")
    page.get_by_role("combobox", name="Completions").select_option("yes")
    expect(found).to_have_text("782 completions in 782 groups")  # 0, 16, ... below 12,500, all of them even
    page.get_by_role("button", name=re.compile("^reward 0:")).click()
    # completion 7 has reward 1 only where number % 9 is 8: number 80 and every 144th from there on, 87 of them
    expect(found).to_have_text("695 completions in 695 groups")
    page.get_by_role("button", name="Clear filters").click()
    expect(found).to_have_text("100,000 completions in 12,500 groups")
    page.get_by_label("From step").fill("1")
    page.get_by_label("To step").fill("1")
    page.get_by_label("To step").press("Enter")
    page.get_by_role("link", name=re.compile("What is 1 plus")).click()  # 2 groups a step or less: numbers 0 and 1
    expect(page.get_by_role("region", name="Reference")).to_contain_text("1")
    first = page.get_by_role("article", name="Completion 1,")
    expect(first).to_contain_text("advantage +0.875")
    expect(first).to_contain_text("format 1")
    expect(first.locator("pre")).to_have_text("1 plus 0 is ...")
    page.get_by_role("button", name="Ratio").click()
    expect(first.get_by_title("ratio 0.500")).to_have_text(" plus 0")
    page.get_by_role("button", name="Version").click()
    expect(first.get_by_title("v1")).to_have_count(2)
    assert "broken" not in page.title()  # what the model wrote is text, never markup


def test_groups_are_walked_through_by_keyboard(long_run, visit):
    page = visit(long_run, at="#/run/long/completions/100")
    expect(page.get_by_role("region", name="Prompt")).to_contain_text("What is 100 plus")
    page.keyboard.press("j")
    expect(page.get_by_role("region", name="Prompt")).to_contain_text("What is 99 plus")
    page.keyboard.press("Escape")
    expect(page.get_by_role("list", name="Groups")).to_be_visible()


def test_ten_thousand_steps_are_drawn_with_few_points_and_zoomed_into(long_run, visit):
    page = visit(long_run, at="#/run/long/curves")
    panel = page.get_by_role("region", name="Reward", exact=True)
    chart = panel.get_by_role("img")
    expect(chart).to_have_accessible_name(re.compile(r"^Reward\. Reward: 0\.\d+ at first, 0\.\d+ last"))
    lengths = panel.locator("path").evaluate_all("paths => paths.map(path => path.getAttribute('d').split('L').length)")
    assert lengths
    assert max(lengths) <= 400
    chart.focus()
    page.keyboard.press("ArrowRight")
    expect(panel.get_by_text(re.compile(r"^step 5,\d\d\d$"))).to_be_visible()
    page.keyboard.press("+")
    expect(page.get_by_role("button", name="Show all")).to_be_visible()
    ticks = panel.locator("text").all_inner_texts()
    assert "0" not in ticks[5:]
    page.keyboard.press("0")
    expect(page.get_by_role("button", name="Show all")).to_be_hidden()


def test_samplers_are_read_along_their_strip(long_run, visit):
    page = visit(long_run, at="#/run/long/samplers")
    strip = page.get_by_role("img", name=re.compile("^far-0: mean lag"))
    strip.focus()
    page.keyboard.press("End")
    expect(page.locator(".lanes")).to_contain_text(
        re.compile(r"far-0 at .*: holds v9,9\d0, \d+ steps behind the learner")
    )


def test_answers_of_evaluations_are_found_by_how_they_came_out_and_opened(tmp_path, visit):
    write_run(tmp_path / "evaluated", steps=40, problems=100)
    page = visit(tmp_path, at="#/run/evaluated/evaluation")
    found = page.get_by_role("status").filter(has_text="problem")
    expect(found).to_contain_text("100 problems")
    outcomes = page.get_by_role("group", name="How it was answered")
    outcomes.get_by_role("button", name=re.compile("^wrong")).click()
    expect(found).to_contain_text("20 problems")  # rows 0, 5, ...
    outcomes.get_by_role("button", name=re.compile("^better than at first")).click()
    expect(found).to_contain_text("40 problems")  # odd rows but 5, 15, ..., 95
    page.get_by_role("combobox", name="Weights of step").select_option("0")
    expect(found).to_contain_text("0 problems")
    outcomes.get_by_role("button", name=re.compile("^all")).click()
    page.get_by_role("searchbox", name="Find").fill("is 7 plus")
    expect(found).to_contain_text("1 problem;")
    page.get_by_role("link", name=re.compile("25% right: How much is 7 plus")).click()
    expect(page.get_by_role("region", name="Reference")).to_contain_text("7")
    last = page.get_by_role("region", name="Step 40")
    expect(last.get_by_role("article", name=re.compile("right$"))).to_have_count(2)
    expect(last.get_by_role("article", name="Completion 4, wrong")).to_contain_text("truncated")
    page.keyboard.press("Escape")
    expect(page.get_by_role("list", name="Problems")).to_be_visible()
    assert "broken" not in page.title()


def test_two_runs_are_compared(tmp_path, visit):
    write_run(tmp_path / "gepo-s0", steps=40, seed=0)
    write_run(tmp_path / "gepo-s1", steps=40, seed=1)
    write_run(tmp_path / "grpo-s0", steps=40, seed=0, algorithm={"loss": {"type": "grpo"}})
    page = visit(tmp_path)
    for name in ("gepo-s0", "gepo-s1", "grpo-s0"):
        page.get_by_role("checkbox", name=f"Compare {name}").check()
    page.get_by_role("button", name="Compare 3").click()
    expect(page.get_by_text("gepo (mean of 2 seeds)")).to_be_visible()
    reward = page.get_by_role("region", name="Reward", exact=True)
    expect(reward.get_by_role("img")).to_have_accessible_name(re.compile("grpo: .*; gepo: "))
    page.get_by_role("link", name="Settings").click()
    rows = page.get_by_role("row")
    expect(rows.filter(has_text="algorithm.loss.type")).to_contain_text("grpo")
    expect(rows.filter(has_text=re.compile("^seed"))).to_be_visible()
    expect(rows.filter(has_text="learningRate")).to_have_count(0)


@pytest.mark.parametrize("width", [1280, 400])
def test_a_report_is_one_file_that_draws_its_charts_without_a_server(tmp_path, browser, width):
    roots = [tmp_path / "gepo-s0", tmp_path / "gepo-s1", tmp_path / "grpo"]
    for seed, root in enumerate(roots):
        write_run(root, steps=60, seed=seed, algorithm={"loss": {"type": root.name.partition("-")[0]}})
    file = write_report(roots, tmp_path / "out")
    page = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(file.as_uri())
    reward = page.get_by_role("region", name="Reward", exact=True)
    expect(reward.get_by_role("img")).to_have_accessible_name(re.compile("gepo: 0.2.* last"))
    expect(page.get_by_role("region", name="Gradient norm").locator("path").first).to_be_attached()
    masked = page.get_by_role("region", name="Masked or rejected")
    expect(masked).to_contain_text("this run has no correction")
    assert masked.locator("svg").count() == 0
    # both seeds of gepo went from 0.2 to 0.7
    expect(page.get_by_role("region", name="Evaluation").get_by_role("row", name=re.compile("^gepo"))).to_contain_text(
        "0.700 ± 0"
    )
    expect(page.get_by_role("row", name=re.compile("^Learning rate"))).to_contain_text("1e-06")
    page.get_by_role("button", name="Time").click()
    expect(reward.locator("svg text").last).to_contain_text("min")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(CONTRAST) == []
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_damaged_files_leave_what_is_whole(tmp_path, visit):
    exchange = write_run(tmp_path / "hurt", steps=30, groups=4)
    with open(exchange.metrics_dir / "learner.jsonl", "ab") as file:
        file.write(b'\x00\xff{"step": 31\n{"step": 32, "reward": 0.9, "time": 1767225930}\n{"step": 33, "rew')
    with open(exchange.completions_file, "ab") as file:
        file.write(b'{"step": 3, "rollout": "x"}\n{"step"')
    (exchange.metrics_dir / "sampler-far-0.jsonl").write_bytes(b"\x00" * 100)
    broken = write_run(tmp_path / "broken", steps=3)
    broken.run_file.write_text('{"apiVersion": ')
    page = visit(tmp_path)
    expect(page.get_by_role("listitem").filter(has_text="broken")).to_contain_text("unreadable")
    page.get_by_role("link", name="hurt").click()
    chart = page.get_by_role("region", name="Reward", exact=True).get_by_role("img")
    expect(chart).to_have_accessible_name(re.compile("Reward"))
    page.get_by_role("link", name="Samplers").click()
    expect(page.get_by_role("img", name=re.compile("^near-0"))).to_be_visible()
    page.get_by_role("link", name="Completions").click()
    expect(page.get_by_text("32 completions in 4 groups; 1 damaged line was left out")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_a_phone_and_has_names_and_contrast(tmp_path, visit, scheme):
    write_run(tmp_path / "a-run-with-a-rather-long-name-s0", steps=30, groups=30, problems=30)
    page = visit(tmp_path, width=400, color_scheme=scheme)
    expect(page.get_by_role("link", name="a-run")).to_be_visible()
    for view in (
        "",
        *(
            f"run/a-run-with-a-rather-long-name-s0/{tab}"
            for tab in (
                "curves",
                "samplers",
                "completions",
                "completions/7",
                "evaluation",
                "evaluation/sums/7",
                "settings",
            )
        ),
    ):
        page.goto(re.sub("#.*", "", page.url) + f"#/{view}")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, view
        assert page.evaluate(UNNAMED) == [], view
        assert page.evaluate(CONTRAST) == [], view


UNNAMED = """() => [...document.querySelectorAll("button, a, input, select, svg[role=img], canvas")]
  .filter(e => e.checkVisibility() && !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
  .map(e => e.outerHTML.slice(0, 100))"""

# WCAG 2: 4.5 to 1 between a text's colour and the background that it stands on, 3 to 1 for what is large.
CONTRAST = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const found = new Set();
  for (const e of document.querySelectorAll("main *, header *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.checkVisibility() || e.closest(":disabled, svg, .unseen, .special")) continue;
    const style = getComputedStyle(e);
    if (!style.color.startsWith("rgb") || !style.backgroundColor.startsWith("rgb")) continue;
    const [a, b] = [light(parse(style.color).slice(0, 3)), light(behind(e).slice(0, 3))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.add(`${e.tagName}.${e.className}: ${ratio.toFixed(2)}`);
  }
  return [...found];
}"""


def test_a_page_opened_with_the_token_reads_runs_and_one_without_does_not(tmp_path, browser):
    write_run(tmp_path / "a", steps=5)
    command = [sys.executable, "-m", "heterorl", "ui", "--host", "0.0.0.0", "--port", "0", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()  # type: ignore[union-attr]
            assert re.fullmatch(r"http://0\.0\.0\.0:\d+/\?token=\S{16,}", address)
            page = browser.new_page()
            assert page.goto(address.partition("?")[0]).status == 401
            page.goto(address)
            expect(page.get_by_role("link", name="a", exact=True)).to_be_visible()
            assert "token" not in page.url
            page.close()
        finally:
            server.send_signal(signal.SIGINT)
