"""`heterorl render`: a run's manifests as YAML, for a cluster without the operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from heterorl.kubernetes.manifests import Images, desired_state, spec_for_pods
from heterorl.kubernetes.names import Object
from heterorl.kubernetes.pods import VOLUME
from heterorl.spec.load import inline_traces
from heterorl.spec.paths import input_paths
from heterorl.spec.run import HeteroRLRun


def render(run: HeteroRLRun, base: Path, images: Images, namespace: str | None) -> tuple[str, list[str]]:
    """The YAML documents of a run, and what a user has to know of them.

    Traces of delays are read from files relative to `base`, the manifest's folder, and written out. Raises DataError
    for a trace that cannot be read.
    """
    run = inline_traces(run, base)
    objects = desired_state(run, images=images, namespace=namespace or run.metadata.namespace)
    return to_yaml(objects), [*_only_with_the_operator(run), *_expected_on_the_volume(run)]


def to_yaml(objects: Iterable[Object]) -> str:
    """Objects as YAML documents; texts of several lines keep them."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True, explicit_start=True)


def _only_with_the_operator(run: HeteroRLRun) -> Iterator[str]:
    spec = run.spec
    for pool in spec.samplers:
        if pool.availability.type != "always":
            yield f"spec.samplers.{pool.name}.availability needs the operator; all {pool.replicas} replicas will run"
    if spec.evaluation.every_steps:
        yield "spec.evaluation needs the operator; versions are not evaluated during the run"
    for field, value in {
        "activeDeadlineSeconds": spec.active_deadline_seconds,
        "ttlSecondsAfterFinished": spec.ttl_seconds_after_finished,
    }.items():
        if value is not None:
            yield f"spec.{field} needs the operator; delete the objects yourself"


def _expected_on_the_volume(run: HeteroRLRun) -> Iterator[str]:
    for path in input_paths(spec_for_pods(run)["spec"]):
        where = "on the volume" if path.value.startswith(VOLUME) else "in the pods"
        yield f"spec.{path.field} is read {where}, at {path.value}; put it there before you apply"


class _Dumper(yaml.SafeDumper):
    """Safe YAML without aliases, with literal blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
