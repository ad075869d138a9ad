"""Merges what a manifest says about pods into a workload, as `kubectl` merges: mappings by key, lists by their key.

| in the manifest | what happens |
|---|---|
| nodeSelector, labels, annotations, resources | key by key; the manifest's value stands (our own keys are refused) |
| env, volumes, imagePullSecrets, volumeMounts | item by item (name, the last by mountPath): one of ours is replaced |
| affinity | key by key, and every list is appended to ours |
| tolerations | appended |
| everything else | the manifest's value stands |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heterorl.spec.pod_template import PodTemplateSpec

Object = dict[str, Any]
"""A Kubernetes object, or a part of one, ready for YAML."""

KUEUE = "kueue.x-k8s.io/"
_KEYS = {"env": "name", "volumeMounts": "mountPath", "volumes": "name", "imagePullSecrets": "name"}
_CONTAINER = ("env", "volumeMounts", "resources", "image", "imagePullPolicy")
_WORKLOAD = ("labels", "annotations")


def merge_into_pod(pod: Object, given: PodTemplateSpec) -> Object:
    """A pod template (`metadata`, `spec`) with the manifest's wishes; those for a container go to the first one.

    Labels of Kueue are left out: it puts its own on the pods of a workload that carries them.
    """
    wishes = {key: value for key, value in _plain(given).items() if value not in ({}, [])}
    metadata = merge_into_metadata(pod["metadata"], given)
    metadata["labels"] = {key: value for key, value in metadata["labels"].items() if not key.startswith(KUEUE)}
    main, *others = pod["spec"]["containers"]
    main, spec = dict(main), dict(pod["spec"])
    for key, wish in wishes.items():
        if key not in _WORKLOAD:
            target = main if key in _CONTAINER else spec
            target[key] = _merged(target.get(key), wish, _KEYS.get(key))
    return {"metadata": metadata, "spec": {**spec, "containers": [main, *others]}}


def merge_into_metadata(metadata: Object, given: PodTemplateSpec) -> Object:
    """A workload's or pod's metadata with the manifest's labels and annotations."""
    annotations = {**metadata.get("annotations", {}), **given.annotations}
    merged = {**metadata, "labels": {**metadata["labels"], **given.labels}}
    return {**merged, "annotations": annotations} if annotations else merged


def _merged(ours: Any, wish: Any, key: str | None) -> Any:
    if isinstance(ours, Mapping) and isinstance(wish, Mapping):
        return {**ours, **{name: _merged(ours.get(name), value, None) for name, value in wish.items()}}
    if isinstance(ours, Sequence) and isinstance(wish, Sequence) and not isinstance(wish, str):
        return _merged_lists(ours, wish, key) if key else [*ours, *wish]
    return wish


def _merged_lists(ours: Sequence[Object], wishes: Sequence[Object], key: str) -> list[Object]:
    """Ours in their order, replaced where a wish has the same key, then the other wishes."""
    by_key = {item[key]: item for item in (*ours, *wishes)}
    return list(by_key.values())


def _plain(given: PodTemplateSpec) -> Object:
    wishes = given.model_dump(mode="json", by_alias=True, exclude_none=True)
    wishes["resources"] = {kind: amounts for kind, amounts in wishes["resources"].items() if amounts}
    return wishes
