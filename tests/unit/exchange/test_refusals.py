"""Weights that no sampler accepts: when it is said, and when it ends the run."""

from __future__ import annotations

import pytest

from builders import spec_of
from heterorl.exchange.records import SlotStatus
from heterorl.exchange.refusals import dead_end, refused_by_all
from heterorl.exchange.version import Version
from heterorl.spec.run import Slot

V3, V4 = Version(3, 1), Version(4, 1)
A, B = Slot("far", 0), Slot("near", 0)
SPEC = spec_of(samplers=[{"name": "far"}, {"name": "near"}], algorithm={"staleness": {"maxSteps": 2}})


def refusing(*versions: Version, serving: int | None = None, state: str = "waiting: weights") -> SlotStatus:
    return SlotStatus(state=state, version_step=serving, refused={str(version): "canary" for version in versions})


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ([refusing(V4), refusing(V4)], True),
        ([refusing(V4), refusing()], False),  # one accepts it, or has not seen it yet
        ([refusing(V3), refusing(V3)], False),  # an older one was refused; the newest was not
        ([refusing(V4), refusing(state="starting")], True),  # of those at work, all
        ([refusing(state="starting")], False),
        ([], False),
    ],
)
def test_it_is_said_when_every_sampler_at_work_has_refused_the_newest(statuses: list[SlotStatus], said: bool) -> None:
    expected = "no sampler accepts weights v00000004-i0001: canary" if said else None
    assert refused_by_all([V3, V4], statuses) == expected


@pytest.mark.parametrize(
    ("far", "near", "ends"),
    [
        (refusing(V3, V4), refusing(V3, V4), True),
        (refusing(V3, V4), refusing(V4), False),  # it has yet to try version 3
        (refusing(V3, V4), None, False),  # it has never come: it may accept one
        (refusing(V3, V4), refusing(V3, V4, serving=2), False),  # step 4 may train what version 2 makes: maxSteps 2
        (refusing(V3, V4), refusing(V3, V4, serving=1), True),
    ],
)
def test_nothing_can_come_once_every_slot_refused_every_version_that_may_be_trained(
    far: SlotStatus, near: SlotStatus | None, ends: bool
) -> None:
    samplers = {A: far} | ({B: near} if near else {})
    assert (dead_end(SPEC, 4, [V3, V4], samplers) is not None) == ends


def test_before_the_first_publication_there_is_hope() -> None:
    assert dead_end(SPEC, 0, [], {A: refusing(), B: refusing()}) is None
