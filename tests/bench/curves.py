"""How costs grow: with parameters, sampler slots, the length of the queue, lag, and the operator's with its runs.

    python -m bench.curves      (with PYTHONPATH=tests)

Draws docs/benchmarks.png: three minutes on two cores. The operator's points are those of the table that
`make bench-operator` recorded.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.benchmark import seconds
from bench.page import PAGE, rows_in
from bench.subjects.queue import GROUPS, MAX_STEPS, Folder, made_by
from builders import CANARY, exchange_at, run_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import SlotStatus
from heterorl.exchange.rollout import RolloutName
from heterorl.exchange.version import Version
from heterorl.report.figures import COLOURS, STYLE
from heterorl.spec.run import Slot
from heterorl_learner.rollout_feed import select_rollouts

PICTURE = PAGE.with_suffix(".png")
PARAMETERS = (1_000_000, 10_000_000, 100_000_000)
SLOTS = (1, 4, 16, 64)
QUEUES = (100, 1_000, 10_000)
VERSIONS = (1, 16, 64)
ROUNDS = 5
Curve = list[tuple[float, float]]


def median_of(measured: Callable[[], float]) -> float:
    """Of a few rounds after one to warm up."""
    measured()
    return statistics.median(measured() for _ in range(ROUNDS))


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────
def weights(folder: Path) -> dict[str, Curve]:
    """Seconds in which a version of so many bfloat16 parameters is published, and fetched with its checks."""
    import torch
    from safetensors.torch import save_file

    curves: dict[str, Curve] = {"publish": [], "fetch": []}
    for count in PARAMETERS:
        exchange = exchange_at(folder / f"weights-{count}")
        tensors = {f"layer.{i}": torch.randn(count // 10).to(torch.bfloat16) for i in range(10)}
        steps = iter(range(100))

        def publish(exchange: Exchange = exchange, tensors: object = tensors, steps: object = steps) -> None:
            version = Version(next(steps), 1)  # type: ignore[call-overload]
            save_file(tensors, exchange.stage_weights(version) / "model.safetensors")  # type: ignore[arg-type]
            exchange.commit_weights(version, CANARY)
            exchange.retire_weights([version])

        def fetch(exchange: Exchange = exchange, count: int = count) -> None:
            exchange.fetch_weights(exchange.list_versions()[-1], folder / f"here-{count}")

        curves["publish"].append((count, median_of(seconds(publish))))
        curves["fetch"].append((count, median_of(seconds(fetch))))
    return curves


def slots(folder: Path) -> dict[str, Curve]:
    """Seconds a group, where each of so many slots publishes one and shows its status, and a learner takes them all."""
    curves: dict[str, Curve] = {"samplers": [], "learner": []}
    for count in SLOTS:
        run = run_of(samplers=[{"name": "far", "replicas": count}], learner={"batch": {"groups": count}})
        exchange = exchange_at(folder / f"slots-{count}", run)
        leases = [lease for _ in range(count) if (lease := exchange.acquire_slot(lambda run=run: run.spec.slots))]  # type: ignore[misc]
        rollout = made_by(exchange)
        sampling, learning = [], []
        for seq in range(ROUNDS):
            started = time.perf_counter()
            for lease in leases:
                exchange.put_rollouts(lease, {RolloutName(Version(0, 1), lease.slot, seq): rollout})
                exchange.beat(lease, SlotStatus())
            published = time.perf_counter()
            names = [name for name in exchange.list_rollouts() if name.seq == seq]
            chosen = select_rollouts(names, step=0, groups=count, max_steps=MAX_STEPS, last=None)
            assert chosen is not None
            for name in chosen.names:
                exchange.read_rollout(name)
            exchange.heartbeats()
            sampling.append((published - started) / count)
            learning.append((time.perf_counter() - published) / count)
        curves["samplers"].append((count, statistics.median(sampling)))
        curves["learner"].append((count, statistics.median(learning)))
    return curves


def queue(folder: Path) -> dict[str, Curve]:
    """Seconds in which the learner, and the reference, choose a batch among so many files."""
    folders = [(count, Folder(folder / f"queue-{count}", count)) for count in QUEUES]
    return {
        "learner": [(count, median_of(seconds(there.ours, before=there.step))) for count, there in folders],
        "reference": [(count, median_of(seconds(there.theirs, before=there.step))) for count, there in folders],
    }


def lag() -> dict[str, Curve]:
    """Seconds of the selection among 2,048 names of so many versions, the oldest as late as that."""
    curve: Curve = []
    for versions in VERSIONS:
        names = [RolloutName(Version(n % versions, 1), Slot("far", n % 8), n) for n in range(2048)]

        def select(names: Sequence[RolloutName] = names, versions: int = versions) -> None:
            select_rollouts(names, step=versions, groups=GROUPS, max_steps=MAX_STEPS, last=None)

        curve.append((versions, median_of(seconds(select))))
    return {"selection": curve}


def operator() -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Seconds to all children, and MB, as recorded."""
    head, *numbers = rows_in(PAGE, "operator scale")

    def column(name: str) -> Curve:
        at = head.index(name)
        return [(float(row[0].replace(",", "")), float(re.sub(r"[^0-9.]", "", row[at]))) for row in numbers]

    return (
        {"operator": column("all children"), "bare loop": column("bare loop")},
        {"memory": column("memory")},
    )


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def draw(axes: Axes, title: str, x: str, y: str, curves: dict[str, Curve]) -> None:
    """One panel, both axes logarithmic."""
    for (name, curve), colour in zip(curves.items(), COLOURS):
        axes.plot(*zip(*curve), marker="o", color=colour, label=name, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if len(curves) > 1:
        axes.legend()


def main() -> None:
    """Measure everything and draw."""
    made, memory = operator()
    with tempfile.TemporaryDirectory(prefix="heterorl-curves-") as name, rc_context(STYLE):
        folder = Path(name)
        figure = Figure(figsize=(10, 6), layout="constrained")
        panels = figure.subplots(2, 3).flat
        draw(next(panels), "A version of the weights", "parameters", "seconds", weights(folder))
        draw(next(panels), "Sampler slots", "slots", "seconds a group", slots(folder))
        draw(next(panels), "Length of the queue", "ready files", "seconds a choice", queue(folder))
        draw(next(panels), "Lag", "versions in the queue", "seconds a selection", lag())
        draw(next(panels), "Operator: all children", "runs", "seconds", made)
        draw(next(panels), "Operator: memory", "runs", "MB", memory)
        figure.savefig(PICTURE, dpi=90)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
