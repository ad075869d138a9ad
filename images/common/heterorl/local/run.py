"""`heterorl run`: a whole run on this machine, from the manifest to the report.

claim the folder ── prepare ── learner + samplers + evaluations ── samplers stop ── last evaluation ── report
                                    │         ▲
                                    └─────────┘ restarted within the failure policy's budgets
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from heterorl.blame import explained
from heterorl.exchange.exchange import Exchange
from heterorl.exit_codes import USER_ERROR
from heterorl.local.live_view import open_view
from heterorl.local.outages import Outages
from heterorl.local.preflight import claim
from heterorl.local.processes import ManagedProcess
from heterorl.local.supervisor import TAKEN_OVER, Interrupts, Programs, Runner, Verdict, count_interrupts, process_env
from heterorl.logs import shown
from heterorl.report import summary
from heterorl.spec.run import HeteroRLRun

_TELLING_S = 120.0
_T = TypeVar("_T")


def run_local(manifest: Path, run: HeteroRLRun, runs_dir: Path, resume: bool, programs: Programs | None = None) -> int:
    """Run a manifest on this machine and return the exit code: 0 done, 1 failed, 2 the user's error, 130 interrupted.

    Raises UserError (RunFolderError, DataError) before anything is written when the run cannot start.
    """
    with (
        explained(runs_dir / run.metadata.name),
        claim(manifest, run, runs_dir, resume=resume) as (exchange, lock),
        count_interrupts() as interrupts,
    ):
        runner = Outages(exchange.root, print).until_over(
            lambda: Runner(exchange, programs or Programs(), interrupts, lock), wait=interrupts.patience()
        )
        verdict = runner.prepare()
        if verdict is None:
            with open_view(exchange) as view:
                try:
                    verdict = runner.supervise(view)
                finally:
                    runner.kill_all()
        _conclude(exchange, verdict, runner.programs, interrupts)
        return verdict.exit_code


def _conclude(exchange: Exchange, verdict: Verdict, programs: Programs, interrupts: Interrupts) -> None:
    """Write summary and report, say where things are and what to do next."""
    outages = Outages(exchange.root, print)

    def reached(operation: Callable[[], _T]) -> _T:
        return outages.until_over(operation, wait=interrupts.patience(interrupts.count))

    if verdict.status == TAKEN_OVER:
        print(f"{verdict.status}: {verdict.reason}")
        return
    if reached(lambda: exchange.prepared) is None:
        if verdict.exit_code != USER_ERROR:  # then its message is the last line already
            print(f"{verdict.status}: {verdict.reason}")
        return
    result = reached(lambda: summary.write_summary(exchange.root))
    telling = reached(lambda: _tell_dashboards(exchange, programs))
    report = _draw_report(exchange) if result["reward_last_tenth"] is not None else None
    if telling is not None:
        _wait_for(telling)
    print(summary.in_words(result))
    for label, path in (("model", exchange.output_dir), ("summary", exchange.summary_file), ("report", report)):
        if path is not None and reached(path.exists):
            print(f"  {label:<8} {shown(path)}")
    print(f"  {'logs':<8} {shown(exchange.logs_dir)}")
    if verdict.status != "succeeded":
        print(f"{verdict.status}: {verdict.reason}")
        print(f"resume with: {_resume_command(exchange)}")


def _tell_dashboards(exchange: Exchange, programs: Programs) -> ManagedProcess | None:
    """Start what tells them of the last evaluations and of the end, which came after the learner had left."""
    monitoring, evaluation = exchange.spec.monitoring, exchange.spec.evaluation
    services = monitoring.wandb.project or monitoring.trackio.project
    if not services and not (monitoring.tensorboard and evaluation.every_steps):
        return None
    command = [*programs.conclude, "--root", str(exchange.root)]
    return ManagedProcess(command, process_env(1, []), exchange.logs_dir / "conclude.log")


def _wait_for(telling: ManagedProcess) -> None:
    """A service that does not answer is given up: what it was not told stays in the run's folder."""
    give_up = time.monotonic() + _TELLING_S
    while telling.poll() is None:
        if time.monotonic() >= give_up:
            telling.signal(signal.SIGKILL)
        time.sleep(0.1)


def _resume_command(exchange: Exchange) -> str:
    """The resolved manifest is named, because the user's own was perhaps changed by --set."""
    return shlex.join(["heterorl", "run", shown(exchange.run_file), "--resume"])


def _draw_report(exchange: Exchange) -> Path | None:
    try:
        from heterorl.report.page import write_report

        return write_report([exchange.root])
    except Exception as error:  # a report that fails must not fail a run that trained for days
        reason = f"{type(error).__name__}: {error}"
    print(f"no report drawn: {reason}; when that is mended: `heterorl report {shown(exchange.root)}`")
    return None
