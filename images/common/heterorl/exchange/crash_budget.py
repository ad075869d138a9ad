"""How the learner's starts ended, kept on the volume: what its budget of crashes is counted from.

A pod records an attempt before it starts its ranks, and how it ended. An attempt without an end is settled by the next
start: in the same pod the container was killed, so it crashed; in another pod the earlier one was taken away.

    clean       the ranks left by themselves
    signalled   they were told to stop, or the pod was taken away: never charged
    crashed     anything else. Of a failure of its node or its user each pod tells itself; a crash is charged to the
                first pod alone: the others fall with it, or it with them

What is charged, and how a budget refills, is defined in `heterorl.failure_policy`. Attempts made before the run
was resumed (`failurePolicy.resumes`) are no longer charged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from heterorl.errors import VOLUME_IN_USE
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Attempt, AttemptOutcome
from heterorl.exit_codes import SITE_ERROR, USER_ERROR, describe_exit, failure_kind
from heterorl.failure_policy import Failure, given_up, run_failure
from heterorl.spec.run import FailurePolicySpec

_PEER_S = 60.0
"""A crash of the first pod so near to the loss of another one is its echo. Clocks differ by less than that."""


class Attempts:
    """The attempts of one of the learner's pods."""

    def __init__(self, exchange: Exchange, node: int, pod: str) -> None:
        self._exchange, self._node, self._pod = exchange, node, pod
        self._begun: tuple[int, Attempt] | None = None

    def settle(self) -> None:
        """Give an end to the last attempt if it has none."""
        if (last := self._last()) is None or last[1].outcome is not None:
            return
        outcome: AttemptOutcome = "crashed" if last[1].pod == self._pod else "signalled"
        message = "the container was killed, perhaps for its memory" if outcome == "crashed" else ""
        self._end(*last, outcome, None, message, found_later=True)

    def begin(self) -> None:
        """Note that the ranks are about to start."""
        exchange = self._exchange
        resumes = exchange.spec.failure_policy.resumes
        attempt = Attempt(run=exchange.run_id, pod=self._pod, started=exchange.now(), resumes=resumes)
        self._begun = exchange.begin_attempt(self._node, attempt), attempt

    def end(self, outcome: AttemptOutcome, code: int | None = None, message: str = "") -> None:
        """Note how the attempt that was begun here ended; what was noted before, here or by a successor, stands."""
        if self._begun is not None:
            self._end(*self._begun, outcome, code, message)

    def asked_for_its_user(self) -> bool:
        """Whether this very pod ended with an error that a restart cannot fix; a new pod tries again."""
        last = self._last()
        return last is not None and last[1].pod == self._pod and last[1].code == USER_ERROR

    def _end(
        self,
        number: int,
        begun: Attempt,
        outcome: AttemptOutcome,
        code: int | None,
        message: str,
        *,
        found_later: bool = False,
    ) -> None:
        ended = {"ended": self._exchange.now(), "outcome": outcome, "code": code, "message": message}
        ended |= {"step": self._exchange.step, "found_later": found_later}
        self._exchange.end_attempt(self._node, number, begun.model_copy(update=ended))

    def _last(self) -> tuple[int, Attempt] | None:
        """This pod number's last attempt of this run."""
        attempts = self._exchange.load_attempts().get(self._node, {})
        ours = ((n, attempt) for n, attempt in reversed(attempts.items()) if attempt.run == self._exchange.run_id)
        return next(ours, None)


def outcome_of(code: int) -> AttemptOutcome:
    """How ranks that ended by themselves ended."""
    if code == 0:
        return "clean"
    return "crashed" if failure_kind(code) else "signalled"


def attempts_of(exchange: Exchange) -> dict[int, list[Attempt]]:
    """All attempts of this run, oldest first, by the number of the pod."""
    found = exchange.load_attempts().items()
    return {node: [a for a in attempts.values() if a.run == exchange.run_id] for node, attempts in found}


def outcomes(attempts: Mapping[int, Sequence[Attempt]]) -> dict[str, int]:
    """How often the learner ended in each way: the first pod's ends. A crash that echoes another pod's loss is none."""
    losses = _losses(attempts)
    ends = Counter(
        "signalled" if attempt.outcome == "crashed" and _is_echo(attempt, losses) else attempt.outcome
        for attempt in attempts.get(0, [])
    )
    return {"clean": ends["clean"], "signalled": ends["signalled"], "crashed": ends["crashed"]}


def gave_up(
    attempts: Mapping[int, Sequence[Attempt]], policy: FailurePolicySpec, successor: str | None = None
) -> tuple[str, str] | None:
    """Why the learner is started no more, as (reason, message); None while it is.

    `successor`: another run whose volume it is. One that never began to train has only come to a volume in use, which
    its preparation tells.
    """
    if successor and any(attempts.values()):
        return VOLUME_IN_USE, f"run {successor} has taken over the volume (resume: true)"
    for node in sorted(attempts):
        charged = _failures(attempts, node, policy.resumes)
        if why := run_failure(given_up("learner", charged, policy), {}):
            return why.reason, why.message
    return None


def _failures(attempts: Mapping[int, Sequence[Attempt]], node: int, resumes: int) -> list[Failure]:
    """What is charged to a pod: what it or its node did; to the first one also the crashes that no other explains."""
    losses = _losses(attempts)
    found = []
    for attempt in attempts[node]:
        how = describe_exit(attempt.code) if attempt.code is not None else "no exit code"
        where = f" of pod {node}" if node else ""
        failure = Failure(attempt.code, attempt.step, ": ".join(filter(None, (how + where, attempt.message))))
        own = failure.kind != "crash" or (node == 0 and not _is_echo(attempt, losses))
        if attempt.outcome == "crashed" and attempt.resumes == resumes and own:
            found.append(failure)
    return found


def _losses(attempts: Mapping[int, Sequence[Attempt]]) -> list[Attempt]:
    """Ends of other pods than the first that take its ranks with them."""
    others = [attempt for node, of_node in attempts.items() if node != 0 for attempt in of_node]
    return [attempt for attempt in others if attempt.outcome == "signalled" or attempt.code == SITE_ERROR]


def _is_echo(crash: Attempt, losses: Sequence[Attempt]) -> bool:
    when = crash.ended or 0.0
    return any(
        (loss.started if loss.found_later else (loss.ended or 0.0) - _PEER_S) <= when <= (loss.ended or 0.0) + _PEER_S
        for loss in losses
    )
