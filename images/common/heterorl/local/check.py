"""`heterorl check`: all that a run reads and refuses before its first step, in seconds, and nothing left behind.

    this machine ── model, tokenizer, data, prompts, memory of a step ── scores of a right and of a wrong answer
    preflight       heterorl_learner                                     heterorl_sampler

The two packages do not know each other, so each checks its part in a process of its own, in the run's order, on a
folder that is deleted at the end.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

from heterorl.exchange.exchange import Exchange
from heterorl.exit_codes import INTERRUPTED
from heterorl.local.preflight import estimated_bytes, free_space, gpu_devices, in_bytes, look
from heterorl.local.processes import ManagedProcess
from heterorl.local.supervisor import Interrupts, cores, count_interrupts, process_env
from heterorl.spec.run import HeteroRLRun

PROGRAMS = ("heterorl_learner", "heterorl_sampler")
_TICK_S = 0.1


def check_run(manifest: Path, run: HeteroRLRun, runs_dir: Path) -> int:
    """Check a manifest as `heterorl run` would meet it; the exit code of the first part that fails, 0 if none does.

    Raises UserError (RunFolderError, DataError) for what is refused on this machine.
    """
    run, root = look(manifest, run, runs_dir)
    devices = gpu_devices()
    print(f"machine   {cores()} CPU cores, {len(devices)} GPUs, {in_bytes(free_space(root)[1])} free on the disk")
    print(f"folder    {root}, about {in_bytes(estimated_bytes(run.spec))}", flush=True)
    with tempfile.TemporaryDirectory(prefix="heterorl-check-") as scratch, count_interrupts() as interrupts:
        exchange = Exchange(Path(scratch))
        exchange.create(run)
        for program in PROGRAMS:
            log_file = exchange.logs_dir / f"{program}.log"
            command = [sys.executable, "-m", program, "check", "--root", scratch]
            code = _finish(ManagedProcess(command, process_env(cores(), devices), log_file, echo=True), interrupts)
            if code:
                return code
    print(f"ok: `heterorl run {manifest}` can start")
    return 0


def _finish(process: ManagedProcess, interrupts: Interrupts) -> int:
    """The process's exit code, once it and all it started are gone; an interrupt ends it."""
    while (code := process.poll()) is None:
        interrupts.wait(_TICK_S)
        if interrupts.count:
            process.signal(signal.SIGKILL)
    return INTERRUPTED if interrupts.count else code
