"""The replicas that the operator asks for, over time, against the pure function: on a real API server."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest
from kubernetes import client, watch
from urllib3.exceptions import HTTPError

from cluster.operators import apply, give_volume, operator, patch, reasons, run_manifest, status, wait_for
from heterorl.heterogeneity.availability import replicas_at
from heterorl.spec.run import HeteroRLRun
from heterorl_operator.timestamps import seconds

CLUSTER = {"level": "controllers"}
pytestmark = pytest.mark.usefixtures("crd")

WINDOWS = {"type": "windows", "windows": [
    {"startSeconds": 0, "endSeconds": 3, "replicas": 2},
    {"startSeconds": 5, "endSeconds": 8, "replicas": 1},
    {"startSeconds": 7, "endSeconds": 11, "replicas": 3},
]}  # fmt: skip
CHURN = {"type": "churn", "churn": {"meanUpSeconds": 4, "meanDownSeconds": 3, "seed": 5}}
POOLS = {"windows": {"replicas": 3, "availability": WINDOWS}, "churn": {"replicas": 4, "availability": CHURN}}
WATCHED_S = 14.0
TOLERANCE_S = 1.0


class Recorder:
    """Notes when a Deployment's `spec.replicas` changes, as a watch tells it."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.changes: dict[str, list[tuple[float, int]]] = {}
        self._watch = watch.Watch()
        self._thread = threading.Thread(target=self._run, args=(client.AppsV1Api(api), namespace), daemon=True)
        self._thread.start()

    def _run(self, apps: client.AppsV1Api, namespace: str) -> None:
        with suppress(HTTPError):  # it watches until the cluster is taken down
            for event in self._watch.stream(apps.list_namespaced_deployment, namespace):
                name, count = event["object"].metadata.name, event["object"].spec.replicas
                seen = self.changes.setdefault(name, [])
                if not seen or seen[-1][1] != count:
                    seen.append((time.time(), count))

    def at(self, name: str, moment: float) -> int | None:
        """What the Deployment asked for at a moment."""
        return next((count for at, count in reversed(self.changes.get(name, [])) if at <= moment), None)


def differences(recorder, run, name, start, begin, end):
    """Moments at which a pool's Deployment asked for what the function gives at no moment within the tolerance."""
    spec = HeteroRLRun.model_validate(run).spec
    found = []
    for pool in spec.samplers:
        for tenth in range(int(begin * 10), int(end * 10)):
            elapsed = tenth / 10
            nearby = [elapsed - TOLERANCE_S + step / 20 for step in range(int(40 * TOLERANCE_S) + 1)]
            allowed = {replicas_at(pool, each, seed=spec.seed) for each in nearby}
            count = recorder.at(f"{name}-sampler-{pool.name}", start + elapsed)
            if count not in allowed:
                found.append((pool.name, elapsed, count, allowed))
    return found


def test_replicas_follow_windows_and_churn_to_a_second_and_the_same_seed_gives_the_same_trace(cluster, api, namespace):
    recorder = Recorder(api, namespace)
    first, second = (run_manifest(name, pools=POOLS, seed=3) for name in ("first", "second"))
    with operator(cluster, "--namespace", namespace) as process:
        starts = {}
        for run in (first, second):
            name = run["metadata"]["name"]
            give_volume(cluster, namespace, name)
            apply(cluster, namespace, run)
            wait_for(lambda name=name: recorder.at(f"{name}-sampler-churn", time.time()) is not None, "the Deployments")
            started = wait_for(lambda name=name: status(cluster, namespace, name).get("startTime"), "the start")
            starts[name] = seconds(started)
        time.sleep(6)
        away_from = time.time() - TOLERANCE_S
        process.kill()  # a successor goes on with the same trace
        process.start()
        away_until = time.time() + TOLERANCE_S
        wait_for(lambda: time.time() > starts["second"] + WATCHED_S, "the end of what is watched")
    for run in (first, second):
        name = run["metadata"]["name"]
        spans = ((TOLERANCE_S, away_from - starts[name]), (away_until - starts[name], WATCHED_S - TOLERANCE_S))
        for begin, end in spans:
            assert differences(recorder, run, name, starts[name], begin, end) == []
        assert len(recorder.changes[f"{name}-sampler-windows"]) >= 3
        assert len(recorder.changes[f"{name}-sampler-churn"]) >= 3


def test_an_edit_of_a_live_run_takes_effect_at_once_and_each_change_is_an_event(cluster, api, namespace):
    recorder = Recorder(api, namespace)
    give_volume(cluster, namespace)
    with operator(cluster, "--namespace", namespace):
        apply(cluster, namespace, run_manifest(pools={"near": {"replicas": 2}}))
        wait_for(lambda: recorder.at("run-sampler-near", time.time()) == 2, "two replicas")
        start = seconds(wait_for(lambda: status(cluster, namespace).get("startTime"), "the start"))
        now = time.time() - start
        points = [{"atSeconds": now + 3, "replicas": 1}, {"atSeconds": now + 5, "replicas": 0}]
        pool = {"name": "near", "engine": "transformers", "replicas": 2}
        patch(cluster, namespace, "run", {"samplers": [{**pool, "availability": {"type": "trace", "trace": points}}]})
        wait_for(lambda: recorder.at("run-sampler-near", time.time()) == 0, "none")
        changes = [(at - start - now, count) for at, count in recorder.changes["run-sampler-near"]]
        assert [count for _, count in changes] == [2, 1, 0]
        assert changes[1][0] == pytest.approx(3, abs=TOLERANCE_S)
        assert changes[2][0] == pytest.approx(5, abs=TOLERANCE_S)
        patch(cluster, namespace, "run", {"samplers": [{**pool, "replicas": 4}]})
        edited = time.time()
        wait_for(lambda: recorder.at("run-sampler-near", time.time()) == 4, "four replicas")
        assert recorder.changes["run-sampler-near"][-1][0] - edited < TOLERANCE_S
        wait_for(lambda: reasons(cluster, namespace).count("Scaled") == 3, "an event for each change")
