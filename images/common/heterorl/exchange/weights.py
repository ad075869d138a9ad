"""Published weights as their readers see them: which files lead to a version, and making it of them on this machine.

list ─▶ cheapest path ─▶ copy each file, check it ─▶ apply the deltas ─▶ check the digest ─▶ model.safetensors
              ▲                    │ damaged, or retired meanwhile             │ not what it should be
              └────────────────────┴───────────────── without it ──────────────┘
"""

from __future__ import annotations

import errno
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from heterorl.errors import CorruptFile, UnknownProtocol
from heterorl.exchange import delta, published_folder
from heterorl.exchange.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from heterorl.exchange.canary import Canary
from heterorl.exchange.record_store import RecordStore
from heterorl.exchange.records import WEIGHTS_FILE, FileEntry, WeightsManifest, parse_canary
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version
from heterorl.exchange.weight_paths import Way, cheapest, cost, ways_of

log = logging.getLogger(__name__)

CANARY_FILE = "canary.json"
Arrived = Callable[[int], None]
"""Told the bytes of each piece that was read from the volume, and 0 between pieces of other work; what it raises ends
the fetch."""


@dataclass(frozen=True)
class Fetched:
    """A version, checked and copied to this machine."""

    version: Version
    folder: Path
    """Holds model.safetensors, or adapters."""
    canary: Canary
    num_bytes: int
    """Read from the volume for the weights."""
    num_files: int
    """That were read for these; none for weights that were held."""
    held: dict[str, Path]
    """What a later fetch may begin with: model.safetensors, by its digest."""


class Weights:
    """The versions in one run's folder."""

    def __init__(self, folder: Path, files: Files, records: RecordStore) -> None:
        self._folder, self._files, self._records = folder, files, records
        self._manifests: dict[Version, WeightsManifest] = {}

    def published(self) -> list[Version]:
        """All versions, those of a lost future too."""
        return self._records.names(self._folder, Version.parse)

    def folder(self, version: Version) -> Path:
        """Where a version is."""
        return self._folder / str(version)

    def manifest(self, version: Version) -> WeightsManifest:
        """A version's manifest; CorruptFile, UnknownProtocol, and FileNotFoundError if it is retired."""
        return published_folder.read_manifest(self._files, self.folder(version), WeightsManifest)

    def ways(self) -> list[Way]:
        """All files that lead to weights. Versions whose manifest cannot be read lead nowhere."""
        published = self.published()
        self._manifests = {version: self._manifests[version] for version in published if version in self._manifests}
        for version in published:
            if version not in self._manifests:
                try:
                    self._manifests[version] = self.manifest(version)  # never written again
                except (CorruptFile, UnknownProtocol, FileNotFoundError):
                    continue
        return [way for version, manifest in self._manifests.items() for way in ways_of(version, manifest)]

    def fetch(
        self, version: Version, to: Path, held: Mapping[str, Path], arrived: Arrived, model: str | None
    ) -> Fetched:
        """As `Exchange.fetch_weights`. `model`: digest of the starting model, to which adapters have to belong."""
        manifest = self.manifest(version)
        if CANARY_FILE not in manifest.files:
            raise CorruptFile(f"weights {version}: the manifest does not list {CANARY_FILE}")
        to.mkdir(parents=True, exist_ok=True)
        canary_file = self._take(version, CANARY_FILE, manifest.files[CANARY_FILE], to / CANARY_FILE, arrived)
        canary = parse_canary(canary_file.read_bytes(), f"weights {version}: {CANARY_FILE}")
        if manifest.kind == "adapter":
            return self._fetch_adapter(version, manifest, canary, to, arrived, model)
        path = self._rebuild(version, manifest, to, held, arrived)
        return Fetched(version, to, canary, cost(path), len(path), {manifest.weights.sha256: to / WEIGHTS_FILE})

    def _fetch_adapter(
        self,
        version: Version,
        manifest: WeightsManifest,
        canary: Canary,
        to: Path,
        arrived: Arrived,
        model: str | None,
    ) -> Fetched:
        if manifest.model != model:
            raise CorruptFile(
                f"weights {version}: these adapters belong to the model with digest {manifest.model}; the starting"
                f" model here has {model}"
            )
        files = {name: manifest.files[name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
        for name, entry in files.items():
            self._take(version, name, entry, to / name, arrived)
        return Fetched(version, to, canary, sum(entry.bytes for entry in files.values()), len(files), held={})

    def _rebuild(
        self, version: Version, manifest: WeightsManifest, to: Path, held: Mapping[str, Path], arrived: Arrived
    ) -> list[Way]:
        """Try the paths to the weights, the cheapest first, until one leads there; returns it."""
        ways = {*self.ways(), *ways_of(version, manifest)}
        held = {digest: file for digest, file in held.items() if file.is_file()}
        reasons: list[CorruptFile | FileNotFoundError] = []
        while (path := cheapest(ways, manifest.weights.sha256, held)) is not None:
            try:
                self._make(path, held, manifest.weights, to, arrived)
                return path
            except _LeadsNowhere as failed:
                log.warning("weights %s: %s; looking for another way to them", version, failed.reason)
                reasons.append(failed.reason)
                if failed.way is None:
                    held = {}
                else:
                    ways.discard(failed.way)
        damaged = next((reason for reason in reasons if isinstance(reason, CorruptFile)), None)
        published = self.published()
        # An older one may stand for its deltas alone, which lead from what a sampler serves to newer ones.
        if version not in published or (damaged is None and version != max(published)):
            raise FileNotFoundError(errno.ENOENT, "weights were retired", str(self.folder(version)))
        raise damaged or CorruptFile(f"weights {version}: no files on the volume lead to them")

    def _make(self, path: list[Way], held: Mapping[str, Path], target: FileEntry, to: Path, arrived: Arrived) -> None:
        """Take the files of a path and make model.safetensors of them, and of what is held, or raise _LeadsNowhere."""
        with tempfile.TemporaryDirectory(dir=to) as parts:
            files = []
            for way in path:
                try:
                    part = Path(parts) / f"{way.version}-{Path(way.file).name}"
                    files.append(self._take(way.version, way.file, way.entry, part, arrived))
                except (CorruptFile, FileNotFoundError) as error:
                    raise _LeadsNowhere(way, error) from error
            if path and path[0].base is None:
                start, changes, blamed = files[0], files[1:], path[-1]
            else:
                base = path[0].base.sha256 if path and path[0].base else target.sha256
                start, changes, blamed = held[base], files, None
            if path and not changes:
                start.rename(to / WEIGHTS_FILE)
                return
            try:
                digest = delta.apply(start, changes, to / WEIGHTS_FILE, check=lambda: arrived(0))
                if digest != target.sha256:
                    raise CorruptFile(f"what {len(changes)} deltas made of {start.name} has another checksum")
            except CorruptFile as error:
                raise _LeadsNowhere(blamed, error) from error

    def _take(self, version: Version, name: str, expected: FileEntry, to: Path, arrived: Arrived) -> Path:
        """A checked copy of a file on this machine."""
        source = self.folder(version) / name
        with published_folder.standing(self._files, source.parent):
            published_folder.check_size(self._files, source, expected)
            digest = self._files.copy(source, to, arrived=arrived)
        published_folder.check_digest(source, digest, expected)
        return to


class _LeadsNowhere(Exception):
    """A path that could not be followed."""

    def __init__(self, way: Way | None, reason: CorruptFile | FileNotFoundError) -> None:
        """`way`: what to do without; None for the weights that this machine had."""
        super().__init__(str(reason))
        self.way, self.reason = way, reason
