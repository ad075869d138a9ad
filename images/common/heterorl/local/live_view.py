"""What `heterorl run` shows while it runs: a live panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.logs import shown
from heterorl.monitoring.progress import LiveProgress, ProgressReader, SlotProgress
from heterorl.spec.run import Slot

_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0
_WIDEST = 120
_BEGIN_UPDATE, _END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"
"""Around what a terminal is to show at once (synchronized output); one that does not know them ignores them."""
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
def open_view(
    exchange: Exchange, console: Console | None = None, *, on_interrupt: str = "Ctrl-C stops cleanly"
) -> Iterator[RunDisplay]:
    """The view that fits where output goes: live in a terminal, lines otherwise."""
    console = console or Console()
    if not console.is_terminal:
        lines = PlainView(exchange, console)
        yield lines
        lines.close()
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:
        view = LiveView(exchange, live, on_interrupt=on_interrupt)
        yield view
        view.close()


class LiveView:
    """A panel that is redrawn in place; messages scroll by above it."""

    def __init__(
        self, exchange: Exchange, live: Live, clock: Callable[[], float] = time.monotonic, *, on_interrupt: str
    ) -> None:
        self._on_interrupt = on_interrupt
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
            self._on_interrupt = ""  # there is nothing left to interrupt
            with suppress(OSError):  # the folder is out of reach
                self._draw(self._state)

    def _draw(self, state: RunView) -> None:
        console = self._live.console
        # The key comes first, so that a narrow panel cuts the end of a long path instead.
        subtitle = " · ".join(filter(None, [self._on_interrupt, shown(self._root)]))
        panel = render(self._title, subtitle, self._reader.read(), state, console.width)
        console.file.write(_BEGIN_UPDATE)
        self._live.update(panel, refresh=True)
        console.file.write(_END_UPDATE)
        console.file.flush()
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
            with suppress(OSError):  # the folder is out of reach
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
    if progress.dropped:
        parts.append(f"{progress.dropped} dropped")
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


def render(title: str, subtitle: str, progress: LiveProgress, state: RunView, width: int) -> Panel:
    """The panel: the learner's head lines, then a row a sampler. It takes at most `width` columns."""
    width = min(width, _WIDEST)
    inner = width - 4  # border and padding on either side
    return Panel(
        Group(_head(progress, state, inner), Text(), _slot_table(progress, state.slots, inner)),
        title=f"[bold]{title}[/]",
        subtitle=Text(subtitle, style="dim"),
        border_style="cyan",
        padding=(0, 1),
        width=width,
    )


def _head(progress: LiveProgress, state: RunView, width: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=8)
    grid.add_column()
    room = width - 10
    grid.add_row("step", _steps(progress, state.elapsed_s, room))
    grid.add_row("reward", _reward(progress, room))
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
    if progress.completion:
        grid.add_row("sample", Text(progress.completion, style="dim", overflow="ellipsis", no_wrap=True))
    return grid


def _steps(progress: LiveProgress, elapsed_s: float, room: int) -> Text:
    """Count, bar, share and times in a line; a narrow terminal does without the bar, then without the time elapsed."""
    share = progress.step / progress.steps if progress.steps else 0.0
    left = ""
    if progress.eta_s is not None and progress.step < progress.steps:
        left = f"ETA {duration(progress.eta_s)}"
    times = " · ".join(filter(None, [f"{duration(elapsed_s)} elapsed", left]))
    count, percent = f"{progress.step}/{progress.steps}  ", f"{share:.0%}  "
    bar = min(36, room - len(count) - len(percent) - len(times) - 2)
    if bar < -2:
        times = left
    line = Text(count, style="bold")
    if bar >= 8:
        done = round(share * bar)
        line += Text("━" * done, style="cyan") + Text("━" * (bar - done) + "  ", style="bright_black")
    return line + Text(percent, style="not bold") + Text(times, style="dim not bold")


def _reward(progress: LiveProgress, room: int) -> Text:
    """The recent mean, and the reward of all steps as blocks between their lowest and highest."""
    if progress.reward is None:
        return Text("–", style="bold green")
    rewards = [progress.rewards[step] for step in sorted(progress.rewards)]
    blocks, low, high = sparkline(rewards, min(48, room - 24))
    bounds = Text(f"  {low:.3f} to {high:.3f}", style="dim")
    return Text(f"{progress.reward:.3f}", style="bold green") + Text(f"  {blocks}", style="green") + bounds


def _evals(progress: LiveProgress, evaluating: Version | None) -> str:
    """Each set's mean at the first and at the last evaluation."""
    parts = []
    if progress.evals:
        (first, before), (last, after) = min(progress.evals.items()), max(progress.evals.items())
        for label, values in after.sets.items():
            begun = before.sets.get(label, {}).get("mean")
            change = f"{begun:.3f} → " if first != last and begun is not None else ""
            parts.append(f"{label} {change}{values['mean']:.3f}")
        parts[-1] += f" [dim]at step {last.step}[/]"
    if evaluating:
        parts.append(f"[dim]evaluating step {evaluating.step}[/]")
    return " · ".join(parts)


_COLUMNS = ("sampler", "state", "version", "lag", "rollouts", "tok/s", "waited", "swaps", "canary Δ")
_LEAVE_FIRST = ("canary Δ", "swaps", "waited", "tok/s", "rollouts", "lag", "version")
"""Which columns a narrow terminal does without, in this order; names and states always stay."""


def _slot_table(progress: LiveProgress, slots: Mapping[Slot, ProcessState], width: int) -> Table:
    rows = [
        [Text(str(slot)), _slot_state(row, slots.get(slot)), *map(Text, _slot_numbers(row, progress))]
        for slot, row in progress.slots.items()
    ]
    gap = 2 if width > 90 else 1
    needed = {title: max([len(title), *(len(row[i]) for row in rows)]) + gap for i, title in enumerate(_COLUMNS)}
    shown_columns = list(_COLUMNS)
    for title in _LEAVE_FIRST:
        if sum(needed[column] for column in shown_columns) - gap <= width:
            break
        shown_columns.remove(title)
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for title in shown_columns:
        # A state is cut before a name is.
        table.add_column(title, justify="left" if title in _COLUMNS[:2] else "right", no_wrap=title != "state")
    for row in rows:
        table.add_row(*(row[_COLUMNS.index(title)] for title in shown_columns))
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


def sparkline(values: Sequence[float], width: int) -> tuple[str, float, float]:
    """Values as a row of blocks with its bounds, lowest to highest; more values than fit are averaged."""
    if not values:
        return "", 0.0, 0.0
    count = min(max(1, width), len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low
    blocks = "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1)) if span else 0] for value in means)
    return blocks, low, high


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3:07, 2:03:09."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
