"""The policy: a language model that gives log-probabilities of packed completions.

Shapes: N input tokens of a pack, T completion tokens, S sequences, W tokens of the longest sequence, H width of the
model, V vocabulary, v tokens of the vocabulary in a tile.

A micro-batch is always a pack, one row of whole sequences. How the model reads it is its layout:

packed   as it is, one forward. Borders are told by positions that start again at 0, and by what transformers' kernels
         for variable lengths take: `cu_seq_lens_q` (flash attention, linear attention), `seq_idx` (convolutions, SSMs)
padded   a row a sequence, filled up on the right and masked, one forward
alone    a forward a sequence, without padding, positions or mask

A single sequence is always read alone. The model's head is then asked for log-probabilities of given tokens instead of
logits of all:

    hidden [T, H] ──× tile of the head [v, H]──▶ logits [T, v] ──▶ logsumexp, the target's logit     forward
                                                            └───▶ (one-hot - softmax) · gradient     backward, made anew

The tokens x vocabulary matrix is never made: a tile of it is made, reduced and dropped. All that the backward pass
needs of the forward one is each token's logsumexp, so the result is exact for every loss, also for one that must have
seen a whole sequence or group before it has any gradient. It costs a fourth product of matrices besides three, and
memory for a few tiles and the gradient of the head. Logits that are no more than one tile are kept instead.

What a model makes of its head's output, a factor or a soft cap, is found by asking the model for it (`Head.ask`).
Which layouts are right for a model is tried by `packing`, as is whether its logits are what its head can be asked for;
if not, the model makes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

Layout = Literal["packed", "padded", "alone"]
TILE = 1 << 24
"""Logits of a tile: 64 MiB in float32."""
PROBE = (1e-3, 1.0, 10.0, 100.0, 1e6)
"""Outputs of a head by which a model shows what it makes of them: from a cap's straight part to its end."""


class Afterwards(NamedTuple):
    """What a model makes of each output z of its head: scale · z, or with a soft cap c · tanh(scale · z / c)."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, logits: Tensor) -> Tensor:
        """The model's logits, in place of the head's output."""
        if self.scale != 1:
            logits = logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative where the model's logits are these."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())


@dataclass(frozen=True)
class Reading:
    """How the model is read."""

    layout: Layout = "packed"
    afterwards: Afterwards | None = None
    """What the model makes of its head's output, where that is known; None: it makes all logits itself."""


