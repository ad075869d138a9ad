"""What a training engine is given and does, and the plain one: PyTorch, one process or DDP over several.

Shapes: N input tokens of a pack, T completion tokens, S sequences.

A pack is one row of whole sequences without padding; positions start again at 0 with each sequence, which is how the
model tells them apart. The last token of a completion is predicted but predicts nothing, so it is not an input: a
sequence of P prompt and L completion tokens takes P + L - 1.

The trainer calls, on every rank alike: `forward_backward` with that rank's micro-batches of the step (as many on each
rank), then `step`. The loss function's values are shares: their sum over micro-batches and ranks is the step's loss,
whatever the engine does underneath (DDP and ZeRO average over ranks, so the share is scaled first).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.core_model_loading import revert_weight_conversion

from heterorl.errors import NotFinite, UserError
from heterorl.exchange.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from heterorl.exchange.storage import persistently
from heterorl.spec.run import LearnerSpec, RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.adapters import adapter_config, adapter_tensors, without_adapters
from heterorl_learner.engines.policy import Layout, Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE_FILE = "engine.pt"


# ── micro-batches ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Sequence:
    """One completion with its prompt and what the loss needs to know of it."""

    prompt_ids: NDArray[np.int32]
    """[P], at least one token."""
    completion_ids: NDArray[np.int32]
    """[L], at least one token."""
    sampler_logp: NDArray[np.float32]
    """[L], the behaviour policy's log-probabilities."""
    group: int
    """Which prompt group of the step it belongs to."""
    advantage: float
    number: int = 0
    """Which completion of the step it is."""
    temperature: float = 1.0
    """At which it was sampled, and at which its log-probabilities are taken."""
    log_expected_q: float = 0.0
    """log(sum q^2 / sum q) over the whole prompt group (GEPO's denominator)."""

    @property
    def num_tokens(self) -> int:
        """Input tokens it takes in a pack."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed into one row, with the tensors the loss takes beside the model's log-probabilities.

    A micro-batch without sequences (T = S = 0) holds one token that no loss looks at: it keeps a rank that has run out
    of work in step with the others.
    """

    input_ids: Tensor
    """long [1, N]."""
    position_ids: Tensor
    """long [1, N], from 0 in each sequence."""
    cu_seqlens: Tensor
    """int32 [S + 1]: where each sequence starts, and N; [0, 1] without sequences."""
    longest: int
    """Input tokens of the longest sequence."""
    logit_index: Tensor
    """long [T]: the input position whose logits predict each completion token."""
    target_ids: Tensor
    """long [T]: the completion tokens."""
    temperature: Tensor
    """float32 [T]: of each token's sequence; a micro-batch may mix them."""
    sampler_logp: Tensor
    """float32 [T]."""
    seq_ids: Tensor
    """long [T], 0 to S - 1."""
    group_ids: Tensor
    """long [S], numbered from 0 within the micro-batch."""
    numbers: Tensor
    """long [S]: which completions of the step they are."""
    lengths: Tensor
    """float32 [S], completion tokens."""
    advantages: Tensor
    """float32 [S]."""
    log_expected_q: Tensor
    """float32 [S]."""

    @property
    def num_tokens(self) -> int:
        """Input tokens of the pack."""
        return self.input_ids.shape[1]

    def pinned(self) -> MicroBatch:
        """The same in memory from which a GPU copies by itself."""
        return replace(self, **{name: value.pin_memory() for name, value in vars(self).items() if name != "longest"})

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "longest"}
        return replace(self, **moved)


def micro_batch(sequences: SequenceOf[Sequence]) -> MicroBatch:
    """Packs the sequences, in the given order, into one row."""
    groups = {group: i for i, group in enumerate(dict.fromkeys(s.group for s in sequences))}
    sizes = [s.num_tokens for s in sequences]
    starts = np.cumsum([0, *sizes])
    inputs = [np.concatenate([s.prompt_ids, s.completion_ids[:-1]]) for s in sequences] or [np.zeros(1, np.int64)]
    lengths = torch.tensor([len(s.completion_ids) for s in sequences], dtype=torch.long)
    # The logits that predict completion token j of a prompt of P tokens stand at input position P - 1 + j.
    index = [np.arange(start + len(s.prompt_ids) - 1, start + size) for s, start, size in zip(sequences, starts, sizes)]
    return MicroBatch(
        input_ids=_long(inputs)[None],
        position_ids=_long([np.arange(len(row)) for row in inputs])[None],
        cu_seqlens=torch.tensor(np.cumsum([0, *map(len, inputs)]), dtype=torch.int32),
        longest=max(map(len, inputs)),
        logit_index=_long(index),
        target_ids=_long([s.completion_ids for s in sequences]),
        temperature=torch.repeat_interleave(torch.tensor([s.temperature for s in sequences]), lengths),
        sampler_logp=torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(s.sampler_logp for s in sequences)])),
        seq_ids=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
        group_ids=torch.tensor([groups[s.group] for s in sequences], dtype=torch.long),
        numbers=torch.tensor([s.number for s in sequences], dtype=torch.long),
        lengths=lengths.float(),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        log_expected_q=torch.tensor([s.log_expected_q for s in sequences], dtype=torch.float32),
    )


