"""Micro-batches: which sequences are packed together, and on which rank.

Shapes: N input tokens of a pack, T completion tokens, S sequences.

A pack is one row of whole sequences without padding; positions start again at 0 with each sequence, which is how the
model tells them apart. The last token of a completion is predicted but predicts nothing, so it is not an input: a
sequence of P prompt and L completion tokens takes P + L - 1. Everything here is a pure function of its arguments, so
every rank plans the whole step and makes the tensors of its own share.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def plan(
    sequences: SequenceOf[Sequence],
    token_budget: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    whole_groups: bool = False,
) -> list[MicroBatch]:
    """The micro-batches of one rank, as many as those of every other.

    No pack exceeds `token_budget` input tokens, unless a single item does, which then goes alone. An item is a
    sequence, or with `whole_groups` a prompt group (eqp's denominator needs the learner's view of all of it).
    """
    items: dict[int, list[Sequence]] = {}
    for number, sequence in enumerate(sequences):
        items.setdefault(sequence.group if whole_groups else number, []).append(sequence)
    packs = [pack(share, token_budget) for share in balance(list(items.values()), world_size)]
    most = max(1, *(len(of_rank) for of_rank in packs))
    return [micro_batch(p) for p in packs[rank] + [[]] * (most - len(packs[rank]))]


def balance(items: SequenceOf[list[Sequence]], world_size: int) -> list[list[list[Sequence]]]:
    """Distributes items over ranks evenly by tokens: longest first, to the rank with the fewest tokens."""
    shares: list[list[list[Sequence]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for item in _longest_first(items):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += _num_tokens(item)
    return shares


def pack(items: SequenceOf[list[Sequence]], token_budget: int) -> list[list[Sequence]]:
    """Fills packs up to the budget: longest item first, each into the first pack that still has room."""
    packs: list[list[Sequence]] = []
    room: list[int] = []
    for item in _longest_first(items):
        size = _num_tokens(item)
        place = next((i for i, left in enumerate(room) if left >= size), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(token_budget)
        packs[place].extend(item)
        room[place] -= size
    return packs


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
        logit_index=_long(index),
        target_ids=_long([s.completion_ids for s in sequences]),
        temperature=torch.repeat_interleave(torch.tensor([s.temperature for s in sequences]), lengths),
        sampler_logp=torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(s.sampler_logp for s in sequences)])),
        seq_ids=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
        group_ids=torch.tensor([groups[s.group] for s in sequences], dtype=torch.long),
        lengths=lengths.float(),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        log_expected_q=torch.tensor([s.log_expected_q for s in sequences], dtype=torch.float32),
    )


def _num_tokens(item: list[Sequence]) -> int:
    return sum(sequence.num_tokens for sequence in item)


def _longest_first(items: SequenceOf[list[Sequence]]) -> list[list[Sequence]]:
    return sorted(items, key=_num_tokens, reverse=True)  # stable: ties keep their order


def _long(arrays: SequenceOf[NDArray[np.integer]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays]).astype(np.int64))
