import pytest
from pydantic import ValidationError

from heterorl.names import Slot
from heterorl.spec import HeteroRLRun
from heterorl.validation import check


def manifest(**spec):
    return {
        "apiVersion": "heterorl.dev/v1alpha1",
        "kind": "HeteroRLRun",
        "metadata": {"name": "test"},
        "spec": {"samplers": [{"name": "near"}]} | spec,
    }


def group(**fields):
    return {"samplers": [{"name": "far"} | fields]}


BROKEN_RULES = [
    ({"model": {"source": "path"}}, "spec.model.path"),
    ({"model": {"source": "hub"}}, "spec.model.name"),
    ({"data": {"train": {"source": "file"}}}, "spec.data.train.path"),
    ({"data": {"train": {"source": "hub"}}}, "spec.data.train.name"),
    ({"data": {"evals": [{"label": "a"}, {"label": "a"}]}}, "spec.data.evals"),
    ({"rewards": [{"name": "custom"}]}, "spec.rewards.0.path"),
    ({"rewards": [{"name": "format", "path": "a.b"}]}, "spec.rewards.0.path"),
    ({"rewards": [{"name": "format"}, {"name": "format"}]}, "spec.rewards"),
    ({"algorithm": {"groupSize": 1}}, "spec.algorithm.groupSize"),
    ({"algorithm": {"staleness": {"maxSteps": 0}}}, "spec.algorithm.staleness.maxSteps"),
    ({"learner": {"gpus": 4}}, "spec.learner.processesPerReplica"),
    ({"learner": {"batch": {"groups": 65}}}, "spec.learner.batch.groups"),
    ({"samplers": [{"name": "a"}, {"name": "a"}]}, "spec.samplers"),
    (group(replicas=0), "spec.samplers"),
    (group(gpus=1, tensorParallel=2), "spec.samplers.0.tensorParallel"),
    (group(delay={"distribution": "lognormal", "lower": 5, "upper": 5}), "spec.samplers.0.delay.lower"),
    (group(delay={"distribution": "weibull", "lower": 0, "upper": 5}), "spec.samplers.0.delay.lower"),
    (group(delay={"distribution": "trace"}), "spec.samplers.0.delay.trace"),
    (
        group(delay={"distribution": "trace", "trace": {"path": "a.csv", "values": [1.0], "column": "b"}}),
        "spec.samplers.0.delay.trace",
    ),
    (group(delay={"distribution": "trace", "trace": {"path": "a.csv"}}), "spec.samplers.0.delay.trace.column"),
    (
        group(delay={"distribution": "constant", "model": "transit", "unit": "steps", "lower": 65}),
        "spec.samplers.0.delay.lower",
    ),
    (group(availability={"type": "windows"}), "spec.samplers.0.availability.windows"),
    (group(availability={"type": "trace"}), "spec.samplers.0.availability.trace"),
    (
        group(availability={"windows": [{"startSeconds": 2, "endSeconds": 2, "replicas": 1}]}),
        "spec.samplers.0.availability.windows.0.startSeconds",
    ),
    (
        group(availability={"trace": [{"atSeconds": 2, "replicas": 1}, {"atSeconds": 1, "replicas": 1}]}),
        "spec.samplers.0.availability.trace",
    ),
    (
        group(podTemplate={"env": [{"name": "A", "value": "b", "valueFrom": {}}]}),
        "spec.samplers.0.podTemplate.env.0.value",
    ),
    (group(podTemplate={"volumes": [{"name": "v"}]}), "spec.samplers.0.podTemplate.volumes.0.name"),
    ({"evaluation": {"passK": [2]}}, "spec.evaluation.passK"),
    ({"evaluation": {"everySteps": 5}}, "spec.data.evals"),
    ({"mode": "online", "learner": {"publish": {"everySteps": 2}}}, "spec.learner.publish.everySteps"),
    ({"mode": "online", **group(delay={"distribution": "constant"})}, "spec.samplers.0.delay"),
]


@pytest.mark.parametrize(("spec", "path"), BROKEN_RULES, ids=[path for _, path in BROKEN_RULES])
def test_each_rule_across_fields_is_reported_at_its_field(spec, path):
    run, problems = check(manifest(**spec))
    assert run is None
    assert [".".join(map(str, problem.location)) for problem in problems] == [path]


@pytest.mark.parametrize(("spec", "path"), BROKEN_RULES, ids=[path for _, path in BROKEN_RULES])
def test_a_spec_that_breaks_a_rule_can_not_be_built(spec, path):
    with pytest.raises(ValidationError):
        HeteroRLRun.model_validate(manifest(**spec))


def test_smallest_manifest_is_valid_and_resolving_it_changes_nothing():
    run = HeteroRLRun.model_validate(manifest())
    assert HeteroRLRun.model_validate(run.resolved()) == run
    assert HeteroRLRun.model_validate_json(run.model_dump_json(by_alias=True)) == run


def test_slots_stand_in_the_order_of_the_manifest():
    run = HeteroRLRun.model_validate(manifest(samplers=[{"name": "b", "replicas": 2}, {"name": "a"}]))
    assert list(run.spec.slots) == [Slot("b", 0), Slot("b", 1), Slot("a", 0)]


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_canary_tolerance_follows_the_dtype_unless_set(dtype, expected):
    spec = {"model": {"dtype": dtype}}
    assert HeteroRLRun.model_validate(manifest(**spec)).spec.canary_tolerance == expected
    spec["exchange"] = {"canary": {"tolerance": 0.5}}
    assert HeteroRLRun.model_validate(manifest(**spec)).spec.canary_tolerance == 0.5


@pytest.mark.parametrize(
    "generation", [{"topP": 0.9}, {"topK": 5}, {"minP": 0.1}, {"repetitionPenalty": 1.1}], ids=lambda g: next(iter(g))
)
def test_each_truncation_makes_the_law_a_truncated_one(generation):
    assert HeteroRLRun.model_validate(manifest(generation=generation)).spec.generation.truncated_law
    assert not HeteroRLRun.model_validate(manifest()).spec.generation.truncated_law
