"""Plots of runs: panels of learner metrics, evaluation, waiting times, and the weights version of each process.

One run: the learner in black, each sampler pool in its colour. Several: a colour each, where runs named alike but for
`-s0`, `-s1`, ... are seeds of one thing: a thin line a seed and their mean. Raw values are faint, smoothed ones strong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from heterorl.monitoring.series import Floats, Series, active_clock, mean_of, series, smooth, smoothed
from heterorl.report.series import RunSeries, lives, pool_of, waiting_shares

INK, FAINT = "#1b1f24", "#8b949e"
# Okabe and Ito's colours, which hold for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#6b6ecf")
STYLE: Any = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelpad": 6.0,
    "axes.edgecolor": "#c4cad0",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
}
MAX_TIMELINES = 6
MAX_LEGEND = 4
_TIME_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True)
class Panel:
    """One metric of the learner over its steps."""

    title: str
    unit: str
    key: str
    log: bool = False
    """Logarithmic, where the values span more than a factor of 30."""
    top: float | None = None
    """Fixed range from 0 to this."""


LAG = Panel("Lag", "learner steps", "lag/mean")
PANELS = (
    Panel("Reward", "mean reward", "reward"),
    LAG,
    Panel("KL divergence from sampler to learner", "nats per token", "mismatch_kl", log=True),
    Panel("Variance of the importance weight", "variance", "weight/variance", log=True),
    Panel("Effective sample size", "share of the batch", "weight/ess", top=1.0),
)
LENGTH = Panel("Completion length", "tokens", "completions/mean_length")


# ── the figure ───────────────────────────────────────────────────────────────────────────────────────────────────────
def draw(runs: Sequence[RunSeries], path: Path) -> None:
    """Draw the runs over each other into a PNG."""
    with rc_context(STYLE):
        figure = _figure(runs)
        figure.savefig(path, dpi=150, facecolor="white")


def _figure(runs: Sequence[RunSeries]) -> Figure:
    colours = _colours(runs)
    panels = [*PANELS, LENGTH] if any(run.evals for run in runs) else list(PANELS)
    painters: list[Callable[[Axes], None]] = [partial(_draw_panel, panel=p, runs=runs, colours=colours) for p in panels]
    painters.append(partial(_draw_waits, runs=runs, colours=colours))
    if any(run.evals for run in runs):
        painters.insert(1, partial(_draw_evals, runs=runs, colours=colours))
    timed = [next(run for run in runs if run.family == family) for family in colours][:MAX_TIMELINES]
    rows = len(painters) // 2
    heights = [1.0] * rows + [1.35 if len(timed) == 1 else 1.0] * -(-len(timed) // 2)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.03)
    figure = Figure(figsize=(12.5, 2.7 * sum(heights) + 0.5), layout=layout)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for i, paint in enumerate(painters):
        paint(figure.add_subplot(grid[i // 2, i % 2]))
    for i, run in enumerate(timed):
        cell = grid[rows + i // 2, :] if len(timed) == 1 else grid[rows + i // 2, i % 2]
        colour = colours[run.family] if len(runs) > 1 else None
        _draw_timeline(figure.add_subplot(cell), run, colour)
    _head(figure, runs, colours)
    return figure


def _head(figure: Figure, runs: Sequence[RunSeries], colours: dict[str, str]) -> None:
    if len(runs) == 1:
        figure.suptitle(runs[0].name, x=0.011, ha="left", fontsize=15, fontweight="bold")
        figure.text(0.985, 0.992, runs[0].about, ha="right", va="top", fontsize=10.5, color=FAINT)
        return
    handles = [Line2D([], [], color=colour, lw=2.5, label=_with_seeds(f, runs)) for f, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), fontsize=11)


def _with_seeds(family: str, runs: Sequence[RunSeries]) -> str:
    members = [run for run in runs if run.family == family]
    return f"{family} (mean of {len(members)} seeds)" if len(members) > 1 else members[0].name


def _colours(runs: Sequence[RunSeries]) -> dict[str, str]:
    families = list(dict.fromkeys(run.family for run in runs))
    return {family: COLOURS[i % len(COLOURS)] for i, family in enumerate(families)}


def _pool_colours(run: RunSeries) -> dict[str, str]:
    return {pool: COLOURS[i % len(COLOURS)] for i, pool in enumerate(sorted({pool_of(s) for s in run.samplers}))}


# ── panels over learner steps ────────────────────────────────────────────────────────────────────────────────────────
def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunSeries], colours: dict[str, str]) -> None:
    if len(runs) == 1:
        _draw_one(axes, panel, runs[0])
    else:
        _draw_several(axes, panel, runs, colours)
    _finish(axes, panel.title, panel.unit, runs)
    _scale(axes, panel, [series(run.learner, "step", panel.key)[1] for run in runs])


def _draw_several(axes: Axes, panel: Panel, runs: Sequence[RunSeries], colours: dict[str, str]) -> None:
    for family, colour in colours.items():
        members = [run.learner for run in runs if run.family == family]
        _draw_family(axes, [series(records, "step", panel.key) for records in members], colour)
        if panel is LAG:
            oldest = [smoothed(series(records, "step", "lag/max")) for records in members]
            axes.plot(*mean_of(oldest), ":", color=colour, lw=1.3)
    if panel is LAG:
        axes.plot([], [], color=FAINT, label="mean")
        axes.plot([], [], ":", color=FAINT, label="oldest of the step")


def _draw_one(axes: Axes, panel: Panel, run: RunSeries) -> None:
    x, y = series(run.learner, "step", panel.key)
    if panel is LAG:
        _draw_lag_by_pool(axes, run)
        axes.plot(x, smooth(y), color=INK, lw=1.8, label="mean, smoothed")
    else:
        axes.plot(x, y, color=INK, lw=0.8, alpha=0.22)
        axes.plot(x, smooth(y), color=INK, lw=1.8)


def _draw_lag_by_pool(axes: Axes, run: RunSeries) -> None:
    """The lag as it is: with a holding delay it is a sawtooth, which smoothing would hide."""
    axes.plot(*series(run.learner, "step", "lag/max"), color="#c4cad0", lw=1.0, label="oldest")
    pools = _pool_colours(run)
    for pool, colour in pools.items() if len(pools) <= MAX_LEGEND else ():
        curve = series(run.learner, "step", f"lag/by_pool/{pool}")
        axes.plot(*curve, color=colour, lw=1.2, label=pool)


def _draw_family(axes: Axes, found: Sequence[Series], colour: str, style: str = "-") -> None:
    """A run with its raw values behind it, or the runs of several seeds behind their mean."""
    if len(found) > 1:
        for curve in found:
            axes.plot(*smoothed(curve), style, color=colour, lw=0.8, alpha=0.4)
        axes.plot(*mean_of([smoothed(curve) for curve in found]), style, color=colour, lw=2.2)
        return
    if style == "-":
        axes.plot(*found[0], color=colour, lw=0.8, alpha=0.2)
    axes.plot(*smoothed(found[0]), style, color=colour, lw=1.8)


def _draw_waits(axes: Axes, runs: Sequence[RunSeries], colours: dict[str, str]) -> None:
    if len(runs) == 1:
        names = {"learner": INK, **_pool_colours(runs[0])}
        for side, curve in waiting_shares(runs[0]).items():
            axes.plot(*smoothed(curve), color=names[side], lw=1.7, label=side)
    else:
        shares = {run.name: waiting_shares(run) for run in runs}
        for family, colour in colours.items():
            members = [shares[run.name] for run in runs if run.family == family]
            _draw_family(axes, [sides.pop("learner") for sides in members], colour)
            samplers = [mean_of([smoothed(side) for side in sides.values()]) for sides in members]
            _draw_family(axes, samplers, colour, "--")
        axes.plot([], [], color=FAINT, label="learner, for rollouts")
        axes.plot([], [], "--", color=FAINT, label="samplers, for room or weights")
    _finish(axes, "Waiting", "share of time", runs)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_evals(axes: Axes, runs: Sequence[RunSeries], colours: dict[str, str]) -> None:
    for i, label in enumerate(sorted({label for run in runs for label in run.evals})):
        look: Any = {"marker": "os^Dvp*X"[i % 8], "ms": 4.5, "lw": 1.5}
        own = COLOURS[i % len(COLOURS)]
        for family, colour in colours.items():
            curves = [_eval_curve(run, label) for run in runs if run.family == family]
            for curve in curves if len(curves) > 1 else ():
                axes.plot(*curve, color=colour, lw=0.8, alpha=0.4)
            axes.plot(*mean_of(curves), color=own if len(runs) == 1 else colour, **look)
        axes.plot([], [], color=own if len(runs) == 1 else FAINT, label=label, **look)
    _finish(axes, "Evaluation", "mean@k", runs)
    axes.margins(x=0.02)  # room for the markers at both ends
    axes.autoscale(axis="x")
    _from_zero(axes)


def _eval_curve(run: RunSeries, label: str) -> Series:
    points = np.array(run.evals.get(label, []), np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _finish(axes: Axes, title: str, unit: str, runs: Sequence[RunSeries]) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("learner step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max((r["step"] for run in runs for r in run.learner), default=1)
    axes.set_xlim(0, max(last, 1))
    _legend_above(axes)
    _say_if_empty(axes)


def _say_if_empty(axes: Axes) -> None:
    if not any(len(line.get_xdata()) for line in axes.lines):  # type: ignore[arg-type]
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color=FAINT)
        axes.xaxis.set_visible(False)
        axes.yaxis.set_visible(False)
        axes.spines[:].set_visible(False)


def _from_zero(axes: Axes) -> None:
    """The axis begins a little below 0, so that values of 0 do not lie on it."""
    top = axes.get_ylim()[1]
    axes.set_ylim(bottom=-0.03 * top, top=top)


def _legend_above(axes: Axes) -> None:
    """A legend on the title's line, so that it never covers data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), borderaxespad=0.1
        )