def _long(arrays: SequenceOf[NDArray[np.integer]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays]).astype(np.int64))


def token_logps(policy: nn.Module, batch: MicroBatch, *, entropy: bool = False) -> Tensor:
    """Log-probability of every completion token at its sequence's temperature: float32 [T], in the batch's order.

    With `entropy` that of each token's distribution instead. `policy` is a `Policy`, bare or wrapped by DDP or
    DeepSpeed.
    """
    values: Tensor = policy(
        batch.input_ids,
        batch.position_ids,
        batch.cu_seqlens,
        batch.longest,
        batch.logit_index,
        batch.target_ids,
        batch.temperature,
        entropy,
    )
    return values


# ── the interface ────────────────────────────────────────────────────────────────────────────────────────────────────
LossFunction = Callable[[MicroBatch, Tensor], Tensor]
"""(micro-batch, log-probabilities [T]) -> its share of the step's loss, a scalar."""
Scores = Callable[[], list[list[float]]]
"""Makes the log-probabilities of several texts' tokens."""


@dataclass(frozen=True)
class Saving:
    """A checkpoint as it is in memory: training goes on while a thread of rank 0 writes it."""

    write: Callable[[], None]
    """Writes what the engine needs to go on."""
    weights: Callable[[], dict[str, Tensor]]
    """As `full_state_dict` at that moment."""


