"""What an unreliable judge costs the engine: tokens a second of a sampler with and without it, in turns.

    python -m bench.judge [--turns 30] [--seconds 3]      (with PYTHONPATH=tests)

A small model generates with the engine `transformers`, in turns with `accuracy` alone (A) and with a judge beside it (B)
that raises in one call of ten, hangs in one of fifty until its limit, and eats memory once. Nobody trains. Turns are
short and many, so that what else the machine does falls on both alike. Printed are medians over the turns of tokens a
second, from the start of a turn's first batch to the end of its last, as a row for docs/rewards.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from transformers import AutoTokenizer

from builders import exchange_at, run_of
from heterorl.exchange.canary import Canary
from heterorl.exchange.records import SlotStatus
from heterorl.exchange.version import Version
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import Slot
from heterorl_sampler import sample
from heterorl_sampler.activity import Activity
from heterorl_sampler.engines.base import Finished
from heterorl_sampler.engines.transformers import TransformersEngine
from heterorl_sampler.prompt_order import PromptOrder
from heterorl_sampler.scoring import Decoder, build_rewards
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
    """Counts its tokens and the time from its first step to its last."""

    tokens, started, ended = 0, 0.0, 0.0

    def step(self) -> Finished:
        """As the engine does."""
        self.started = self.started or time.perf_counter()
        finished = super().step()
        self.tokens += sum(len(completion.token_ids) for _, group in finished for completion in group)
        self.ended = time.perf_counter()
        return finished

    def take_speed(self) -> float:
        """Tokens a second since the last time."""
        speed = self.tokens / (self.ended - self.started)
        self.tokens, self.started, self.ended = 0, 0.0, 0.0
        return speed


class Side:
    """A sampler with these rewards, in a folder of its own."""

    def __init__(self, engine: Counting, model: Path, folder: Path, rewards: list[dict[str, object]]) -> None:
        run = run_of(
            model={"dtype": "float32"},
            samplers=[{"name": "far", "engine": "transformers", "promptsPerBatch": 8}],
            algorithm={"groupSize": 8},
            generation={"maxCompletionTokens": 16},
            exchange={"maxPendingGroups": 100_000},
            rewards=rewards,
        )
        self.exchange = exchange_at(folder / "run", run)
        staged = self.exchange.stage_weights(Version(0, 1))
        shutil.copy(model / "model.safetensors", staged)
        self.exchange.commit_weights(Version(0, 1), Canary([[3, 4, 5]], engine.score([[3, 4, 5]])))
        lease = self.exchange.acquire_slot(lambda: [Slot("far", 0)])
        assert lease is not None
        self._engine, self._lease, self._scratch = engine, lease, folder / "scratch"
        self._decoder = Decoder(AutoTokenizer.from_pretrained(model))
        self.rewards = build_rewards(self.exchange.spec)
        self.rewards.load()
        self.speeds: list[float] = []
        self.groups = self.left_out = 0

    def sample(self, seconds: float) -> None:
        """One turn."""
        status, stop = SlotStatus(), threading.Event()
        weights = WeightSync(self.exchange, self._engine, self._lease.slot, self._scratch)
        order = PromptOrder(ROWS, seed=0, share=0, shares=1)
        sampler = sample.Sampler(
            self.exchange,
            self._lease,
            Activity(status),
            weights,
            self._engine,
            order,
            self._decoder,
            self.rewards,
            Metrics(),
            stop,
        )
        threading.Timer(seconds, stop.set).start()
        sampler.run()
        saved = self.exchange.load_slot(self._lease.slot)
        assert saved is not None
        self.groups += saved.next_seq - self._lease.first_seq
        self._lease.first_seq = saved.next_seq
        self.left_out += status.unrewarded
        self.speeds.append(self._engine.take_speed())


def measure(folder: Path, turns: int, seconds: float) -> tuple[Side, Side]:
    """Both sides after their turns; the first turn of each is not counted."""
    model = folder / "model"
    save_tiny_qwen3(model, True, 0)
    save_character_tokenizer(model)
    (folder / "unreliable.py").write_text(JUDGE)
    sys.path.insert(0, str(folder))
    os.environ["JUDGED"] = str(folder / "calls")
    engine = Counting(model, dtype="float32")
    sides = Side(engine, model, folder / "A", [ACCURACY]), Side(engine, model, folder / "B", [ACCURACY, UNRELIABLE])
    for _ in range(turns + 1):
        for side in sides:
            side.sample(seconds)
    for side in sides:
        side.rewards.close()
        del side.speeds[0]
    return sides


def main() -> None:
    """Take the turns and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    sample.LAST_SCORES_S = 60.0  # a turn's last batches are scored, however busy the machine
    with tempfile.TemporaryDirectory(prefix="heterorl-judge-") as folder:
        without, judged = measure(Path(folder), arguments.turns, arguments.seconds)
    pairs = [b / a - 1 for a, b in zip(without.speeds, judged.speeds)]
    print(f"{judged.groups} groups judged, {judged.left_out} left out, failed calls {dict(judged.rewards.failures)}")
    print(f"B against A, turn by turn: median {median(pairs):+.1%}")
    a, b = median(without.speeds), median(judged.speeds)
    print(f"| {a:,.0f} | {b:,.0f} | {b / a - 1:+.1%} |")


if __name__ == "__main__":
    main()
