"""Moments in a status: RFC 3339 in UTC, to the millisecond, as availability needs it."""

from __future__ import annotations

from datetime import UTC, datetime


def moment(seconds: float) -> str:
    """Seconds since 1970 as text."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(text: str) -> float:
    """Text, also as the API server writes it, as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()
