"""Ways to weights: which files lead from what a reader has to the version that it wants, in the fewest bytes.

A file on the volume leads from some weights, or from nothing, to others; weights are known by the SHA-256 of their
model.safetensors. All functions are pure.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from heterorl.exchange.records import WEIGHTS_FILE, DeltaBase, FileEntry, WeightsManifest
from heterorl.exchange.version import Version


@dataclass(frozen=True)
class Way:
    """A file that leads to a version's weights."""

    version: Version
    """In whose folder it is, and to whose weights it leads."""
    file: str
    entry: FileEntry
    leads_to: str
    """Digest of the weights."""
    base: DeltaBase | None = None
    """What it changes; None for the whole weights."""


def ways_of(version: Version, manifest: WeightsManifest) -> list[Way]:
    """The ways to a version that its own folder holds; none to adapters, which are taken as they are."""
    if manifest.kind == "adapter":
        return []
    files = {name: manifest.deltas.get(name) for name in (WEIGHTS_FILE, *manifest.deltas) if name in manifest.files}
    digest = manifest.weights.sha256
    return [Way(version, name, manifest.files[name], digest, base) for name, base in files.items()]


def paths_to(ways: Iterable[Way], target: str) -> dict[str | None, list[Way]]:
    """The path of fewest bytes to `target` from each weights that lead there, and from nothing (None).

    Dijkstra's algorithm over digests, from the target back; of ways alike, those of the newest versions.
    """
    leading: defaultdict[str | None, list[Way]] = defaultdict(list)
    for way in sorted(ways, key=lambda way: way.version, reverse=True):
        leading[way.leads_to].append(way)
    order = itertools.count()
    frontier: list[tuple[int, int, str | None, list[Way]]] = [(0, next(order), target, [])]
    paths: dict[str | None, list[Way]] = {}
    while frontier:
        num_bytes, _, digest, path = heapq.heappop(frontier)
        if digest in paths:
            continue
        paths[digest] = path
        for way in leading[digest]:
            start = way.base.sha256 if way.base else None
            heapq.heappush(frontier, (num_bytes + way.entry.bytes, next(order), start, [way, *path]))
    return paths


def cheapest(ways: Iterable[Way], target: str, held: Iterable[str] = ()) -> list[Way] | None:
    """The path of fewest bytes to `target` from nothing or one of the weights held; None where none leads there.

    It is empty for weights that are held.
    """
    paths = paths_to(ways, target)
    return min((paths[start] for start in (*held, None) if start in paths), key=cost, default=None)


def cost(path: Iterable[Way]) -> int:
    """Bytes to be read."""
    return sum(way.entry.bytes for way in path)


def folders_on_the_way(ways: Collection[Way], kept: Iterable[Version], max_lag: int) -> set[Version]:
    """Versions whose folders hold what readers need to come to the kept ones.

    That is, for each, the cheapest path from nothing; and from any weights of up to `max_lag` steps before, which a
    sampler may still serve, where that is cheaper.
    """
    digests = {way.version: way.leads_to for way in ways}
    steps = {digest: version.step for version, digest in digests.items()}
    steps |= {way.base.sha256: way.base.version.step for way in ways if way.base}
    found: set[Version] = set()
    for version in set(kept) & digests.keys():
        paths = paths_to(ways, digests[version])
        whole = cost(paths[None]) if None in paths else math.inf
        for digest, path in paths.items():
            if digest is None or (steps[digest] >= version.step - max_lag and cost(path) < whole):
                found.update(way.version for way in path)
    return found
