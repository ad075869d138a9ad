"""Seconds of the quickstart from the command to its last step, now and at an earlier commit, in turn.

    python -m bench.quickstart [--before COMMIT] [--rounds 2]      (with PYTHONPATH=tests)

Written into docs/benchmarks.md: about five minutes a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from bench.before import BEFORE, checkouts, started
from bench.page import PAGE, commit, machine, put

LIMIT_S = 1200.0


def seconds_to_the_last_step(checkout: Path) -> float:
    """Run the quickstart of a checkout; the learner says on the volume how far it is."""
    with tempfile.TemporaryDirectory(prefix="heterorl-quickstart-") as runs:
        begun = time.monotonic()
        process = started(checkout, "quickstart", Path(runs))
        try:
            while not _is_trained(Path(runs) / "quickstart" / "learner.json"):
                if process.poll() is not None or time.monotonic() - begun > LIMIT_S:
                    raise SystemExit(f"the quickstart of {checkout} did not come to its last step")
                time.sleep(0.1)
            return time.monotonic() - begun
        finally:
            process.terminate()
            process.wait()


def _is_trained(heartbeat: Path) -> bool:
    try:
        learner = json.loads(heartbeat.read_text())
    except (FileNotFoundError, ValueError):  # not there yet, or just being replaced
        return False
    return bool(learner.get("step", 0) >= learner.get("steps", 1))


def main() -> None:
    """Measure in turn, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    took: dict[str, list[float]] = {args.before: [], commit(): []}
    with checkouts(args.before) as each:
        for _ in range(args.rounds):
            for label, checkout in each.items():
                took[label].append(seconds_to_the_last_step(checkout))
                print(f"{label}: {took[label][-1]:.0f} s", flush=True)
    was, now = (f"{statistics.median(times):.0f} s" for times in took.values())
    rounds = f"median of {args.rounds}, in turn"
    text = f"Seconds from the command to step 250: {now}; {was} at `{args.before}` ({rounds}).\n\n`{commit()}`, {machine()}."
    put(PAGE, "quickstart", text)
    print(text)


if __name__ == "__main__":
    main()
