"""How the operator scales: many runs of three pools on a real API server, with real controllers and kwok's pods.

    PYTHONPATH=tests python -m bench.operator_scale [--record] [RUNS ...]      [1 100 1000]

Beside it, in the same run, a bare loop of the same client applies the same objects on a fresh cluster. `--record` writes
the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kubernetes import config

from bench.page import PAGE, ROOT, machine, put
from cluster.harness import Cluster
from cluster.operators import OperatorProcess, run_manifest, wait_for
from heterorl.kubernetes.manifests import Images, desired_state
from heterorl.spec.run import HeteroRLRun
from heterorl_operator.client import Api
from heterorl_operator.resources import BY_NAME, DEPLOYMENT, POD, RUN, ResourceKind

NAMESPACE = "bench"
POOLS = ("near", "mid", "far")
OBJECTS = 8  # ConfigMap, claim, Service, Job, StatefulSet, three Deployments
CONCURRENT = 8
CHANGES = 50
REST_S = 60.0
QUIET_S = 15.0
"""Without a write for so long, the cluster is at rest."""
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Result:
    """What was measured with so many runs."""

    runs: int
    bare_s: float
    """The bare loop: all objects applied."""
    children_s: float
    """From the operator's start to the last object."""
    p50_s: float
    """From the change of one run, the others at rest, to its object's change."""
    p99_s: float
    memory: int
    """Resident bytes of the operator, at rest."""
    writes_per_minute: float
    """At rest."""
    synced_s: float
    """From a start to every run looked at."""
    undone_s: float
    """From that start to the end of the second looks, which undo what somebody edited meanwhile."""

    @property
    def ratio(self) -> float:
        """To the bare loop."""
        return self.children_s / self.bare_s


def manifest(number: int) -> dict[str, Any]:
    """One of the runs."""
    run = run_manifest(f"run-{number}", pools={pool: {} for pool in POOLS})
    run["metadata"]["namespace"] = NAMESPACE
    return run


def volume(number: int) -> dict[str, Any]:
    """A PersistentVolume for one of the runs."""
    claim = {"namespace": NAMESPACE, "name": f"run-{number}-volume"}
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "claimRef": claim}
    spec |= {"hostPath": {"path": "/tmp"}}
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"volume-{number}"}, "spec": spec}


class Bench:
    """A fresh cluster with the CRD."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds" / "heterorlrun.yaml"))
        cluster.wait("the CRD", lambda: "heterorlruns" in cluster.kubectl("api-resources", "--api-group=heterorl.dev"))
        cluster.kubectl("create", "namespace", NAMESPACE)
        client = config.new_client_from_config(str(cluster.kubeconfig))
        client.configuration.connection_pool_maxsize = 2 * CONCURRENT
        self.api = Api(client, "bench")

    def give_volumes(self, runs: int) -> None:
        """A volume for the claim of each run, so that its pods are scheduled and seem to run."""
        _in_parallel(
            lambda number: self.api._request("POST", "/api/v1/persistentvolumes", {}, volume(number)), range(runs)
        )

    def count(self, kind: ResourceKind) -> int:
        """Objects of a kind, without reading them."""
        page = self.api._request("GET", kind.path(NAMESPACE), {"limit": "1"})
        return len(page["items"]) + int(page["metadata"].get("remainingItemCount") or 0)

    def children(self) -> int:
        """Objects of all kinds that the operator makes; the namespace has a ConfigMap of its own."""
        return sum(self.count(kind) for kind in BY_NAME.values() if kind not in (RUN, POD)) - 1

    def wait_for_children(self, runs: int, operator: OperatorProcess) -> None:
        """Until all are there. The operator is asked first, and not often: both that and counting is work for them."""
        applied = lambda: operator.metric("heterorl_operator_applies_total") >= runs * OBJECTS  # noqa: E731
        wait_for(applied, "the applies", LIMIT_S, every_s=0.5)
        wait_for(lambda: self.children() == runs * OBJECTS, "the objects", LIMIT_S)

    def submit(self, runs: int) -> None:
        """Create the runs."""
        _in_parallel(lambda number: self.api.create(RUN, manifest(number)), range(runs))

    def settle(self, runs: int, operator: OperatorProcess) -> None:
        """Wait until every pod was made and nothing is written any more."""
        wait_for(lambda: self.count(POD) >= runs * (2 + len(POOLS)), "the pods", LIMIT_S)
        quiet_since, before = time.monotonic(), -1.0
        while time.monotonic() - quiet_since < QUIET_S:
            if (now := operator.metric("heterorl_operator_writes_total")) != before:
                quiet_since, before = time.monotonic(), now
            time.sleep(1)


def bare_loop(runs: int) -> float:
    """Seconds in which as many threads apply the same objects without an operator."""
    with Cluster("kwok") as cluster:
        bench = Bench(cluster)
        images = Images("heterorl/learner", "heterorl/sampler")
        parsed = [HeteroRLRun.model_validate(manifest(number)) for number in range(runs)]
        bench.give_volumes(runs)
        objects = [each for run in parsed for each in desired_state(run, images=images, namespace=NAMESPACE)]
        started = time.monotonic()
        _in_parallel(lambda each: bench.api.apply(BY_NAME[each["kind"]], each), objects)
        return time.monotonic() - started


@contextmanager
def operated(runs: int) -> Iterator[tuple[Bench, OperatorProcess, float]]:
    """A fresh cluster where an operator has made the objects of so many runs, and the seconds that this took."""
    with Cluster("kwok") as cluster:
        bench = Bench(cluster)
        bench.give_volumes(runs)
        bench.submit(runs)
        operator = OperatorProcess(cluster, "heterorl", ["--namespace", NAMESPACE], cluster.kubeconfig)
        try:
            started = time.monotonic()
            super(OperatorProcess, operator).start()
            bench.wait_for_children(runs, operator)
            yield bench, operator, time.monotonic() - started
        finally:
            operator.stop()


def at_rest(bench: Bench, runs: int, operator: OperatorProcess, rest_s: float) -> tuple[int, float]:
    """Once nothing is written any more: the operator's memory in bytes, and its writes a minute."""
    bench.settle(runs, operator)
    before = operator.metric("heterorl_operator_writes_total")
    time.sleep(rest_s)
    return operator.memory(), (operator.metric("heterorl_operator_writes_total") - before) * 60 / rest_s


