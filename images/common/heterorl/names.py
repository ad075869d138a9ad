"""Names on the shared volume. They carry what selection needs, so that choosing opens no file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Self

_VERSION = re.compile(r"v([0-9]{8})-i([0-9]{4,})")
_SLOT = re.compile(r"([a-z0-9]([-a-z0-9]*[a-z0-9])?)-(0|[1-9][0-9]*)")
_ROLLOUT = re.compile(r"(v[0-9]{8}-i[0-9]{4,})--(.+)--s([0-9]{10})")


@dataclass(frozen=True, order=True)
class Version:
    """Published weights: the learner's step, and which incarnation of the learner made them.

    A learner that resumes from step k publishes k+1 again; the incarnation keeps the two apart.
    """

    step: int
    incarnation: int

    def __str__(self) -> str:
        return f"v{self.step:08d}-i{self.incarnation:04d}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The version with that name; ValueError if it is none."""
        if not (match := _VERSION.fullmatch(text)):
            raise ValueError(f"{text!r} is not a weights version; expected a name such as v00000012-i0001")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, order=True)
class Slot:
    """A sampler's place: its pool and index. Identity, seed, prompt cursor and delays belong to the slot."""

    pool: str
    index: int

    def __str__(self) -> str:
        return f"{self.pool}-{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The slot with that name; ValueError if it is none."""
        if not (match := _SLOT.fullmatch(text)):
            raise ValueError(f"{text!r} is not a slot; expected a name such as far-0")
        return cls(match[1], int(match[3]))


@total_ordering
@dataclass(frozen=True)
class RolloutName:
    """One prompt's group of completions: the oldest weights that made a token of it, its slot, its sequence number.

    A slot's sequence numbers only grow and are never used twice, so a name stands for one rollout for ever.
    """

    version: Version
    slot: Slot
    seq: int

    def __str__(self) -> str:
        return f"{self.version}--{self.slot}--s{self.seq:010d}"

    def __lt__(self, other: Self) -> bool:
        return (self.version, self.slot, self.seq) < (other.version, other.slot, other.seq)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The rollout with that name; ValueError if it is none."""
        if not (match := _ROLLOUT.fullmatch(text)):
            raise ValueError(f"{text!r} is not a rollout; expected a name such as v00000012-i0001--far-0--s0000000042")
        return cls(Version.parse(match[1]), Slot.parse(match[2]), int(match[3]))