class Policy(nn.Module):
    """Wraps the language model, so that what DDP and DeepSpeed call as `forward` yields log-probabilities."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._head_name = install_head(model)
        self.reading = Reading()
        accepted = signature(model.forward).parameters
        self._selects_logits = "logits_to_keep" in accepted
        self._takes_borders = any(p.kind is Parameter.VAR_KEYWORD for p in accepted.values())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        logit_index: Tensor,
        target_ids: Tensor,
        temperature: Tensor,
        entropy: bool = False,
    ) -> Tensor:
        """Log-probability of every target token at its temperature, float32 [T]; the arguments are a `MicroBatch`'s.

        With `entropy` that of the distribution it was drawn from instead, in nats.
        """
        if self.reading.layout == "alone" or len(cu_seqlens) == 2:
            read = self._alone(input_ids, cu_seqlens, logit_index)
        elif self.reading.layout == "padded":
            read = self._padded(input_ids, position_ids, cu_seqlens, longest, logit_index)
        else:
            read = self._packed(input_ids, position_ids, cu_seqlens, longest, logit_index)
        if self._head is None:
            return values_of(read, target_ids, temperature, entropy)
        # Called as a module, for which ZeRO-3 gathers its weights.
        values: Tensor = self._head(read, target_ids, temperature, entropy, self.reading.afterwards)
        return values

    @property
    def head(self) -> Head | None:
        """The model's head; None where it is no linear layer."""
        return None if self._head_name is None else cast(Head, self.model.get_submodule(self._head_name))

    @property
    def _head(self) -> Head | None:
        """The head where log-probabilities are made from its input; None where the model makes logits."""
        return None if self.reading.afterwards is None else self.head

    def _packed(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, longest: int, logit_index: Tensor
    ) -> Tensor:
        """What `_read` gives of T positions: [T, ...].

        An attention mask or a cache would make transformers overlook the borders in the positions.
        """
        borders: dict[str, Any] = {}
        if self._takes_borders:
            sequence = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=input_ids.device)
            borders = {
                "seq_idx": sequence.repeat_interleave(cu_seqlens.diff(), output_size=input_ids.shape[1])[None],
                "cu_seq_lens_q": cu_seqlens,
                "cu_seq_lens_k": cu_seqlens,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return self._read(logit_index, input_ids=input_ids, position_ids=position_ids, **borders)[0]

    def _padded(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, longest: int, logit_index: Tensor
    ) -> Tensor:
        """Likewise. Padding stands on the right, where a causal model's tokens do not see it."""
        columns, width = position_ids[0], torch.arange(longest, device=input_ids.device)
        rows = (columns == 0).cumsum(0) - 1
        mask = (width < cu_seqlens.diff()[:, None]).long()  # [S, W]
        filler = getattr(self.model.config.get_text_config(), "pad_token_id", None) or 0
        ids = torch.full_like(mask, filler).index_put((rows, columns), input_ids[0])
        kept, place = columns[logit_index].unique(return_inverse=True)
        return self._read(kept, input_ids=ids, attention_mask=mask)[rows[logit_index], place]

    def _alone(self, input_ids: Tensor, cu_seqlens: Tensor, logit_index: Tensor) -> Tensor:
        """Likewise."""
        if len(cu_seqlens) == 2:
            return self._read(logit_index, input_ids=input_ids)[0]
        ends, starts = cu_seqlens[1:].long(), cu_seqlens[:-1].long()
        counts = torch.bucketize(logit_index, ends, right=True).bincount(minlength=len(ends))
        texts = input_ids[0].split((ends - starts).tolist())
        places = logit_index.split(counts.tolist())
        parts = [
            self._read(place - start, input_ids=text[None])[0] for text, place, start in zip(texts, places, starts)
        ]
        return torch.cat(parts)

    def _read(self, kept: Tensor, **inputs: Any) -> Tensor:
        """The input of the head at the kept positions, [rows, positions, H], or without one the logits, [.., .., V]."""
        if self._selects_logits:
            inputs["logits_to_keep"] = kept
        if self._head is None:
            read: Tensor = self.model(**inputs, use_cache=False).logits
        else:
            read = self._head.input_of(lambda: self.model(**inputs, use_cache=False))
        return read if self._selects_logits else read[:, kept]


# ── the head ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class Head(nn.Linear):
    """A model's own head, in its place and with its parameters, that can also be asked for log-probabilities.

    Called by the model it gives logits, as before; within `input_of` it only notes what it was called with.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self._seen: list[Tensor] | None = None

    def forward(
        self,
        hidden: Tensor,
        target_ids: Tensor | None = None,
        temperature: Tensor | None = None,
        entropy: bool = False,
        afterwards: Afterwards | None = None,
    ) -> Tensor:
        """Logits [..., V] of hidden [..., H]; with all the others each target's log-probability of hidden [T, H].

        `target_ids`: long [T]; `temperature`: float32 [T]; `entropy`: that of the distribution that the target was
        drawn from instead, in nats and without a gradient; `afterwards`: what the model makes of its head's output.
        """
        if target_ids is not None:
            values: Tensor = _Tiled.apply(  # type: ignore[no-untyped-call]
                hidden, self.weight, self.bias, target_ids, temperature, entropy, afterwards
            )
            return values
        if self._seen is None:
            return super().forward(hidden)
        self._seen.append(hidden)
        return hidden.new_tensor(PROBE, dtype=torch.float32).expand(*hidden.shape[:-1], len(PROBE))

    def input_of(self, call: Callable[[], Any]) -> Tensor:
        """What the model calls its head with in `call`: [..., H]. ValueError if it does not do so once."""
        seen: list[Tensor] = []
        self._seen = seen
        try:
            call()
        finally:
            self._seen = None
        if len(seen) != 1:
            raise ValueError(f"the model calls its head {len(seen)} times")
        return seen[0]

    def ask(self, call: Callable[[], Any]) -> Afterwards:
        """What the model makes of its head's output; ValueError where that is no factor and no soft cap."""
        logits: list[Tensor] = []
        self.input_of(lambda: logits.append(call().logits))
        found = logits[0].detach().float().reshape(-1, len(PROBE))[0].tolist()
        probe = torch.tensor(PROBE)
        scale, most = found[0] / probe[0].item(), found[-1]
        afterwards = Afterwards(scale, None if most > scale * PROBE[-1] / 2 else most)
        expected = afterwards.of(probe).tolist()
        if not all(abs(a - b) <= 1e-3 * abs(b) for a, b in zip(found, expected, strict=True)):
            raise ValueError(f"the model makes {found} of outputs {PROBE} of its head: no factor and no soft cap")
        return afterwards


def install_head(model: PreTrainedModel) -> str | None:
    """Put a `Head` in place of the model's head, and return its name in the model; None where it is no linear layer."""
    old = model.get_output_embeddings()
    if type(old) is not nn.Linear:
        return None
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    new = Head(old)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return names[0] if names else None


def values_of(logits: Tensor, target_ids: Tensor, temperature: Tensor, entropy: bool = False) -> Tensor:
    """What `Head` gives of its input, of logits [T, V] that are there as a whole: float32 [T]."""
    logits = logits.float() / temperature[:, None]
    if entropy:
        entropies: Tensor = torch.special.entr(logits.softmax(1)).sum(1)
        return entropies
    return logits.gather(1, target_ids[:, None])[:, 0] - logits.logsumexp(1)


# ── the tiles ────────────────────────────────────────────────────────────────────────────────────────────────────────
class _Tiled(torch.autograd.Function):
    """Log-probabilities of the targets, or entropies (without gradient), a tile of the vocabulary at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        temperature: Tensor,
        entropy: bool,
        afterwards: Afterwards,
    ) -> Tensor:
        ctx.dtype, ctx.afterwards = _dtype(weight), afterwards
        log_total = temperature.new_full(temperature.shape, -torch.inf)
        value = torch.zeros_like(log_total)  # the target's logit, or the mean logit
        ctx.keeps = afterwards.cap is None and len(hidden) * len(weight) <= TILE  # all that is made is one tile
        for rows in _tiles(hidden, weight):
            logits = _logits(ctx, hidden, weight, bias, rows).div_(temperature[:, None])
            before, log_total = log_total, log_total.logaddexp(logits.logsumexp(1))
            if entropy:
                share = (logits - log_total[:, None]).exp()
                value = value * (before - log_total).exp() + share.mul_(logits).sum(1)
            else:
                inside, place = _places(target_ids, rows)
                value = torch.where(inside, logits.gather(1, place)[:, 0], value)
        if entropy:
            ctx.mark_non_differentiable(entropies := log_total - value)
            return entropies
        kept = logits if ctx.keeps else None
        ctx.save_for_backward(hidden, weight, bias, target_ids, temperature, log_total, kept)
        return value - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids, temperature, log_total, kept = ctx.saved_tensors
        temperature, inputs = temperature[:, None], hidden.to(ctx.dtype)
        gradient = gradient[:, None] / temperature
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        of_weight, of_bias = (
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((weight, bias), ctx.needs_input_grad[1:3])
        )
        for rows in _tiles(hidden, weight):
            logits = _logits(ctx, hidden, weight, bias, rows) if kept is None else kept * temperature
            slope = ctx.afterwards.slope(logits)
            inside, place = _places(target_ids, rows)
            # of the head's outputs: (one-hot - softmax) · gradient / temperature · slope
            own = logits.div_(temperature).sub_(log_total[:, None]).exp_().mul_(-gradient)
            own = own.scatter_add_(1, place, gradient * inside[:, None]).mul_(slope).to(ctx.dtype)
            of_hidden += own @ weight[rows].to(ctx.dtype)
            if of_weight is not None:
                of_weight[rows] = own.T @ inputs
            if of_bias is not None:
                of_bias[rows] = own.sum(0)
        return of_hidden.to(hidden.dtype), of_weight, of_bias, None, None, None, None


def _dtype(weight: Tensor) -> torch.dtype:
    """In which the products are made: an autocast's, or the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows of the head whose logits fit into a tile."""
    rows = max(1, TILE // max(1, len(hidden)))
    return (slice(first, min(first + rows, len(weight))) for first in range(0, len(weight), rows))


def _logits(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    """The model's logits of a tile: float32 [T, v]."""
    with torch.autocast(weight.device.type, enabled=False):
        logits = linear(
            hidden.to(ctx.dtype), weight[rows].to(ctx.dtype), None if bias is None else bias[rows].to(ctx.dtype)
        )
        after: Tensor = ctx.afterwards.of(logits.float())
    return after


def _places(target_ids: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile [T], and at which of its columns [T, 1]; of the others any column."""
    place = target_ids - rows.start
    width = rows.stop - rows.start
    return (place >= 0) & (place < width), place.clamp(0, width - 1)[:, None]