def restarted(runs: int, operator: OperatorProcess) -> tuple[float, float]:
    """The seconds from a restart to the look at every run, and to the end of the second looks."""
    operator.kill()
    started = time.monotonic()
    super(OperatorProcess, operator).start()
    synced = lambda: operator.metric("heterorl_operator_synced") == 1.0  # noqa: E731
    wait_for(synced, "the look at every run", LIMIT_S, every_s=0.5)
    synced_s = time.monotonic() - started
    # Every object but the Jobs is applied; those of the first looks that had changes are among them.
    applied = lambda: operator.metric("heterorl_operator_applies_total") >= runs * (OBJECTS - 1)  # noqa: E731
    wait_for(applied, "the second looks", LIMIT_S, every_s=0.5)
    return synced_s, time.monotonic() - started


def measure(runs: int, *, rest_s: float = REST_S, say: Callable[[str], None] = print) -> Result:
    """Everything, on fresh clusters."""
    bare_s = bare_loop(runs)
    say(f"{runs} runs: the bare loop took {bare_s:.1f} s")
    with operated(runs) as (bench, operator, children_s):
        say(f"{runs} runs: the operator made all objects in {children_s:.1f} s")
        bench.settle(runs, operator)
        latencies = sorted(_latencies(bench, runs))
        memory, writes = at_rest(bench, runs, operator, rest_s)  # those changes made pods
        synced_s, undone_s = restarted(runs, operator)
    return Result(
        runs=runs,
        bare_s=bare_s,
        children_s=children_s,
        p50_s=statistics.median(latencies),
        p99_s=latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        memory=memory,
        writes_per_minute=writes,
        synced_s=synced_s,
        undone_s=undone_s,
    )


def _latencies(bench: Bench, runs: int) -> list[float]:
    """Seconds from a patch of one run to the change of its Deployment, one at a time."""
    found = []
    for change in range(CHANGES):
        name, wanted = f"run-{change * 7919 % runs}", 2 + change % 5
        samplers = [{"name": pool, "engine": "transformers"} for pool in POOLS]
        samplers[0]["replicas"] = wanted  # type: ignore[assignment]
        started = time.monotonic()
        bench.api.merge(RUN, NAMESPACE, name, {"spec": {"samplers": samplers}})
        while True:
            seen = bench.api.get(DEPLOYMENT, NAMESPACE, f"{name}-sampler-{POOLS[0]}")
            if seen and seen["spec"]["replicas"] == wanted:
                break
            time.sleep(0.002)
        found.append(time.monotonic() - started)
        time.sleep(0.2)
    return found


def _in_parallel(work: Callable[[Any], object], items: Any) -> None:
    with ThreadPoolExecutor(CONCURRENT) as pool:
        for done in [pool.submit(work, each) for each in items]:
            done.result()


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────────
COLUMNS: dict[str, Callable[[Result], str]] = {
    "runs": lambda r: f"{r.runs:,}",
    "objects": lambda r: f"{r.runs * OBJECTS:,}",
    "bare loop": lambda r: f"{r.bare_s:.1f} s",
    "all children": lambda r: f"{r.children_s:.1f} s",
    "ratio": lambda r: f"{r.ratio:.2f}",
    "change p50": lambda r: f"{1000 * r.p50_s:.0f} ms",
    "change p99": lambda r: f"{1000 * r.p99_s:.0f} ms",
    "memory": lambda r: f"{r.memory / 1e6:.0f} MB",
    "writes a minute": lambda r: f"{r.writes_per_minute:.0f}",
    "restart": lambda r: f"{r.synced_s:.1f} s",
    "edits undone": lambda r: f"{r.undone_s:.1f} s",
}


def table(results: list[Result]) -> str:
    """Markdown."""
    rows = [list(COLUMNS), ["---:"] * len(COLUMNS), *([column(r) for column in COLUMNS.values()] for r in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=int, default=[1, 100, 1000])
    parser.add_argument("--record", action="store_true", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    results = [measure(runs) for runs in args.runs]
    print(table(results))
    if args.record:
        put(PAGE, "operator scale", f"{table(results)}\n\nMeasured on {machine()}.")


if __name__ == "__main__":
    main()
