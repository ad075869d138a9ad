"""The evaluations of a run on this machine: one at a time, oldest version first."""

from __future__ import annotations

from collections.abc import Callable

from heterorl.exchange.evaluations import Pins, due_now
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.local.processes import ProcessRole, RoleOutcome
from heterorl.logs import shown


class Evaluations:
    """One evaluation at a time, oldest version first; versions that wait for theirs are pinned."""

    def __init__(self, exchange: Exchange, make_role: Callable[[Version], ProcessRole]) -> None:
        self._exchange, self._make_role = exchange, make_role
        self._pins = Pins(exchange)
        self._left: set[Version] = set()  # done, or not worth another try
        self.version: Version | None = None
        """The version being evaluated, if any."""
        self.role: ProcessRole | None = None
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

    def ended(self, outcome: RoleOutcome) -> str | None:
        """Take note of the end of the process; a message if its version is left out."""
        assert self.version is not None
        assert self.role is not None
        if outcome is RoleOutcome.RESTARTED:
            return None
        version, log = self.version, self.role.log
        has_result = outcome is not RoleOutcome.STOPPED and version in self._exchange.read_evals()
        self.version = self.role = None
        if outcome is RoleOutcome.STOPPED:
            return None
        self._left.add(version)
        if has_result:
            return None
        return f"the evaluation of {version} gave no result and is left out; see {shown(log)}"

    def _due(self, *, finished: bool) -> list[Version]:
        return due_now(self._exchange, finished=finished, left_out=self._left)
