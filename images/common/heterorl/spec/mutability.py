"""What of a run's spec may change, and when: one table for the CRD, the local runner and the running processes.

    LIVE        at any time; running processes take it over
    IMMUTABLE   never
    the rest    only while nothing of the run runs: on Kubernetes, while it is suspended

Sampler pools may come and go at any time. Paths are those of the manifest below `spec`, with `*` for a pool's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from heterorl.spec.run import HeteroRLRun

LIVE = (
    "learner.steps",  # up only
    "samplers.*.replicas",
    "samplers.*.availability",
    "samplers.*.delay",
    "exchange.retention",
    "exchange.volume.size",
    "evaluation",
    "failurePolicy",
    "local",
    "suspend",
    "resume",
    "ttlSecondsAfterFinished",
    "activeDeadlineSeconds",
)
IMMUTABLE = (
    "model",
    "data",
    "seed",
    "algorithm.groupSize",
    "learner.strategy",
    "samplers.*.engine",
    "exchange.volume.claimName",
    "exchange.volume.storageClassName",
    "exchange.volume.accessModes",
)

Path = tuple[str, ...]


def within(path: Sequence[str], table: Sequence[str]) -> bool:
    """Whether one of the table's paths is this one or lies around it."""
    patterns = [entry.split(".") for entry in table]
    return any(len(path) >= len(p) and all(a in ("*", b) for a, b in zip(p, path)) for p in patterns)


def changes(old: HeteroRLRun, new: HeteroRLRun) -> Iterator[tuple[Path, Any, Any]]:
    """Every value that differs: its path, what it was, what it is. Pools that came or went are none."""
    before, now = _by_name(old), _by_name(new)
    stayed = before["samplers"].keys() & now["samplers"].keys()
    for spec in (before, now):
        spec["samplers"] = {name: pool for name, pool in spec["samplers"].items() if name in stayed}
    was, is_ = dict(_leaves(before)), dict(_leaves(now))
    for path in sorted(was.keys() | is_.keys()):
        if was.get(path) != is_.get(path):
            yield path, was.get(path), is_.get(path)


def is_refused_live(path: Path, was: Any, is_: Any) -> bool:
    """Whether a running process does not take this change over."""
    return not within(path, LIVE) or (path == ("learner", "steps") and is_ < was)


def take_over(held: HeteroRLRun, edited: HeteroRLRun) -> HeteroRLRun:
    """The run as held, with what of the edited one may change at any time; ValueError if the two do not go together."""
    spec = _merged(_by_name(held), _by_name(edited), ())
    spec["samplers"] = list(spec["samplers"].values())
    spec["learner"]["steps"] = max(held.spec.learner.steps, edited.spec.learner.steps)
    return HeteroRLRun.model_validate({**held.resolved(), "spec": spec})


def _merged(held: Any, edited: Any, path: Path) -> Any:
    if within(path, LIVE):
        return edited
    if path == ("samplers",):
        return {
            name: _merged(held[name], pool, (*path, name)) if name in held else pool for name, pool in edited.items()
        }
    if isinstance(held, dict) and isinstance(edited, dict):
        return {key: _merged(value, edited.get(key), (*path, key)) for key, value in held.items()}
    return held


def _by_name(run: HeteroRLRun) -> dict[str, Any]:
    """The spec as a tree, sampler pools by their name rather than their place."""
    spec: dict[str, Any] = run.resolved()["spec"]
    spec["samplers"] = {pool["name"]: pool for pool in spec["samplers"]}
    return spec


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value
