"""The parts put together: what follows from a reconcile, and what is said of the operator's health."""

from __future__ import annotations

import time

import pytest
import yaml

from heterorl.errors import UserError
from heterorl.kubernetes.manifests import Images
from heterorl_operator.app import Operator, Options
from heterorl_operator.client import Conflict, Transient
from heterorl_operator.reconcile import Unfinished
from unit.operator.operator_world import KEY, run_body

OPTIONS = Options(Images("learner", "sampler"), workers=2, release="mine", release_namespace="lab")


@pytest.fixture
def operator(tmp_path, monkeypatch):
    path = tmp_path / "kubeconfig"
    context = {"name": "it", "context": {"cluster": "it", "user": "it"}}
    cluster = {"name": "it", "cluster": {"server": "http://127.0.0.1:9"}}
    config = {
        "current-context": "it",
        "contexts": [context],
        "clusters": [cluster],
        "users": [{"name": "it", "user": {}}],
    }
    path.write_text(yaml.safe_dump(config))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    made = Operator(OPTIONS)
    made._loaded.set()
    return made


def answer(operator, what):
    """Let the reconcile of the run end so: by an answer, or by an error."""

    def reconcile(key):
        if isinstance(what, Exception):
            raise what
        return what

    operator.cache.put("HeteroRLRun", run_body())
    operator.reconciler.reconcile = reconcile
    return operator._reconcile(KEY)


def next_reconcile(operator):
    """Seconds until the run is reconciled again."""
    return min(at for at, *_ in operator.queue._later) - time.monotonic()


@pytest.mark.parametrize(
    ("what", "result", "at_least", "at_most"),
    [
        (None, "ok", 500, 660),  # the resync, not of all runs at once
        (7.0, "ok", 6, 7),
        (10_000.0, "ok", 500, 660),
        (Unfinished("quota", None), "unfinished", 0.1, 0.6),
        (Unfinished("quota", 0.05), "unfinished", -1, 0.05),
        (Transient(503, "ServiceUnavailable", "away"), "error", 0.1, 0.6),
        (Conflict(409, "Conflict", "injected"), "error", 0.1, 0.6),
        (ZeroDivisionError("a mistake of ours"), "error", 0.1, 0.6),
    ],
)
def test_every_run_is_reconciled_again_after_a_while(operator, what, result, at_least, at_most):
    assert answer(operator, what) == result
    assert at_least <= next_reconcile(operator) <= at_most


def test_a_retry_waits_as_long_as_the_api_server_asks(operator):
    error = Transient(429, "TooManyRequests", "slow down")
    error.retry_after_s = 17.0
    assert answer(operator, error) == "error"
    assert 16 <= next_reconcile(operator) <= 17


def test_a_run_with_a_problem_is_still_reconciled_when_time_is_due(operator):
    for _ in range(12):
        answer(operator, Unfinished("a right is missing", 30.0))  # by now it is tried each five minutes
    operator.queue._later.clear()
    operator.queue._due.clear()
    answer(operator, Unfinished("a right is missing", 30.0))
    assert 29 <= next_reconcile(operator) <= 30


def test_a_run_that_is_gone_is_not_reconciled_again(operator):
    operator.reconciler.reconcile = lambda key: None
    assert operator._reconcile(KEY) == "ok"
    assert operator.queue._later == []


def test_a_long_queue_is_healthy_and_a_reconcile_that_never_ends_is_not(operator, monkeypatch):
    operator.queue.add(KEY)
    monkeypatch.setattr("heterorl_operator.app._STUCK_S", 0.02)
    time.sleep(0.05)
    assert operator.health() == (True, "ok")
    operator.queue.get()
    time.sleep(0.05)
    healthy, why = operator.health()
    assert not healthy
    assert "its worker hangs" in why
    operator.queue.done(KEY)
    assert operator.health() == (True, "ok")


def test_an_operator_is_not_ready_before_it_has_listed_everything(operator):
    operator._loaded.clear()
    assert operator.health() == (False, "the first list has not finished")


def test_a_stale_watch_is_unhealthy(operator):
    operator.relister.stale.add("Pod")
    assert operator.health() == (False, "the watches of Pod are stale")


def test_an_operator_is_named_after_its_installation(operator):
    assert operator.api.manager == "heterorl-operator/lab/mine"


def test_no_cluster_is_said_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(UserError, match="set KUBECONFIG, or run in a pod"):
        Operator(OPTIONS)
