"""Breaks one line of the code at a time and runs only the tests that should notice: `make mutants`.

    PYTHONPATH=tests python -m mutants.run [--report FILE] [WORD ...]      only mutants whose file or sentence has a WORD

`mutants.yaml` lists them: a file, the text to find in it (exactly once), what to write instead, one sentence on what that
breaks, and the tests. Each mutant is a copy of the four packages in front of the real ones. First all tests named have to
pass on the code as it is; then every mutant has to make one of its tests fail. A text that is not found, or a test that
does not exist, ends it at once: a list that no longer fits the code proves nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MUTANTS = Path(__file__).with_name("mutants.yaml")
SOURCES = {
    "heterorl": "images/common",
    "heterorl_learner": "images/learner",
    "heterorl_sampler": "images/sampler",
    "heterorl_operator": "operator",
}
AT_ONCE = 2
LIMIT_S = 240
"""A mutant may make its tests wait for ever, which is noticed too."""
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other means that the tests could not be run."""


@dataclass(frozen=True)
class Mutant:
    """One broken line."""

    file: str
    """Below the folder of its package: `heterorl/exchange/storage.py`."""
    find: str
    replace: str
    breaks: str
    """What no longer holds, in one sentence."""
    tests: list[str]
    """Node ids of pytest below `tests/`."""

    @property
    def path(self) -> Path:
        """The file it breaks."""
        return ROOT / SOURCES[self.file.partition("/")[0]] / self.file

    def broken(self) -> str:
        """The file's text with the line broken; ValueError where the list no longer fits the code."""
        text = self.path.read_text()
        if (found := text.count(self.find)) != 1:
            raise ValueError(
                f"{self.file}: {self.find!r} stands there {found} times, expected once; correct {MUTANTS.name}"
            )
        return text.replace(self.find, self.replace)


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    mutant: Mutant
    noticed_by: str | None
    """The first test that failed; None where all passed."""
    seconds: float


def read_mutants(words: list[str]) -> list[Mutant]:
    """The list, or those that a word names. Raises ValueError for an entry that does not fit the code."""
    mutants = [Mutant(**entry) for entry in yaml.safe_load(MUTANTS.read_text())]
    for mutant in mutants:
        mutant.broken()
    return [m for m in mutants if not words or any(word in f"{m.file} {m.breaks}" for word in words)]


def run_tests(tests: list[str], packages: Path | None = None) -> tuple[int, str]:
    """Pytest's exit code and output, with copies of the packages in front of the real ones."""
    folders = [packages] if packages else [ROOT / folder for folder in SOURCES.values()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S if packages else None,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return FAILED, f"FAILED no end within {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def try_mutant(mutant: Mutant) -> Outcome:
    """Run the mutant's tests on a broken copy; RuntimeError where they cannot be run."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heterorl-mutant-") as folder:
        for package, source in SOURCES.items():
            shutil.copytree(ROOT / source / package, Path(folder) / package)
        (Path(folder) / mutant.file).write_text(mutant.broken())
        code, output = run_tests(mutant.tests, Path(folder))
    if code not in (PASSED, FAILED):
        raise RuntimeError(f"the tests of {mutant.file} ({mutant.breaks}) cannot be run:\n{output[-3000:]}")
    failed = re.search(r"^FAILED (.*?)(?: - |$)", output, re.MULTILINE)
    outcome = Outcome(mutant, failed[1] if failed else None, time.monotonic() - start)
    print(
        f"{'noticed ' if outcome.noticed_by else 'SURVIVED'} {outcome.seconds:5.1f} s  {mutant.file}: {mutant.breaks}",
        flush=True,
    )
    return outcome


def report(outcomes: list[Outcome], seconds: float) -> str:
    """Markdown."""
    noticed = sum(outcome.noticed_by is not None for outcome in outcomes)
    rows = []
    for each in outcomes:
        test = f"`{each.noticed_by.rpartition('::')[2]}`" if each.noticed_by else "**none**"
        rows.append(f"| `{each.mutant.file}` | {each.mutant.breaks} | {test} |")
    return "\n".join(
        [
            "# Mutants",
            "",
            f"`make mutants` breaks one line at a time and runs only the tests that should notice it. Noticed:"
            f" {noticed} of {len(outcomes)}, in {seconds / 60:.0f} minutes on two cores.",
            "The list is `tests/mutants/mutants.yaml`.",
            "",
            "| File | What is broken | First test that fails |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> int:
    """0 when every mutant was noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("words", nargs="*", help="only mutants whose file or sentence has one of these")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the outcome there, as Markdown")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        mutants = read_mutants(args.words)
        code, output = run_tests(sorted({test for mutant in mutants for test in mutant.tests}))
        if code != PASSED:
            raise RuntimeError(f"the tests do not pass on the code as it is:\n{output[-3000:]}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = list(pool.map(try_mutant, mutants))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    survived = [outcome for outcome in outcomes if outcome.noticed_by is None]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} noticed")
    if args.report:
        args.report.write_text(report(outcomes, time.monotonic() - start))
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
