"""A rollout: its name, and the contents of its file: one prompt, its group of completions, flat from end to end.

Names carry what selection needs, so that choosing opens no file. The file is safetensors with a JSON header; no pickle,
no padding. Its one tensor holds all arrays, compressed: of each first the lowest byte of every value, then the second
of every value, and so on. Bytes that hardly vary (the upper ones of token ids, exponents) then lie together, and zstd
leaves little of them. A digest over that tensor and the header is part of the header, because a file on a far volume
may be cut or changed.

The header also says how the rollout was made (`Provenance`), so that a run whose rewards, prompts or sampling were
edited meanwhile never mixes it in unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from zstandard import ZstdCompressor, ZstdDecompressor, ZstdError, frame_content_size

from heterorl.errors import CorruptFile, UnknownProtocol
from heterorl.exchange import PROTOCOL
from heterorl.exchange.version import Version
from heterorl.spec.run import GenerationSpec, RunSpec, Slot

_PACKED = "packed"
_TERM = "reward/"
_MOST_BYTES = 1 << 30
"""Of a file's arrays: what claims more would fill the memory of its reader."""
_DTYPES = {
    "prompt_ids": np.int32,
    "completion_ids": np.int32,
    "lengths": np.int32,
    "logp": np.float32,
    "rewards": np.float32,
    "truncated": np.bool_,
}
_ROLLOUT = re.compile(r"(v[0-9]{8}-i[0-9]{4,})--(.+)--s([0-9]{10})")


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class RolloutName(NamedTuple):
    """One prompt's group of completions: the oldest weights that made a token of it, its slot, its sequence number.

    A slot's sequence numbers only grow and are never used twice, so a name stands for one rollout for ever.
    """

    version: Version
    slot: Slot
    seq: int

    def __str__(self) -> str:
        return f"{self.version}--{self.slot}--s{self.seq:010d}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The rollout with that name; ValueError if it is none."""
        if not (match := _ROLLOUT.fullmatch(text)):
            raise ValueError(f"{text!r} is not a rollout; expected a name such as v00000012-i0001--far-0--s0000000042")
        return cls(Version.parse(match[1]), Slot.parse(match[2]), int(match[3]))


Runs = tuple[tuple[Version, int], ...]
"""Which weights made which tokens: (version, how many of the next tokens), neighbours of one version in one run."""


def joined(runs: Iterable[tuple[Version, int]]) -> Runs:
    """Runs with neighbours of one version put together, and empty ones left out."""
    by_version = groupby(((version, count) for version, count in runs if count), key=itemgetter(0))
    return tuple((version, sum(count for _, count in same)) for version, same in by_version)


def runs_of(swaps: Sequence[tuple[Version, int]], version: Version, length: int) -> Runs:
    """Which weights made which of a completion's `length` tokens.

    `swaps`: for each swap since it began, the version that was served until then and the tokens it had by then;
    `version`: the one served now.
    """
    ends = [*((old, min(end, length)) for old, end in swaps), (version, length)]
    starts = [0, *(end for _, end in ends)]
    return joined((by, end - start) for (by, end), start in zip(ends, starts))


# ── contents ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class SamplingDistribution(BaseModel):
    """The distribution that completions are sampled from; fields as in `spec.generation`."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    temperature: float = 1.0
    """Sampling temperature; 0 is greedy decoding, with log-probabilities at temperature 1."""
    top_p: float = 1.0
    """Top-p (nucleus) sampling; 1 disables."""
    top_k: int = 0
    """Top-k sampling; 0 disables."""
    min_p: float = 0.0
    """Min-p sampling: minimum probability relative to the most likely token; 0 disables."""
    repetition_penalty: float = 1.0
    """Repetition penalty on tokens seen so far, including those of the prompt; 1 disables."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the token that completes one is its last."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's own."""

    @classmethod
    def of(cls, generation: GenerationSpec) -> SamplingDistribution:
        """That of a spec."""
        return SamplingDistribution.model_validate(generation)


class Sampling(SamplingDistribution):
    """What an engine is asked for: the distribution, and where a completion is cut."""

    max_tokens: int
    """Maximum number of tokens, including the end-of-sequence token."""

    @classmethod
    def of(cls, generation: GenerationSpec) -> Sampling:
        """That of a run's rollouts."""
        distribution = SamplingDistribution.of(generation)
        return cls(max_tokens=generation.max_completion_tokens, **distribution.model_dump())


