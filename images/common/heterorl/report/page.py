"""`heterorl report RUN...`: one or several runs as a PNG and as a self-contained HTML page.

A run may be going on, stopped or crashed: what is there is shown. Writes `report.png` and `report.html`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heterorl.errors import RunFolderError
from heterorl.exchange.exchange import Exchange
from heterorl.monitoring.run_records import read_samplers, read_steps
from heterorl.monitoring.snapshot import Snapshot, SnapshotReader
from heterorl.report.figures import draw
from heterorl.report.series import RunSeries
from heterorl.report.summary import summarise
from heterorl.spec.run import RunSpec, SamplerPoolSpec

Facts = dict[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 2rem auto; max-width: 1200px; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } .about { color: #57606a }
img { width: 100%; height: auto } .wide { overflow-x: auto } table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid #e8ebee }
th { font-weight: 600 } tbody th { color: #57606a; font-weight: 400; white-space: nowrap }
td { font-variant-numeric: tabular-nums } .bad { color: #b42318; font-weight: 600 } 
dt { font-weight: 600 } dd { margin: 0 0 .5rem }
"""

_HOW_TO_READ = {
    "Reward": "mean over the completions of a step; thin: every step, bold: smoothed.",
    "Lag": "learner step minus the step of the weights that generated the rollouts.",
    "KL divergence": "k3 estimate from sampler to learner on the rollouts of a step, before the update.",
    "Variance of the importance weight": "of the loss's own weights; it grows with the lag. GEPO's is not 0 at lag 0.",
    "Effective sample size": "as a fraction of the completions (of the tokens, for token-level ratios) of a step.",
    "Waiting": "the learner for rollouts, samplers for room in the queue or for weights; the bottleneck never waits.",
    "Weights version by process": "each step up is a swap; the gap below the learner is the lag of new rollouts.",
}


