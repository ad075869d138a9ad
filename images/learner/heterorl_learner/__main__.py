"""`python -m heterorl_learner [train | prepare | check | launch | conclude] --root ROOT`: the learner's programs.

train      one rank of the learner (with torchrun's environment), the program that needs no name
prepare    puts the starting model and the tokenised data onto the volume
check      the same without the model: what a run would read, printed (`heterorl check`)
launch     one pod of the learner: starts its ranks, tells how far the run is
conclude   tells the dashboards of the last evaluations and of the end, once all is done
"""

from __future__ import annotations

import argparse
import logging
import math
import os

from heterorl.entry import Process, Program, run

log = logging.getLogger("heterorl_learner")


def train(process: Process) -> None:
    """Train on the prepared model, until every rank is done or told to stop."""
    from heterorl.exchange.learner_state import LAUNCHER
    from heterorl.exchange.storage import persistently
    from heterorl.monitoring.metrics import Metrics
    from heterorl.monitoring.run_story import RunStory
    from heterorl.report.summary import summarise
    from heterorl_learner import ranks
    from heterorl_learner.engines.build import build_engine
    from heterorl_learner.train import Trainer

    exchange, rank = process.exchange, _rank()
    exchange.launcher = os.environ.get(LAUNCHER, "")
    spec = exchange.spec
    folder = exchange.model_dir
    engine = persistently(lambda: build_engine(folder, spec), what="the model", folder=folder)
    metrics = Metrics()
    if rank == 0:
        metrics = Metrics.open(
            exchange.metrics_dir,
            "learner",
            spec.monitoring,
            run=exchange.run.metadata.name,
            story=lambda: RunStory(exchange, lambda: summarise(exchange.root)),
        )
    try:
        with metrics:
            trainer = Trainer(exchange, engine, metrics, process.stop.is_set)
            # From here on there is something to save: the step is finished and checkpointed, as long as its pod has.
            with process.stop.finishing(within_s=math.inf):
                trainer.train()
    except Exception:
        # Only rank 0 writes, and leaves when it is superseded; then the collectives of the others break.
        exchange.require_incarnation()
        raise
    ranks.part()


def prepare(process: Process) -> None:
    """Prepare the run unless it is prepared."""
    from heterorl_learner.prepare import prepare

    if process.args.spec is not None:
        process.exchange.occupy()
    prepare(process.exchange)
    log.info("model and data are prepared")


def check(process: Process) -> None:
    """Read what a run would read, and print it."""
    from heterorl_learner.check import check

    check(process.exchange)


def launch(process: Process) -> int:
    """Supervise this pod's ranks; the exit code is theirs."""
    from heterorl_learner.launch import serve

    return serve(process)


def conclude(process: Process) -> None:
    """Tell the dashboards what came after the learner had left."""
    from heterorl.monitoring.metrics import conclude
    from heterorl.report.summary import summarise

    conclude(process.exchange, summarise(process.exchange.root))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _label(args: argparse.Namespace) -> str:
    return f"learner-{_rank()}" if _rank() else "learner"


PROGRAMS = {
    "train": Program(train, "One rank of the learner, with torchrun's environment where there are several.", _label),
    "prepare": Program(prepare, "Put the starting model and the tokenised data onto the volume.", lambda _: "prepare"),
    "check": Program(check, "Read what a run would read, and print it.", lambda _: "check"),
    "conclude": Program(conclude, "Tell the dashboards how the run ended.", lambda _: "conclude"),
    "launch": Program(launch, "One pod of the learner: start its ranks, tell how it goes.", lambda _: "learner-pod"),
}

if __name__ == "__main__":
    run("heterorl_learner", PROGRAMS)
