"""What `heterorl run` shows while it runs: a live panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Version
from heterorl.local.processes import shown
from heterorl.monitoring.progress import LiveProgress, ProgressReader, SlotProgress
from heterorl.spec.run import Slot

_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_STYLES = {"up": "green", "away": "dim", "stopping": "yellow", "restarting": "yellow", "lost": "bold red"}


@dataclass(frozen=True)
class ProcessState:
    """A process as its runner sees it."""

    state: str
    """up, stopping, restarting, away (not available now), lost (given up), done or stopped."""
    crashes: int = 0


@dataclass(frozen=True)
class RunView:
    """A run's processes as their runner sees them."""

    learner: ProcessState
    slots: Mapping[Slot, ProcessState]
    evaluating: Version | None
    elapsed_s: float


class RunDisplay(Protocol):
    """Where the runner shows what goes on."""

    def say(self, message: str) -> None:
        """Print a message that stays."""
        ...

    def show(self, state: RunView) -> None:
        """Show the run as it is now; called often, draws now and then."""
        ...


@contextmanager
def open_view(exchange: Exchange, console: Console | None = None) -> Iterator[RunDisplay]:
    """The view that fits where output goes: live in a terminal, lines otherwise."""
    console = console or Console()
    if not console.is_terminal:
        lines = PlainView(exchange, console)
        yield lines
        lines.close()
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:
        view = LiveView(exchange, live)
        yield view
        view.close()


class LiveView:
    """A panel that is redrawn in place; messages scroll by above it."""

    def __init__(self, exchange: Exchange, live: Live, clock: Callable[[], float] = time.monotonic) -> None:
        self._reader, self._live, self._clock = ProgressReader(exchange), live, clock
        self._title, self._root = exchange.run.metadata.name, exchange.root
        self._drawn_at = float("-inf")
        self._state: RunView | None = None

    def say(self, message: str) -> None:
        """Print above the panel."""
        self._live.console.print(Text(f"{time.strftime('%H:%M:%S')} {message}"))

    def show(self, state: RunView) -> None:
        """Redraw, at most twice a second."""
        self._state = state
        if self._clock() - self._drawn_at >= _REFRESH_S:
            self._draw(state)

    def close(self) -> None:
        """Draw how it ended."""
        if self._state:
            self._draw(self._state)

    def _draw(self, state: RunView) -> None:
        self._live.update(render(self._title, self._root, self._reader.read(), state), refresh=True)
        self._drawn_at = self._clock()


