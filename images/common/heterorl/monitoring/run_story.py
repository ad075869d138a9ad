"""What a dashboard shows of a run beside the numbers of its steps: its settings, evaluations, completions, summary.

It is read from the run's folder, where other processes and other parts of the learner have written it anyway.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.monitoring.json_lines import Record, Tail
from heterorl.monitoring.software import software

_GROUPS = 8
"""Groups of completions that a table has, the last ones logged."""
_TABLES = 100
"""Tables of them over a run, at most."""
_NOT_SETTINGS = ("credentials", "podTemplate")
"""Where a run takes place, with what it must not tell; everything else says what it does."""
_STATE = ("name", "status", "reason")
"""Of the summary: a dashboard has its own."""


class RunStory:
    """One run, told from where the last call ended."""

    def __init__(self, exchange: Exchange, summary: Callable[[], Mapping[str, Any]] = dict) -> None:
        """`summary`: the run in numbers (`report.summary`), asked for at the end."""
        self._exchange, self._summary = exchange, summary
        self._evaluated: set[Version] = set()
        self._completions = Tail(exchange.completions_file)
        self._groups: deque[list[Record]] = deque(maxlen=_GROUPS)
        self._table_from = 0

    @property
    def name(self) -> str:
        """Of the run."""
        return self._exchange.run.metadata.name

    @property
    def id(self) -> str:
        """What no other run has, and this one keeps over restarts."""
        return self._exchange.board_id()

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved spec as a tree, and the software that the run is made with."""
        spec = _without(self._exchange.run.resolved()["spec"], _NOT_SETTINGS)
        return {"run": self.name, "software": software(), **spec}

    def evaluations(self) -> list[Record]:
        """Results since the last call, each as the numbers of the step that was evaluated."""
        if not (due := set(self._exchange.list_evals()) - self._evaluated):
            return []
        results = {version: result for version, result in self._exchange.read_evals().items() if version in due}
        self._evaluated |= results.keys()
        return [
            {
                "step": version.step,
                "time": self._exchange.now(),
                "eval/average": result.average,
                **result.metrics,
            }
            for version, result in results.items()
        ]

    def completions(self, *, last: bool = False) -> list[Record]:
        """The rows of a table of the newest completions, when it is time for one, or the last chance; else none."""
        self._groups.extend(rows for group in self._completions.read() if (rows := list(_rows(group))))
        if not self._groups:
            return []
        step = self._groups[-1][-1]["step"]
        if step < self._table_from and not last:
            return []
        self._table_from = step + max(1, self._exchange.spec.learner.steps // _TABLES)
        rows = [row for group in self._groups for row in group]
        self._groups.clear()
        return rows

    def summary(self) -> dict[str, Any]:
        """The run in numbers as it is now."""
        return {key: value for key, value in self._summary().items() if key not in _STATE}


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree under its path, such as learner.batch.groups; lists as JSON."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        elif value is not None:
            yield f"{path}{key}", json.dumps(value) if isinstance(value, list) else value


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return [_without(inner, keys) for inner in value] if isinstance(value, list) else value


def _rows(group: Record) -> Iterator[Record]:
    """A group of `completions.jsonl`, one row a completion; none of what is damaged."""
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        for completion in group["completions"]:
            yield {
                "step": int(group["step"]),
                "set": group.get("set"),
                "prompt": str(group["prompt"]),
                "completion": str(completion["text"]),
                "reward": completion["reward"],
                **{f"reward/{name}": value for name, value in completion.get("parts", {}).items()},
                "advantage": completion.get("advantage"),
                "truncated": completion.get("truncated"),
                "reference": None if (reference := group.get("reference")) is None else str(reference),
            }
