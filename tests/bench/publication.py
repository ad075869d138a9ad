"""What a publication takes of training, beside `torch.save` in the step: one comparison for any engine and device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench import reference
from bench.benchmark import Pair, seconds
from heterorl.exchange.exchange import Exchange

if TYPE_CHECKING:
    from heterorl_learner.engines.torch_ddp import TrainingEngine


def blocked_by_a_publication(exchange: Exchange, engine: TrainingEngine, folder: Path) -> Iterator[Pair]:
    """The pair, with the gate that what is published is what the engine has."""
    from safetensors.torch import load_file, save

    from heterorl_learner.publish import Publisher

    steps = itertools.count(1)
    with Publisher(exchange, engine, exchange.incarnation or 0) as publisher:

        def gate() -> None:
            publisher.publish(next(steps))
            publisher.wait()
            found = exchange.fetch_weights(exchange.list_versions()[-1], folder / "fetched")
            assert save(load_file(found.folder / "model.safetensors")) == save(engine.full_state_dict())

        state = engine.policy.state_dict()
        yield Pair(
            seconds(lambda: publisher.publish(next(steps)), before=publisher.wait),
            seconds(lambda: reference.save_in_the_step(state, folder / "model.pt"), before=publisher.wait),
            gate,
        )
        publisher.wait()
