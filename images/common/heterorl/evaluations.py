"""Evaluations during a run: which published versions are due, kept on the volume until then, and one at a time.

On Kubernetes the learner's first pod keeps the due versions and tells them (`heterorl.progress_metrics`); the operator
makes the Jobs. On one machine the runner does both, by `Evaluations`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

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


def due_now(exchange: Exchange, *, finished: bool, left_out: Collection[Version] = ()) -> list[Version]:
    """Versions on the volume still to be evaluated, oldest first."""
    if not (every_steps := exchange.spec.evaluation.every_steps):
        return []
    done = {*exchange.read_evals(), *left_out}
    return due_versions(exchange.list_versions(), done, every_steps, finished=finished)


class Pins:
    """Keeps versions from being retired while they are due. One keeper a run; it takes over from an earlier one."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._pinned = set(exchange.list_pinned())

    def keep(self, due: Collection[Version]) -> None:
        """Keep these, and let go of all others."""
        for version in set(due) - self._pinned:
            self._exchange.pin(version)
        for version in self._pinned - set(due):
            self._exchange.unpin(version)
        self._pinned = set(due)


class Evaluations:
    """One evaluation at a time, oldest version first; versions that wait for theirs are pinned."""

    def __init__(self, exchange: Exchange, make_role: Callable[[Version], Role]) -> None:
        self._exchange, self._make_role = exchange, make_role
        self._pins = Pins(exchange)
        self._left: set[Version] = set()  # done, or not worth another try
        self.version: Version | None = None
        """The version being evaluated, if any."""
        self.role: Role | None = None
        """The process at work on it."""

    def want(self, *, finished: bool) -> None:
        """Start what is due, unless one is at work."""
        due = self._due(finished=finished)
        self._pins.keep(due)
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
        if version in self._exchange.read_evals():
            return None
        return f"the evaluation of {version} gave no result and is left out; see {shown(log)}"

    def _due(self, *, finished: bool) -> list[Version]:
        return due_now(self._exchange, finished=finished, left_out=self._left)
