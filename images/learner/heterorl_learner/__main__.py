"""`python -m heterorl_learner --root ROOT`: the learner, or one rank of it (with torchrun's environment)."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

from heterorl.entry import exit_code, leave
from heterorl.exchange.exchange import Exchange
from heterorl.logs import setup_logging
from heterorl.monitoring.metrics import Metrics


def main() -> int:
    """Parse, set up, train; the exit code says whether it went well (0), was the user's to mend (2) or failed (1)."""
    parser = argparse.ArgumentParser(prog="heterorl_learner", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the run's folder on the shared volume")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="the resolved spec [ROOT/run.json]")
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    rank = int(os.environ.get("RANK", "0"))
    setup_logging("learner" if rank == 0 else f"learner-{rank}")
    return exit_code(lambda: learn(Exchange(args.root, spec_file=args.spec), rank, stop), args.root)


def learn(exchange: Exchange, rank: int, stop: threading.Event) -> None:
    """Train on the prepared model, until every rank is done."""
    from heterorl_learner import ranks  # slow to import, and `--help` needs none of these
    from heterorl_learner.engines.build import build_engine
    from heterorl_learner.train import Trainer

    spec = exchange.spec
    engine = build_engine(exchange.model_dir, spec)
    metrics = Metrics()
    if rank == 0:
        metrics = Metrics.open(
            exchange.metrics_dir, "learner", spec.monitoring, run=exchange.run.metadata.name, to_wandb=True
        )
    with metrics:
        Trainer(exchange, engine, metrics, stop.is_set).train()
    ranks.part()


if __name__ == "__main__":
    leave(main)
