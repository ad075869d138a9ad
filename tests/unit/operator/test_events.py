"""Events: one object a message, repeats counted in it."""

from __future__ import annotations

import pytest

from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Forbidden
from heterorl_operator.events import Events
from unit.operator.operator_world import KEY, MANAGER, START, UID, FakeApi, run_body


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def run():
    cache = ObjectCache()
    cache.put("HeteroRLRun", run_body())
    return cache.run(KEY)


def reported(api):
    """Count, first and last time of each event, by its message."""
    return {
        event["message"]: (event["count"], event["firstTimestamp"], event["lastTimestamp"])
        for event in api.objects.values()
    }


def test_an_event_is_about_its_run(api, run):
    Events(api, MANAGER).post(run, "Warning", "Stalled", "no step", START)
    ((_, event),) = api.objects.items()
    assert (event["type"], event["reason"], event["message"], event["count"]) == ("Warning", "Stalled", "no step", 1)
    about = event["involvedObject"]
    assert (about["kind"], about["namespace"], about["name"], about["uid"]) == ("HeteroRLRun", "lab", "run", UID)
    assert event["metadata"]["namespace"] == "lab"


def test_a_repeat_is_counted_in_the_same_event_and_another_message_is_another_event(api, run):
    events = Events(api, MANAGER)
    for second, message in ((0, "2 to 1"), (10, "1 to 2"), (20, "2 to 1")):
        events.post(run, "Normal", "Scaled", message, START + second)
    assert reported(api) == {
        "2 to 1": (2, "2023-11-14T22:13:20.000Z", "2023-11-14T22:13:40.000Z"),
        "1 to 2": (1, "2023-11-14T22:13:30.000Z", "2023-11-14T22:13:30.000Z"),
    }


def test_a_repeat_of_an_event_that_the_api_server_dropped_is_said_anew(api, run):
    events = Events(api, MANAGER)
    events.post(run, "Normal", "Scaled", "2 to 1", START)
    api.objects.clear()  # as it does after an hour
    events.post(run, "Normal", "Scaled", "2 to 1", START + 4000)
    events.post(run, "Normal", "Scaled", "2 to 1", START + 4010)
    assert reported(api) == {"2 to 1": (2, "2023-11-14T23:20:00.000Z", "2023-11-14T23:20:10.000Z")}


def test_an_operator_that_started_again_still_says_what_it_said_before(api, run):
    for _ in range(2):
        Events(api, MANAGER).post(run, "Normal", "Scaled", "2 to 1", START)
    assert len(api.objects) == 2


def test_a_cluster_that_takes_no_events_stops_nothing(api, run):
    def refuse(verb, kind, name):
        raise Forbidden(403, "Forbidden", "no")

    events = Events(api, MANAGER)
    api.before = refuse
    events.post(run, "Normal", "Scaled", "2 to 1", START)
    api.before = lambda verb, kind, name: None
    events.post(run, "Normal", "Scaled", "2 to 1", START)
    assert reported(api)["2 to 1"][0] == 1


def test_a_message_is_cut_to_what_an_event_holds(api, run):
    Events(api, MANAGER).post(run, "Warning", "Crashed", "x" * 5000 + " the cause", START)
    (message,) = reported(api)
    assert 1000 < len(message.encode()) <= 1024
    assert message.endswith(" the cause")
