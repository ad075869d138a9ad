"""Which published versions are due for evaluation, and keeping them on the volume until then."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version


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
    done = {*exchange.list_evals(), *left_out}
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
