"""What a learner that gets no further waits for: each slot, the weights it serves, and since when it is silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from heterorl.monitoring.snapshot import ObservedSlot
from heterorl.spec.run import Slot

_NAMED = 8
"""Number of slots that are named; the others are only counted."""


def waiting_for(slots: Sequence[Slot], seen: Mapping[Slot, ObservedSlot]) -> str:
    """The slots of the run in a line; `seen`: those that had a heartbeat.

    Moments are given to the minute and not as durations, so that the line stays the same while nothing changes.
    """
    parts = [_slot(slot, seen.get(slot)) for slot in slots[:_NAMED]]
    if len(slots) > _NAMED:
        parts.append(f"and {len(slots) - _NAMED} more")
    return ", ".join(parts)


def _slot(slot: Slot, seen: ObservedSlot | None) -> str:
    if seen is None:
        return f"{slot} has not started"
    beat = seen.heartbeat
    serves = f"serves {beat.version}" if beat.version else "serves no weights"
    if beat.trouble:
        serves += f"; {beat.trouble}"
    if beat.refused:
        serves += f", refused {', '.join(sorted(beat.refused)[-3:])}"
    if beat.released:
        return f"{slot} has stopped ({serves})"
    if not seen.alive:
        return f"{slot} has been silent since {datetime.fromtimestamp(seen.heard_at, UTC):%H:%M} UTC ({serves})"
    return f"{slot} is {beat.state or 'starting'} ({serves})"
