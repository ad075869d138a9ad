"""What a publication does to the versions before it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import exchange_at, publish, run_of
from heterorl.errors import Superseded
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl_learner.engines.torch_ddp import MicroBatch
from heterorl_learner.publish import Publisher


class OneTensorEngine:
    """A model of one tensor that finds every token equally likely."""

    rank = 0
    adapter_config = None

    def __init__(self) -> None:
        self.written_over: list[int | None] = []
        """At each copy, the number of the earlier one whose memory it was given."""
        self.copies: list[torch.Tensor] = []

    def score_copy(
        self, tensors: dict[str, torch.Tensor], batches: list[MicroBatch]
    ) -> Callable[[], list[list[float]]]:
        return lambda: [[0.0] * int(batch.lengths.sum()) for batch in batches]

    def full_state_dict(self, into: Mapping[str, torch.Tensor] = {}) -> dict[str, torch.Tensor]:
        earlier = [number for number, copy in enumerate(self.copies) if copy is into.get("weight")]
        self.written_over.append(earlier[-1] if earlier else None)
        self.copies.append(into.get("weight", torch.ones(2)))
        return {"weight": self.copies[-1]}


@pytest.fixture
def exchange(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Exchange:
    exchange = exchange_at(tmp_path / "run", run_of(exchange={"retention": {"weights": 2}, "deltas": False}))
    exchange.model_dir.symlink_to(tiny_model_dir(tokenizer=True))
    exchange.data_file("train").parent.mkdir()
    exchange.data_file("train").write_text(json.dumps({"prompt_ids": [3, 4, 5]}) + "\n")
    return exchange


@pytest.fixture
def publisher(exchange: Exchange) -> Iterator[Publisher]:
    with Publisher(exchange, OneTensorEngine(), exchange.begin_incarnation()) as publisher:
        yield publisher


def test_the_newest_versions_are_kept_and_older_ones_retired(exchange: Exchange, publisher: Publisher) -> None:
    for step in range(4):
        publisher.publish(step)
        publisher.wait()
    assert exchange.list_versions() == [Version(2, 1), Version(3, 1)]


@pytest.mark.parametrize(
    "manifest", ["", '{"protocol": 1}', '{"protocol": 1, "kind": "anchor", "step": 0, "files": {}}']
)
def test_a_damaged_manifest_of_a_version_that_is_kept_is_put_aside_and_publication_goes_on(
    exchange: Exchange, publisher: Publisher, manifest: str
) -> None:
    damaged = publish(exchange, Version(0, 1))
    (exchange.root / "weights" / str(damaged) / "manifest.json").write_text(manifest)
    publisher.publish(1)
    publisher.wait()
    publisher.publish(2)
    publisher.wait()
    assert exchange.list_versions() == [Version(1, 1), Version(2, 1)]
    assert (exchange.root / "quarantine" / "weights" / str(damaged) / "model.safetensors").read_bytes() == b"weights"


def test_a_version_of_a_later_protocol_is_kept_whatever_is_published(exchange: Exchange, publisher: Publisher) -> None:
    later = publish(exchange, Version(0, 1))
    (exchange.root / "weights" / str(later) / "manifest.json").write_text('{"protocol": 2}')
    for step in (1, 2, 3):
        publisher.publish(step)
        publisher.wait()
    assert exchange.list_versions() == [later, Version(2, 1), Version(3, 1)]


def test_a_superseded_learner_learns_it_when_it_publishes(exchange: Exchange, publisher: Publisher) -> None:
    Exchange(exchange.root).begin_incarnation()
    publisher.publish(1)
    with pytest.raises(Superseded):
        publisher.wait()
    assert exchange.list_versions() == []


def test_a_version_that_a_superseded_learner_published_after_all_is_passed_over_and_retired(
    exchange: Exchange, publisher: Publisher
) -> None:
    for step in range(5, 8):
        publish(exchange, Version(step, 0))  # of the learner before; this one resumes from step 6
    publisher.publish(6)
    publisher.wait()
    assert exchange.list_versions() == [Version(6, 0), Version(6, 1)]
    publish(exchange, late := Version(9, 0))
    assert exchange.list_versions() == [Version(6, 0), Version(6, 1)]
    publisher.publish(7)
    publisher.wait()
    assert exchange.list_versions() == [Version(6, 1), Version(7, 1)]
    assert not (exchange.root / "weights" / str(late)).exists()


def test_while_a_version_is_written_the_newest_waits_and_those_between_are_skipped(
    exchange: Exchange, publisher: Publisher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit, begun, may_go_on = Exchange.commit_weights, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> None:
        begun.set()
        assert may_go_on.wait(60)
        commit(*args, **kwargs)

    monkeypatch.setattr(Exchange, "commit_weights", slow)
    caplog.set_level("INFO")
    publisher.publish(1)
    assert begun.wait(60)
    for step in (2, 3, 4):
        publisher.publish(step)
    may_go_on.set()
    publisher.wait()
    assert exchange.list_versions() == [Version(1, 1), Version(4, 1)]
    skipped = [record.message for record in caplog.records if "are not published" in record.message]
    assert [message.split()[1] for message in skipped] == ["v00000002-i0001", "v00000003-i0001"]


def test_a_copy_is_written_over_once_it_is_published_or_skipped_and_not_before(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on, commit = threading.Event(), threading.Event(), Exchange.commit_weights

    def slow(*args: Any, **kwargs: Any) -> None:
        begun.set()
        assert may_go_on.wait(60)
        commit(*args, **kwargs)

    monkeypatch.setattr(Exchange, "commit_weights", slow)
    engine = OneTensorEngine()
    with Publisher(exchange, engine, exchange.begin_incarnation()) as publisher:
        publisher.publish(0)
        assert begun.wait(60)
        for step in (1, 2, 3):  # 0 is being written and 1 waits; 2 takes the place of 1, and 3 that of 2
            publisher.publish(step)
        may_go_on.set()
        publisher.wait()
        publisher.publish(4)
    assert engine.written_over == [None, None, None, 1, 3]
