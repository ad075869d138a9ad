"""The policy, and the training engine: forward, backward, optimizer, weights, over one or many ranks.

The trainer calls, on every rank alike: `forward_backward` with that rank's micro-batches of the step (as many on each
rank), then `step`. The loss function's values are shares: their sum over micro-batches and ranks is the step's loss,
whatever the engine does underneath (DDP and ZeRO average over ranks, so the share is scaled first).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heterorl.errors import NotFinite
from heterorl.spec.run import LearnerSpec, RunSpec
from heterorl_learner import ranks
from heterorl_learner.batching import MicroBatch

LossFunction = Callable[[MicroBatch, Tensor], Tensor]
"""(micro-batch, log-probabilities [T]) -> its share of the step's loss, a scalar."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy(nn.Module):
    """Wraps the language model, so that what DDP and DeepSpeed call as `forward` yields log-probabilities."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logit_index: Tensor, target_ids: Tensor, temperature: Tensor
    ) -> Tensor:
        """Log-probability of every target token at its temperature; the tensors are those of a `MicroBatch`.

        Without attention_mask and cache, transformers reads the sequences' borders from the positions (block-diagonal
        mask, or varlen attention with flash_attention_2); with either given, sequences silently see each other.
        """
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logit_index
        ).logits[0]
        logits = logits.float() / temperature[:, None]  # [T, vocabulary]: never made for prompt tokens
        logp: Tensor = logits.gather(1, target_ids[:, None])[:, 0] - logits.logsumexp(1)
        return logp


def token_logps(policy: nn.Module, batch: MicroBatch) -> Tensor:
    """Log-probability of every completion token at its sequence's temperature: float32 [T], in the batch's order.

    `policy` is a `Policy`, bare or wrapped by DDP or DeepSpeed.
    """
    logp: Tensor = policy(batch.input_ids, batch.position_ids, batch.logit_index, batch.target_ids, batch.temperature)
    return logp


class TrainingEngine(ABC):
    """What the trainer sees; one subclass for plain torch, one for DeepSpeed."""

    policy: nn.Module
    """A `Policy` as wrapped by the engine; called, never looked into."""

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self.rank, self.world_size = ranks.rank(), ranks.size()
        self.device = device
        self.dtype = DTYPES[spec.model.dtype]
        self._loss = 0.0

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def forward_backward(self, batches: Sequence[MicroBatch], loss_function: LossFunction) -> float:
        """Adds the gradient of this rank's share of the step's loss, and returns the share.

        Once a step, with equally many micro-batches on every rank; those without sequences never reach the loss.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batch.to(self.device) for batch in batches):
            is_last = number == len(batches) - 1
            with self._accumulating(is_last):
                logp = self._logps(batch)
                loss = loss_function(batch, logp) if len(logp) else logp.sum()
                # Times 1, or NaN where the loss is not finite: then no gradient is, on any rank, and `step` refuses it.
                self._backward(loss * (loss.detach() * 0 + 1))
            total += loss.detach()
        self._loss = total.item()  # once: each look at a number waits for the device
        return self._loss

    def score(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities of the completion tokens without a gradient: float32 [T]. Every rank calls it."""
        with torch.no_grad():
            return self._logps(batch.to(self.device))

    def step(self, learning_rate: float) -> float:
        """Clips, updates, clears the gradient; returns its norm over all parameters and ranks, before clipping.

        Raises NotFinite on every rank when a rank's loss or the gradient is not finite; then the gradient is cleared
        and nothing else has changed.
        """
        norm = self._step(learning_rate)
        if not math.isfinite(norm):
            losses = ", ".join(f"{loss:g} on rank {rank}" for rank, loss in enumerate(ranks.gather(self._loss)))
            raise NotFinite(
                f"loss and gradient must be finite; found a gradient norm of {norm:g} and a loss of {losses}"
            )
        return norm

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────
    @abstractmethod
    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's tensors by their Hugging Face names, on the CPU in the spec's dtype; tied ones once.

        Every rank calls it, rank 0 gets the tensors (copies), the others an empty dict.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state into an existing folder. Every rank calls it; on return all is written."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote with the same strategy and number of ranks. Every rank calls it."""

    # ── for the subclasses ───────────────────────────────────────────────────────────────────────────────────────────
    def _logps(self, batch: MicroBatch) -> Tensor:
        return token_logps(self.policy, batch)

    def _accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _step(self, learning_rate: float) -> float:
        """As `step`; where the norm, the same on every rank, is not finite it only clears the gradient."""


def build_optimizer(policy: nn.Module, learner: LearnerSpec) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices only, not on norms and biases."""
    options = learner.optimizer
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    beta1, beta2 = options.betas
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(beta1, beta2), eps=options.eps)


def unique_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The wrapped model's tensors by their Hugging Face names; of tied ones only the first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in policy.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name.removeprefix("model.")] = tensor
    return tensors