class TrainingEngine(ABC):
    """What the trainer sees; one subclass for plain torch, one for DeepSpeed."""

    policy: nn.Module
    """A `Policy` as wrapped by the engine; called, never looked into."""
    reference: Policy | None = None
    """The starting model, where the run needs a copy of it; whole on every rank, never trained."""

    def __init__(self, policy: Policy, spec: RunSpec, device: torch.device) -> None:
        self._bare = policy
        self.rank, self.world_size = ranks.rank(), ranks.size()
        self.device = device
        self.dtype = DTYPES[spec.model.dtype]
        self._keeps_near_start = spec.algorithm.kl_to_reference.weight > 0
        self._loss = 0.0

    @property
    def adapter_config(self) -> str | None:
        """With LoRA, the adapter_config.json that belongs to the adapters; None where the whole model is trained."""
        return adapter_config(self._bare.model)

    @property
    def layout(self) -> Layout:
        """How the model reads the sequences of a micro-batch."""
        return self._bare.reading.layout

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def forward_backward(self, batches: SequenceOf[MicroBatch], loss_function: LossFunction) -> float:
        """Adds the gradient of this rank's share of the step's loss, and returns the share.

        Once a step, with equally many micro-batches on every rank; those without sequences never reach the loss.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batch.to(self.device) for batch in batches):
            is_last = number == len(batches) - 1
            with self._accumulating(is_last):
                logp = self._logps(batch)
                if len(logp):
                    loss = loss_function(batch, logp)
                else:
                    self.reference_logps(batch)  # in step with the others: ZeRO-3 gathers weights for it on all ranks
                    loss = logp.sum()
                # Times 1, or NaN where the loss is not finite: then no gradient is, on any rank, and `step` refuses it.
                self._backward(loss * (loss.detach() * 0 + 1))
            total += loss.detach()
        self._loss = total.item()  # once: each look at a number waits for the device
        return self._loss

    def score(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities of the completion tokens without a gradient: float32 [T]. Every rank calls it."""
        with torch.no_grad():
            return self._logps(batch.to(self.device))

    def score_copy(
        self, tensors: dict[str, Tensor], batches: SequenceOf[MicroBatch]
    ) -> Callable[[], list[list[float]]]:
        """`score` of each batch under the weights as they are now, of which `tensors` is the `full_state_dict`.

        Every rank calls it; rank 0 calls the result, on a thread beside training, before `tensors` are changed.
        """
        scores: list[list[float]] = [self.score(batch).tolist() for batch in batches]
        return lambda: scores

    def entropy(self, batch: MicroBatch) -> Tensor:
        """Entropy of the distribution of each completion token, in nats: float32 [T]. Every rank calls it."""
        with torch.no_grad():
            return self._logps(batch.to(self.device), entropy=True)

    def reference_logps(self, batch: MicroBatch) -> Tensor | None:
        """The starting model's log-probabilities of the completion tokens: float32 [T]; None if the run needs none."""
        if not self._keeps_near_start:
            return None
        with torch.no_grad():
            if self.reference is not None:
                return token_logps(self.reference, batch)
            with without_adapters(self._bare):
                return self._logps(batch)

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
    def full_state_dict(self, into: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
        """The model's tensors as in its checkpoint, on the CPU in the spec's dtype; tied ones once.

        `into`: what an earlier call gave and nobody needs any more. It is written over: memory that is fresh costs
        more than the copy into it.

        Modules of transformers need not be as checkpoints are: the experts of a layer, for one, are a tensor there and
        many here. With LoRA they are those of the adapters alone, by peft's names. Every rank calls it, rank 0 gets the
        tensors (copies), the others an empty dict.
        """
        return self._as_in_files(self._gather_tensors(into))

    def _as_in_files(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's own tensors by the names and shapes of its files; adapters as they are."""
        if adapter_tensors(self._bare.model):
            return tensors
        tensors = revert_weight_conversion(self._bare.model, tensors)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @abstractmethod
    def save(self, folder: Path) -> Saving:
        """Copy into memory what a checkpoint holds, to be written into a staged folder that all ranks see.

        Every rank calls it, when what it saved before is written; what is left to write is rank 0's, what others have
        to write is written when it returns.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote with the same strategy and number of ranks. Every rank calls it."""

    # ── for the subclasses ───────────────────────────────────────────────────────────────────────────────────────────
    def _logps(self, batch: MicroBatch, *, entropy: bool = False) -> Tensor:
        return token_logps(self.policy, batch, entropy=entropy)

    def _accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    def _copied(self, tensor: Tensor, into: Tensor | None) -> Tensor:
        return copied(tensor.detach(), into, self.dtype)

    @abstractmethod
    def _gather_tensors(self, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `full_state_dict`, by the names of transformers' modules."""

    @abstractmethod
    def _step(self, learning_rate: float) -> float:
        """As `step`; where the norm, the same on every rank, is not finite it only clears the gradient."""


def build_optimizer(policy: nn.Module, learner: LearnerSpec) -> torch.optim.Optimizer:
    """AdamW; weight decay acts on matrices only, not on norms and biases. UserError where bitsandbytes is missing."""
    options = learner.optimizer
    trained = [p for p in policy.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # adapters are matrices, all of them
    beta1, beta2 = options.betas
    if options.type == "adamw_8bit":
        adamw: Callable[..., torch.optim.Optimizer] = _bitsandbytes().AdamW8bit
    else:
        adamw = partial(torch.optim.AdamW, fused=True) if options.type == "adamw_fused" else torch.optim.AdamW
    return adamw(groups, lr=options.learning_rate, betas=(beta1, beta2), eps=options.eps)


def _bitsandbytes() -> Any:
    try:
        return import_module("bitsandbytes.optim")
    except ImportError as error:
        raise UserError(
            f"learner.optimizer.type is adamw_8bit, which needs the package bitsandbytes ({error});"
            " pip install 'heterorl[bitsandbytes]', or use adamw"
        ) from error


def unique_tensors(policy: Policy) -> dict[str, Tensor]:
    """The model's tensors by the names of its modules, of tied ones the first; with LoRA the adapters', by peft's."""
    if adapters := adapter_tensors(policy.model):
        return adapters
    seen: set[int] = set()
    tensors = {}
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def save_weights(tensors: dict[str, Tensor], adapter_config: str | None, folder: Path) -> None:
    """Write what `full_state_dict` gave, adapters with their configuration, into a folder that no one reads yet."""
    if adapter_config is None:
        save_tensors(tensors, folder / "model.safetensors")
    else:
        save_tensors(tensors, folder / ADAPTER_WEIGHTS)
        persistently(lambda: (folder / ADAPTER_CONFIG).write_text(adapter_config), what=ADAPTER_CONFIG)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write the model's tensors, as `full_state_dict` gives them, into a file that no reader looks at yet."""
    persistently(lambda: save_file(tensors, file, metadata={"format": "pt"}), what=file.name)


# ── plain PyTorch ────────────────────────────────────────────────────────────────────────────────────────────────────
class TorchEngine(TrainingEngine):
    """float32 weights throughout; with dtype bfloat16 they are the master weights of a bfloat16 autocast.

    In bfloat16 itself an update below 1/256 of a weight would be lost, and at a rate of 1e-6 nearly all are.
    """

    def __init__(self, policy: Policy, spec: RunSpec, device: torch.device) -> None:
        super().__init__(policy, spec, device)
        self._optimizer = build_optimizer(self._bare, spec.learner)
        self._max_grad_norm = spec.learner.optimizer.max_grad_norm
        self._saved: dict[str, Any] = {}  # what was saved last, to be written over
        self._twin = _without_weights(policy)
        self.policy = self._bare
        if self.world_size > 1:
            self.policy = DistributedDataParallel(self._bare, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def _step(self, learning_rate: float) -> float:
        gradients = [p.grad for p in self._bare.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if norm.isfinite():
            clip_grads_with_norm_(self._bare.parameters(), self._max_grad_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm.item()

    def score_copy(
        self, tensors: dict[str, Tensor], batches: SequenceOf[MicroBatch]
    ) -> Callable[[], list[list[float]]]:
        """On a CPU a forward takes as long as writing the weights, so it is made beside training, of the copy.

        That is done where the copy has the model's own names, which are not those of its files for every architecture.
        """
        if self.device.type != "cpu" or (tensors and tensors.keys() != unique_tensors(self._twin).keys()):
            return super().score_copy(tensors, batches)
        return lambda: self._score_twin(tensors, batches)

    def _score_twin(self, tensors: dict[str, Tensor], batches: SequenceOf[MicroBatch]) -> list[list[float]]:
        for name, tensor in unique_tensors(self._twin).items():
            tensor.data = tensors[name].to(tensor.dtype)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread: training has the others
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                return [token_logps(self._twin, batch).tolist() for batch in batches]
        finally:
            torch.set_num_threads(threads)
            for tensor in unique_tensors(self._twin).values():
                tensor.data = tensor.new_empty(0)

    def save(self, folder: Path) -> Saving:
        if self.rank != 0:
            return Saving(lambda: None, dict)
        state = {"policy": unique_tensors(self._bare), "optimizer": self._optimizer.state_dict()}
        self._saved = state = _all_copied(state, self._saved)
        weights = state["policy"]
        return Saving(
            lambda: persistently(lambda: write_state(state, folder / STATE_FILE), what=STATE_FILE),
            lambda: self._as_in_files({name: tensor.to(self.dtype) for name, tensor in weights.items()}),
        )

    def load(self, folder: Path) -> None:
        state = persistently(lambda: torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True))
        with torch.no_grad():
            for name, tensor in unique_tensors(self._bare).items():
                tensor.copy_(state["policy"][name])
        self._optimizer.load_state_dict(state["optimizer"])

    def _logps(self, batch: MicroBatch, *, entropy: bool = False) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return super()._logps(batch, entropy=entropy)

    def _accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        if is_last or not isinstance(self.policy, DistributedDataParallel):
            return nullcontext()
        return self.policy.no_sync()

    def _backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # DDP averages over ranks; the shares are to be summed

    def _gather_tensors(self, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.rank != 0:
            return {}
        return {name: self._copied(tensor, into.get(name)) for name, tensor in unique_tensors(self._bare).items()}


def _without_weights(policy: Policy) -> Policy:
    """The same model with empty tensors in place of those that are trained; others are shared."""
    kept = {
        id(p): nn.Parameter(p.new_empty(0), requires_grad=False) if p.requires_grad else p for p in policy.parameters()
    }
    return deepcopy(policy, kept)


def copied(tensor: Tensor, into: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A copy in this machine's memory: in place of `into`, if that is of the same shape and number format.

    Nor is one written over that is part of another, of which something else may be a part.
    """
    is_alike = into is not None and into.shape == tensor.shape and into.dtype == dtype
    if into is None or not is_alike or into.untyped_storage().nbytes() != into.nbytes:
        return tensor.to("cpu", dtype, copy=True)
    return into.copy_(tensor)


def _all_copied(state: Any, into: Any) -> Any:
    """The same with every tensor copied into this machine's memory: in place of its like in `into`, if there is one."""
    if isinstance(state, dict):
        likes = into if isinstance(into, dict) else {}
        return {key: _all_copied(value, likes.get(key)) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_all_copied(value, None) for value in state)
    if isinstance(state, Tensor):
        return copied(state.detach(), into if isinstance(into, Tensor) else None, state.dtype)
    return state


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write what torch saves; OSError with its number where the disk does not take it."""
    with open(path, "wb") as file:  # torch's own writer tells no error's number
        torch.save(state, file)
