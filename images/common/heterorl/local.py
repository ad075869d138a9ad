"""`heterorl run`: a whole run on this machine, from the manifest to the report.

claim the folder ── prepare ── learner + samplers + evaluations ── samplers stop ── last evaluation ── report
                                    │         ▲
                                    └─────────┘ restarted within the failure policy's budgets
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from heterorl import summary
from heterorl.exchange import Exchange
from heterorl.runfolder import claim, no_space_is_a_user_error
from heterorl.runner import Programs, Runner, Verdict, count_interrupts
from heterorl.spec import HeteroRLRun
from heterorl.view import open_view


def run_local(manifest: Path, run: HeteroRLRun, runs_dir: Path, resume: bool, programs: Programs | None = None) -> int:
    """Run a manifest on this machine and return the exit code: 0 done, 1 failed, 2 the user's error, 130 interrupted.

    Raises UserError (RunFolderError, DataError) before anything is written when the run cannot start.
    """
    with (
        no_space_is_a_user_error(runs_dir / run.metadata.name),
        claim(manifest, run, runs_dir, resume=resume) as (exchange, lock),
        count_interrupts() as interrupts,
    ):
        runner = Runner(exchange, programs or Programs(), interrupts, lock)
        verdict = runner.prepare()
        if verdict is None:
            with open_view(exchange) as view:
                try:
                    verdict = runner.supervise(view)
                finally:
                    runner.kill_all()
        _conclude(exchange, verdict, manifest, resumable=exchange.prepared is not None)
        return verdict.exit_code


def _conclude(exchange: Exchange, verdict: Verdict, manifest: Path, *, resumable: bool) -> None:
    """Write summary and report, say where things are and what to do next."""
    if not resumable:
        if verdict.status == "stopped":
            print("stopped before the preparation was complete; nothing is left behind")
        return
    result = summary.write_summary(exchange.root)
    report = _draw_report(exchange) if result["steps"] else None
    print(summary.in_words(result))
    for label, path in (("model", exchange.output_dir), ("summary", exchange.summary_file), ("report", report)):
        if path is not None and path.exists():
            print(f"  {label:<8} {_short(path)}")
    print(f"  {'logs':<8} {_short(exchange.logs_dir)}")
    if verdict.status != "succeeded":
        print(f"{verdict.status}: {verdict.reason}")
        print(f"go on with: heterorl run {manifest} --resume")


def _draw_report(exchange: Exchange) -> Path | None:
    try:
        from heterorl.report import write_report
    except ModuleNotFoundError as error:
        print(f"no report drawn: {error.name} is not installed; pip install 'heterorl[plot]' and `heterorl report`")
        return None
    return write_report([exchange.root], exchange.root)


def _short(path: Path) -> str:
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
