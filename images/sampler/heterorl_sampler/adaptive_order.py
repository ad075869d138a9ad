"""Prompts whose outcome is uncertain: where all completions are right, or all are wrong, there is nothing to learn.

Model Predictive Prompt Selection (MoPPS, arXiv 2507.04632): a prompt's success rate has a Beta posterior, from the
rewards of the groups generated for it. Each time, a success rate is drawn for each of a few candidates (Thompson
sampling) and the one whose draw is closest to 1/2 is taken, where the variance p(1 - p) of a reward is largest. As the
policy changes, evidence fades. The candidates are the next prompts of the slot's shuffled order, rather than drawn
independently, so that every prompt of its share comes up, and each once in a pass; a mix of sets keeps its weights.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from heterorl.exchange.records import PromptEvidence
from heterorl.seeds import derive_seed
from heterorl.spec.run import RunSpec, Slot
from heterorl_sampler.prompt_order import PromptOrder, Row

CANDIDATES = 8
"""Prompts that one is chosen from."""
HALF_LIFE_STEPS = 32.0
"""Learner steps after which evidence counts half."""
MAX_KEPT = 4096
"""Prompts whose evidence is kept, as it is written with every batch; the one seen longest ago is forgotten first."""


class AdaptiveOrder(PromptOrder):
    """A prompt order that depends on what came of the prompts; `row` and `observe` may be called from two threads."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        seed: int,
        share: int,
        shares: int,
        weights: Mapping[str, float] | None = None,
        evidence: PromptEvidence,
    ) -> None:
        """`evidence`: what the slot knows already; the rest as for `PromptOrder`."""
        super().__init__(rows, seed=seed, share=share, shares=shares, weights=weights)
        self._place_of = {id(row): place for place, row in enumerate(rows)}
        self._draws = ("adaptive", seed, share)
        self._lock = threading.Lock()
        self._range, self._seen = evidence.reward_range, dict(evidence.seen)

    def row(self, seq: int, step: int = 0) -> Row:
        """The row for a sequence number, given what is known by now; `step`: of the weights that generate for it."""
        candidates = self.candidates(seq, CANDIDATES)
        with self._lock:
            successes, failures = np.transpose([self._counts(self._place_of[id(row)], step) for row in candidates])
        rates = np.random.default_rng(derive_seed(*self._draws, seq)).beta(1 + successes, 1 + failures)
        return candidates[int(np.abs(rates - 0.5).argmin())]

    def observe(self, row: Row, rewards: NDArray[np.float32], step: int) -> None:
        """Take in the rewards [G] of a group that the weights of this step generated for the row."""
        lowest, highest = float(rewards.min()), float(rewards.max())
        with self._lock:
            if self._range is not None:
                lowest, highest = min(lowest, self._range[0]), max(highest, self._range[1])
            self._range = (lowest, highest)
            place = self._place_of[id(row)]
            count, total, since = self._seen.pop(place, (0.0, 0.0, step))
            kept = _faded(step - since)
            total = float(f"{kept * total + float(rewards.sum()):.6g}")
            self._seen[place] = (float(f"{kept * count + len(rewards):.6g}"), total, max(step, since))
            if len(self._seen) > MAX_KEPT:
                del self._seen[next(iter(self._seen))]

    @property
    def evidence(self) -> PromptEvidence:
        """What the slot's next holder has to know."""
        with self._lock:
            return PromptEvidence(reward_range=self._range, seen=dict(self._seen))

    def _counts(self, place: int, step: int) -> tuple[float, float]:
        """Successes and failures as they count now: a reward is a success by its place in the range seen so far.

        While there has been one value only, it says nothing.
        """
        lowest, highest = self._range or (0.0, 0.0)
        if place not in self._seen or highest <= lowest:
            return 0.0, 0.0
        count, total, since = self._seen[place]
        successes = min(max((total - count * lowest) / (highest - lowest), 0.0), count)
        kept = _faded(step - since)
        return kept * successes, kept * (count - successes)


def _faded(steps: int) -> float:
    """What evidence still counts after so many learner steps."""
    return float(0.5 ** (max(0, steps) / HALF_LIFE_STEPS))


def build_order(spec: RunSpec, slot: Slot, rows: Sequence[Row], evidence: PromptEvidence) -> PromptOrder:
    """The order that a run asks for, for one of its slots."""
    seed, weights = spec.seed + spec.data.shuffle_seed, spec.data.train.weights
    share = spec.slots.index(slot) if slot in spec.slots else slot.index
    if spec.data.order == "adaptive":
        return AdaptiveOrder(rows, seed=seed, share=share, shares=len(spec.slots), weights=weights, evidence=evidence)
    return PromptOrder(rows, seed=seed, share=share, shares=len(spec.slots), weights=weights)
