"""A status is written strictly and read leniently: what another version wrote costs no more than itself."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from heterorl.spec.status import Condition, LearnerStatus, RunStatus, keep_end

SUCCEEDED = {
    "type": "Succeeded",
    "status": "True",
    "reason": "Trained",
    "message": "8 steps are trained",
    "lastTransitionTime": "2026-11-14T22:13:20.000Z",
}
STATUS = {
    "observedGeneration": 3,
    "state": "Succeeded",
    "conditions": [SUCCEEDED],
    "learner": {"step": 8, "reward": 0.5},
    "samplers": [{"name": "near", "desired": 2}, {"name": "far", "desired": 1}],
    "startTime": "2026-11-14T22:00:00.000Z",
    "completionTime": "2026-11-14T22:13:20.000Z",
}


def test_what_this_version_wrote_is_read_as_it_was():
    assert RunStatus.read(STATUS).model_dump(by_alias=True, exclude_unset=True) == STATUS


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"phase": "Done"}, {}),
        ({"learner": {"step": 8, "reward": 0.5, "tokens": 10**9}}, {}),
        ({"state": "Completed"}, {"state": None}),
        ({"learner": {"step": -1, "reward": 0.5}}, {"learner": {"reward": 0.5}}),
        ({"learner": {"step": 8, "reward": "NaN"}}, {"learner": {"step": 8}}),
        ({"learner": ["step", 8]}, {"learner": None}),
        ({"startTime": "yesterday"}, {"startTime": None}),
        ({"startTime": "2026-11-14T22:00:00"}, {"startTime": None}),  # no zone
        ({"samplers": [{"name": "near", "desired": 2}, {"pool": "far"}]}, {"samplers": [STATUS["samplers"][0]]}),
        ({"samplers": {"near": 2}}, {"samplers": []}),
        ({"conditions": [SUCCEEDED, {"type": "Ready", "status": "Perhaps"}]}, {}),
        ({"conditions": [*({"type": f"New{n}", "status": "True"} for n in range(20)), SUCCEEDED]}, {}),
    ],
)
def test_what_another_version_wrote_costs_no_more_than_itself(change, lost):
    found = RunStatus.read({**STATUS, **change}).model_dump(by_alias=True, exclude_unset=True, exclude_none=True)
    expected = {**STATUS, **lost}
    assert found == {key: value for key, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    "change",
    [
        {"severity": "none"},
        {"reason": ""},
        {"reason": 7},
        {"message": "x" * 40_000},
        {"message": None},
        {"lastTransitionTime": "just now"},
        {"observedGeneration": "3"},
    ],
)
def test_an_end_is_read_whatever_else_the_condition_holds(change):
    (found,) = RunStatus.read({"conditions": [{**SUCCEEDED, **change}]}).conditions
    assert (found.type, found.status) == ("Succeeded", "True")


@pytest.mark.parametrize("missing", ["reason", "message", "lastTransitionTime"])
def test_an_end_is_read_from_a_condition_that_lacks_a_part(missing):
    part = {key: value for key, value in SUCCEEDED.items() if key != missing}
    (found,) = RunStatus.read({"conditions": [part]}).conditions
    assert (found.type, found.status) == ("Succeeded", "True")


@pytest.mark.parametrize("tree", [None, [], "Succeeded", {"conditions": None}, {"conditions": {"type": "Ready"}}])
def test_an_unreadable_status_is_read_as_an_empty_one(tree):
    assert RunStatus.read(tree) == RunStatus()


@pytest.mark.parametrize("wrong", [{"step": -1}, {"reward": float("nan")}, {"tokens": 1}])
def test_a_status_is_written_strictly(wrong):
    with pytest.raises(ValidationError):
        LearnerStatus(**wrong)


def test_a_message_beyond_the_api_servers_bound_keeps_its_end_where_the_cause_stands():
    message = "the learner: " + "a line of its log\n" * 3000 + "OSError: No space left on device"
    found = Condition.model_validate({**SUCCEEDED, "message": message}).message
    assert len(found) <= 32768
    assert found.startswith("the learner: a line")
    assert found.endswith("OSError: No space left on device")


def test_a_cut_text_is_as_long_as_allowed_in_bytes_and_breaks_no_character():
    text = "Ursache: " + "ä€😀" * 1000
    for limit in range(100, 112):
        cut = keep_end(text, limit)
        assert limit - 7 < len(cut.encode()) <= limit
        assert cut.startswith("Ursache: ä€😀")
        assert cut.endswith("ä€😀")
    assert keep_end("short", 100) == "short"
    assert keep_end("half a pair \ud83d", 100) == "half a pair ?"  # what JSON allows and UTF-8 does not
