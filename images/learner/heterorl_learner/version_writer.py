"""Writing a version: what has changed since earlier ones where that is little, else the weights whole.

    snapshot ─▶ a file on this machine ─▶ compared with those of earlier versions ─▶ staged ─▶ published
                        └──────────── kept, as what later versions are compared with

A version is compared with the one before and, every 8 and 64 versions, with the one as many versions back. So a reader
that is far behind reads a few merged deltas instead of a long chain, in which many weights change more than once.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from heterorl.exchange import delta
from heterorl.exchange.canary import Canary
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import WEIGHTS_FILE, DeltaBase, FileEntry
from heterorl.exchange.version import Version
from heterorl_learner.engines.torch_ddp import DTYPES, save_tensors

log = logging.getLogger(__name__)

STRIDES = (1, 8, 64)
"""Over how many versions deltas go."""
MOST_OF_WHOLE = 0.5
"""A delta that would take more than this share of the whole weights is not worth its time."""


class VersionWriter:
    """Writes the versions of one learner incarnation; they are deltas of nothing but its own.

    `scratch`, a folder of this machine, holds at most as many versions as there are strides, and the newest. Memory
    beside the snapshot does not grow with the model.
    """

    def __init__(self, exchange: Exchange, scratch: Path) -> None:
        self._exchange, self._scratch = exchange, scratch
        self._word = DTYPES[exchange.spec.model.dtype].itemsize
        self._bases: dict[int, DeltaBase] = {}
        self._count = 0

    def write(self, version: Version, tensors: dict[str, Tensor], canary: Canary) -> None:
        """Publish a snapshot. Every file is hashed once, while it is copied if it is."""
        file = self._file(version)
        save_tensors(tensors, file)
        staged, files, num_bytes = self._exchange.stage_weights(version), self._exchange.files, file.stat().st_size
        deltas = self._encode(file) if self._exchange.spec.exchange.deltas else {}
        whole = self._exchange.needs_anchor(num_bytes, {base: out.stat().st_size for base, out in deltas.items()})
        sources = {out.name: out for out in deltas.values()} | ({WEIGHTS_FILE: file} if whole else {})
        copied = {
            name: FileEntry(bytes=source.stat().st_size, sha256=files.copy(source, staged / name))
            for name, source in sources.items()
        }
        weights = copied[WEIGHTS_FILE] if whole else FileEntry(bytes=num_bytes, sha256=files.digest(file))
        self._exchange.commit_weights(
            version,
            canary,
            deltas={out.name: base for base, out in deltas.items()},
            rebuilt=None if whole else weights,
            known=copied,
        )
        written = sum(entry.bytes for entry in copied.values())
        log.info("weights %s: %d bytes, %.3f of the whole weights", version, written, written / num_bytes)
        for out in deltas.values():
            out.unlink()
        self._keep_as_base(DeltaBase(version=version, sha256=weights.sha256))

    def _encode(self, file: Path) -> dict[DeltaBase, Path]:
        """Deltas, by what they change."""
        found = {}
        limit = int(MOST_OF_WHOLE * file.stat().st_size)
        for base in dict.fromkeys(self._bases[stride] for stride in self._due() if stride in self._bases):
            out = self._scratch / f"since-{base.version}.delta"
            if not delta.encode(self._file(base.version), file, out, word=self._word, limit=limit):
                out.unlink(missing_ok=True)
                break  # since those that reach further back even more has changed
            found[base] = out
        return found

    def _keep_as_base(self, newest: DeltaBase) -> None:
        before = {*self._bases.values(), newest}
        self._bases |= dict.fromkeys(self._due(), newest)
        self._count += 1
        for unused in before - {*self._bases.values()}:
            self._file(unused.version).unlink(missing_ok=True)

    def _due(self) -> list[int]:
        return [stride for stride in STRIDES if self._count % stride == 0]

    def _file(self, version: Version) -> Path:
        return self._scratch / f"{version}.safetensors"
