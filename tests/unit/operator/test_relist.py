"""Watches are compared with the API server: what they missed is taken in, and staleness is reported."""

from __future__ import annotations

import time

import pytest

from heterorl_operator import handlers, relist
from heterorl_operator.apply import Applier
from heterorl_operator.client import Forbidden, NotFound, Transient
from heterorl_operator.handlers import Watcher
from heterorl_operator.relist import Relister
from heterorl_operator.resources import DEPLOYMENT
from unit.operator.operator_world import KEY, FakeApi, body, run_body

NAME = ("Deployment", "run-sampler-near")


@pytest.fixture
def api():
    served = FakeApi()
    served.put(run_body())
    served.put(body(*NAME, spec={"replicas": 1}))
    return served


@pytest.fixture
def relister(api, cache, queue, monkeypatch):
    monkeypatch.setattr(relist, "_SETTLE_S", 0.0)
    monkeypatch.setattr(handlers, "_BATCH_S", 0.0)
    watcher = Watcher(cache, queue, Applier(api, cache).object_deleted)
    made = Relister(api, cache, watcher, (), every_s=0.08)
    yield made
    made.stop()


def wait_for(look):
    deadline = time.monotonic() + 5
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_at_the_start_everything_is_cached_and_every_run_is_queued(relister, cache, queue):
    relister.load()
    assert cache.run_keys() == [KEY]
    assert list(cache.children(KEY)) == [NAME]
    assert len(queue) == 1
    assert cache.unreadable == {}


def test_a_kind_that_may_not_be_listed_is_noted_but_runs_must_be_readable(relister, api, cache):
    def forbid(verb, kind, name):
        if kind == hidden:
            raise Forbidden(403, "Forbidden", "no right")

    api.before, hidden = forbid, "Deployment"
    relister.load()
    assert cache.unreadable == {DEPLOYMENT: "no right"}
    assert cache.run_keys() == [KEY]
    hidden = "HeteroRLRun"
    with pytest.raises(Forbidden):
        relister.load()


def test_a_cluster_that_does_not_know_runs_is_an_error(relister, api):
    def unknown(verb, kind, name):
        raise NotFound(404, "NotFound", "no such kind")

    api.before = unknown
    with pytest.raises(NotFound):
        relister.load()


def test_what_a_watch_missed_is_cached_and_its_run_is_queued(relister, api, cache, queue):
    relister.load()
    queue.done(queue.get()[0])
    api.put(body(*NAME, spec={"replicas": 4}))
    relister.start()
    wait_for(lambda: cache.children(KEY)[NAME].wanted == 4)
    assert queue.get()[0] == KEY


def test_a_deletion_that_a_watch_missed_is_taken_in(relister, api, cache):
    relister.load()
    del api.objects[NAME]
    relister.start()
    wait_for(lambda: not cache.children(KEY))


def test_a_watch_that_misses_something_twice_in_a_row_is_stale_until_it_misses_nothing(relister, api):
    relister.load()
    deaf = []
    for is_missed in (False, True, True, True, False):
        if is_missed:
            api.put(body(*NAME))
        relister._check(DEPLOYMENT)
        deaf.append(bool(relister.stale))
    assert deaf == [False, False, True, True, False]


def test_a_watch_that_is_late_and_still_reports_something_is_not_stale(relister, api):
    relister.load()
    for _ in range(4):
        relister._watcher.event_counts["Deployment"] += 1  # as kopf's handler counts
        api.put(body(*NAME))
        relister._check(DEPLOYMENT)
        assert relister.stale == set()


def test_a_kind_that_is_readable_again_asks_for_a_restart(relister, api):
    def forbid(verb, kind, name):
        if kind == "Deployment":
            raise Forbidden(403, "Forbidden", "no right")

    api.before = forbid
    relister.load()
    relister.start()
    api.before = lambda verb, kind, name: None
    assert relister.readable_again.wait(5)


@pytest.mark.parametrize("error", [Transient(503, "ServiceUnavailable", "away"), ValueError("no JSON")])
def test_a_list_that_failed_is_followed_by_the_next(relister, api, cache, error):
    relister.load()
    failures = []

    def fail(verb, kind, name):
        if len(failures) < 3:
            failures.append(kind)
            raise error

    api.before = fail
    api.put(body(*NAME, spec={"replicas": 4}))
    relister.start()
    wait_for(lambda: cache.children(KEY)[NAME].wanted == 4)
    assert len(failures) == 3
