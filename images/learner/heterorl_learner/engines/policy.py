"""The policy: a language model that gives log-probabilities of packed completions.

Shapes: N input tokens of a pack, T completion tokens, S sequences, V vocabulary, W tokens of the longest sequence.

A micro-batch is always a pack, one row of whole sequences. How the model reads it is its layout:

packed   as it is, one forward. Borders are told by positions that start again at 0, and by what transformers' kernels
         for variable lengths take: `cu_seq_lens_q` (flash attention, linear attention), `seq_idx` (convolutions, SSMs)
padded   a row a sequence, filled up on the right and masked, one forward
alone    a forward a sequence, without padding, positions or mask

A single sequence is always read alone. Which layouts are right for a model is tried by `packing`, as is whether its
logits are what `head` can take apart; if not, the model makes all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heterorl_learner.engines.head import Afterwards, Head, install_head, values_of

Layout = Literal["packed", "padded", "alone"]


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
