"""`python -m heterorl_sampler --root ROOT --pool far [--index 0]`: one sampler, until SIGTERM."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from heterorl.data.tokenizer import load_tokenizer
from heterorl.entry import exit_code
from heterorl.errors import HeteroRLError
from heterorl.exchange.canary import CANARY_TOKENS
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import SlotStatus
from heterorl.exchange.slots import Lease
from heterorl.exit_codes import SITE_ERROR
from heterorl.logs import setup_logging
from heterorl.monitoring.metrics import Metrics
from heterorl.names import Slot
from heterorl_sampler.activity import STUCK_S, Activity

log = logging.getLogger("heterorl_sampler")


def main() -> int:
    """Parse, set up, sample; the exit code says whether it went well (0), was the user's to mend (2) or failed (1)."""
    parser = argparse.ArgumentParser(prog="heterorl_sampler", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the run's folder on the shared volume")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="the resolved spec [ROOT/run.json]")
    parser.add_argument("--pool", required=True, help="sampler pool of the spec")
    parser.add_argument("--index", type=int, help="slot in the pool; absent: the first that is free")
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    exchange = Exchange(args.root, spec_file=args.spec)
    setup_logging(f"sampler-{args.pool}")
    return exit_code(lambda: serve(exchange, args.pool, args.index, stop), args.root)


def serve(exchange: Exchange, pool_name: str, index: int | None, stop: threading.Event) -> None:
    """Lease a slot and sample in it until `stop`."""

    def slots() -> list[Slot]:
        # The spec's file may lag behind the object that started this pod: a new pool or replica may not be in it yet.
        found = [slot for slot in exchange.spec.slots if slot.pool == pool_name]
        return found if index is None else [Slot(pool_name, index)]

    while exchange.prepared is None or not slots():  # with `heterorl render` nobody orders the pods
        if stop.wait(exchange.spec.exchange.poll_seconds):
            return
    lease = exchange.acquire_slot(slots, stop.is_set)
    if lease is None:
        return
    activity = Activity(SlotStatus(state="starting", rollouts=lease.first_seq))
    with Heartbeat(exchange, lease, activity, stop):
        sample(exchange, lease, activity, stop)


def sample(exchange: Exchange, lease: Lease, activity: Activity, stop: threading.Event) -> None:
    """Start the leased slot's engine and sample until `stop`, telling `activity` of it."""
    from heterorl_sampler.engines.build import build_engine  # slow to import, and `--help` needs none of it
    from heterorl_sampler.rewards import build_rewards
    from heterorl_sampler.rollout_maker import RolloutMaker
    from heterorl_sampler.sample import Sampler
    from heterorl_sampler.weight_sync import WeightSync

    spec = exchange.spec
    pool = spec.pool(lease.slot.pool)
    if spec.generation.is_truncated:
        log.warning("topP, topK, minP or repetitionPenalty change the distribution: importance ratios are biased")
    rows = [json.loads(line) for line in exchange.data_file("train").read_text().splitlines()]
    engine = build_engine(
        pool.engine,
        exchange.model_dir,
        dtype=spec.model.dtype,
        max_model_len=max(CANARY_TOKENS, spec.generation.max_prompt_tokens + spec.generation.max_completion_tokens),
        gpus=pool.gpus,
        tensor_parallel=pool.tensor_parallel,
        gpu_memory_utilization=pool.gpu_memory_utilization,
        kv_cache_bytes=pool.kv_cache_bytes,
    )
    with (
        tempfile.TemporaryDirectory(prefix="heterorl-weights-") as scratch,
        Metrics.open(
            exchange.metrics_dir, f"sampler-{lease.slot}", spec.monitoring, run=exchange.run.metadata.name
        ) as metrics,
        build_rewards(spec) as rewards,
    ):
        maker = RolloutMaker(spec, lease, engine, load_tokenizer(exchange.model_dir), rewards, rows)
        weights = WeightSync(exchange, engine, lease.slot, Path(scratch))
        Sampler(exchange, lease, activity, weights, maker, metrics, stop).run()
    engine.close()


class Heartbeat:
    """Keeps a lease on a thread of its own: a slow start or a long generation must not lose it. Released at the end.

    A sampler that is stuck must not keep it: then the process is ended, as a failure of this node.
    """

    def __init__(
        self,
        exchange: Exchange,
        lease: Lease,
        activity: Activity,
        stop: threading.Event,
        *,
        stuck_s: float = STUCK_S,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._exchange, self._lease, self._activity, self._stop = exchange, lease, activity, stop
        self._stuck_s, self._end = stuck_s, end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._exchange.beat(self._lease, self._activity.status)
        self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if kind is None:
            self._activity.status.state = "stopped"
            self._exchange.beat(self._lease, self._activity.status, released=True)

    def _run(self) -> None:
        period = min(2.0, self._exchange.spec.exchange.lease_seconds / 4)
        while not self._done.wait(period):
            status, idle_s = self._activity.status, self._activity.idle_s
            if idle_s > self._stuck_s:
                log.critical("stuck: nothing came of it for %.0f s (%s); this process ends", idle_s, status.state)
                self._end(SITE_ERROR)
                return
            status.idle_s = round(idle_s, 1)
            try:
                self._exchange.beat(self._lease, status)
            except HeteroRLError as error:
                log.error("%s", error)
                self._stop.set()
                return
            except OSError as error:
                log.warning("no heartbeat written: %s", error)


if __name__ == "__main__":
    sys.exit(main())
