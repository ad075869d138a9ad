"""Which fields of a run's spec may change, and when: one table for the CRD, the local runner and the processes.

    LIVE        at any time; running processes follow the change
    IMMUTABLE   never
    the rest    only while the run is stopped: on Kubernetes, while it is suspended

Sampler pools may be added and removed at any time. Paths are relative to `spec`, with `*` for the name of a pool.
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
    "samplers.*.fetchBytesPerSecond",
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
    """Whether the table holds this path or one that encloses it."""
    patterns = [entry.split(".") for entry in table]
    return any(len(path) >= len(p) and all(a in ("*", b) for a, b in zip(p, path)) for p in patterns)


def changes(old: HeteroRLRun, new: HeteroRLRun) -> Iterator[tuple[Path, Any, Any]]:
    """Every value that differs: its path, the old and the new value. Added and removed pools are not listed."""
    before, now = _by_name(old), _by_name(new)
    stayed = before["samplers"].keys() & now["samplers"].keys()
    for spec in (before, now):
        spec["samplers"] = {name: pool for name, pool in spec["samplers"].items() if name in stayed}
    was, is_ = dict(_leaves(before)), dict(_leaves(now))
    for path in sorted(was.keys() | is_.keys()):
        if was.get(path) != is_.get(path):
            yield path, was.get(path), is_.get(path)


def is_refused_live(path: Path, was: Any, is_: Any) -> bool:
    """Whether a running process does not follow this change."""
    return not within(path, LIVE) or (path == ("learner", "steps") and is_ < was)


def take_over(held: HeteroRLRun, edited: HeteroRLRun) -> HeteroRLRun:
    """The held run with the live fields of the edited one; ValueError if the result is invalid."""
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
    """The spec as a tree, with the sampler pools by name rather than by position."""
    spec: dict[str, Any] = run.resolved()["spec"]
    spec["samplers"] = {pool["name"]: pool for pool in spec["samplers"]}
    return spec


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value
