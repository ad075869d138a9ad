"""docs/benchmarks.json, which keeps every measurement, and the table of docs/benchmarks.md, which is made from it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.benchmark import Benchmark
from bench.measure import Outcome

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = PAGE.with_suffix(".json")
Row = dict[str, Any]
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Origin:
    """Where and how it was measured."""

    commit: str
    hardware: str
    command: str

    @classmethod
    def here(cls, command: str) -> Origin:
        """Now, on this machine."""
        return cls(commit(), machine(), command)


def machine() -> str:
    """The hardware, and the Python on it."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in about if line.startswith("model name")), platform.machine())
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{os.cpu_count()} cores ({cpu}), {memory} GiB, Python {platform.python_version()}"


def commit() -> str:
    """The commit of the working tree, with a plus where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return "unknown" if head.returncode else head.stdout.strip() + "+" * bool(changed.stdout)


# ── the results ──────────────────────────────────────────────────────────────────────────────────────────────────────
def record(benchmarks: dict[str, Benchmark], outcomes: dict[str, Outcome], origin: Origin | None = None) -> None:
    """Merge outcomes, which have an origin, into the results by their ids, and write the table anew."""
    rows = {row["id"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    merged = [merge(benchmarks[id], rows.get(id), outcomes.get(id), origin) for id in sorted(benchmarks, key=_order)]
    RESULTS.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    put(PAGE, "ratios", table(merged, benchmarks))


def merge(benchmark: Benchmark, before: Row | None, outcome: Outcome | None, origin: Origin | None) -> Row:
    """The row of a benchmark: the new outcome, unless it could not be measured now and was before."""
    row: Row = {
        "id": benchmark.id,
        "what": benchmark.what,
        "peer": benchmark.peer,
        "target": benchmark.target.ratio,
        "bound": benchmark.target.bound,
    }
    measured: Row = {"median": None, "min": None, "max": None, "met": None, "gate": NOT_MEASURED}
    if outcome is None or (outcome.gate == NOT_MEASURED and before and before["gate"] != NOT_MEASURED):
        return {**measured, **(before or {}), **row}
    measured["gate"] = f"{outcome.gate}: {outcome.why or benchmark.gate}"
    if outcome.gate == "failed":
        measured["met"] = False
    if outcome.gate == "passed":
        ratios = outcome.ratios
        measured |= {"median": outcome.median, "min": min(ratios), "max": max(ratios)}
        measured |= {"met": benchmark.target.is_met(outcome.median), "rounds": len(ratios)}
        measured |= {"unit": benchmark.unit, "ours": outcome.ours_median, "theirs": outcome.peer_median}
    return {**row, **measured, **(vars(origin) if origin else {})}


def _order(id: str) -> list[tuple[int, str]]:
    """2 before 2b before 10, and words last."""
    return [(int(part), "") if part.isdigit() else (10**9, part) for part in re.split(r"(\d+)", id) if part]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
HEAD = ("id", "what", "against", "target", "median", "min – max", "ours", "the peer", "met", "limit")


def table(rows: list[Row], benchmarks: dict[str, Benchmark]) -> str:
    """Markdown, with what each row comes from below it."""
    lines = [table_line(HEAD), table_line(["---"] * 4 + ["---:"] * 4 + ["---"] * 2)]
    lines += [table_line(_row(row, benchmarks[row["id"]])) for row in rows]
    missed = [row["id"] for row in rows if row["met"] is False and benchmarks[row["id"]].missed]
    lines += ["", "Why a target is missed:", ""] * bool(missed)
    lines += [f"- {id}: {benchmarks[id].missed}" for id in missed]
    origins: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["median"] is not None:
            origins.setdefault((row["commit"], row["hardware"], row["command"]), []).append(row["id"])
    lines += ["", *(f"- `{c}`, {h}, `{how}`: {', '.join(ids)}" for (c, h, how), ids in origins.items())]
    return "\n".join(lines)


def _row(row: Row, benchmark: Benchmark) -> list[str]:
    known = [row["id"], row["what"], row["peer"], str(benchmark.target)]
    if row["median"] is None:
        return [*known, row["gate"], "", "", "", "no" if row["met"] is False else "", benchmark.limit]
    measured = [f"**{row['median']:.3g}**", f"{row['min']:.3g} – {row['max']:.3g}"]
    figures = [figure(row["ours"], row["unit"]), figure(row["theirs"], row["unit"])]
    return [*known, *measured, *figures, "yes" if row["met"] else "no", benchmark.limit]


def figure(value: float, unit: str) -> str:
    """A figure to three digits, in a unit of its size."""
    scales = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))}
    for scale, name in scales.get(unit, ()):
        if abs(value) >= scale:
            return f"{value / scale:,.3g} {name}"
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}"


def table_line(cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def put(page: Path, section: str, text: str) -> None:
    """Put text where a page has room for it: between the marks of the section."""
    before, _, after = _around(page, section)
    page.write_text(f"{before}\n{text}\n{after}")


def rows_in(page: Path, section: str) -> list[list[str]]:
    """The cells of the table in a section, its head first, without the line below that."""
    lines = [line for line in _around(page, section)[1].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in lines]
    return [*rows[:1], *rows[2:]]


def _around(page: Path, section: str) -> tuple[str, str, str]:
    """A page up to a section's first mark, what is between the marks, and the page from the last one on."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, found, rest = page.read_text().partition(begin)
    inside, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no section {section!r}: it needs the lines {begin} and {end}")
    return before + begin, inside, end + after
