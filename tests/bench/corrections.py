"""What losses and corrections make of stale rollouts: gradient norm, variance of the weights, ESS, share without gradient.

    python -m bench.corrections [--run FOLDER]      (with PYTHONPATH=tests)

A tiny model is trained online for 65 steps, and its rollouts are kept. The learner of step 64 then computes the
gradient of every loss under every correction on the batches of steps 64, 56, 32 and 0: lags of 0, 8, 32 and 64.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.rollout import Rollout, RolloutName
from heterorl.exchange.version import Version
from heterorl.report.figures import COLOURS, INK, STYLE
from heterorl.spec.run import CorrectionSpec, LossType, RunSpec
from heterorl_learner.engines.build import build_engine
from heterorl_learner.engines.torch_ddp import TrainingEngine
from heterorl_learner.rollout_feed import StepBatch
from heterorl_learner.train_step import train_on

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "reports" / "corrections.md"
PICTURE = REPORT.with_suffix(".png")
LAGS = (0, 8, 32, 64)
LEARNER_STEP = 64
LOSSES: tuple[LossType, ...] = get_args(LossType)
DRAWN: tuple[LossType, ...] = ("grpo", "gspo", "gepo", "cispo")
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "truncate token": {"weight": {"type": "truncate"}},
    "truncate sequence": {"weight": {"type": "truncate", "level": "sequence"}},
    "mask token": {"weight": {"type": "mask", "low": 0.5, "high": 5.0}},
    "mask sequence": {"weight": {"type": "mask", "level": "sequence", "low": 0.0, "high": 3.0}},
    "geometric": {"reject": {"type": "geometric"}},
    "k3": {"reject": {"type": "k3"}},
    "OPSM": {"opsmDelta": 0.5},
    "M2PO": {"m2poTau": 0.04},
}
OVERRIDES = (
    "name=corrections",
    "evaluation.everySteps=0",
    f"learner.steps={LEARNER_STEP + 1}",
    "learner.checkpoint.keep=1",  # rollouts go to the archive when every checkpoint that is kept covers them
    "exchange.retention.keepRollouts=true",
)


@dataclass(frozen=True)
class Measured:
    """One gradient."""

    loss: LossType
    correction: str
    lag: int
    values: dict[str, float]


FIGURES = {
    "grad_norm": "Gradient norm",
    "weight/variance": "Variance of the weights",
    "weight/ess": "Effective sample size, share of the batch",
    "correction/zero": "Share of tokens without gradient through the correction",
}


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────
def record(folder: Path) -> Path:
    """Run the online example with its rollouts kept; returns the run's folder."""
    sets = [argument for override in OVERRIDES for argument in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "heterorl",
        "run",
        str(ROOT / "examples" / "online.yaml"),
        "--runs-dir",
        str(folder),
    ]
    subprocess.run([*command, *sets], check=True)
    return folder / "corrections"


def batches(exchange: Exchange) -> Iterator[tuple[int, StepBatch]]:
    """Each lag with the kept rollouts of that age, as the batch of the learner's step."""
    archive = exchange.root / "archive"
    names = sorted(RolloutName.parse(path.stem) for path in archive.iterdir())
    for lag in LAGS:
        of_lag = [name for name in names if name.version.step == LEARNER_STEP - lag]
        rollouts = [Rollout.from_bytes((archive / f"{name}.safetensors").read_bytes()) for name in of_lag]
        yield lag, StepBatch(LEARNER_STEP, of_lag, rollouts, wait_s=0.0)


def learner_at(exchange: Exchange, version: Version) -> TrainingEngine:
    """A training engine with the weights of a published version."""
    folder = Path(tempfile.mkdtemp(prefix="corrections-"))
    shutil.copytree(exchange.model_dir, folder, dirs_exist_ok=True)
    exchange.fetch_weights(version, folder)
    return build_engine(folder, exchange.spec)


def measure(exchange: Exchange) -> Iterator[Measured]:
    """Every loss under every correction at every lag; the engine's weights stay what they are."""
    version = next(v for v in exchange.list_versions() if v.step == LEARNER_STEP)
    engine = learner_at(exchange, version)
    for lag, batch in batches(exchange):
        for loss in LOSSES:
            for name, correction in CORRECTIONS.items():
                values = train_on(engine, spec_with(exchange.spec, loss, correction), batch)
                values["grad_norm"] = engine.step(learning_rate=0.0)
                yield Measured(loss, name, lag, {key: values.get(key, 0.0) for key in FIGURES})


