"""Weights that no sampler accepts: what the samplers' heartbeats say of it, and when nothing can come any more.

A refusal is for good (`heterorl_sampler.weight_sync`), so what all have refused stays refused until processes or
settings change. Whatever reports on a run asks here, and the learner, which ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from heterorl.exchange.records import SlotStatus
from heterorl.exchange.version import Version
from heterorl.spec.run import RunSpec, Slot


def refused_by_all(versions: Iterable[Version], samplers: Iterable[SlotStatus]) -> str | None:
    """Which newest version every sampler at work has refused, and why; None unless all have."""
    newest, at_work = max(versions, default=None), [status for status in samplers if status.state != "starting"]
    reasons = [status.refused.get(str(newest)) for status in at_work]
    if newest is None or not reasons or None in reasons:
        return None
    return f"no sampler accepts weights {newest}: {reasons[0]}"


def dead_end(spec: RunSpec, step: int, versions: Iterable[Version], samplers: Mapping[Slot, SlotStatus]) -> str | None:
    """Why no rollout that may be trained at `step` can come any more, though the learner waits for one; None if it can.

    Only once every slot of the run has reported that it refused every version whose rollouts might be trained.
    """
    published = set(versions)
    online = {max(published)} if published and spec.mode == "online" else published
    useful = {str(version) for version in online if step - version.step <= spec.max_lag}
    for slot in spec.slots:
        status = samplers.get(slot)
        if status is None or not useful <= status.refused.keys():
            return None
        if status.version_step is not None and step - status.version_step <= spec.max_lag and spec.mode != "online":
            return None
    return refused_by_all(published, samplers.values())
