"""How the learner's starts ended, kept on the volume: what its budget of crashes is counted from.

A pod notes an attempt before it starts its ranks and how it ended. An attempt without an end is settled by whoever
comes next: in the same pod the container was killed under it, so it crashed; in another one the pod was taken away.

    clean       the ranks left by themselves
    signalled   somebody asked them to go, or took the pod: never charged
    crashed     anything else, charged to the first pod's attempts alone: the others fall with it, or it with them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from heterorl.errors import VOLUME_IN_USE
from heterorl.exchange.exchange import Exchange
from heterorl.exit_codes import PREEMPTED, USER_ERROR, describe_exit

AttemptOutcome = Literal["clean", "signalled", "crashed"]

_PEER_S = 60.0
"""A crash of the first pod so near to the loss of another one is its echo. Clocks differ by less than that."""


@dataclass(frozen=True)
class Attempt:
    """One start of a pod's ranks."""

    run: str
    """Id of the run: the volume may have seen another one before."""
    pod: str
    """Uid of the pod."""
    started: float
    ended: float | None = None
    outcome: AttemptOutcome | None = None
    code: int | None = None
    """Exit code of the ranks; None if nobody saw it."""
    message: str = ""
    """The last line of the ranks' log."""
    found_later: bool = False
    """Nobody wrote the end when it came: it lies somewhere between `started` and `ended`."""


class Attempts:
    """The attempts of one of the learner's pods."""

    def __init__(self, exchange: Exchange, node: int, pod: str) -> None:
        self._exchange, self._node, self._pod = exchange, node, pod

    def settle(self) -> None:
        """Give an end to the last attempt if it has none."""
        if (last := self._last()) is None or last.outcome is not None:
            return
        outcome: AttemptOutcome = "crashed" if last.pod == self._pod else "signalled"
        message = "the container was killed, perhaps for its memory" if outcome == "crashed" else ""
        self._write(replace(last, ended=self._exchange.now(), outcome=outcome, message=message, found_later=True))

    def begin(self) -> None:
        """Note that the ranks are about to start."""
        self._write(Attempt(self._exchange.run_id, self._pod, self._exchange.now()), add=True)

    def end(self, outcome: AttemptOutcome, code: int | None = None, message: str = "") -> None:
        """Note how the last attempt ended; what was noted before stands."""
        last = self._last()
        if last is not None and last.outcome is None:
            self._write(replace(last, ended=self._exchange.now(), outcome=outcome, code=code, message=message))

    def asked_for_its_user(self) -> bool:
        """Whether this very pod ended with an error that a restart does not mend; a new pod tries again."""
        last = self._last()
        return last is not None and last.pod == self._pod and last.code == USER_ERROR

    def _last(self) -> Attempt | None:
        return next(reversed(attempts_of(self._exchange).get(self._node, [])), None)

    def _write(self, attempt: Attempt, *, add: bool = False) -> None:
        lines = self._exchange.load_attempts().get(self._node, [])
        ours = [at for at, line in enumerate(lines) if line["run"] == attempt.run]
        at = slice(len(lines), None) if add else slice(ours[-1], ours[-1] + 1)  # the last may be another run's
        lines[at] = [asdict(attempt)]
        self._exchange.save_attempts(self._node, lines)


def outcome_of(code: int) -> AttemptOutcome:
    """How ranks that ended by themselves ended."""
    if code == 0:
        return "clean"
    return "signalled" if code in PREEMPTED else "crashed"


def attempts_of(exchange: Exchange) -> dict[int, list[Attempt]]:
    """All attempts of this run, oldest first, by the number of the pod."""
    found = {node: [Attempt(**line) for line in lines] for node, lines in exchange.load_attempts().items()}
    return {node: [a for a in attempts if a.run == exchange.run_id] for node, attempts in found.items()}


def outcomes(attempts: Mapping[int, Sequence[Attempt]]) -> dict[str, int]:
    """How often the learner ended in each way: the first pod's ends. A crash that echoes another pod's loss is none."""
    losses = [a for node, others in attempts.items() if node != 0 for a in others if a.outcome == "signalled"]
    ends = Counter(
        "signalled" if attempt.outcome == "crashed" and _is_echo(attempt, losses) else attempt.outcome
        for attempt in attempts.get(0, [])
    )
    return {"clean": ends["clean"], "signalled": ends["signalled"], "crashed": ends["crashed"]}


def gave_up(
    attempts: Mapping[int, Sequence[Attempt]], budget: int, successor: str | None = None
) -> tuple[str, str] | None:
    """Why the learner is started no more, as (reason, message); None while it is.

    `successor`: another run whose volume it is. One that never began to train has only come to a volume in use, which
    its preparation tells.
    """
    if successor and any(attempts.values()):
        return VOLUME_IN_USE, f"run {successor} has taken the volume over (resume: true) and goes on from there"
    crashed = outcomes(attempts)["crashed"]
    if crashed > budget:
        last = next(a for a in reversed(attempts[0]) if a.outcome == "crashed")
        how = describe_exit(last.code) if last.code is not None else "no exit code"
        return (
            "LearnerCrashed",
            f"the learner crashed {crashed} times, failurePolicy.learnerRestarts is {budget}; the last time: {how},"
            f" {last.message}",
        )
    for node, of_node in attempts.items():
        if of_node and of_node[-1].code == USER_ERROR:
            return "UserError", f"pod {node} of the learner ended with an error to be put right: {of_node[-1].message}"
    return None


def _is_echo(crash: Attempt, losses: Sequence[Attempt]) -> bool:
    when = crash.ended or 0.0
    return any(
        (loss.started if loss.found_later else (loss.ended or 0.0) - _PEER_S) <= when <= (loss.ended or 0.0) + _PEER_S
        for loss in losses
    )
