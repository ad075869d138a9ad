"""Weights on the volume: the bytes that a sampler reads to come to a version, by how far behind it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np

from bench import shapes
from bench.benchmark import GateFailed, Pair, Surroundings, at_most, benchmark
from bench.density import train
from builders import CANARY, exchange_at, run_of
from heterorl.exchange import delta
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.exchange.weight_paths import Way, cheapest, cost

STEPS = 64
TOKENS = 48


@dataclass(frozen=True)
class Published:
    """A learner's versions on a volume."""

    exchange: Exchange
    versions: list[Version]
    files: dict[Version, Path]
    """The weights whole, as its own disk had them."""
    ways: list[Way]
    digests: dict[Version, str]

    def bytes_read(self, lag: int) -> float:
        """By a sampler that serves the version `lag` steps before, on average over all versions that have one."""
        pairs = zip(self.versions, self.versions[lag:])
        paths = [cheapest(self.ways, self.digests[after], [self.digests[before]]) for before, after in pairs]
        return fmean(cost(path) for path in paths if path is not None)

    def bytes_whole(self) -> float:
        """Of the safetensors file."""
        return float(self.files[self.versions[0]].stat().st_size)


@cache
def published(parent: Path, quick: bool) -> Published:
    """The weights before and after each of 64 steps of Adam at 1e-6, published as the learner does, in bfloat16."""
    import torch
    from transformers import Qwen3ForCausalLM

    from heterorl_learner.version_writer import VersionWriter

    class Keeping(VersionWriter):
        def write(self, version: Version, tensors: dict[str, torch.Tensor], canary: object) -> None:
            super().write(version, tensors, CANARY)
            versions.append(version)
            files[version] = parent / f"{version}.safetensors"
            files[version].hardlink_to(self._file(version))

    folder = parent / "weights-bench"
    (scratch := folder / "scratch").mkdir(parents=True)
    versions: list[Version] = []
    files: dict[Version, Path] = {}
    exchange = exchange_at(folder / "run", run_of(model={"dtype": "bfloat16"}))
    writer = Keeping(exchange, scratch)
    incarnation = exchange.begin_incarnation()
    torch.manual_seed(0)
    hidden, layers, vocabulary = (128, 2, 2048) if quick else (512, 4, 16_384)
    model = Qwen3ForCausalLM(shapes.qwen3(hidden=hidden, layers=layers, vocabulary=vocabulary))
    texts = np.random.default_rng(0).integers(2, 2048, (256, TOKENS)).tolist()
    for step, tensors in enumerate(train(model, texts, STEPS)):
        writer.write(Version(step, incarnation), tensors, CANARY)
    ways = exchange._weights.ways()
    return Published(exchange, versions, files, ways, {way.version: way.leads_to for way in ways})


def same_bytes(at: Published, folder: Path) -> None:
    """Rebuilt weights are those that were published, from nothing, by chains and by merged deltas; twice is once."""
    truth = {version: hashlib.sha256(at.files[version].read_bytes()).hexdigest() for version in at.versions}
    for begin, end in ((None, 0), (None, 64), (0, 64), (63, 64), (48, 64), (5, 61)):
        held = {} if begin is None else {truth[at.versions[begin]]: at.files[at.versions[begin]]}
        target = at.versions[end]
        fetched = at.exchange.fetch_weights(target, folder / f"from-{begin}-{end}", held=held)
        made = fetched.folder / "model.safetensors"
        if hashlib.sha256(made.read_bytes()).hexdigest() != truth[target]:
            raise GateFailed(f"{target} made of {begin} is not what was published")
        if held:
            last = max((at.exchange.root / "weights" / str(target)).glob("since-*.delta"))  # of the version before
            if delta.apply(made, [last], folder / "twice") != truth[target]:
                raise GateFailed(f"{last.name} applied twice is not the same as once")


def _at_lag(lag: int, target: float) -> None:
    @benchmark(
        f"1-lag{lag}",
        what=f"bytes a sampler reads that serves the version {lag} steps before; bfloat16, 64 steps of Adam at 1e-6",
        peer="whole bfloat16 safetensors",
        target=at_most(target),
        gate="rebuilt weights bit-identical from any path, applied twice = once",
        limit="66-167x at 1 % changed",
        unit="B",
        memory_gb=3.0,
        disk_gb=7.0,
        quick=False,  # sixty-four steps of Adam on millions of values take minutes
    )
    def weights_bytes(at: Surroundings) -> Iterator[Pair]:
        versions = published(at.folder.parent, at.quick)
        gate: Callable[[], None] = lambda: same_bytes(versions, at.folder)  # noqa: E731
        yield Pair(lambda: versions.bytes_read(lag), versions.bytes_whole, gate)


for _lag, _target in ((1, 1 / 20), (16, 1 / 6), (64, 1 / 4)):
    _at_lag(_lag, _target)