def _scale(axes: Axes, panel: Panel, values: Sequence[Floats]) -> None:
    together = np.concatenate([np.empty(0), *values])
    positive = together[together > 0]
    if panel.top is not None:
        axes.set_ylim(-0.03 * panel.top, panel.top * 1.03)
    elif panel.log and len(positive) and np.quantile(positive, 0.99) > 30 * np.quantile(positive, 0.01):
        axes.set_yscale("log")
        axes.set_ylim(bottom=float(np.quantile(positive, 0.01)) / 3)
    elif len(together) and together.min() >= -0.01 * together.max():  # a k3 estimate of nothing may be a rounding below
        _from_zero(axes)


# ── the timeline ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _draw_timeline(axes: Axes, run: RunSeries, colour: str | None) -> None:
    """Every slot's version over time under the learner's step; `colour`: the run's own, where it is one of several."""
    records = [*run.learner, *(r for found in run.samplers.values() for r in found)]
    times = [r["time"] for r in records if r.get("time") is not None]
    clock = active_clock(times or [0.0])
    total = clock(max(times, default=0.0))
    unit, unit_s = next((name, s) for name, s in _TIME_UNITS if total > 3 * s or s == 1)
    x, y = series(run.learner, "time", "step")
    axes.plot([clock(t) / unit_s for t in x], y, color=INK, lw=1.3, label="learner")
    for slot, look in _slot_looks(run, colour):
        for n, life in enumerate(lives(run.samplers[slot])):
            at, held = [clock(t) / unit_s for t, _ in life], [version for _, version in life]
            axes.plot(at, held, **look, lw=1.5, drawstyle="steps-post", label=slot if n == 0 else None)
    axes.set_title(run.name if colour else "Weights version by process", color=colour or INK)
    axes.set_xlabel(f"{unit} since the start")
    axes.set_ylabel("version (learner step)")
    axes.set_xlim(0, total / unit_s or 1.0)
    axes.set_ylim(bottom=-0.02 * max(axes.get_ylim()[1], 1.0))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _say_if_empty(axes)
    if len(run.samplers) <= (MAX_LEGEND if colour else 2 * MAX_LEGEND):
        _legend_above(axes)


def _slot_looks(run: RunSeries, colour: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Every slot with its look: a dash each in the run's colour, or a colour each while they last, else one a pool."""
    slots, pools = sorted(run.samplers), _pool_colours(run)
    if colour:
        return [(slot, {"color": colour, "ls": ("-", "--", ":", "-.")[i % 4]}) for i, slot in enumerate(slots)]
    if len(pools) < len(slots) <= len(COLOURS):
        return [(slot, {"color": COLOURS[i]}) for i, slot in enumerate(slots)]
    return [(slot, {"color": pools[pool_of(slot)]}) for slot in slots]
