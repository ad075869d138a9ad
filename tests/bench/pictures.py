"""The pictures of README and docs/: the page, the report and the live view of real runs, and one on a cluster.

    python -m bench.pictures [--runs FOLDER] [--only page|cluster]      (with PYTHONPATH=tests)

Without a folder of runs it trains the quickstart three times, twice with GEPO and once with GSPO, and takes the live
view from the first while it goes on. Then it applies the quickstart to the test cluster, and shows what kubectl tells.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console, RenderableType
from rich.terminal_theme import MONOKAI
from rich.text import Text

from bench.page import ROOT
from bench.ui_speed import serving
from cluster import images
from cluster.harness import Cluster, Unavailable
from cluster.helm import CHART, VALUES, helm_in
from cluster.operators import status, wait_for
from heterorl.exchange.exchange import Exchange
from heterorl.local.attach import view_of
from heterorl.local.live_view import render
from heterorl.monitoring.progress import ProgressReader
from heterorl.monitoring.snapshot import SnapshotReader
from heterorl.report.page import write_report

PICTURES = ROOT / "docs" / "pictures"
RUNS = {"gepo-s0": ("gepo", 0), "gepo-s1": ("gepo", 1), "gspo-s0": ("gspo", 0)}
SHOWN_AT = 120
"""The step of the live view."""
COLUMNS = (60, 80, 120)
PATIENCE_MS = 180_000
# name: address, width, height, theme
SHOTS = {
    "runs": ("#/", 1200, 420, "light"),
    "curves": ("#/run/{first}/curves", 1280, 1000, "light"),
    "samplers": ("#/run/{first}/samplers", 1200, 560, "light"),
    "completions": ("#/run/{first}/completions", 1200, 760, "light"),
    "group": ("#/run/{first}/completions/1500", 1200, 760, "dark"),
    "evaluation": ("#/run/{first}/evaluation", 1200, 900, "light"),
    "compare": ("#/compare/{all}/curves", 1280, 1000, "dark"),
    "phone": ("#/run/{first}/curves", 400, 860, "light"),
}


def main() -> None:
    """Make them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder with the runs, trained before")
    parser.add_argument(
        "--only", choices=("page", "cluster"), help="page: without a cluster; cluster: its picture alone"
    )
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        if given.only != "cluster":
            shoot_pages(browser, given.runs, Path(folder))
        if given.only != "page":
            try:
                shoot_svg(browser, "kubectl", terminal(on_cluster(), 100))
            except Unavailable as error:
                print(f"no picture of kubectl: {error}")
        browser.close()
    print(f"{sum(path.stat().st_size for path in PICTURES.iterdir()):,} bytes in {PICTURES}")


def shoot_pages(browser: Any, runs: Path | None, scratch: Path) -> None:
    """Live view, page and report of runs, which are trained if there are none yet."""
    folder = runs or scratch / "runs"
    for name, svg in ({} if runs else train(folder)).items():
        shoot_svg(browser, name, svg)
    names = sorted(path.parent.name for path in folder.glob("*/run.json"))
    with serving(folder.resolve()) as address:
        for name, (place, width, height, theme) in SHOTS.items():
            shown = place.format(first=names[0], all=",".join(names))
            shoot(browser, name, f"{address}{shown}", width, height, theme)
    report = write_report([folder / name for name in names], scratch)
    shoot(browser, "report", report.as_uri(), 1280, 1000, "light")


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def train(folder: Path) -> dict[str, str]:
    """Train the runs; the live view of the first, in some widths, as SVG."""
    views: dict[str, str] = {}
    for name, (loss, seed) in RUNS.items():
        values = {
            "name": name, "algorithm.loss.type": loss, "seed": seed, "evaluation.everySteps": 50,
            "evaluation.samplesPerPrompt": 4, "evaluation.temperature": 0.6,
        }  # fmt: skip
        sets = [part for path, value in values.items() for part in ("--set", f"{path}={value}")]
        command = [sys.executable, "-m", "heterorl", "run", "examples/quickstart.yaml", "--runs-dir", str(folder)]
        with subprocess.Popen([*command, *sets], cwd=ROOT, stdout=subprocess.DEVNULL) as run:
            if not views:
                views = live_views(folder / name, run)
        if run.returncode:
            raise RuntimeError(f"{name} failed; see its logs in {folder / name}")
    return views


def live_views(root: Path, run: subprocess.Popen[bytes]) -> dict[str, str]:
    """What `heterorl attach` shows at a step, in each width."""
    while not (root / "metrics").is_dir():
        time.sleep(0.5)
    exchange = Exchange(root)
    while run.poll() is None and (exchange.learner is None or exchange.learner.step < SHOWN_AT):
        time.sleep(0.2)
    snapshot, progress = SnapshotReader(exchange).read(), ProgressReader(exchange).read()
    state = view_of(snapshot, exchange.runner)
    return {
        f"live-{width}": terminal(
            render(root.name, f"Ctrl-C stops cleanly · runs/{root.name}", progress, state, width), width
        )
        for width in COLUMNS
    }


def on_cluster() -> str:
    """What kubectl tells of the quickstart at a step, on the test cluster with the chart installed."""
    archive = images.build_archive()
    with Cluster("node") as cluster:
        assert cluster.node is not None
        cluster.node.load_image(archive)
        place = ("--namespace", "heterorl-system", "--create-namespace", "--wait", "--timeout", "180s")
        helm_in(cluster.folder)("install", "heterorl", CHART, *place, values=VALUES, kubeconfig=cluster.kubeconfig)
        cluster.kubectl("create", "namespace", "training")
        with images.site(cluster, "training") as site:
            quickstart = str(ROOT / "examples" / "quickstart.yaml")
            manifest = json.loads(cluster.kubectl("create", "--dry-run=client", "-o", "json", "-f", quickstart))
            manifest["spec"]["exchange"]["volume"]["accessModes"] = ["ReadWriteMany"]  # what the volumes here offer
            site.adopt(manifest)
            cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
            wait_for(lambda: trained(cluster) >= SHOWN_AT, f"step {SHOWN_AT}", 600)
            commands = ("get hrl", "get pods -l heterorl.dev/run=quickstart")
            told = [f"$ kubectl {line}\n{cluster.kubectl(*line.split(), '-n', 'training')}" for line in commands]
    return "\n".join(told)


def trained(cluster: Cluster) -> int:
    return int(status(cluster, "training", "quickstart").get("learner", {}).get("step") or 0)


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def terminal(content: RenderableType, columns: int) -> str:
    """A terminal's window with this in it, as SVG that loads no font."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(content) if isinstance(content, str) else content)
    return re.sub(
        r"@font-face \{.*?\}", "", console.export_svg(title=f"{columns} columns", theme=MONOKAI), flags=re.DOTALL
    )


def shoot_svg(browser: Any, name: str, svg: str) -> None:
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    page = browser.new_page(viewport={"width": round(width), "height": round(height)})
    page.set_content(f"<body style='margin:0;background:transparent'>{svg}</body>")
    save(name, page.screenshot(omit_background=True), colours=64)
    page.close()


def shoot(browser: Any, name: str, address: str, width: int, height: int, theme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.locator("main .card").first.wait_for()
    page.wait_for_timeout(4000)  # what is asked for once a panel is seen
    save(name, page.screenshot())
    context.close()


def save(name: str, png: bytes, colours: int = 128) -> None:
    """As a PNG with a palette, which is a third of the size."""
    image = Image.open(io.BytesIO(png))
    method = Image.Quantize.FASTOCTREE if image.mode == "RGBA" else Image.Quantize.MEDIANCUT
    image.quantize(colours, method=method, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
