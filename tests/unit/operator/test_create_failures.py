"""Events are listed only for workloads that lack pods, after a while and with back-off."""

from __future__ import annotations

import pytest

from heterorl_operator.client import Forbidden
from heterorl_operator.create_failures import CreateFailures
from unit.operator.operator_world import CREATED, EARLIER, KEY, body, children

LEARNER = children(body("StatefulSet", "run-learner"))["StatefulSet", "run-learner"]
JOB = children(body("Job", "run-prepare"))["Job", "run-prepare"]
LATER = "2023-11-14T22:13:30Z"


class Events:
    """An API server's events."""

    def __init__(self):
        self.asked, self.events, self.error = [], [], None

    def list(self, kind, namespace, selector="", *, fields=""):
        self.asked.append((kind.name, namespace, fields))
        if self.error:
            raise self.error
        return iter(self.events)


@pytest.fixture
def api():
    return Events()


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def failures(api, now):
    return CreateFailures(api, clock=lambda: now[0])


def event(message, at):
    return {"metadata": {"uid": message}, "message": message, "lastTimestamp": at}


def test_a_workload_whose_pods_appear_in_time_costs_no_request(failures, api, now):
    assert failures.messages(KEY, {LEARNER: CREATED}) == {}
    assert failures.next_s(KEY) == 5
    now[0] += 4
    assert failures.messages(KEY, {LEARNER: CREATED}) == {}
    assert failures.messages(KEY, {}) == {}
    assert failures.next_s(KEY) is None
    assert api.asked == []


def test_one_that_still_lacks_pods_is_asked_about_alone_and_its_newest_failure_counts(failures, api, now):
    api.events = [event("exceeded quota", CREATED), event("no PriorityClass", LATER), event("long ago", EARLIER)]
    failures.messages(KEY, {LEARNER: CREATED})
    now[0] += 5
    assert failures.messages(KEY, {LEARNER: CREATED}) == {LEARNER: "no PriorityClass"}
    assert api.asked == [("Event", "lab", "reason=FailedCreate,involvedObject.uid=uid-of-run-learner")]


def test_a_failure_from_before_the_newest_pod_was_created_is_over(failures, api, now):
    api.events = [event("exceeded quota", CREATED)]
    failures.messages(KEY, {LEARNER: LATER})
    now[0] += 5
    assert failures.messages(KEY, {LEARNER: LATER}) == {}


def test_it_is_asked_about_ever_more_rarely_and_what_was_said_stays(failures, api, now):
    api.events = [event("exceeded quota", LATER)]
    started = now[0]
    asked_at = []
    while now[0] < started + 1000:
        before = len(api.asked)
        found = failures.messages(KEY, {LEARNER: CREATED, JOB: CREATED})
        if len(api.asked) > before:
            asked_at.append(now[0] - started)
            api.events = []  # the API server keeps them for an hour
        assert found == ({LEARNER: "exceeded quota", JOB: "exceeded quota"} if asked_at else {}) or JOB not in found
        now[0] += failures.next_s(KEY)
    assert asked_at == [5, 15, 35, 75, 155, 315, 615, 915]


def test_a_role_that_may_not_list_events_is_not_an_error(failures, api, now):
    api.error = Forbidden(403, "Forbidden", "no right")
    failures.messages(KEY, {LEARNER: CREATED})
    now[0] += 5
    assert failures.messages(KEY, {LEARNER: CREATED}) == {}


def test_a_run_that_is_gone_is_forgotten(failures):
    failures.messages(KEY, {LEARNER: CREATED})
    failures.forget(KEY)
    assert failures.next_s(KEY) is None
