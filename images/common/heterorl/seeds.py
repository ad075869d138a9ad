"""Random numbers that depend only on names: the next holder of a slot draws what its predecessor would have drawn."""

from __future__ import annotations

import hashlib


def derive_seed(*key: object) -> int:
    """A seed in [0, 2^31) that is a pure function of the key, on every machine and Python the same."""
    return _hash(key) >> 33


def uniform(*key: object) -> float:
    """A number in the open interval (0, 1) that is a pure function of the key."""
    return ((_hash(key) >> 12) + 0.5) * 2.0**-52


def _hash(key: tuple[object, ...]) -> int:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
