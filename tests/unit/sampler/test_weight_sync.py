"""Following the weights: swaps, refusals and what is served after each, on a real exchange with an honest little engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import builders
from builders import exchange_at, run_of
from heterorl.errors import SiteError
from heterorl.exchange import storage
from heterorl.exchange.canary import Canary
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.storage import Files
from heterorl.exchange.version import Version
from heterorl.heterogeneity.delay import Adoption
from heterorl.spec.run import DelaySpec, Slot
from heterorl_sampler.weight_sync import Swap, WeightSync

TEXTS = [[1, 2], [3, 4]]


class OneNumberEngine:
    """A model of one weight, which is also every log-probability it computes."""

    def __init__(self) -> None:
        self.weight = 0.0

    def load_weights(self, folder: Path, version: Version) -> None:
        self.weight = float((folder / "model.safetensors").read_text())

    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        return [[self.weight] * (len(text) - 1) for text in token_ids]


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    return exchange_at(tmp_path / "run", run_of(model={"dtype": "float32"}))


@pytest.fixture
def engine() -> OneNumberEngine:
    return OneNumberEngine()


@pytest.fixture
def follower(exchange: Exchange, engine: OneNumberEngine, tmp_path: Path) -> WeightSync:
    return WeightSync(exchange, engine, Slot("far", 0), tmp_path / "scratch")


def publish(
    exchange: Exchange, step: int, weight: float, *, canary: float | None = None, incarnation: int = 1
) -> Version:
    expected = weight if canary is None else canary
    return builders.publish(
        exchange, Version(step, incarnation), str(weight).encode(), Canary(TEXTS, [[expected], [expected]])
    )


def settle(follower: WeightSync) -> list[Swap]:
    """Advance until nothing is under way any more."""
    swaps = []
    for _ in range(6):
        if swap := follower.advance():
            swaps.append(swap)
        time.sleep(0.05)  # the fetch runs on a thread of its own
    return swaps


def test_the_first_weights_are_served_and_then_the_newest(
    exchange: Exchange, engine: OneNumberEngine, follower: WeightSync
) -> None:
    publish(exchange, 0, -1.0)
    assert [swap.version for swap in settle(follower)] == [Version(0, 1)]
    publish(exchange, 1, -2.0)
    newest = publish(exchange, 2, -3.0)
    assert [swap.version for swap in settle(follower)] == [newest]
    assert (engine.weight, follower.version) == (-3.0, newest)


def test_a_fetch_keeps_to_the_pools_limit_and_ends_at_once_when_the_sampler_leaves(
    engine: OneNumberEngine, tmp_path: Path
) -> None:
    pool = {"name": "far", "fetchBytesPerSecond": 1}
    exchange = exchange_at(tmp_path / "run", run_of(model={"dtype": "float32"}, samplers=[pool]))
    follower = WeightSync(exchange, engine, Slot("far", 0), tmp_path / "scratch")
    publish(exchange, 0, -1.0)  # with its canary over 30 bytes, half a minute
    assert settle(follower) == []
    follower.close()
    give_up = time.monotonic() + 10
    while any(thread.name.startswith("fetch") for thread in threading.enumerate()):
        assert time.monotonic() < give_up, "the fetch goes on"
        time.sleep(0.01)
    assert not (tmp_path / "scratch" / str(Version(0, 1)) / "model.safetensors").exists()


def test_weights_that_a_superseded_learner_published_last_are_not_served(
    exchange: Exchange, engine: OneNumberEngine, follower: WeightSync
) -> None:
    publish(exchange, 4, -1.0)
    settle(follower)
    resumed = publish(exchange, 3, -2.0, incarnation=2)
    publish(exchange, 5, -3.0)
    assert [swap.version for swap in settle(follower)] == [resumed]
    assert (engine.weight, follower.version) == (-2.0, resumed)


def test_a_damaged_version_is_refused_once_and_the_old_one_stays(
    exchange: Exchange, engine: OneNumberEngine, follower: WeightSync, caplog: pytest.LogCaptureFixture
) -> None:
    first = publish(exchange, 0, -1.0)
    settle(follower)
    damaged = publish(exchange, 1, -2.0)
    (exchange.root / "weights" / str(damaged) / "model.safetensors").write_text("-9.0")
    assert settle(follower) == []
    assert (engine.weight, follower.version) == (-1.0, first)
    assert list(follower.rejected) == [damaged]
    refusals = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(refusals) == 1
    assert "checksum" in refusals[0]
    assert f"continues with {first}" in refusals[0]


def test_a_version_whose_canary_fails_is_refused_and_the_old_weights_are_loaded_again(
    exchange: Exchange, engine: OneNumberEngine, follower: WeightSync
) -> None:
    first = publish(exchange, 0, -1.0)
    settle(follower)
    wrong = publish(exchange, 1, -2.0, canary=-2.1)
    settle(follower)
    assert (engine.weight, follower.version) == (-1.0, first)
    assert "differ by 0.1 on average" in follower.refused[str(wrong)]
    good = publish(exchange, 2, -3.0)
    settle(follower)
    assert (engine.weight, follower.version) == (-3.0, good)
    exchange.retire_weights([good])
    settle(follower)
    assert (list(follower.rejected), follower.refused) == ([wrong], {})  # no longer published


def test_a_version_retired_during_the_fetch_is_not_a_failure(
    exchange: Exchange, engine: OneNumberEngine, follower: WeightSync
) -> None:
    publish(exchange, 0, -1.0)
    settle(follower)
    publish(exchange, 1, -2.0)
    list(follower._look())
    exchange.retire_weights([])
    newest = publish(exchange, 2, -3.0)
    settle(follower)
    assert (follower.version, follower.rejected) == (newest, {})


def test_after_a_learner_crash_its_successor_is_followed_back(
    exchange: Exchange, engine: OneNumberEngine, follower: WeightSync
) -> None:
    for step in range(8):
        publish(exchange, step, float(-step))
    settle(follower)
    assert follower.version == Version(7, 1)
    exchange.retire_weights([Version(step, 1) for step in range(6)])  # resumed from the checkpoint of step 5
    resumed = Version(5, 2)
    (exchange.stage_weights(resumed) / "model.safetensors").write_text("-5.5")
    exchange.commit_weights(resumed, Canary(TEXTS, [[-5.5], [-5.5]]))
    settle(follower)
    assert follower.version == resumed


def test_a_hold_in_steps_ends_when_the_learner_went_back_to_an_earlier_step() -> None:
    delay = DelaySpec(distribution="constant", unit="steps", lower=30.0)
    adoption = Adoption(delay, slot="far-0")
    adoption.adopted(Version(100, 1), now_s=0.0, newest_step=100)
    assert adoption.choose([(Version(120, 1), 0.0)], Version(100, 1), 0.0) is None  # 20 steps of 30
    assert adoption.choose([(Version(50, 2), 0.0)], Version(100, 1), 0.0) == Version(50, 2)


class SlowFiles(Files):
    """A network that brings one byte after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.chunks = threading.Event(), 0

    def copy(self, source: Path, target: Path, *, arrived: Callable[[int], None] = lambda num_bytes: None) -> str:
        def counted(num_bytes: int) -> None:
            self.chunks += 1
            self.begun.set()
            time.sleep(0.005)
            arrived(num_bytes)

        return super().copy(source, target, arrived=counted)