def spec_with(spec: RunSpec, loss: LossType, correction: dict[str, Any]) -> RunSpec:
    """The run's spec with another loss, under another correction."""
    update = {
        "loss": spec.algorithm.loss.model_copy(update={"type": loss}),
        "correction": CorrectionSpec.model_validate(correction),
    }
    return spec.model_copy(update={"algorithm": spec.algorithm.model_copy(update=update)})


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────
HEAD = f"""# Losses and corrections on stale rollouts

Made by `make corrections-report`. A tiny model learns sums online (`examples/online.yaml`, for {LEARNER_STEP + 1} steps)
and keeps its rollouts. The learner of step {LEARNER_STEP} computes the gradient of each loss under each correction on the
rollouts made with the weights of steps 64, 56, 32 and 0 (32 groups of 8 or more each), so at lags of 0, 8, 32 and 64.

- It is about one gradient, of short completions and a rate that moves the policy far in a few steps. It says nothing
  about how well anything trains.
- At lag 0 the weights are 1 and nothing is corrected, whatever is on.
- Under a weight all losses with token ratios have the same weights, those of the correction: they differ in the divisor.
- OPSM leaves the gradient of gspo and gepo as it was: what it drops, their lower clip had cut already.
- With gepo a weight raises the variance and the gradient norm at large lags: it brings p/q back. Rejection and M2PO do
  not.

![Gradient norm, variance of the weights, ESS and share without gradient by lag](corrections.png)

Corrections: truncate 0 to 2; mask by token 0.5 to 5, by sequence at most 3; geometric 0.5 to 2; k3 at most 0.1; OPSM
0.5; M2PO 0.04. Weights include the correction's factor; they are tokens' for losses with token ratios and sequences' for
the others. Each cell: lags 0, 8, 32, 64.
"""


def report(measured: list[Measured]) -> str:
    """The tables, as Markdown."""
    found = {(m.loss, m.correction, m.lag): m.values for m in measured}
    parts = [HEAD]
    for key, title in FIGURES.items():
        parts += [f"\n## {title}\n", f"| loss | {' | '.join(CORRECTIONS)} |", "|---|" + "---|" * len(CORRECTIONS)]
        for loss in LOSSES[:1] if key == "correction/zero" else LOSSES:  # which tokens those are does not depend on it
            cells = (" ".join(_short(found[loss, name, lag][key]) for lag in LAGS) for name in CORRECTIONS)
            parts.append(f"| {'any' if key == 'correction/zero' else loss} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) > 1e-9 else "0"  # below is rounding


def draw(measured: list[Measured]) -> None:
    """A row a figure, a column a loss, a line a correction."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 8), layout="constrained")
        axes = figure.subplots(len(FIGURES), len(DRAWN), sharex=True, sharey="row")
        for panel, loss in zip(axes[0], DRAWN):
            panel.set_title(loss)
        for panel in axes[-1]:
            panel.set_xlabel("lag")
        for row, (key, title) in zip(axes, FIGURES.items()):
            for panel, loss in zip(row, DRAWN):
                for name, colour in zip(CORRECTIONS, (INK, *COLOURS)):
                    of_it = [m.values[key] for m in measured if (m.loss, m.correction) == (loss, name)]
                    panel.plot(LAGS, of_it, marker=".", color=colour, label=name, linewidth=1.2)
            row[0].set_ylabel(title.partition(",")[0].replace(" without", "\nwithout").replace(" through", "\nthrough"))
            if key in ("grad_norm", "weight/variance"):
                row[0].set_yscale("symlog", linthresh=0.01)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(CORRECTIONS))
        figure.savefig(PICTURE, dpi=80)


def main() -> None:
    """Record a run unless one is given, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run recorded before, instead of a new one")
    folder = parser.parse_args().run or record(Path(tempfile.mkdtemp(prefix="corrections-run-")))
    torch.set_num_threads(1)
    measured = list(measure(Exchange(folder)))
    REPORT.write_text(report(measured))
    draw(measured)
    print(f"wrote {REPORT} and {PICTURE}; the run is {folder}")


if __name__ == "__main__":
    main()
