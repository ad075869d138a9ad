"""How may sequences be packed for this model? Tried when an engine is built, not trusted.

Many models keep packed sequences apart by their positions; others let them see each other through convolutions,
states or chunks of attention, or number positions on their own, and say nothing. So a few random texts are scored in
each layout, cheapest first, and compared with the plain forward of each text alone, by two statistics:

truth        mean |log-probability in the layout - alone|. Sees everything, but also the dtype's rounding.
neighbours   mean |log-probability beside one set of texts - beside another of the same lengths|. Sees what leaks, and
             nothing else: the same shapes round the same way, so it is exactly 0 where nothing leaks, in any dtype.
             Before, later tokens are exchanged in the same way: those must not be seen even alone.

Both are divided by the spread (standard deviation over tokens) of the log-probabilities, so that they mean the same for
a model that knows nothing yet. `docs/models.md` has the measurements.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heterorl.errors import ModelError
from heterorl.exchange.canary import ROUNDING
from heterorl.spec.run import RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.policy import Afterwards, Layout, Policy, Reading
from heterorl_learner.engines.torch_ddp import Sequence, micro_batch, token_logps

log = logging.getLogger(__name__)

LENGTHS = (13, 6, 33, 9, 21, 17)
"""Input tokens of the texts: all longer than the kernel of a convolution (4), none a multiple of another's block."""
PROMPT = 3
"""Tokens that are not scored: with one, a layout that loses the order of prompt and completion would not show."""
LAYOUTS: dict[Layout, str] = {
    "packed": "",
    "padded": "pads each sequence to the longest of its micro-batch and computes the padding, too",
    "alone": "reads one sequence a pass, so a micro-batch takes as many passes as it has sequences",
}
"""The layouts, cheapest first, and what the learner does in one that costs more than the first."""


LEAK = 2e-5
"""What other neighbours, or other tokens that come later, may change, as a share of the spread; in any data type."""


class Wrong(Exception):
    """Log-probabilities are not those of a causal model that reads the text alone; the words say what was seen."""


