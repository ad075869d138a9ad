"""The name of published weights: apart from the files, so that the operator knows it without numpy."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

_VERSION = re.compile(r"v([0-9]{8})-i([0-9]{4,})")


class Version(NamedTuple):
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
