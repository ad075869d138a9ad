"""Runs, run folders and rollouts for the tests: what a test does not name is the least that works.

A run has one pool, `far`, of one sampler; every field of `spec` is given as in a manifest: `run_of(learner={"steps": 2})`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heterorl.exchange.canary import Canary
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Provenance, Rollout, RolloutName
from heterorl.exchange.slots import Lease
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version
from heterorl.spec.run import API_VERSION, KIND, HeteroRLRun, RunSpec, Slot

FAR = Slot("far", 0)
CANARY = Canary([[1, 2, 3]], [[-0.5, -0.25]])


class Clock:
    """Time that passes only when a test says so, or sleeps."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def manifest(name: str = "test", *, metadata: Mapping[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """The manifest as a user writes it."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, **(metadata or {})},
        "spec": {"samplers": [{"name": "far"}], **spec},
    }


def run_of(name: str = "test", *, metadata: Mapping[str, Any] | None = None, **spec: Any) -> HeteroRLRun:
    """The run, checked and with its defaults."""
    return HeteroRLRun.model_validate(manifest(name, metadata=metadata, **spec))


def spec_of(**spec: Any) -> RunSpec:
    """The run's spec alone."""
    return run_of(**spec).spec


def exchange_at(
    root: Path,
    run: HeteroRLRun | None = None,
    *,
    files: Files | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Exchange:
    """A run's folder, new or with another manifest than before."""
    exchange = Exchange(root, files=files, clock=clock, sleep=sleep)
    exchange.create(run or run_of())
    return exchange


def rollout_name(seq: int, step: int = 0, *, incarnation: int = 1, slot: Slot = FAR) -> RolloutName:
    """The name of a rollout made with the weights of `step`."""
    return RolloutName(Version(step, incarnation), slot, seq)


def rollout_of(
    rewards: Sequence[float] = (1.0, 0.0),
    lengths: Sequence[int] | None = None,
    *,
    version: int = 0,
    logp: Sequence[float] | None = None,
    truncated: Sequence[bool] | None = None,
    terms: Mapping[str, Sequence[float]] | None = None,
    provenance: Provenance | None = None,
    **fields: Any,
) -> Rollout:
    """A group with these rewards [G] on the prompt 5, 6; completions of one token each, 7, 8, ..., unless `lengths` says."""
    lengths = lengths or [1] * len(rewards)
    tokens = sum(lengths)
    return Rollout(
        prompt_ids=np.array([5, 6], np.int32),
        completion_ids=np.arange(7, 7 + tokens, dtype=np.int32),
        lengths=np.array(lengths, np.int32),
        logp=np.array([-0.5] * tokens if logp is None else logp, np.float32),
        versions=((Version(version, 1), tokens),),
        rewards=np.array(rewards, np.float32),
        truncated=np.array(truncated or [False] * len(rewards), np.bool_),
        provenance=provenance or Provenance.of(spec_of(), ""),
        reward_terms={name: np.array(values, np.float32) for name, values in (terms or {}).items()},
        **fields,
    )


def put(exchange: Exchange, rollouts: Mapping[RolloutName, Rollout], *, epoch: int = 1) -> None:
    """Rollouts of one slot on the volume, as its sampler publishes them."""
    slot = next(iter(rollouts)).slot
    exchange.put_rollouts(Lease(slot, epoch), rollouts)


def publish(exchange: Exchange, version: Version, weights: bytes = b"weights", canary: Canary = CANARY) -> Version:
    """Weights on the volume, as the learner publishes them."""
    (exchange.stage_weights(version) / "model.safetensors").write_bytes(weights)
    exchange.commit_weights(version, canary)
    return version
