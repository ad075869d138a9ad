"""What online.yaml drops of what its samplers make, and how long its learner waits, now and at an earlier commit, in turn.

    python -m bench.online [--before COMMIT] [--rounds 3]      (with PYTHONPATH=tests)

Written into docs/benchmarks.md: about three minutes a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.before import BEFORE, checkouts, started
from bench.page import PAGE, commit, machine, put, table_line
from heterorl.monitoring.json_lines import read_metrics

HEAD = ("code", "run", "made", "dropped", "share dropped", "learner's waits, median", "in all", "the run")


class Run(NamedTuple):
    """What one run came to."""

    made: int
    """Groups that samplers published."""
    dropped: int
    waits_s: list[float]
    """Of the learner before each step but the first, for which the samplers start."""
    took_s: float

    @property
    def cells(self) -> tuple[str, ...]:
        share = f"{self.dropped / self.made:.1%}"
        waits = f"{statistics.median(self.waits_s):.2f} s", f"{sum(self.waits_s):.0f} s"
        return f"{self.made:,}", f"{self.dropped:,}", share, *waits, f"{self.took_s:.0f} s"


def run(checkout: Path) -> Run:
    """The example once."""
    with tempfile.TemporaryDirectory(prefix="heterorl-online-") as runs:
        begun = time.monotonic()
        if code := started(checkout, "online", Path(runs)).wait():
            raise SystemExit(f"online.yaml of {checkout} ended with {code}")
        took_s = time.monotonic() - begun
        folder = Path(runs) / "online"
        summary = json.loads((folder / "summary.json").read_text())
        steps = [line for line in read_metrics(folder / "metrics" / "learner.jsonl") if "loss" in line]
        waits_s = [float(line["perf/rollout_wait_s"]) for line in steps[1:]]
        return Run(summary["rollouts_published"], summary["rollouts_dropped"], waits_s, took_s)


def main() -> None:
    """Measure in turn, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lines = [table_line(HEAD), table_line(["---"] * 2 + ["---:"] * (len(HEAD) - 2))]
    with checkouts(args.before) as each:
        for number in range(1, args.rounds + 1):
            for label, checkout in each.items():
                lines.append(table_line([f"`{label}`", str(number), *run(checkout).cells]))
                print(lines[-1], flush=True)
    put(PAGE, "online", "\n".join([*lines, "", f"In turn, on {machine()}, now `{commit()}`."]))


if __name__ == "__main__":
    main()
