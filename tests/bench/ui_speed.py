"""How long the page of `heterorl ui` takes for an interaction with 10,000 steps and 100,000 completions, in Chromium; and
what the page costs a run: seconds of the quickstart with and without it open, in turn.

    python -m bench.ui_speed [--cost PAIRS]         (with PYTHONPATH=tests; writes the tables of docs/ui.md)
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from bench.page import ROOT, commit, machine, put
from run_folders import write_run

PAGE = ROOT / "docs" / "ui.md"
REPEATED = 9
# From the event to the frame after the one that shows what was waited for.
TIMED = """async ([act, changed]) => {
  const seen = new Function("return " + changed), perform = new Function(act);
  const before = performance.now(), state = seen();
  perform();
  while (seen() === state) {
    if (performance.now() - before > 20000) throw new Error("nothing changed: " + act);
    await new Promise(requestAnimationFrame);
  }
  await new Promise(requestAnimationFrame);
  return performance.now() - before;
}"""


@dataclass(frozen=True)
class Interaction:
    """Something that a reader does, and the JavaScript for it."""

    what: str
    place: str
    act: Callable[[int], str]
    """What is done the nth time."""
    changed: str
    """An expression whose value is another one when the page shows the result."""


def text(selector: str) -> str:
    return f"[...document.querySelectorAll({selector!r})].map(e => e.textContent).join()"


def click(*selectors: str) -> Callable[[int], str]:
    """Click these in turn."""
    return lambda n: f"document.querySelector({selectors[n % len(selectors)]!r}).click()"


def select(label: str, *values: str) -> Callable[[int], str]:
    """Choose these in turn."""
    return lambda n: (
        f"const s = [...document.querySelectorAll('label')].find(e => e.textContent.startsWith({label!r})).control;"
        f" s.value = {values[n % len(values)]!r}; s.dispatchEvent(new Event('change'))"
    )


def button(words: str) -> str:
    return f"[...document.querySelectorAll('button, nav a')].find(e => e.textContent.startsWith({words!r})).click()"


def key(where: str, name: str) -> str:
    return (
        f"const e = {where}; e.focus?.();"
        f" e.dispatchEvent(new KeyboardEvent('keydown', {{key: {name!r}, bubbles: true, cancelable: true}}))"
    )


RUN, CHART = "run/long-s0", "document.querySelector('.plot svg')"
PATHS = "[...document.querySelectorAll('.plot path')].map(e => e.getAttribute('d')).join()"
GROUPS = text(".groups, .pager")
INTERACTIONS = [
    Interaction("open a run from the list", "", click(".run a.name"), "document.querySelectorAll('.plot path').length > 4"),
    Interaction("curves: zoom", f"{RUN}/curves", lambda n: key(CHART, "+"), PATHS),
    Interaction("curves: over time, over steps", f"{RUN}/curves", lambda n: button(("Time", "Steps")[n % 2]), text(".plot svg")),
    Interaction("curves: raw, smoothed", f"{RUN}/curves", lambda n: button(("Raw", "Smoothed")[n % 2]), PATHS),
    Interaction("curves: next value by arrow key", f"{RUN}/curves", lambda n: key(CHART, "ArrowRight"), text(".now")),
    Interaction("curves of two runs: zoom", "compare/long-s0,long-s1/curves", lambda n: key(CHART, "+"), PATHS),
    Interaction("from curves to samplers and back", f"{RUN}/curves", lambda n: button(("Samplers", "Curves")[n % 2]),
                "[document.querySelectorAll('.lane svg').length > 0, document.querySelectorAll('.plot path').length > 4].join()"),
    Interaction("samplers: colour by waiting, by lag", f"{RUN}/samplers", lambda n: button(("Waiting", "Lag")[n % 2]), text(".scale")),
    Interaction("completions: filter by pool", f"{RUN}/completions", select("Sampler pool", "near", "far"), GROUPS),
    Interaction("completions: filter by reward", f"{RUN}/completions", click(".histogram button:first-child", ".histogram button:last-child"), GROUPS),
    Interaction("completions: next page", f"{RUN}/completions", lambda n: button("Older"), GROUPS),
    Interaction("completions: open a group", f"{RUN}/completions",
                lambda n: "document.querySelector('.groups a').click()", text(".text pre")),
    Interaction("completions: next group by key", f"{RUN}/completions/9000", lambda n: key("document", "j"), text(".text pre")),
    Interaction("completions: colour by ratio, by version", f"{RUN}/completions/9000", lambda n: button(("Ratio", "Version")[n % 2]),
                "[...document.querySelectorAll('.tok')].map(e => e.title).join()"),
    Interaction("evaluation: filter by outcome", f"{RUN}/evaluation", lambda n: button(("wrong", "right")[n % 2]), text(".problems")),
    Interaction("settings: all fields, what differs", f"{RUN}/settings", lambda n: "document.querySelector('.tools input[type=checkbox]').click()",
                "document.querySelectorAll('.settings tr').length"),
]  # fmt: skip
ONCE = ("open a run from the list", "completions: open a group")  # the page is loaded anew each time


# ── how long an interaction takes ────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`heterorl ui` on a folder; gives its address."""
    command = [sys.executable, "-m", "heterorl", "ui", "--port", "0", folder.name]
    with subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.send_signal(signal.SIGINT)


