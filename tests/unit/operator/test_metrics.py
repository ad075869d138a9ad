"""What Prometheus is told of the runs."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from heterorl_operator.cache import ObjectCache
from heterorl_operator.metrics import RunsCollector
from unit.operator.operator_world import KEY, run_body


def told_of(**status: object) -> dict[str, float]:
    """Samples of a run's metrics with their labels."""
    cache, registry = ObjectCache(), CollectorRegistry()
    cache.put("HeteroRLRun", run_body(status=status))
    registry.register(RunsCollector(cache, {KEY: 7.0}.get))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


LEARNER = {"step": 3, "lag": 1.5}
RUN = f'namespace="{KEY.namespace}",run="{KEY.name}"'


def test_a_run_at_work_tells_its_step_lag_time_since_the_last_step_and_samplers():
    samplers = [{"name": "near", "desired": 2, "ready": 1}]
    assert told_of(state="Running", learner=LEARNER, samplers=samplers) == {
        'heterorl_operator_runs{state="Running"}': 1,
        f"heterorl_run_step{{{RUN}}}": 3,
        f"heterorl_run_lag{{{RUN}}}": 1.5,
        f"heterorl_run_stalled_seconds{{{RUN}}}": 7,
        'heterorl_run_samplers_ready{namespace="lab",pool="near",run="run"}': 1,
        'heterorl_run_samplers_desired{namespace="lab",pool="near",run="run"}': 2,
    }


def test_a_run_without_a_status_is_pending():
    assert told_of()['heterorl_operator_runs{state="Pending"}'] == 1


@pytest.mark.parametrize("state", ["Suspended", "Succeeded", "Failed"])
def test_a_suspended_or_ended_run_reports_no_lag_and_no_stall(state):
    told = told_of(state=state, learner=LEARNER)
    assert told == {f'heterorl_operator_runs{{state="{state}"}}': 1, f"heterorl_run_step{{{RUN}}}": 3}