def test_a_sampler_that_is_told_to_go_ends_its_fetch_in_the_midst_of_a_file(
    tmp_path: Path, engine: OneNumberEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_CHUNK", 1)
    files = SlowFiles()
    exchange = exchange_at(tmp_path / "run", files=files)
    builders.publish(exchange, Version(0, 1), b"0" * 10_000)
    follower = WeightSync(exchange, engine, Slot("far", 0), tmp_path / "scratch")
    follower.advance()
    assert files.begun.wait(10)
    follower.close()
    follower._thread.shutdown(wait=True)
    assert files.chunks < 10_000


@pytest.mark.parametrize("manifest", ['{"protocol": 1}', '{"protocol": 2}', ""])
def test_a_manifest_of_no_use_refuses_its_version_and_the_next_one_is_served(
    exchange: Exchange, engine: OneNumberEngine, follower: WeightSync, manifest: str
) -> None:
    refused = publish(exchange, 0, -1.0)
    (exchange.root / "weights" / str(refused) / "manifest.json").write_text(manifest)
    assert settle(follower) == []
    publish(exchange, 1, -2.0)
    assert [swap.version for swap in settle(follower)] == [Version(1, 1)]
    assert list(follower.rejected) == [refused]
    assert exchange.list_versions() == [refused, Version(1, 1)]


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
SECONDS = {"distribution": "constant", "lower": 60}


def follower_whose_clock_is(skew_s: float, delay: dict[str, Any], root: Path) -> WeightSync:
    """A sampler on another node than its learner, whose clock is right."""
    run = run_of(model={"dtype": "float32"}, samplers=[{"name": "far", "delay": delay}])
    learner = exchange_at(root / "run", run)
    publish(learner, 0, -1.0, incarnation=learner.begin_incarnation())
    here = Exchange(learner.root, clock=lambda: time.time() + skew_s)
    return WeightSync(here, OneNumberEngine(), Slot("far", 0), root / "scratch")


@pytest.mark.parametrize(("skew_s", "words"), [(300.0, "300 s ahead of"), (-20.0, "20 s behind")])
def test_a_node_whose_clock_is_off_is_named_where_delays_are_in_seconds(
    tmp_path: Path, skew_s: float, words: str
) -> None:
    with pytest.raises(SiteError, match=f"this node's clock is {words} that of the learner's node"):
        follower_whose_clock_is(skew_s, SECONDS, tmp_path).advance()


@pytest.mark.parametrize("delay", [{}, {**SECONDS, "unit": "steps", "model": "transit"}], ids=["none", "in steps"])
def test_a_clock_that_no_delay_needs_is_only_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, delay: dict[str, Any]
) -> None:
    assert len(settle(follower_whose_clock_is(300.0, delay, tmp_path))) == 1
    assert [record.levelname for record in caplog.records if "300 s ahead of" in record.message] == ["WARNING"]


def test_clocks_that_differ_little_are_left_alone_whatever_the_file_servers_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = Files.stamp
    monkeypatch.setattr(Files, "stamp", lambda files, folder: stamp(files, folder) - 7200)
    assert len(settle(follower_whose_clock_is(2.0, SECONDS, tmp_path))) == 1
    assert "clock" not in caplog.text
