"""Weights by delta: the same bytes whichever way a reader takes, and nothing that a reader needs goes."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from builders import CANARY, exchange_at, run_of
from heterorl.errors import CorruptFile
from heterorl.exchange import delta
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import SlotStatus
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version
from heterorl.exchange.weights import Fetched
from heterorl.spec.run import Slot
from heterorl_learner.version_writer import VersionWriter

DTYPES = {"bfloat16": (torch.bfloat16, 2), "float32": (torch.float32, 4)}


# ── one delta ────────────────────────────────────────────────────────────────────────────────────────────────────────
def files(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"file-{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths


def pair(rng: np.random.Generator, words: int, share: float, dtype: str) -> tuple[bytes, bytes]:
    """Random contents, and the same with about this share of the words replaced by random ones."""
    before = rng.integers(0, np.iinfo(dtype).max, words, dtype, endpoint=True)
    after = np.where(rng.random(words) < share, rng.integers(0, np.iinfo(dtype).max, words, dtype), before)
    return before.tobytes(), after.astype(dtype).tobytes()


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "word"), [("uint16", 2), ("uint32", 4)])
@pytest.mark.parametrize("words", [0, 1, 999, 3001])
def test_a_delta_makes_the_later_file_of_the_earlier_one_whatever_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, dtype: str, word: int, words: int
) -> None:
    monkeypatch.setattr(delta, "BLOCK_WORDS", 1000)
    before, after = pair(np.random.default_rng(words), words, share, dtype)
    base, target = files(tmp_path, before, after)
    assert delta.encode(base, target, tmp_path / "delta", word=word, limit=10**6)
    digest = delta.apply(base, [tmp_path / "delta"], tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == after
    assert digest == hashlib.sha256(after).hexdigest()
    assert delta.apply(tmp_path / "made", [tmp_path / "delta"], tmp_path / "again") == digest  # twice is once


@pytest.mark.parametrize("length", [1001, 1003])
def test_a_file_whose_last_word_is_incomplete_is_rebuilt_as_it_is(tmp_path: Path, length: int) -> None:
    contents = np.random.default_rng(0).bytes(length), np.random.default_rng(1).bytes(length)
    base, target = files(tmp_path, *contents)
    assert delta.encode(base, target, tmp_path / "delta", word=4, limit=10**6)
    delta.apply(base, [tmp_path / "delta"], tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == contents[1]


def test_files_of_different_lengths_and_deltas_that_are_too_long_are_left(tmp_path: Path) -> None:
    base, longer, other = files(tmp_path, bytes(1000), bytes(1002), np.random.default_rng(0).bytes(1000))
    assert not delta.encode(base, longer, tmp_path / "delta", word=2, limit=10**6)
    assert not delta.encode(base, other, tmp_path / "delta", word=2, limit=500)


def test_a_delta_is_refused_for_weights_that_it_was_not_made_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, target, other, shorter = files(tmp_path, *(rng.bytes(4000) for _ in range(3)), rng.bytes(3998))
    assert delta.encode(base, target, tmp_path / "delta", word=2, limit=10**6)
    for wrong, words in ((other, "does not fit the weights"), (shorter, "changes weights of 4000 bytes")):
        with pytest.raises(CorruptFile, match=words):
            delta.apply(wrong, [tmp_path / "delta"], tmp_path / "made")


def test_a_delta_of_which_any_byte_is_another_or_the_end_is_missing_gives_no_other_weights(tmp_path: Path) -> None:
    before, after = pair(np.random.default_rng(0), 300, 0.1, "uint16")
    base, target = files(tmp_path, before, after)
    delta.encode(base, target, tmp_path / "delta", word=2, limit=10**6)
    whole, damaged = (tmp_path / "delta").read_bytes(), tmp_path / "damaged"
    changed = [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(len(whole))]
    refused = 0
    for data in (*changed, *(whole[:i] for i in range(0, len(whole) - 4, 3))):
        damaged.write_bytes(data)
        try:
            digest = delta.apply(base, [damaged], tmp_path / "made")
        except CorruptFile:
            refused += 1
            continue
        assert digest == hashlib.sha256((tmp_path / "made").read_bytes()).hexdigest()  # which a reader compares
    assert refused > len(changed)


# ── a run of versions ────────────────────────────────────────────────────────────────────────────────────────────────
class Learner:
    """Publishes weights that change a little from version to version, and remembers the digests of what it wrote."""

    def __init__(self, root: Path, dtype: str = "bfloat16", **exchange: object) -> None:
        self.exchange = exchange_at(root / "run", run_of(model={"dtype": dtype}, exchange=exchange))
        self.dtype = DTYPES[dtype][0]
        self.begin()
        self.weights = {"embed": torch.randn(500, 8), "norm": torch.ones(8), "head": torch.randn(300, 8)}
        self.generator = torch.Generator().manual_seed(0)
        self.digests: dict[Version, str] = {}

    def begin(self) -> None:
        """Start, anew after a crash: as another incarnation that knows nothing of the one before."""
        self.incarnation = self.exchange.begin_incarnation()
        scratch = self.exchange.root.parent / f"scratch-{self.incarnation}"
        scratch.mkdir()
        self.writer = VersionWriter(self.exchange, scratch)

    def train(self, share: float) -> None:
        """Change this share of the weights by a few percent."""
        for tensor in self.weights.values():
            chosen = torch.rand(tensor.shape, generator=self.generator) < share
            tensor.add_(chosen * 0.03 * torch.randn(tensor.shape, generator=self.generator))

    def publish(self, step: int) -> Version:
        """Publish the weights as they are."""
        version = Version(step, self.incarnation)
        tensors = {name: tensor.to(self.dtype, copy=True) for name, tensor in self.weights.items()}
        self.writer.write(version, tensors, CANARY)
        self.digests[version] = hashlib.sha256((self.writer._file(version)).read_bytes()).hexdigest()
        return version

    def run(self, steps: range, share: float = 0.01) -> list[Version]:
        """Train and publish each step."""
        versions = []
        for step in steps:
            self.train(share)
            versions.append(self.publish(step))
        return versions

    def manifest(self, version: Version) -> dict[str, object]:
        """As it lies on the volume."""
        path = self.exchange.root / "weights" / str(version) / "manifest.json"
        return dict(json.loads(path.read_text()))


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    torch.manual_seed(0)
    return Learner(tmp_path)


@pytest.fixture
def fetch(learner: Learner, tmp_path: Path) -> Callable[..., Fetched]:
    """Fetch as a reader that has never seen the volume, and check what it got."""

    def fetch(version: Version, begin_with: Fetched | None = None) -> Fetched:
        reader, held = Exchange(learner.exchange.root), begin_with.held if begin_with else {}
        fetched = reader.fetch_weights(version, tmp_path / f"reader-{version}-{len(held)}", held=held)
        made = hashlib.sha256((fetched.folder / "model.safetensors").read_bytes()).hexdigest()
        assert made == learner.digests[version]
        assert fetched.held == {made: fetched.folder / "model.safetensors"}
        assert {path.name for path in fetched.folder.iterdir()} == {"model.safetensors", "canary.json"}
        return fetched

    return fetch


def test_any_version_is_the_same_bytes_from_nothing_and_from_any_earlier_one(
    learner: Learner, fetch: Callable[..., Fetched]
) -> None:
    versions = learner.run(range(70))
    assert learner.manifest(versions[0])["kind"] == "anchor"
    assert [learner.manifest(version)["kind"] for version in versions[1:10]] == ["delta"] * 9
    earlier = [fetch(version) for version in versions[::9]]
    for held in earlier:
        for version in versions[5::13]:
            fetch(version, held)


def test_a_reader_that_is_far_behind_reads_merged_deltas(learner: Learner, tmp_path: Path) -> None:
    versions = learner.run(range(130), share=0.001)
    for begin, end, files in ((3, 4, 1), (8, 16, 1), (0, 64, 1), (64, 128, 1), (6, 17, 4)):
        reader = learner.exchange
        held = reader.fetch_weights(versions[begin], tmp_path / f"held-{begin}")
        fetched = reader.fetch_weights(versions[end], tmp_path / f"made-{begin}-{end}", held=held.held)
        assert list(fetched.held) == [learner.digests[versions[end]]]
        assert fetched.num_files == files


def test_weights_that_are_held_already_are_not_read_again(learner: Learner, fetch: Callable[..., Fetched]) -> None:
    version = learner.publish(0)
    same = learner.publish(1)  # nothing has changed
    held = fetch(version)
    assert (fetch(same, held).num_bytes, fetch(same, held).num_files) == (0, 0)


def test_the_next_anchor_comes_sooner_the_more_changes(tmp_path: Path) -> None:
    def anchors(share: float) -> list[int]:
        learner = Learner(tmp_path / str(share))
        return [v.step for v in learner.run(range(40), share) if learner.manifest(v)["kind"] == "anchor"]

    few, some, many = anchors(0.001), anchors(0.2), anchors(1.0)
    assert few == [0]
    assert 1 < len(some) < len(many)


def test_a_reader_that_has_nothing_reads_at_most_half_more_than_whole_weights(
    learner: Learner, fetch: Callable[..., Fetched]
) -> None:
    for version in learner.run(range(60), share=0.1):
        fetched = fetch(version)
        assert fetched.num_bytes <= 1.5 * (fetched.folder / "model.safetensors").stat().st_size


def test_versions_are_whole_where_the_spec_says_so(tmp_path: Path) -> None:
    learner = Learner(tmp_path, deltas=False)
    assert {str(learner.manifest(version)["kind"]) for version in learner.run(range(4))} == {"anchor"}


def test_each_file_of_a_version_is_hashed_once(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest, copy = Files.digest, Files.copy

    def digesting(files: Files, path: Path) -> str:
        hashed.append(path.name)
        return digest(files, path)

    def copying(files: Files, source: Path, target: Path) -> str:
        hashed.append(target.name)
        return copy(files, source, target)

    monkeypatch.setattr(Files, "digest", digesting)
    monkeypatch.setattr(Files, "copy", copying)
    whole, changed = learner.run(range(2))
    assert sorted(hashed) == [
        "canary.json",
        "canary.json",
        "model.safetensors",
        f"since-{whole}.delta",
        f"{changed}.safetensors",
    ]


def test_a_version_whose_tensors_are_others_is_whole_and_the_next_one_is_its_delta(
    learner: Learner, fetch: Callable[..., Fetched]
) -> None:
    learner.run(range(3))
    learner.weights["adapter"] = torch.zeros(4, 8)
    grown, following = learner.run(range(3, 5))
    assert learner.manifest(grown)["kind"] == "anchor"
    assert learner.manifest(following)["kind"] == "delta"
    fetch(following, fetch(Version(1, 1)))


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def damage(learner: Learner, version: Version, file: str) -> None:
    path = learner.exchange.root / "weights" / str(version) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_delta_is_passed_by_where_another_way_leads_to_the_version(
    learner: Learner, fetch: Callable[..., Fetched]
) -> None:
    versions = learner.run(range(9))
    held = fetch(versions[0])
    damage(learner, versions[8], f"since-{versions[0]}.delta")  # the merged one
    assert fetch(versions[8], held).num_files == 8
    assert len(learner.exchange.list_versions()) == 9  # nothing is deleted or moved by a reader


def test_a_version_to_which_no_whole_files_lead_is_refused_with_the_reason(learner: Learner, tmp_path: Path) -> None:
    versions = learner.run(range(4))
    damage(learner, versions[2], f"since-{versions[1]}.delta")
    with pytest.raises(CorruptFile, match=f"checksum of since-{versions[1]}.delta does not fit"):
        learner.exchange.fetch_weights(versions[3], tmp_path / "here")


def test_held_weights_that_have_gone_bad_are_made_anew(learner: Learner, fetch: Callable[..., Fetched]) -> None:
    versions = learner.run(range(3))
    held = fetch(versions[0])
    file = held.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fetch(versions[2], held).num_files == 3  # the anchor, and two deltas


def test_after_a_refusal_the_next_version_is_whole(learner: Learner, fetch: Callable[..., Fetched]) -> None:
    versions = learner.run(range(3))
    damage(learner, versions[0], "model.safetensors")  # what all others are made of
    lease = learner.exchange.acquire_slot(lambda: [Slot("far", 0)])
    assert lease is not None
    learner.exchange.beat(lease, SlotStatus(refused={str(versions[2]): "damaged"}))
    healed, following = learner.run(range(3, 5))
    assert learner.manifest(healed)["kind"] == "anchor"
    assert learner.manifest(following)["kind"] == "delta"
    fetch(following)


# ── retention ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_leads_to_a_kept_version_is_kept_with_it_and_the_rest_goes(
    tmp_path: Path, fetch: Callable[..., Fetched], learner: Learner
) -> None:
    versions = learner.run(range(12), share=0.1)
    first_of_newest = max(step for step in range(12) if learner.manifest(versions[step])["kind"] == "anchor")
    learner.exchange.retire_weights(versions[-1:])
    fetch(versions[-1])
    assert versions[first_of_newest] in learner.exchange.list_versions()
    far = learner.run(range(200, 201), share=1.0)  # a whole one, far beyond any lag
    learner.exchange.retire_weights(far)
    assert learner.exchange.list_versions() == far


def test_a_sampler_that_serves_what_was_retired_still_reads_deltas_only(
    learner: Learner, fetch: Callable[..., Fetched]
) -> None:
    versions = learner.run(range(10))
    held = fetch(versions[4])
    for step in range(10, 20):
        versions += learner.run(range(step, step + 1))
        learner.exchange.retire_weights(versions[-2:])
        fetched = fetch(versions[-1], held)
        assert fetched.num_bytes < (fetched.folder / "model.safetensors").stat().st_size / 2


def test_a_version_that_a_sampler_fetches_is_kept_until_it_has_it(tmp_path: Path) -> None:
    exchange = (learner := Learner(tmp_path, deltas=False)).exchange
    versions = learner.run(range(2))
    lease = exchange.acquire_slot(lambda: [Slot("far", 0)])
    assert lease is not None
    exchange.beat(lease, SlotStatus(fetching=versions[0]))
    assert exchange.retire_weights(versions[1:]) == []
    exchange.beat(lease, SlotStatus(fetching=versions[0]), released=True)  # it has gone
    assert exchange.retire_weights(versions[1:]) == versions[:1]


def test_a_reader_beside_a_writer_that_retires_gets_whole_versions(learner: Learner, tmp_path: Path) -> None:
    learner.run(range(1))
    done, failures = threading.Event(), []

    def read() -> None:
        reader, fetched, count = Exchange(learner.exchange.root), None, 0
        while not done.is_set():
            newest = reader.list_versions()[-1]
            count += 1
            try:
                fetched = reader.fetch_weights(
                    newest, tmp_path / f"read-{count}", held=fetched.held if fetched and count % 3 else {}
                )
            except FileNotFoundError:
                continue
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    for step in range(1, 40):
        newest = learner.run(range(step, step + 1), share=0.1)
        learner.exchange.retire_weights(newest)
    done.set()
    thread.join()
    assert failures == []


def test_a_version_that_stands_for_its_deltas_alone_is_gone_for_who_has_nothing(
    learner: Learner, fetch: Callable[..., Fetched], tmp_path: Path
) -> None:
    versions = learner.run(range(3), share=0.1)
    held = fetch(versions[-1])
    while learner.manifest(versions[-1])["kind"] != "anchor":
        versions += learner.run(range(len(versions), len(versions) + 1), share=0.1)
    learner.exchange.retire_weights(versions[-1:])
    *steps_on_the_way, newest = learner.exchange.list_versions()
    assert steps_on_the_way
    for version in steps_on_the_way:
        with pytest.raises(FileNotFoundError, match="weights were retired"):
            learner.exchange.fetch_weights(version, tmp_path / str(version))
    assert fetch(newest).num_files == 1
    assert fetch(newest, held).num_files >= 1


def test_the_newest_version_to_which_nothing_leads_is_damaged(learner: Learner, tmp_path: Path) -> None:
    versions = learner.run(range(3))
    shutil.rmtree(learner.exchange.root / "weights" / str(versions[0]))  # the anchor, by hand
    with pytest.raises(CorruptFile, match="no files on the volume lead to them"):
        learner.exchange.fetch_weights(versions[-1], tmp_path / "here")


def test_a_learner_that_resumed_begins_with_an_anchor_and_builds_on_nothing_of_the_lost_future(
    learner: Learner, fetch: Callable[..., Fetched]
) -> None:
    lost = learner.run(range(6))
    held = fetch(lost[5])
    learner.begin()
    first, second = learner.run(range(3, 5))
    assert learner.manifest(first)["kind"] == "anchor"
    learner.exchange.retire_weights([first, second])
    assert [version.incarnation for version in learner.exchange.list_versions()] == [2, 2]
    fetch(second, held)