class PlainView:
    """A line every ten seconds, while there is something new to say; for logs and pipes."""

    def __init__(self, exchange: Exchange, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._reader, self._console, self._clock = ProgressReader(exchange), console, clock
        self._looked_at, self._printed = clock(), ""
        self._state: RunView | None = None

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(Text(f"{time.strftime('%H:%M:%S')} {message}"), soft_wrap=True)

    def show(self, state: RunView) -> None:
        """Print a line if it is time for one."""
        self._state = state
        if self._clock() - self._looked_at >= _LINE_EVERY_S:
            self._print(state)

    def close(self) -> None:
        """Print where it ended, unless that was said."""
        if self._state:
            self._print(self._state)

    def _print(self, state: RunView) -> None:
        self._looked_at = self._clock()
        line = describe(self._reader.read(), state)
        if line != self._printed:
            self.say(line)
        self._printed = line


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def describe(progress: LiveProgress, state: RunView) -> str:
    """The run in one line: `step 120/400 reward 0.410 lag 8.2 (max 21) ...`."""
    parts = [f"step {progress.step}/{progress.steps}"]
    if progress.reward is not None:
        parts.append(f"reward {progress.reward:.3f}")
    if progress.lag_mean is not None:
        parts.append(f"lag {progress.lag_mean:.1f} (max {progress.lag_max:.0f})")
    if progress.learner_tokens_per_s:
        parts.append(f"learner {progress.learner_tokens_per_s:,.0f} tok/s, waiting {progress.waiting:.0%}")
    for slot, row in progress.slots.items():
        seen = state.slots[slot].state
        version = "" if row.version is None else f" v{row.version}"
        unrewarded = f", {row.unrewarded} unrewarded" if row.unrewarded else ""
        left_out = unrewarded + (f", {row.filtered} filtered" if row.filtered else "")
        parts.append(f"{slot}{version} {row.rollouts} rollouts{left_out}" + ("" if seen == "up" else f" ({seen})"))
    if progress.weights_refused:
        parts.append(progress.weights_refused)
    if progress.waiting_for:
        parts.append(progress.waiting_for)
    if state.evaluating:
        parts.append(f"evaluating step {state.evaluating.step}")
    if progress.eta_s is not None and progress.step < progress.steps:
        parts.append(f"ETA {duration(progress.eta_s)}")
    return " | ".join(parts)


def render(title: str, root: Path, progress: LiveProgress, state: RunView) -> Panel:
    """The panel: the learner's head lines, then a row a sampler."""
    return Panel(
        Group(_head(progress, state), Text(), _slot_table(progress, state.slots)),
        title=f"[bold]{title}[/]",
        subtitle=f"[dim]{shown(root)} · Ctrl-C stops cleanly[/]",
        border_style="cyan",
        padding=(0, 1),
        width=100,
    )


def _head(progress: LiveProgress, state: RunView) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=8)
    grid.add_column()
    bar = Table.grid(padding=(0, 2))
    done = progress.step / progress.steps if progress.steps else 0.0
    times = f"{duration(state.elapsed_s)} elapsed"
    if progress.eta_s is not None and progress.step < progress.steps:
        times += f" · ETA {duration(progress.eta_s)}"
    bar.add_row(
        Text(f"{progress.step}/{progress.steps}", style="bold"),
        ProgressBar(total=max(progress.steps, 1), completed=progress.step, width=36, complete_style="cyan"),
        Text(f"{done:.0%}"),
        Text(times, style="dim"),
    )
    grid.add_row("step", bar)
    rewards = [progress.rewards[step] for step in sorted(progress.rewards)]
    reward = Text("–" if progress.reward is None else f"{progress.reward:.3f}", style="bold green")
    grid.add_row("reward", reward + Text(f"  {sparkline(rewards, 48)}", style="green"))
    lag = "–" if progress.lag_mean is None else f"{progress.lag_mean:.1f} steps, max {progress.lag_max:.0f}"
    dropped = f" · {_count(progress.dropped, 'rollout')} too old" if progress.dropped else ""
    grid.add_row("lag", lag + dropped)
    made = sum(row.tokens_per_s for slot, row in progress.slots.items())
    grid.add_row("tokens/s", f"learner {progress.learner_tokens_per_s:,.0f} · samplers {made:,.0f}")
    learner = Text(state.learner.state, style=_STYLES.get(state.learner.state, ""))
    waits = f" · waits for rollouts {progress.waiting:.0%} of the time"
    crashes = f" · {_count(state.learner.crashes, 'restart')}" if state.learner.crashes else ""
    grid.add_row("learner", learner + Text(waits + crashes, style="dim"))
    if progress.waiting_for:
        grid.add_row("waiting", Text(progress.waiting_for, style="yellow"))
    if progress.weights_refused:
        grid.add_row("weights", Text(progress.weights_refused, style="red"))
    if progress.evals or state.evaluating:
        grid.add_row("evals", _evals(progress, state.evaluating))
    return grid


def _evals(progress: LiveProgress, evaluating: Version | None) -> str:
    parts = []
    if progress.evals:
        version, result = max(progress.evals.items())
        scores = " · ".join(f"{label} {values['mean']:.3f}" for label, values in result.sets.items())
        parts.append(f"{scores} [dim]at step {version.step}[/]")
    if evaluating:
        parts.append(f"[dim]evaluating step {evaluating.step}[/]")
    return " · ".join(parts)


def _slot_table(progress: LiveProgress, slots: Mapping[Slot, ProcessState]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("sampler")
    table.add_column("state", min_width=18)
    for title in ("version", "lag", "rollouts", "tok/s", "waited", "swaps", "canary Δ"):
        table.add_column(title, justify="right")
    for slot, row in progress.slots.items():
        table.add_row(str(slot), _slot_state(row, slots.get(slot)), *_slot_numbers(row, progress))
    return table


def _slot_state(row: SlotProgress, seen: ProcessState | None) -> Text:
    state = seen.state if seen else "away"
    text = Text(row.activity or "starting" if state == "up" else state, style=_STYLES.get(state, ""))
    if seen and seen.crashes:
        text.append(f" ({seen.crashes}×)", style="yellow")
    if row.rejected:
        text.append(f" {row.rejected} refused", style="red")
    if row.filtered:
        text.append(f" {row.filtered} filtered", style="dim")
    if row.unrewarded:
        text.append(f" {row.unrewarded} unrewarded", style="red")
    return text


def _slot_numbers(row: SlotProgress, progress: LiveProgress) -> list[str]:
    lag = None if row.version is None or progress.newest is None else max(0, progress.newest.step - row.version)
    return [
        "–" if row.version is None else str(row.version),
        "–" if lag is None else str(lag),
        f"{row.rollouts:,}",
        f"{row.tokens_per_s:,.0f}",
        duration(row.waited_s),
        str(row.swaps),
        "–" if row.canary is None else f"{row.canary:.0e}",
    ]


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a row of blocks, lowest to highest; more values than fit are averaged."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1)) if span else 0] for value in means)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3:07, 2:03:09."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
