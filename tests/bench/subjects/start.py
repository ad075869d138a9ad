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
    what="sampler cold start to its first token, vLLM on the CPU, 21 M parameters",
    peer="vLLM's defaults",
    target=at_most(0.4),
    gate="same first token",
    limit="import and one read",
    memory_gb=4.0,
    disk_gb=0.5,
    quick=False,
    gate_warms=True,
)
def cold_start(at: Surroundings) -> Iterator[Pair]:
    if find_spec("vllm") is None:
        raise CannotMeasure("vLLM is not installed: install heterorl[sampler-cpu]")
    save_qwen3(at.folder, qwen3(hidden=512, layers=4, vocabulary=16_384))

    def gate() -> None:
        ours, theirs = (first_token(which, at.folder)[0] for which in ("ours", "theirs"))
        assert ours == theirs, f"ours is {ours}, the peer's {theirs}"

    yield Pair(lambda: first_token("ours", at.folder)[1], lambda: first_token("theirs", at.folder)[1], gate)
