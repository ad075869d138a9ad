"""Which rollouts a step trains on: a pure function of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from heterorl.names import RolloutName, Slot


@dataclass(frozen=True)
class Selection:
    """What to train and what is too old, both in order."""

    names: list[RolloutName]
    dropped: list[RolloutName]


def lag(name: RolloutName, step: int) -> int:
    """Learner step minus the step of the weights; weights of a lost future (of a learner that died) count as fresh."""
    return max(0, step - name.version.step)


def select_rollouts(
    waiting: Iterable[RolloutName], *, step: int, groups: int, max_steps: int, last: Slot | None
) -> Selection | None:
    """Take `groups` of the waiting rollouts for the step that follows `step` updates; None while there are too few.

    Admissible is a lag of at most `max_steps`. The oldest version goes first; within a version everybody's first
    rollout precedes anybody's second, and the slot after `last` (who came last in the step before) begins.
    """
    waiting = sorted(waiting, key=lambda name: (name.version.step, name.seq, name.slot))
    admissible = [name for name in waiting if lag(name, step) <= max_steps]
    if len(admissible) < groups:
        return None
    slots = sorted({name.slot for name in admissible})
    begin = next((i for i, slot in enumerate(slots) if last is not None and slot > last), 0)
    turns: Counter[tuple[int, Slot]] = Counter()
    order = {}
    for name in admissible:
        lane = (name.version.step, name.slot)
        order[name] = (name.version.step, turns[lane], (slots.index(name.slot) - begin) % len(slots))
        turns[lane] += 1
    chosen = sorted(admissible, key=order.__getitem__)[:groups]
    return Selection(chosen, [name for name in waiting if lag(name, step) > max_steps])
