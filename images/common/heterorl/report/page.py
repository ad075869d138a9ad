"""`heterorl report RUN...`: one or several runs as a single HTML file, which stands on the page of `heterorl ui`.

The file holds the page's modules and style and what they would ask the server, so it works without any. A run may be
going on, stopped or crashed: what is there is shown. Beside it, `report.png` is a picture for a README.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterorl.errors import RunFolderError
from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.json_lines import Record, read_metrics
from heterorl.monitoring.run_records import learner_file, read_samplers
from heterorl.report.bundle import script
from heterorl.report.comparison import comparison
from heterorl.report.rows import RESULTS, SETTINGS, Facts, model_name, table
from heterorl.report.series import read_run
from heterorl.report.summary import summarise
from heterorl.ui.columns import plain
from heterorl.ui.run_view import RunView, curves_of

PAGE = Path(__file__).parents[1] / "ui" / "page"
_POINTS = 200
"""Of a line of a chart."""
_STRETCHES = 300
"""Of a sampler's strip."""


def write_report(roots: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html`, and `report.png` where matplotlib is installed; returns the page.

    `out` is a folder, the first run's by default. Raises RunFolderError for a folder that holds no run or an `out` that
    cannot be written.
    """
    out = roots[0] if out is None else out
    names = names_of(roots)
    facts = [facts_of(root) for root in roots]
    page = render_page([RunView(name, root) for name, root in zip(names, roots)], facts)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page, encoding="utf-8")
        _draw(roots, names, facts, out / "report.png")
    except OSError as error:
        raise RunFolderError(
            f"{out}: cannot write the report: {error.strerror}; choose another folder with --out"
        ) from error
    return out / "report.html"


def _draw(roots: Sequence[Path], names: Sequence[str], facts: Sequence[Facts], path: Path) -> None:
    try:
        from heterorl.report.figures import draw
    except ModuleNotFoundError:
        return
    draw([read_run(root, name, about(fact)) for root, name, fact in zip(roots, names, facts)], path)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def names_of(roots: Sequence[Path]) -> list[str]:
    """The runs' names; where two are alike, those of their folders."""
    names = [Exchange(root).run.metadata.name for root in roots]
    return names if len(set(names)) == len(names) else [root.resolve().name for root in roots]


def facts_of(root: Path) -> Facts:
    """The run's summary with its spec, the software that made it, and when it began."""
    exchange = Exchange(root)
    learner = read_metrics(learner_file(exchange.metrics_dir))
    starts = [record for record in learner if record.get("event") == "start"]
    samplers = [record for found in read_samplers(exchange.metrics_dir).values() for record in found]
    dates = [record["time"] for record in starts if record.get("time")]
    return {
        **summarise(root),
        "spec": exchange.spec,
        "software": _software(samplers) | _software(starts),
        "date": min(dates, default=None),
    }


def _software(records: Sequence[Record]) -> dict[str, str]:
    """What the newest start says."""
    return next((record["software"] for record in reversed(records) if "software" in record), {})


def about(facts: Facts) -> str:
    """A run in a line."""
    spec, samplers = facts["spec"], len(facts["spec"].slots)
    steps = f"{facts['steps']:,} of {facts['steps_wanted']:,} steps"
    return (
        f"{spec.algorithm.loss.type} · {model_name(spec)} · {steps} · {samplers} sampler{'s' if samplers > 1 else ''}"
    )


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def answers(runs: Sequence[RunView], facts: Sequence[Facts]) -> dict[str, Any]:
    """What the modules would ask of the server, by what they ask, and what only the report shows (`report`)."""
    names = [run.name for run in runs]
    overviews = {run.name: run.overview() for run in runs}
    keys = sorted({key for overview in overviews.values() for key in overview["keys"]} | {"waiting"})
    return plain(  # type: ignore[no-any-return]
        {
            "run": overviews,
            "curves": {x: curves_of(runs, keys, x, None, None, _POINTS) for x in ("step", "time")},
            "timeline": {run.name: run.timeline(None, None, _STRETCHES) for run in runs},
            "report": {
                "names": names,
                "title": names[0] if len(names) == 1 else f"{len(names)} runs",
                "about": about(facts[0]) if len(names) == 1 else ", ".join(names),
                "comparison": comparison(names, [fact["evaluations"] for fact in facts]),
                "settings": table(SETTINGS, list(facts)),
                "results": table(RESULTS, list(facts)),
            },
        }
    )


def render_page(runs: Sequence[RunView], facts: Sequence[Facts]) -> str:
    """The page, self-contained."""
    carried = answers(runs, facts)
    held = json.dumps(carried, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    icon = base64.b64encode((PAGE / "icon.svg").read_bytes()).decode()
    title = html.escape(carried["report"]["title"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · HeteroRL</title>
<link rel="icon" href="data:image/svg+xml;base64,{icon}">
<style>
{(PAGE / "style.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main id="main"><noscript>The report is drawn by a script that this file holds; allow it to run.</noscript></main>
<div id="spoken" class="unseen" aria-live="polite"></div>
<script id="answers" type="application/json">{held}</script>
<script type="module">
{script(PAGE, "report")}</script>
</body>
</html>
"""
