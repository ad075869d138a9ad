"""Evaluations of a local run: which published versions are due, and the process that makes one at a time.

The operator asks `due_versions` as well, for its Jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from heterorl.exchange import Exchange, Version
from heterorl.processes import Outcome, Role, shown


def due_versions(
    published: Iterable[Version], evaluated: Iterable[Version], every_steps: int, *, finished: bool = False
) -> list[Version]:
    """Versions still to be evaluated, oldest first: the first one at or after each multiple of `every_steps`.

    Once the run has `finished` the newest version is due as well. A version published again by a later incarnation of
    the learner is not evaluated a second time. `every_steps` 0 is off.
    """
    published, steps = sorted(published), {version.step for version in evaluated}
    if not every_steps or not published:
        return []
    covered = {step // every_steps for step in steps}
    first: dict[int, Version] = {}
    for version in published:
        if version.step // every_steps not in covered:
            first.setdefault(version.step // every_steps, version)
    due = set(first.values())
    if finished and published[-1].step not in steps:
        due.add(published[-1])
    return sorted(due)


class Evaluations:
    """One evaluation at a time, oldest version first; versions that wait for theirs are pinned."""

    def __init__(self, exchange: Exchange, make_role: Callable[[Version], Role]) -> None:
        self._exchange, self._make_role = exchange, make_role
        self._every = exchange.spec.evaluation.every_steps
        self._pinned: set[Version] = set()
        self._left: set[Version] = set()  # done, or not worth another try
        for version in exchange.read_evals():  # a runner that was killed may have left its pin
            exchange.unpin(version)
        self.version: Version | None = None
        """The version being evaluated, if any."""
        self.role: Role | None = None
        """The process at work on it."""

    def want(self, *, finished: bool) -> None:
        """Start what is due, unless one is at work."""
        due = self._due(finished=finished)
        for version in set(due) - self._pinned:
            self._exchange.pin(version)
            self._pinned.add(version)
        if due and self.role is None:
            self.version, self.role = due[0], self._make_role(due[0])
            self.role.wanted = True

    def stop(self) -> None:
        """Ask the one at work to end; its version stays due, also for a resumed run."""
        if self.role is not None:
            self.role.wanted = False

    def busy(self) -> bool:
        """Whether a finished run has to wait for evaluations."""
        return self.role is not None or bool(self._due(finished=True))

    def ended(self, outcome: Outcome) -> str | None:
        """Take note of the end of the process; a message if its version is left out."""
        assert self.version is not None
        assert self.role is not None
        if outcome is Outcome.CRASHED:
            return None
        version, log = self.version, self.role.log
        self.version = self.role = None
        if outcome is Outcome.STOPPED:
            return None
        self._left.add(version)
        self._exchange.unpin(version)
        if version in self._exchange.read_evals():
            return None
        return f"the evaluation of {version} gave no result and is left out; see {shown(log)}"

    def _due(self, *, finished: bool) -> list[Version]:
        if not self._every:
            return []
        done = {*self._exchange.read_evals(), *self._left}
        return due_versions(self._exchange.list_versions(), done, self._every, finished=finished)