@dataclass(frozen=True)
class Completion:
    """One completion; the token that ended it is its last."""

    token_ids: list[int]
    """Generated tokens."""
    logp: list[float]
    """Log-probability of each token under the sampling distribution."""
    truncated: bool
    """Whether the length limit ended it, rather than an end-of-sequence token or a stop."""
    versions: Runs = ()
    """Which weights made which of its tokens; more than one when weights were swapped while it was generated."""


class Provenance(BaseModel):
    """How a rollout was made. Samplers write that of the run as it is for them, the learner compares its own."""

    model_config = ConfigDict(frozen=True)

    sampling: SamplingDistribution
    rewards: str
    """Fingerprint of `spec.rewards`."""
    prompts: str
    """Fingerprint of what stands around a problem, of the sets' weights, and of the tokenised training data."""
    reward_sources: str = ""
    """Fingerprint of the source of custom rewards, which samplers know; the learner tells when it changes."""

    @classmethod
    def of(cls, spec: RunSpec, data_digest: str) -> Self:
        """That of a run; `data_digest`: of its training data, as the preparation found it."""
        return cls(
            sampling=SamplingDistribution.of(spec.generation),
            rewards=_fingerprint([reward.model_dump(mode="json") for reward in spec.rewards]),
            prompts=_fingerprint(
                [
                    *(spec.data.prompt_template, spec.data.system_prompt, spec.data.instruction),
                    *(spec.data.train.weights, data_digest),
                ]
            ),
        )

    def mismatch(self, run: Provenance) -> str | None:
        """Why the run cannot train on it, in words; None where it can.

        Another sampling distribution is not a reason: the log-probabilities are those of the distribution that was
        sampled from, and the learner takes its own at the same temperature.
        """
        found = [name for name in ("rewards", "prompts") if getattr(self, name) != getattr(run, name)]
        return f"made with other {' and '.join(found)} than the run has now" if found else None


