"""`heterorl list`: the runs below some folders as a table in the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from heterorl.ui.library import Library

_STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "unreadable": "red"}
_WORDS = {"silent": "no sign of life"}


def print_runs(folders: Sequence[Path], console: Console | None = None) -> None:
    """Print them, the one that was written last first; RunFolderError for a folder that does not exist."""
    console = console or Console()
    library = Library(folders)
    cards = sorted((run.card() for run in library.runs()), key=lambda card: -(card.get("changed") or 0.0))
    if not cards:
        console.print(Text(f"no runs below {', '.join(library.places)}"), soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for title in ("step", "reward", "lag"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("last written", justify="right", no_wrap=True)
    for card in cards:
        table.add_row(*_cells(card))
    console.print(table)
    for card in cards:
        if card.get("why"):
            console.print(Text(f"{card['id']}: {card['why']}"), soft_wrap=True)


def _cells(card: dict[str, Any]) -> list[Text]:
    state = card["state"]
    return [
        Text(card["id"]),
        Text(_WORDS.get(state, state), style=_STYLES.get(state, "yellow")),
        Text(f"{card['step']}/{card['steps']}"),
        Text("–" if card.get("reward") is None else f"{card['reward']:.3f}"),
        Text("–" if card.get("lag") is None else f"{card['lag']:.1f}"),
        Text(_ago(card.get("changed"))),
    ]


def _ago(moment: float | None) -> str:
    if moment is None:
        return "–"
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"
