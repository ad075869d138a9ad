"""What was answered in evaluations, by problem and by the step of the weights; texts stay in the files until someone
opens a problem.

A line that is damaged or lacks what it must have is left out and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterorl.monitoring.json_lines import Record, Tail, record_at
from heterorl.ui.columns import plain

OUTCOMES = ("right", "partly", "wrong", "gained", "lost")
"""How a problem came out at a step; gained and lost are against the first step that it was evaluated at."""
_BY_HAND = "eval-"
_SNIPPET = 160
"""Characters of a prompt in the list."""


@dataclass(frozen=True)
class _Answer:
    """A problem at one step."""

    file: Path
    place: int
    """The byte of its line."""
    right: float
    """Share of its completions that are right."""


@dataclass
class _Problem:
    row: str
    prompt: str
    reference: str
    at: dict[int, _Answer] = field(default_factory=dict)

    def outcomes(self, step: int) -> set[str]:
        """Which of OUTCOMES are true of it at a step."""
        now, first = self.at[step].right, self.at[min(self.at)].right
        known = zip(OUTCOMES, (now == 1, 0 < now < 1, now == 0, now > first, now < first))
        return {outcome for outcome, true in known if true}


class AnswerIndex:
    """Follows a folder of answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, tuple[int, int]] = {}
        self._sets: dict[str, dict[str, _Problem]] = {}
        self.damaged = 0
        """Lines that could not be used."""

    def update(self) -> None:
        """Take what is new in the folder; a file that is another one now makes it all be read anew."""
        found = {path: _identity(path) for path in sorted(self._folder.glob("*.jsonl"))}
        if any(found.get(path) != known for path, known in self._known.items()):
            self._known, self._sets, self.damaged = {}, {}, 0
        for path, identity in found.items():
            if path not in self._known:
                self._known[path] = identity
                self._read(path)

    def _read(self, path: Path) -> None:
        for place, record in Tail(path).read_places():
            try:
                self._add(path, place, record)
            except (KeyError, TypeError, ValueError, ZeroDivisionError):
                self.damaged += 1

    def _add(self, path: Path, place: int, record: Record) -> None:
        marks = [bool(made["correct"]) for made in record["completions"]]
        answer = _Answer(path, place, sum(marks) / len(marks))
        label = str(record["set"]) + (" (heterorl eval)" if path.name.startswith(_BY_HAND) else "")
        row, prompt = str(record["row"]), str(record["prompt"])
        problem = self._sets.setdefault(label, {}).setdefault(row, _Problem(row, prompt, str(record["reference"])))
        problem.at[int(record["step"] or 0)] = answer

    def query(
        self, label: str, step: int | None, outcome: str | None, words: str, page: int, size: int
    ) -> dict[str, Any]:
        """A page of a set's problems that were evaluated at a step (the newest by default) and came out so there."""
        label = label if label in self._sets else min(self._sets, default="")
        problems = list(self._sets.get(label, {}).values())
        steps = sorted({step for problem in problems for step in problem.at})
        step = step if step in steps else max(steps, default=0)
        there = [one for one in problems if step in one.at and words.lower() in one.prompt.lower()]
        counts = Counter(outcome for one in there for outcome in one.outcomes(step))
        found = [one for one in there if outcome is None or outcome in one.outcomes(step)]
        return {
            "set": label,
            "sets": sorted(self._sets),
            "steps": steps,
            "step": step,
            "counts": {"all": len(there), **{name: counts[name] for name in OUTCOMES}},
            "found": len(found),
            "problems": [
                {
                    "row": one.row,
                    "prompt": one.prompt[-_SNIPPET:],
                    "reference": one.reference[:_SNIPPET],
                    "right": [one.at[at].right if at in one.at else None for at in steps],
                }
                for one in found[page * size : (page + 1) * size]
            ],
            "damaged": self.damaged,
        }

    def problem(self, label: str, row: str) -> Record:
        """A problem with all its answers, newest first; IndexError if it is not there."""
        problem = self._sets.get(label, {}).get(row)
        if problem is None:
            raise IndexError(row)
        answers = [
            {"step": step, "right": answer.right, "completions": record_at(answer.file, answer.place)["completions"]}
            for step, answer in sorted(problem.at.items(), reverse=True)
        ]
        about = {"set": label, "row": row, "prompt": problem.prompt, "reference": problem.reference}
        return plain({**about, "answers": answers})  # type: ignore[no-any-return]


def _identity(path: Path) -> tuple[int, int]:
    try:
        about = os.stat(path)
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns
