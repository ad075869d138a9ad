"""What an unreliable judge costs the engine: tokens a second of one sampler with and without it, in turns.

    python -m bench.judge [--turns 3] [--seconds 30]      (with PYTHONPATH=tests)

One sampler with a small model and the engine `transformers` generates in turns with `accuracy` alone (A) and with a
judge beside it (B) that raises in one call of ten, hangs in one of fifty until its limit, and eats memory once. Nobody
trains; a turn's folder is thrown away. Printed: tokens a second of the whole turn, from its first to its last batch,
and the median of each kind, as a row for docs/rewards.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from transformers import AutoTokenizer

from builders import exchange_at, run_of
from heterorl.exchange.canary import Canary
from heterorl.exchange.records import SlotStatus
from heterorl.exchange.rollout import Completion, Version
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import Slot
from heterorl_sampler.activity import Activity
from heterorl_sampler.decoding import Decoder
from heterorl_sampler.engines.transformers import TransformersEngine
from heterorl_sampler.prompt_order import PromptOrder
from heterorl_sampler.sample import Sampler
from heterorl_sampler.scoring import build_rewards
from heterorl_sampler.weight_sync import WeightSync
from models import save_character_tokenizer, save_tiny_qwen3

JUDGE = """
import os, time
def score(completions, **columns):
    with open(os.environ["JUDGED"], "a+") as calls:
        calls.seek(0)
        n = len(calls.read())
        calls.write(".")
    if n == 20: bytearray(64 << 30)
    if n % 10 == 3: raise ConnectionError("no verdict")
    if n % 50 == 7: time.sleep(1000)
    return [float(len(text)) for text in completions]
"""
ACCURACY: dict[str, object] = {"name": "accuracy"}
UNRELIABLE: dict[str, object] = {
    "name": "custom",
    "path": "unreliable.score",
    "timeLimitSeconds": 1,
    "onError": "skipGroup",
}
ROWS = [{"id": i, "prompt": "", "prompt_ids": [2 + i % 8, 5], "answer": str(i), "columns": {}} for i in range(64)]


class Counting(TransformersEngine):
    """Counts its tokens and the time from the start of its first batch to the end of its last."""

    tokens, started, ended = 0, 0.0, 0.0

    def generate(self, *args: object, **kwargs: object) -> list[list[Completion] | None]:
        """As the engine does."""
        self.started = self.started or time.perf_counter()
        groups = super().generate(*args, **kwargs)  # type: ignore[arg-type]
        self.tokens += sum(len(completion.token_ids) for group in groups if group for completion in group)
        self.ended = time.perf_counter()
        return groups


def turn(model: Path, folder: Path, rewards: list[dict[str, object]], seconds: float) -> tuple[float, SlotStatus]:
    """Tokens a second of a sampler with these rewards, and its status at the end."""
    run = run_of(
        model={"dtype": "float32"},
        samplers=[{"name": "far", "engine": "transformers", "promptsPerBatch": 8}],
        algorithm={"groupSize": 8},
        generation={"maxCompletionTokens": 16},
        exchange={"maxPendingGroups": 100_000},
        rewards=rewards,
    )
    exchange = exchange_at(folder / "run", run)
    (exchange.stage_weights(Version(0, 1)) / "model.safetensors").write_bytes(
        (model / "model.safetensors").read_bytes()
    )
    engine = Counting(model, dtype="float32")
    exchange.commit_weights(Version(0, 1), Canary([[3, 4, 5]], engine.score([[3, 4, 5]])))
    lease, status, stop = exchange.acquire_slot(lambda: [Slot("far", 0)]), SlotStatus(), threading.Event()
    assert lease is not None
    order, decoder = PromptOrder(ROWS, seed=0, share=0, shares=1), Decoder(AutoTokenizer.from_pretrained(model))
    with build_rewards(exchange.spec) as built:
        built.load()
        weights = WeightSync(exchange, engine, lease.slot, folder / "scratch")
        sampler = Sampler(exchange, lease, Activity(status), weights, engine, order, decoder, built, Metrics(), stop)
        threading.Timer(seconds, stop.set).start()
        sampler.run()
    return engine.tokens / (engine.ended - engine.started), status


@contextmanager
def _prepared() -> Iterator[Callable[[], Path]]:
    """A folder with model and judge; gives a fresh folder for each turn."""
    with tempfile.TemporaryDirectory(prefix="heterorl-judge-") as name:
        folder = Path(name)
        save_tiny_qwen3(folder / "model", True, 0)
        save_character_tokenizer(folder / "model")
        (folder / "unreliable.py").write_text(JUDGE)
        sys.path.insert(0, name)
        os.environ["JUDGED"] = str(folder / "calls")
        yield lambda: Path(tempfile.mkdtemp(dir=name))


def main() -> None:
    """Run the turns and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {"A": [], "B": []}
    with _prepared() as fresh:
        for kind in "AB" * arguments.turns:
            folder = fresh()
            rewards = [ACCURACY] if kind == "A" else [ACCURACY, UNRELIABLE]
            speed, status = turn(folder.parent / "model", folder, rewards, arguments.seconds)
            speeds[kind].append(speed)
            print(f"{kind}: {speed:,.0f} tokens/s, {status.rollouts} groups, {status.unrewarded} left out,", end=" ")
            print(f"failed calls {status.reward_failures}", flush=True)
    without, with_judge = median(speeds["A"]), median(speeds["B"])
    print(f"| {without:,.0f} | {with_judge:,.0f} | {with_judge / without - 1:+.1%} |")


if __name__ == "__main__":
    main()