@dataclass(frozen=True, eq=False)
class Rollout:
    """One prompt's group: G completions with T tokens in all, P prompt tokens."""

    prompt_ids: NDArray[np.int32]
    """[P] prompt tokens."""
    completion_ids: NDArray[np.int32]
    """[T] completion tokens, one completion after the other."""
    lengths: NDArray[np.int32]
    """[G] tokens of each completion; they sum to T."""
    logp: NDArray[np.float32]
    """[T] behaviour log-probabilities from the engine, of the distribution that was sampled from."""
    versions: Runs
    """Which weights made which of the T tokens."""
    rewards: NDArray[np.float32]
    """[G] weighted sum of the reward terms."""
    truncated: NDArray[np.bool_]
    """[G] whether the completion hit the length limit."""
    provenance: Provenance
    lease_epoch: int = 0
    """Epoch of the lease under which it was made, by which the learner knows one that came too late."""
    reward_terms: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """[G] each, by the reward's name, before weighting; NaN where the reward does not apply."""
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON: row_id and the like."""

    @property
    def oldest(self) -> Version:
        """The oldest weights that made a token of it, by which its lag counts."""
        return min(version for version, _ in self.versions)

    def to_bytes(self) -> bytes:
        """The file's contents."""
        arrays: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(getattr(self, name), dtype) for name, dtype in _DTYPES.items()
        }
        arrays |= {_TERM + name: np.ascontiguousarray(term, np.float32) for name, term in self.reward_terms.items()}
        header = {
            "protocol": str(PROTOCOL),
            "provenance": self.provenance.model_dump_json(),
            "lease_epoch": str(self.lease_epoch),
            "versions": json.dumps([(str(version), count) for version, count in self.versions]),
            "meta": json.dumps(self.meta, sort_keys=True),
            "arrays": json.dumps({name: array.size for name, array in arrays.items()}),
        }
        packed = _pack(list(arrays.values()))
        return save_safetensors({_PACKED: packed}, {**header, "sha256": _digest(packed, header)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Rollout:
        """Read and check; whatever the bytes are, raises CorruptFile, or UnknownProtocol for a later version's."""
        try:
            header_size = int.from_bytes(data[:8], "little")
            header = from_json(data[8 : 8 + header_size])["__metadata__"]
            protocol = int(header["protocol"])
            if protocol > PROTOCOL:
                raise UnknownProtocol("the rollout", f"protocol {protocol}", f"protocol {PROTOCOL}")
            packed = load_safetensors(data)[_PACKED]
            if packed.dtype != np.uint8 or packed.ndim != 1:
                raise TypeError(f"{_PACKED} is {packed.dtype}{list(packed.shape)}; expected one axis of uint8")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"not a rollout file: {error}") from error
        if protocol != PROTOCOL:
            raise CorruptFile(f"there never was a protocol {protocol}")
        claimed = header.pop("sha256", None)
        if claimed != _digest(packed, header):
            raise CorruptFile("the digest does not fit the contents")
        try:
            arrays = _unpack(packed, from_json(header["arrays"]))
            rollout = cls(
                **{name: arrays[name] for name in _DTYPES},
                provenance=Provenance.model_validate_json(header["provenance"]),
                lease_epoch=int(header["lease_epoch"]),
                versions=tuple((Version.parse(name), int(count)) for name, count in from_json(header["versions"])),
                reward_terms={n.removeprefix(_TERM): array for n, array in arrays.items() if n.startswith(_TERM)},
                meta=dict(from_json(header["meta"])),
            )
        except (KeyError, ValueError, TypeError, AttributeError, ZstdError) as error:
            raise CorruptFile(f"an array or a part of the header is missing: {error}") from error
        rollout.check()
        return rollout

    def check(self) -> None:
        """Shapes, types and values that every later step relies on; raises CorruptFile."""
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise CorruptFile(f"{name} is {array.dtype}{list(array.shape)}; expected one axis of {np.dtype(dtype)}")
        group, tokens = len(self.lengths), len(self.completion_ids)
        if group == 0 or int(self.lengths.min()) < 1 or int(self.lengths.astype(np.int64).sum()) != tokens:
            raise CorruptFile(f"lengths {self.lengths.tolist()[:8]} do not add up to {tokens} completion tokens")
        counts = [count for _, count in self.versions]
        if min(counts, default=0) < 1 or sum(counts) != tokens:
            raise CorruptFile(f"versions tell of {sum(counts)} tokens, {counts[:8]} of each; there are {tokens}")
        sizes = {"logp": tokens, "rewards": group, "truncated": group}
        for name, size in sizes.items():
            if len(getattr(self, name)) != size:
                raise CorruptFile(f"{name} has {len(getattr(self, name))} values; expected {size}")
        if len(self.prompt_ids) == 0:
            raise CorruptFile("the prompt is empty")
        for name in ("logp", "rewards"):
            if not np.isfinite(getattr(self, name)).all():
                raise CorruptFile(f"{name} holds values that are not finite")


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Zstd(threading.local):
    """A thread's contexts: to make one takes as long as the bytes of a rollout do."""

    def __init__(self) -> None:
        # Most of the bytes are mantissas, as good as random; level 1 finds 3 % more in the rest, in twice the time.
        self.compressor, self.decompressor = ZstdCompressor(level=-1), ZstdDecompressor()


_zstd = _Zstd()


def _digest(packed: NDArray[np.uint8], header: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(f"uint8:({packed.size},)".encode())
    digest.update(packed.data)
    return digest.hexdigest()


def _pack(arrays: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """Byte planes of arrays of one axis, one after the other, compressed."""
    planes, end = np.empty(sum(array.nbytes for array in arrays), np.uint8), 0
    for array in arrays:
        for byte in range(array.itemsize):
            begin, end = end, end + array.size
            planes[begin:end] = array.view(np.uint8)[byte :: array.itemsize]
    return np.frombuffer(_zstd.compressor.compress(planes.data), np.uint8)


def _unpack(packed: NDArray[np.uint8], counts: dict[str, int]) -> dict[str, NDArray[Any]]:
    """The arrays by name; ValueError or ZstdError if it does not hold as many values of each."""
    types = {name: np.dtype(_DTYPES.get(name, np.float32)) for name in counts}
    total = sum(types[name].itemsize * count for name, count in counts.items())
    if min(counts.values()) < 0 or total > _MOST_BYTES or frame_content_size(packed.data) != total:
        raise ValueError(f"the compressed arrays are not {total} bytes, of at most {_MOST_BYTES}")
    planes, end = np.frombuffer(_zstd.decompressor.decompress(packed.data), np.uint8), 0
    arrays = {name: np.empty(count, types[name]) for name, count in counts.items()}
    for array in arrays.values():
        for byte in range(array.itemsize):
            begin, end = end, end + array.size
            array.view(np.uint8)[byte :: array.itemsize] = planes[begin:end]
    return arrays
