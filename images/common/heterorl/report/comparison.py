"""Several runs as in the paper's table: best, last and their gap by evaluation set, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from heterorl.monitoring.series import family_of

Scores = Mapping[str, Mapping[str, float]]
"""best, last and gap by evaluation set, as in `summary.json`."""

# The 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom; beyond them two terms of its expansion around
# the normal distribution's.
_STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.960


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95 % interval by Student's t; None for a single value, which tells nothing of it."""
    if len(values) < 2:
        return fmean(values), None
    freedom = len(values) - 1
    beyond = _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * freedom)
    t = _STUDENT_T[freedom - 1] if freedom <= len(_STUDENT_T) else beyond
    return fmean(values), t * stdev(values) / math.sqrt(len(values))


def comparison(names: Sequence[str], scores: Sequence[Scores]) -> dict[str, Any]:
    """Sets, and a row for each family of seeds: {family, seeds, sets: {set: {best, last, gap}}} of (mean, interval).

    A set counts for a family when all of its seeds were evaluated on it.
    """
    members: dict[str, list[Scores]] = {}
    for name, found in zip(names, scores):
        members.setdefault(family_of(name), []).append(found)
    rows = [
        {"family": family, "seeds": len(found), "sets": {label: _measures(label, found) for label in _shared(found)}}
        for family, found in members.items()
    ]
    sets = dict.fromkeys(label for found in members.values() for label in _shared(found))
    return {"sets": list(sets), "rows": rows}


def _shared(found: Sequence[Scores]) -> list[str]:
    return [label for label in found[0] if all(label in scores for scores in found)]


def _measures(label: str, found: Sequence[Scores]) -> dict[str, tuple[float, float | None]]:
    return {key: mean_and_interval([scores[label][key] for scores in found]) for key in ("best", "last", "gap")}