def write_report(roots: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the runs over each other; returns the page. `out` is a folder, the first run's by default.

    Raises RunFolderError for a folder that holds no run or an `out` that cannot be written.
    """
    runs, facts = read_runs(roots)
    out = roots[0] if out is None else out
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw(runs, out / "report.png")
        page = out / "report.html"
        page.write_text(render_page(runs, facts, (out / "report.png").read_bytes()), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"{out}: cannot write the report: {error.strerror}; choose another folder with --out"
        ) from error
    return page


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_runs(roots: Sequence[Path]) -> tuple[list[RunSeries], list[Facts]]:
    """The series and the facts of each run; runs of the same name are called by their folders' names."""
    loaded = [_read_run(root) for root in roots]
    names = [run.name for run, _ in loaded]
    if len(set(names)) < len(names):
        loaded = [(replace(run, name=root.resolve().name), facts) for (run, facts), root in zip(loaded, roots)]
    return [run for run, _ in loaded], [facts for _, facts in loaded]


def _read_run(root: Path) -> tuple[RunSeries, Facts]:
    exchange = Exchange(root)
    spec = exchange.spec
    facts = summarise(root)
    samplers = f"{len(spec.slots)} sampler{'s' if len(spec.slots) > 1 else ''}"
    steps = f"{facts['steps']} of {facts['steps_wanted']} steps"
    run = RunSeries(
        name=exchange.run.metadata.name,
        about=f"{spec.algorithm.loss.type} · {_model(spec)} · {steps} · {samplers}",
        learner=read_steps(exchange.metrics_dir),
        samplers={str(slot): records for slot, records in read_samplers(exchange.metrics_dir).items()},
        evals=_evals(SnapshotReader(exchange).read()),
    )
    return run, {**facts, "spec": spec}


def _evals(snapshot: Snapshot) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for version, result in snapshot.evaluations.items():
        for label, scores in result.sets.items():
            if scores.get("mean") is not None:
                found.setdefault(label, []).append((version.step, scores["mean"]))
    return found


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _model(spec: RunSpec) -> str:
    return {"path": Path(spec.model.path or "").name, "hub": spec.model.name or ""}.get(spec.model.source, "tiny model")


def _delay(pool: SamplerPoolSpec, time_scale: float) -> str:
    delay = pool.delay
    scale, unit = (time_scale, "s") if delay.unit == "seconds" else (1.0, "steps")
    match delay.distribution:
        case "none":
            return "no delay"
        case "constant":
            span = f"{delay.lower * scale:g} {unit}"
        case "trace":
            span = f"{len(delay.trace.values)} recorded values in {unit}"
        case _:
            span = f"{delay.lower * scale:g} to {delay.upper * scale:g} {unit}"
    return f"{delay.distribution} delay, {span}, {delay.model}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _counts(by_slot: dict[str, int]) -> str:
    return ", ".join(f"{slot} {count:,}" for slot, count in by_slot.items()) or "–"


def _bad_if_any(count: int) -> str:
    return f'<span class="bad">{count}</span>' if count else "0"


def _samplers(facts: Facts) -> str:
    spec: RunSpec = facts["spec"]
    lines = [f"{g.name}: {g.replicas} × {g.engine}, {_delay(g, spec.time_scale)}" for g in spec.samplers]
    return "<br>".join(map(html.escape, lines))


def _evaluations(facts: Facts) -> str:
    scores = facts["evaluations"].items()
    lines = [f"{label}: {s['best']:.3f} / {s['last']:.3f} / {s['gap']:.3f}" for label, s in scores]
    return "<br>".join(map(html.escape, lines)) or "–"


_ROWS: dict[str, Callable[[Facts], str]] = {
    "Status": lambda f: html.escape(f"{f['status']}{': ' + f['reason'] if f['reason'] else ''}"),
    "Steps": lambda f: f"{f['steps']:,} of {f['steps_wanted']:,}",
    "Wall time": lambda f: f"{f['wall_s'] / 60:.1f} min, including {f['prepare_s'] / 60:.1f} min of preparation",
    "Loss": lambda f: f["spec"].algorithm.loss.type,
    "Seed": lambda f: str(f["spec"].seed),
    "Samplers": _samplers,
    "Reward, first → last tenth": lambda f: f"{_number(f['reward_first_tenth'])} → {_number(f['reward_last_tenth'])}",
    "Lag, mean and maximum": lambda f: f"{_number(f['lag_mean'], 1)} and {_number(f['lag_max'], 0)} steps",
    "Evaluation, best / last / gap": _evaluations,
    "Rollouts by sampler": lambda f: _counts(f["rollouts"]),
    "Rollouts trained": lambda f: f"{f['rollouts_trained']:,} of {f['rollouts_published']:,} published",
    "… dropped as too old": lambda f: f"{f['rollouts_dropped']:,}",
    "… pending": lambda f: f"{f['rollouts_pending']:,}",
    "… quarantined": lambda f: _bad_if_any(f["rollouts_quarantined"]),
    "… trained twice, lost": lambda f: f"{_bad_if_any(f['rollouts_trained_twice'])}, {_bad_if_any(f['rollouts_lost'])}",
    "Weight swaps by sampler": lambda f: _counts(f["swaps"]),
    "Largest canary difference": lambda f: (
        "–" if f["canary_mean_abs_diff"] is None else f"{f['canary_mean_abs_diff']:.1e}"
    ),
    "Restarts after crashes": lambda f: _counts({k: n for k, n in f["restarts"].items() if n}),
}


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def render_page(runs: Sequence[RunSeries], facts: Sequence[Facts], picture: bytes) -> str:
    """The page: the picture (a PNG) and a table of results, self-contained."""
    title = html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(r.name for r in runs)}")
    about = f'<p class="about">{html.escape(runs[0].about)}</p>' if len(runs) == 1 else ""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{cell(fact)}</td>' for fact in facts)}</tr>\n"
        for name, cell in _ROWS.items()
    )
    reading = "".join(f"<dt>{panel}</dt><dd>{html.escape(text)}</dd>\n" for panel, text in _HOW_TO_READ.items())
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{_STYLE}</style>
<h1>{title}</h1>
{about}
<img alt="Curves of reward, lag, divergence, importance weights, waits and weight versions of {title}"
 src="data:image/png;base64,{image}">
<h2>In numbers</h2>
<div class="wide"><table>
<thead><tr><th></th>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
<h2>How to read the picture</h2>
<dl>
{reading}</dl>
</html>
"""