@dataclass(frozen=True)
class Texts:
    """Random texts from the vocabulary, and two sets of neighbours, of the same lengths as each other."""

    texts: list[Sequence]
    neighbours: tuple[list[Sequence], list[Sequence]]

    @classmethod
    def draw(cls, vocabulary: list[int], context: int, window: int) -> Texts:
        """`window` > 0: one text is longer, and one stands across the window's border as counted in the pack.

        Two texts fit into the model's context.
        """
        rng = np.random.default_rng(0)

        def some(lengths: tuple[int, ...]) -> list[Sequence]:
            return [_sequence(rng.choice(vocabulary, min(length, context // 2 - 1) + 1)) for length in lengths]

        beside = (max(window - 5, LENGTHS[0]), *LENGTHS[1:])
        return cls(some((*LENGTHS[:-1], max(window + 9, LENGTHS[-1]))), (some(beside), some(beside)))


@dataclass(frozen=True)
class Verdict:
    """The layout that is right, None if none is, and what is wrong with those that cost less."""

    layout: Layout | None
    reasons: str
    afterwards: Afterwards | None = None
    """What the model makes of its head's output; None where that is nothing simple."""
    why_whole: str = ""
    """Why its logits are then made as a whole."""


def choose_reading(policy: Policy, spec: RunSpec, device: torch.device, *, autocast: bool) -> Reading:
    """The cheapest way in which the model's log-probabilities are right, the same on every rank.

    Called with the bare model, before an engine divides it, so that no rank waits for another while it tries.
    `autocast`: float32 weights that are used in bfloat16. Raises ModelError when the model is not causal.
    """
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        verdicts = ranks.gather(_Trial(policy, spec, device).verdict())
    # Other machines may round otherwise: the ranks take the most careful verdict of all.
    verdict = max(verdicts, key=lambda v: [*LAYOUTS, None].index(v.layout))
    name = type(policy.model).__name__
    if verdict.layout is None:
        raise ModelError(f"{name} cannot be trained as a causal language model: {verdict.reasons}")
    if verdict.reasons and ranks.rank() == 0:
        log.warning("%s reads packs wrongly, so the learner %s; %s", name, LAYOUTS[verdict.layout], verdict.reasons)
    whole = next((v for v in verdicts if v.afterwards is None), verdict)
    if whole.why_whole and ranks.rank() == 0:
        log.warning("%s: the logits of all tokens of a micro-batch are kept in memory; %s", name, whole.why_whole)
    return Reading(verdict.layout, whole.afterwards)


class _Trial:
    """One model, its texts, and the truth about them."""

    def __init__(self, policy: Policy, spec: RunSpec, device: torch.device) -> None:
        self._policy, self._device = policy, device
        self._rounding = ROUNDING[spec.model.dtype]
        config = policy.model.config.get_text_config().to_dict()
        special = {value for key, value in config.items() if key.endswith(("token_id", "token_index"))}
        vocabulary = [token for token in range(config["vocab_size"]) if token not in special]
        context = config.get("max_position_embeddings") or 2**20
        self._texts = Texts.draw(vocabulary, context, _window(config, spec))

    def verdict(self) -> Verdict:
        try:
            self._truth = self._plain(self._texts.texts)
            self._spread = max(float(torch.cat(self._truth).std()), 1e-3)  # the policy may be uniform
            self._require_causal()
        except Wrong as error:
            return Verdict(None, str(error))
        afterwards, why_whole = self._try_head()
        reasons: list[str] = []
        for layout in LAYOUTS:
            self._policy.reading = Reading(layout, afterwards)
            try:
                self._require_right()
                return Verdict(layout, "; ".join(reasons), afterwards, why_whole)
            except Wrong as error:
                reasons.append(f"{layout}: {error}")
        return Verdict(None, "; ".join(reasons))

    def _try_head(self) -> tuple[Afterwards | None, str]:
        """What the model makes of its head's output, or None and why that cannot be said."""
        if (head := self._policy.head) is None:
            return None, "its head is no linear layer"
        ids = torch.tensor([[1, 2, 3]], device=self._device)
        try:
            with _told_as_wrong():
                afterwards = head.ask(lambda: self._policy.model(input_ids=ids, use_cache=False))
            self._policy.reading = Reading("alone", afterwards)
            self._require(
                "from its head's input, log-probabilities", self._scores(self._texts.texts), self._truth, self._rounding
            )
        except Wrong as error:
            return None, str(error)
        return afterwards, ""

    def _require_causal(self) -> None:
        """Scores must not depend on later tokens, nor on chance."""

        def before(later: list[Sequence]) -> list[Tensor]:
            longer = [
                replace(text, completion_ids=np.concatenate([text.completion_ids, more.completion_ids]))
                for text, more in zip(self._texts.texts, later)
            ]
            return [scores[: len(text.completion_ids)] for scores, text in zip(self._plain(longer), self._texts.texts)]

        before_ones, before_others = (before(later) for later in self._texts.neighbours)
        self._require("before other tokens, log-probabilities", before_ones, before_others, LEAK)
        self._require("before more tokens, log-probabilities", before_ones, self._truth, self._rounding)

    def _require_right(self) -> None:
        texts, (ones, others) = self._texts.texts, self._texts.neighbours
        beside_ones, beside_others = (self._scores(_interleave(beside, texts))[1::2] for beside in (ones, others))
        self._require("beside other neighbours, log-probabilities", beside_ones, beside_others, LEAK)
        reverse = self._scores(texts[::-1])[::-1]
        for found in (beside_ones, reverse):
            self._require("log-probabilities", found, self._truth, self._rounding)

    def _require(self, what: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
        share = float((torch.cat(found) - torch.cat(expected)).abs().mean()) / self._spread
        if not share <= tolerance:  # not a number is wrong, too
            raise Wrong(f"{what} differ by {share:.2g} of their spread, {tolerance:g} is allowed for rounding")

    def _scores(self, sequences: list[Sequence]) -> list[Tensor]:
        """Log-probabilities of each sequence's completion, by the policy in its layout."""
        batch = micro_batch(sequences).to(self._device)
        with _told_as_wrong():
            logp = token_logps(self._policy, batch).cpu()
        return list(logp.split([len(s.completion_ids) for s in sequences]))

    def _plain(self, sequences: list[Sequence]) -> list[Tensor]:
        """The same by the model's own forward over one whole text at a time, with nothing but its tokens."""
        scores = []
        for text in sequences:
            ids = torch.tensor(np.concatenate([text.prompt_ids, text.completion_ids]), device=self._device).long()
            with _told_as_wrong():
                logits: Tensor = self._policy.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                logp = logits.float().log_softmax(-1).gather(1, ids[1:, None])
            scores.append(logp[len(text.prompt_ids) - 1 :, 0].cpu())
        return scores


@contextmanager
def _told_as_wrong() -> Iterator[None]:
    """Whatever a model's code raises for inputs that it was not written for says that it is wrong for them."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _window(config: dict[str, Any], spec: RunSpec) -> int:
    """The longest window of the model's attention that the run's own packs can cross; 0 if there is none."""
    batch, generation = spec.learner.batch, spec.generation
    tokens = generation.max_prompt_tokens + generation.max_completion_tokens
    reach = min(batch.tokens_per_micro_batch, batch.groups * spec.algorithm.group_size * tokens)
    kinds = ("sliding_window", "attention_chunk", "local_attention", "index_topk", "indexer_budget")
    sizes = [size for name, size in config.items() if type(size) is int and name.startswith(kinds)]
    return max((size for size in sizes if 2 * size + 4 * sum(LENGTHS) <= reach), default=0)


def _sequence(ids: NDArray[np.integer]) -> Sequence:
    completion = ids[PROMPT:].astype(np.int32)
    return Sequence(ids[:PROMPT].astype(np.int32), completion, np.zeros(len(completion), np.float32), 0, 0.0)


def _interleave(ones: list[Sequence], others: list[Sequence]) -> list[Sequence]:
    return [sequence for pair in zip(ones, others) for sequence in pair]
