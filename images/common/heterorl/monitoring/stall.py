"""What a learner that gets no further waits for: each slot, the weights it serves, and since when it is silent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from heterorl.exchange.records import SlotHeartbeat
from heterorl.names import Slot
from heterorl.spec.run import RunSpec

_NAMED = 8
"""Number of slots that are named; the others are only counted."""


def waiting_for(spec: RunSpec, beats: Mapping[Slot, SlotHeartbeat], heard_at: Mapping[Slot, float], now: float) -> str:
    """The slots of the run in a line. `heard_at`: when each heartbeat was last seen to move, by the clock of `now`.

    Moments are given to the minute and not as durations, so that the line stays the same while nothing changes.
    """
    slots = spec.slots
    parts = [_slot(slot, beats.get(slot), heard_at.get(slot, now), now, spec) for slot in slots[:_NAMED]]
    if len(slots) > _NAMED:
        parts.append(f"and {len(slots) - _NAMED} more")
    return ", ".join(parts)


def _slot(slot: Slot, beat: SlotHeartbeat | None, heard_at: float, now: float, spec: RunSpec) -> str:
    if beat is None:
        return f"{slot} has not started"
    serves = f"serves {beat.version}" if beat.version else "serves no weights"
    if beat.refused:
        serves += f", refused {', '.join(sorted(beat.refused)[-3:])}"
    if beat.released:
        return f"{slot} has stopped ({serves})"
    if now - heard_at >= spec.exchange.lease_seconds:
        return f"{slot} has been silent since {datetime.fromtimestamp(heard_at, UTC):%H:%M} UTC ({serves})"
    return f"{slot} is {beat.state or 'starting'} ({serves})"