@contextmanager
def browsing() -> Iterator[Any]:
    """A page in a Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


def measure_interactions() -> list[tuple[str, list[float]]]:
    """Milliseconds of each, several times."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            write_run(Path(folder) / f"long-s{seed}", steps=10_000, groups=12_500, problems=1000, seed=seed)
        with serving(Path(folder)) as address, browsing() as page:
            return [(each.what, _times(page, address, each)) for each in INTERACTIONS]


def _times(page: Any, address: str, interaction: Interaction) -> list[float]:
    times = []
    for n in range(REPEATED + 1):
        if n == 0 or interaction.what in ONCE:
            page.goto("about:blank")
            page.goto(f"{address}#/{interaction.place}")
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(1500)
        times.append(page.evaluate(TIMED, [interaction.act(n), interaction.changed]))
        page.wait_for_timeout(200)
    print(
        f"{interaction.what:<44} {statistics.median(times[1:]):4.0f} ms, longest {max(times[1:]):4.0f} ms", flush=True
    )
    return times[1:]  # the first one reads the files


# ── what the page costs a run ────────────────────────────────────────────────────────────────────────────────────────
def measure_cost(pairs: int) -> list[tuple[float, float]]:
    """Seconds of the quickstart without the page and with it, one after the other."""
    return [(_quickstart(is_open=False), _quickstart(is_open=True)) for _ in range(pairs)]


def _quickstart(*, is_open: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        page = _page_on(Path(folder)) if is_open else nullcontext()
        command = [sys.executable, "-m", "heterorl", "run", "examples/quickstart.yaml", "--runs-dir", folder]
        with page:
            began = time.monotonic()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            took = time.monotonic() - began
    print(f"quickstart {'with' if is_open else 'without'} the page: {took:.1f} s", flush=True)
    return took


@contextmanager
def _page_on(folder: Path) -> Iterator[None]:
    """The curves of the run in a browser, from before its start, asking every two seconds as a reader's page does."""
    with serving(folder) as address, browsing() as page:
        page.goto(f"{address}#/run/quickstart/curves")
        yield


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────────
def interactions_table(found: list[tuple[str, list[float]]]) -> str:
    lines = ["| | median | longest |", "|---|---:|---:|"]
    lines += [f"| {what} | {statistics.median(times):.0f} ms | {max(times):.0f} ms |" for what, times in found]
    return "\n".join([*lines, "", f"{REPEATED} times each, {machine()}, commit {commit()}."])


def cost_table(pairs: list[tuple[float, float]]) -> str:
    lines = ["| quickstart | seconds | median |", "|---|---|---:|"]
    for name, times in zip(("without the page", "with it open"), zip(*pairs)):
        lines.append(f"| {name} | {', '.join(f'{each:.0f}' for each in times)} | {statistics.median(times):.0f} |")
    ratio = statistics.median(b / a for a, b in pairs)
    return "\n".join([*lines, "", f"In turn; median ratio {ratio:.3f}. {machine()}, commit {commit()}."])


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cost", type=int, metavar="PAIRS", help="measure what the page costs a run instead")
    pairs = parser.parse_args().cost
    if pairs:
        put(PAGE, "page cost", cost_table(measure_cost(pairs)))
    else:
        put(PAGE, "interactions", interactions_table(measure_interactions()))


if __name__ == "__main__":
    main()
