"""Watches are compared with the API server: what they missed is taken in, and deafness is told."""

from __future__ import annotations

import time

import pytest
from operator_world import KEY, FakeApi, body, run_body

from heterorl_operator import handlers
from heterorl_operator import relist as audit
from heterorl_operator.apply import Applier
from heterorl_operator.cache import ObjectCache
from heterorl_operator.client import Forbidden, NotFound, Transient
from heterorl_operator.handlers import Watcher
from heterorl_operator.relist import Relister
from heterorl_operator.resources import DEPLOYMENT
from heterorl_operator.workqueue import WorkQueue

NAME = ("Deployment", "run-sampler-near")


@pytest.fixture
def api():
    served = FakeApi()
    served.put(run_body())
    served.put(body(*NAME, spec={"replicas": 1}))
    return served


@pytest.fixture
def store():
    return ObjectCache()


@pytest.fixture
def queue():
    return WorkQueue()


@pytest.fixture
def auditor(api, store, queue, monkeypatch):
    monkeypatch.setattr(audit, "_SETTLE_S", 0.0)
    monkeypatch.setattr(handlers, "_TOGETHER_S", 0.0)
    watcher = Watcher(store, queue, Applier(api, store))
    made = Relister(api, store, watcher, (), every_s=0.08)
    yield made
    made.stop()


def wait_for(look):
    deadline = time.monotonic() + 5
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_at_the_start_everything_is_taken_in_and_every_run_is_looked_at(auditor, store, queue):
    auditor.load()
    assert store.run_keys() == [KEY]
    assert list(store.children(KEY)) == [NAME]
    assert len(queue) == 1
    assert auditor.hidden == {}


def test_a_kind_that_must_not_be_seen_is_hidden_but_runs_must_be_seen(auditor, api, store):
    def forbid(verb, kind, name):
        if kind == hidden:
            raise Forbidden(403, "Forbidden", "no right")

    api.before, hidden = forbid, "Deployment"
    auditor.load()
    assert auditor.hidden == {DEPLOYMENT: "no right"}
    assert store.run_keys() == [KEY]
    hidden = "HeteroRLRun"
    with pytest.raises(Forbidden):
        auditor.load()


def test_a_cluster_that_does_not_know_runs_is_an_error(auditor, api):
    def unknown(verb, kind, name):
        raise NotFound(404, "NotFound", "no such kind")

    api.before = unknown
    with pytest.raises(NotFound):
        auditor.load()


def test_what_a_watch_missed_is_taken_in_and_its_run_is_looked_at(auditor, api, store, queue):
    auditor.load()
    queue.done(queue.get()[0])
    api.put(body(*NAME, spec={"replicas": 4}))
    auditor.start()
    wait_for(lambda: store.children(KEY)[NAME].wanted == 4)
    assert queue.get()[0] == KEY


def test_a_deletion_that_a_watch_missed_is_taken_in(auditor, api, store):
    auditor.load()
    del api.objects[NAME]
    auditor.start()
    wait_for(lambda: not store.children(KEY))


def test_a_watch_that_misses_something_twice_in_a_row_is_deaf_until_it_misses_nothing(auditor, api):
    auditor.load()
    deaf = []
    for is_missed in (False, True, True, True, False):
        if is_missed:
            api.put(body(*NAME))
        auditor._check(DEPLOYMENT)
        deaf.append(bool(auditor.deaf))
    assert deaf == [False, False, True, True, False]


def test_a_watch_that_is_late_and_still_brings_something_is_not_deaf(auditor, api):
    auditor.load()
    for _ in range(4):
        auditor._watcher.heard["Deployment"] += 1  # as kopf's handler counts
        api.put(body(*NAME))
        auditor._check(DEPLOYMENT)
        assert auditor.deaf == set()


def test_a_kind_that_may_be_seen_by_now_asks_for_a_new_start(auditor, api):
    def forbid(verb, kind, name):
        if kind == "Deployment":
            raise Forbidden(403, "Forbidden", "no right")

    api.before = forbid
    auditor.load()
    auditor.start()
    api.before = lambda verb, kind, name: None
    assert auditor.unveiled.wait(5)


@pytest.mark.parametrize("error", [Transient(503, "ServiceUnavailable", "away"), ValueError("no JSON")])
def test_an_audit_that_failed_is_followed_by_the_next(auditor, api, store, error):
    auditor.load()
    failures = []

    def fail(verb, kind, name):
        if len(failures) < 3:
            failures.append(kind)
            raise error

    api.before = fail
    api.put(body(*NAME, spec={"replicas": 4}))
    auditor.start()
    wait_for(lambda: store.children(KEY)[NAME].wanted == 4)
    assert len(failures) == 3
