"""The start of a sampler: from nothing to its first token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.benchmark import CannotMeasure, Pair, Surroundings, at_most, benchmark
from bench.shapes import qwen3, save_qwen3

CACHE_GB = "1"
"""vLLM's key-value cache on a CPU: by default it takes what is free, which other processes may want."""
LIMIT_S = 600.0


def first_token(which: str, model: Path) -> tuple[int, float]:
    """The token, and the seconds from the start of its process until it was there."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.first_token", which, str(model)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": CACHE_GB},
        start_new_session=True,  # vLLM's engine is another process of this session
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("token "):
                return int(line.split()[1]), time.monotonic() - started
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise RuntimeError(f"the process of {which} ended without a token; its words are above")


@benchmark(
    "12",
    what="sampler cold start to its first token, vLLM on the CPU, 42 M parameters",
    peer="vLLM's defaults",
    target=at_most(0.4),
    gate="same first token",
    limit="import and one read",
    memory_gb=4.0,
    disk_gb=0.5,
    quick=False,
    rounds=3,  # each takes more than a minute, and hardly varies
    warm_up=0,
)
def cold_start(at: Surroundings) -> Iterator[Pair]:
    if find_spec("vllm") is None:
        raise CannotMeasure("vLLM is not installed: install heterorl[sampler-cpu]")
    save_qwen3(at.folder, qwen3(hidden=512, layers=10, vocabulary=16_384))
    starts: dict[str, list[float]] = {"ours": [], "theirs": []}

    def gate() -> None:
        """Its starts are the first round."""
        tokens = {}
        for which, seconds in starts.items():
            tokens[which], took = first_token(which, at.folder)
            seconds.append(took)
        assert tokens["ours"] == tokens["theirs"], f"ours is {tokens['ours']}, the peer's {tokens['theirs']}"

    def start(which: str) -> float:
        return starts[which].pop() if starts[which] else first_token(which, at.folder)[1]

    yield Pair(lambda: start("ours"), lambda: start("theirs"), gate)
