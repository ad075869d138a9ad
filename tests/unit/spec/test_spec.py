from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from builders import manifest
from heterorl.spec.run import HeteroRLRun, Slot
from heterorl.spec.validation import check

# Shared with tests/cluster, which shows them to a real API server.
BROKEN_MANIFESTS = yaml.safe_load((Path(__file__).parents[2] / "broken_manifests.yaml").read_text())
BROKEN_RULES = [(broken["spec"], broken["at"]) for broken in BROKEN_MANIFESTS]


@pytest.mark.parametrize(("spec", "path"), BROKEN_RULES, ids=[path for _, path in BROKEN_RULES])
def test_each_rule_across_fields_is_reported_at_its_field(spec, path):
    run, problems = check(manifest(**spec))
    assert run is None
    assert [".".join(map(str, problem.location)) for problem in problems] == [path]


@pytest.mark.parametrize("broken", BROKEN_MANIFESTS, ids=[path for _, path in BROKEN_RULES])
def test_a_spec_that_keeps_the_rule_is_accepted(broken):
    run, problems = check(manifest(**broken["mended"]))
    assert run is not None
    assert problems == []


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


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_canary_tolerance_follows_the_dtype_unless_set(dtype, expected):
    spec = {"model": {"dtype": dtype}}
    assert HeteroRLRun.model_validate(manifest(**spec)).spec.canary_tolerance == expected
    spec["exchange"] = {"canary": {"tolerance": 0.5}}
    assert HeteroRLRun.model_validate(manifest(**spec)).spec.canary_tolerance == 0.5


@pytest.mark.parametrize(
    "generation", [{"topP": 0.9}, {"topK": 5}, {"minP": 0.1}, {"repetitionPenalty": 1.1}], ids=lambda g: next(iter(g))
)
def test_each_setting_that_changes_the_sampling_distribution_is_noticed(generation):
    assert HeteroRLRun.model_validate(manifest(generation=generation)).spec.generation.is_truncated
    assert not HeteroRLRun.model_validate(manifest()).spec.generation.is_truncated
