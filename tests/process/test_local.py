"""The local runner, with small real programs in the places of prepare, learner, samplers and evaluation."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from builders import run_of
from heterorl.errors import DataError, RunFolderError, UserError
from heterorl.exchange.evaluations import due_versions
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.version import Version
from heterorl.local.preflight import assign_gpus, check_gpus, check_space, differences, gpu_devices, with_absolute_paths
from heterorl.local.processes import ManagedProcess
from heterorl.local.run import run_local
from heterorl.local.supervisor import Programs, Runner, process_env
from heterorl.spec.load import load_run
from heterorl.spec.run import HeteroRLRun, RunSpec

PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
root = Path(options["--root"])

def put(name, value):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(".tmp-" + path.name)
    staged.write_text(json.dumps(value))
    staged.rename(path)

def attempts(name):
    path = root / (name + ".attempts")
    with open(path, "a") as file:
        file.write("x")
    return len(path.read_text())

def until(condition):
    while not condition():
        time.sleep(0.02)
"""
PREPARED = "print('preparing', flush=True); put('prepared.json', {'run': 'demo'})"
TRAINED = "put('learner.json', {'step': 4, 'finished': True})"
WAITS = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); until(lambda: False)"


@pytest.fixture
def programs(tmp_path: Path) -> Any:
    def make(
        prepare: str = PREPARED, learner: str = TRAINED, sampler: str = WAITS, evaluate: str = "sys.exit(0)"
    ) -> Programs:
        bodies = {"prepare": prepare, "learner": learner, "sampler": sampler, "evaluate": evaluate}
        commands = {}
        for name, body in bodies.items():
            script = tmp_path / f"{name}.py"
            script.write_text(PREAMBLE + body)
            commands[name] = (sys.executable, "-S", str(script))  # -S: quicker to start
        return Programs(**commands)

    return make


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heterorl.local.processes.BACKOFF_S", (0.05,))
    monkeypatch.setattr("heterorl.local.processes.SITE_BACKOFF_S", (0.05,))
    monkeypatch.setattr("heterorl.local.supervisor.TICK_S", 0.02)
    monkeypatch.setattr("heterorl.local.supervisor.GRACE_S", 1.0)
    monkeypatch.setattr("heterorl.local.outages._PAUSE_S", 0.1)


def manifest(**spec: Any) -> HeteroRLRun:
    defaults = {"learner": {"steps": 4}, "samplers": [{"name": "near", "engine": "transformers"}]}
    return run_of("demo", **defaults | spec)


def start(tmp_path: Path, programs: Programs, run: HeteroRLRun | None = None, *, resume: bool = False) -> int:
    return run_local(tmp_path / "run.yaml", run or manifest(), tmp_path / "runs", resume, programs)


def summary(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "runs/demo/summary.json").read_text())


FOLLOWED = """
claim = {"protocol": 1, "id": "x", "host": "elsewhere", "pid": 7, "time": 0}
put("incarnations/i0001.json", {**claim, "launcher": os.environ["HETERORL_LAUNCHER"]})
put("incarnations/i0002.json", {**claim, "launcher": "another"})
put("runner.json", {"protocol": 1, "status": "the other's"})
"""
"""Another run's learner takes the folder over."""


# ── a run's course ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_is_prepared_trained_and_summed_up(tmp_path, programs, capsys):
    assert start(tmp_path, programs()) == 0
    assert summary(tmp_path)["status"] == "succeeded"
    assert summary(tmp_path)["steps"] == 4
    printed = capsys.readouterr().out
    assert "preparing model and data, see " in printed.splitlines()[0]  # before the process says anything
    assert "summary.json" in printed


def test_samplers_are_told_to_stop_when_the_learner_has_finished(tmp_path, programs):
    sampler = """
signal.signal(signal.SIGTERM, lambda *_: (put("flushed.json", {}), sys.exit(0)))
put("sampling.json", {})
until(lambda: False)
"""
    learner = "until((root / 'sampling.json').exists); " + TRAINED
    assert start(tmp_path, programs(learner=learner, sampler=sampler)) == 0
    assert (tmp_path / "runs/demo/flushed.json").exists()


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(tmp_path, programs):
    sampler = "signal.signal(signal.SIGTERM, signal.SIG_IGN); put('up.json', os.getpid()); until(lambda: False)"
    learner = "until((root / 'up.json').exists); " + TRAINED
    assert start(tmp_path, programs(learner=learner, sampler=sampler)) == 0
    assert not psutil.pid_exists(json.loads((tmp_path / "runs/demo/up.json").read_text()))


def test_a_crashed_learner_is_restarted_and_the_restarts_are_counted(tmp_path, programs):
    learner = "attempts('learner') < 3 and os.kill(os.getpid(), signal.SIGKILL); " + TRAINED
    assert start(tmp_path, programs(learner=learner)) == 0
    assert summary(tmp_path)["restarts"] == {"learner": 2}


def test_a_learner_that_crashes_beyond_its_budget_fails_the_run_and_shows_its_last_words(tmp_path, programs, capsys):
    learner = "attempts('learner'); print('no more ideas'); sys.exit(1)"
    run = manifest(failurePolicy={"learnerRestarts": 2})
    assert start(tmp_path, programs(learner=learner), run) == 1
    assert (tmp_path / "runs/demo/learner.attempts").read_text() == "xxx"  # the first start and 2 restarts
    assert "no more ideas" in capsys.readouterr().out
    assert summary(tmp_path)["status"] == "failed"


def test_a_learner_that_was_asked_to_leave_is_started_again_free_of_charge(tmp_path, programs):
    learner = "attempts('learner') < 3 and sys.exit(0); " + TRAINED
    assert start(tmp_path, programs(learner=learner), manifest(failurePolicy={"learnerRestarts": 0})) == 0
    assert summary(tmp_path)["restarts"] == {}


def test_a_run_whose_folder_another_one_has_taken_over_ends_and_writes_nothing_more(tmp_path, programs, capsys):
    learner = "attempts('learner'); " + FOLLOWED.strip().replace("\n", "; ") + "; sys.exit(143)"
    assert start(tmp_path, programs(learner=learner)) == 1
    assert "incarnation 2, process 7 of host elsewhere) has taken over" in capsys.readouterr().out
    assert (tmp_path / "runs/demo/learner.attempts").read_text() == "x"  # it is not started again
    assert json.loads((tmp_path / "runs/demo/runner.json").read_text())["status"] == "the other's"
    assert not (tmp_path / "runs/demo/summary.json").exists()


def test_a_users_error_in_the_learner_ends_the_run_without_a_restart(tmp_path, programs, capsys):
    learner = "attempts('learner'); print('error: no such optimizer'); sys.exit(2)"
    assert start(tmp_path, programs(learner=learner)) == 2
    assert (tmp_path / "runs/demo/learner.attempts").read_text() == "x"
    assert "no such optimizer" in capsys.readouterr().out


def test_a_users_error_in_every_sampler_ends_the_run_without_a_restart(tmp_path, programs, capsys):
    sampler = "attempts('sampler'); print('error: engine wants a key'); sys.exit(2)"
    assert start(tmp_path, programs(learner=WAITS, sampler=sampler)) == 2
    assert (tmp_path / "runs/demo/sampler.attempts").read_text() == "x"
    assert "engine wants a key" in capsys.readouterr().out


def test_one_lost_sampler_is_given_up_and_the_run_goes_on(tmp_path, programs, capsys):
    sampler = "options['--index'] == '0' and sys.exit(attempts('sampler') and 1); " + WAITS
    learner = (
        "until(lambda: (root / 'sampler.attempts').exists() and len((root / 'sampler.attempts').read_text()) == 2)"
    )
    pools = [{"name": "near", "engine": "transformers", "replicas": 2}]
    run = manifest(samplers=pools, failurePolicy={"samplerRestarts": 1})
    assert start(tmp_path, programs(learner=f"{learner}; time.sleep(0.3); {TRAINED}", sampler=sampler), run) == 0
    assert "near-0 crashed 2 times, failurePolicy.samplerRestarts is 1" in capsys.readouterr().out


@pytest.mark.parametrize("code", [2, 3])
def test_one_sampler_that_cannot_work_never_ends_a_run_while_another_goes_on(tmp_path, programs, capsys, code):
    sampler = f"options['--index'] == '0' and sys.exit(attempts('sampler') and {code}); " + WAITS
    tries = {2: "x", 3: "xxx"}[code]  # a user's error is not tried again, a node's failure on a budget of its own
    file = "root / 'sampler.attempts'"
    enough = f"({file}).exists() and len(({file}).read_text()) >= {len(tries)}"
    learner = f"until(lambda: {enough}); time.sleep(0.5); " + TRAINED
    run = manifest(
        samplers=[{"name": "near", "engine": "transformers", "replicas": 2}], failurePolicy={"siteRestarts": 2}
    )
    assert start(tmp_path, programs(learner=learner, sampler=sampler), run) == 0
    assert (tmp_path / "runs/demo/sampler.attempts").read_text() == tries


def test_good_steps_give_a_learner_its_restarts_back(tmp_path, programs):
    # Crashes at steps 1, 2, 3, 4 and 5 with a budget of one: each step that is trained gives one restart back.
    learner = "n = attempts('learner'); put('learner.json', {'step': n}); n < 6 and sys.exit(1); " + TRAINED
    run = manifest(learner={"steps": 4}, failurePolicy={"learnerRestarts": 1, "refillSteps": 1})
    assert start(tmp_path, programs(learner=learner), run) == 0
    assert summary(tmp_path)["restarts"] == {"learner": 5}


def test_a_run_whose_budget_is_used_up_is_taken_up_again_in_place(tmp_path, programs):
    run = manifest(failurePolicy={"learnerRestarts": 0})
    assert start(tmp_path, programs(learner="put('kept.json', {}); sys.exit(1)"), run) == 1
    assert start(tmp_path, programs(prepare="sys.exit(9)"), run, resume=True) == 0
    assert (tmp_path / "runs/demo/kept.json").exists()


def test_the_run_fails_when_every_sampler_is_lost(tmp_path, programs):
    run = manifest(failurePolicy={"samplerRestarts": 1})
    assert start(tmp_path, programs(learner=WAITS, sampler="sys.exit(1)"), run) == 1
    assert summary(tmp_path)["reason"].startswith("every sampler was given up; near-0 crashed 2 times")


def test_the_deadline_ends_the_run(tmp_path, programs):
    assert start(tmp_path, programs(learner=WAITS), manifest(activeDeadlineSeconds=1)) == 1
    assert "activeDeadlineSeconds" in summary(tmp_path)["reason"]


def test_samplers_come_and_go_with_their_availability(tmp_path, programs):
    sampler = """
attempts("sampler")
signal.signal(signal.SIGTERM, lambda *_: (put("went.json", {}), sys.exit(0)))
until(lambda: False)
"""
    learner = "until(lambda: len((root / 'sampler.attempts').read_text()) == 2 if (root / 'went.json').exists() else 0)"
    windows = [
        {"startSeconds": 0, "endSeconds": 0.5, "replicas": 1},
        {"startSeconds": 0.8, "endSeconds": 99, "replicas": 1},
    ]
    pool = {"name": "near", "engine": "transformers", "availability": {"type": "windows", "windows": windows}}
    assert start(tmp_path, programs(learner=f"{learner}; {TRAINED}", sampler=sampler), manifest(samplers=[pool])) == 0
    assert summary(tmp_path)["restarts"] == {}


def test_ranks_of_a_learner_find_each_other_and_die_together(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os, sys, time\nos.environ['RANK'] == '1' and sys.exit(3)\ntime.sleep(60)")
    process = ManagedProcess((sys.executable, str(script)), dict(os.environ), tmp_path / "learner.log", ranks=2)
    while (code := process.poll()) is None:
        time.sleep(0.02)
    assert code == 3
    assert not psutil.pid_exists(process.pid)


def test_ranks_of_which_one_was_told_to_go_are_not_charged_for_the_others_that_broke_with_it(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os, sys\nsys.exit(143 if os.environ['RANK'] == '1' else 1)")
    process = ManagedProcess((sys.executable, str(script)), dict(os.environ), tmp_path / "learner.log", ranks=2)
    for rank in process._ranks:
        rank.wait()
    assert process.poll() == 143


def test_a_preparation_that_fails_by_its_node_is_started_again(tmp_path, programs, capsys):
    assert start(tmp_path, programs(prepare="attempts('prepare') < 3 and sys.exit(3); " + PREPARED)) == 0
    assert capsys.readouterr().out.count("the node of prepare is to blame; starting it again") == 2


@pytest.mark.parametrize(("code", "ends"), [(1, 1), (2, 2)])
def test_a_preparation_that_fails_by_itself_or_its_user_is_not_started_again(tmp_path, programs, code, ends):
    body = f"(root.parent / 'starts').open('a').write('x'); sys.exit({code})"
    assert start(tmp_path, programs(prepare=body)) == ends
    assert (tmp_path / "runs/starts").read_text() == "x"


# ── the folder out of reach ──────────────────────────────────────────────────────────────────────────────────────────
class Away:
    """Stands for a module in whose place every call on a path below `root` fails while the folder is away."""

    def __init__(self, module: Any, is_away: Callable[[Any], bool]) -> None:
        self._module, self._is_away = module, is_away

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        return self.guarded(real) if name in ("stat", "listdir", "open", "replace", "mkdir") else real

    def guarded(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if self._is_away(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, *rest, **options)

        return call


@pytest.fixture
def outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], bool]]:
    """For so many seconds after a file was first seen, this process cannot reach the folder; tells when that began."""
    root, ends = str(tmp_path / "runs/demo"), list[float]()

    def begin(seconds: float, after: str = "up.json", containing: str = "") -> Callable[[], bool]:
        def has_begun() -> bool:
            file = f"{root}/{after}"
            return os.path.exists(file) and (not containing or containing in Path(file).read_text())

        def is_away(path: Any) -> bool:
            if not ends and str(path).startswith(root) and has_begun():
                ends.append(time.monotonic() + seconds)
            return bool(ends) and time.monotonic() < ends[0] and str(path).startswith(root)

        away = Away(os, is_away)
        for module in ("exchange.storage", "local.preflight"):
            monkeypatch.setattr(f"heterorl.{module}.os", away)
        monkeypatch.setattr("pathlib.os", away)
        for module in ("heterorl.exchange.storage", "heterorl.local.processes"):
            monkeypatch.setattr(f"{module}.open", away.guarded(open), raising=False)
        return lambda: bool(ends)

    return begin


@pytest.mark.parametrize(
    ("after", "containing"),
    [("..", ""), ("run.lock", ""), ("run.json", ""), ("runner.json", '"succeeded"')],
    ids=["before it is claimed", "while it is claimed", "before the preparation", "when all is done"],
)
def test_a_run_whose_folder_is_out_of_reach_waits_for_it(tmp_path, programs, outage, capsys, after, containing):
    (tmp_path / "runs/demo").mkdir(parents=True)
    outage(1.0, after, containing)
    assert start(tmp_path, programs()) == 0
    printed = capsys.readouterr().out
    assert printed.count("runs/demo is out of reach (Input/output error); waiting for it") == 1
    assert printed.count("runs/demo is back after") == 1
    assert summary(tmp_path)["status"] == "succeeded"


@pytest.mark.parametrize("after", ["..", "run.lock", "run.json"])
def test_ctrl_c_ends_the_wait_for_a_folder_that_does_not_come_back(tmp_path, programs, outage, after):
    (tmp_path / "runs/demo").mkdir(parents=True)
    interrupt_when(outage(3600.0, after))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, programs())


def test_ctrl_c_ends_a_run_whose_folder_does_not_come_back(tmp_path, programs, outage, monkeypatch):
    has_begun, saving, save = outage(3600.0), threading.Event(), Runner._save
    monkeypatch.setattr(Runner, "_save", lambda runner: (has_begun() and saving.set(), save(runner)))
    interrupt_when(has_begun, times=2)  # the processes are told to stop, and then killed
    interrupt_when(saving.is_set)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, programs(learner="put('up.json', {}); " + WAITS))


def test_a_run_outlives_an_outage_of_its_folder_and_reacts_afterwards_to_what_ended_meanwhile(
    tmp_path, programs, outage, capsys
):
    # Meanwhile the learner crashes, and a sampler for good.
    learner = (
        """
if attempts('learner') < 2:
    until((root / 'near-0').exists), put('up.json', {}), time.sleep(1), sys.exit(1)
"""
        + TRAINED
    )
    sampler = (
        """
if options['--index'] == '0':
    put('near-0', 1), until((root / 'up.json').exists), time.sleep(1), sys.exit(2)
"""
        + WAITS
    )
    outage(9.0)
    run = manifest(samplers=[{"name": "near", "engine": "transformers", "replicas": 2}])
    assert start(tmp_path, programs(learner=learner, sampler=sampler), run) == 0
    printed = capsys.readouterr().out
    assert printed.count("runs/demo is out of reach (Input/output error); waiting for it") == 1
    assert "runs/demo is back after" in printed
    assert "learner: exit code 1" in printed
    assert "near-0 exited with a user error" in printed
    assert summary(tmp_path)["restarts"] == {"learner": 1}


def test_ctrl_c_is_heard_while_the_folder_is_out_of_reach(tmp_path, programs, outage, capsys):
    learner = """
signal.signal(signal.SIGTERM, lambda *_: (put("left.json", time.time()), sys.exit(0)))
put("up.json", time.time())
until(lambda: False)
"""
    interrupt_when(outage(6.0))
    assert start(tmp_path, programs(learner=learner)) == 130
    came, left = (json.loads((tmp_path / f"runs/demo/{name}.json").read_text()) for name in ("up", "left"))
    assert left - came < 5
    assert summary(tmp_path)["status"] == "stopped"


def test_a_folder_whose_marker_was_damaged_during_the_run_is_kept(tmp_path, programs):
    learner = "put('checkpoints/step-00000002/kept', 1); (root / 'prepared.json').write_bytes(bytes(40)); sys.exit(2)"
    assert start(tmp_path, programs(learner=learner)) == 2
    assert (tmp_path / "runs/demo/checkpoints/step-00000002/kept").exists()


# ── interrupts and resume ────────────────────────────────────────────────────────────────────────────────────────────
def interrupt_when(condition: Callable[[], bool], times: int = 1) -> None:
    def wait_and_signal() -> None:
        while not condition():
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    threading.Thread(target=wait_and_signal, daemon=True).start()


def test_ctrl_c_lets_every_process_save_and_says_how_to_resume(tmp_path, programs, capsys):
    learner = """
signal.signal(signal.SIGTERM, lambda *_: (put("learner.json", {"step": 2}), sys.exit(0)))
put("up.json", {})
until(lambda: False)
"""
    interrupt_when((tmp_path / "runs/demo/up.json").exists)
    assert start(tmp_path, programs(learner=learner)) == 130
    assert summary(tmp_path)["status"] == "stopped"
    assert summary(tmp_path)["steps"] == 2
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("resume with: heterorl run ")
    assert command == f"{tmp_path}/runs/demo/run.json --resume"
    written = load_run(tmp_path / "runs/demo/run.json")
    assert run_local(tmp_path / "runs/demo/run.json", written, tmp_path / "runs", True, programs()) == 0


def test_a_second_ctrl_c_kills_at_once(tmp_path, programs, monkeypatch):
    monkeypatch.setattr("heterorl.local.supervisor.GRACE_S", 600.0)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); put('up.json', {}); until(lambda: False)"
    interrupt_when((tmp_path / "runs/demo/up.json").exists, times=2)
    assert start(tmp_path, programs(learner=deaf)) == 130


def test_a_resumed_run_goes_on_with_its_clock_and_is_not_prepared_again(tmp_path, programs):
    interrupt_when((tmp_path / "runs/demo/up.json").exists)
    assert start(tmp_path, programs(learner="put('up.json', {}); " + WAITS)) == 130
    first = summary(tmp_path)["wall_s"]
    assert start(tmp_path, programs(prepare="sys.exit(9)", learner="time.sleep(0.3); " + TRAINED), resume=True) == 0
    assert summary(tmp_path)["wall_s"] >= first + 0.3


def test_resuming_a_finished_run_starts_nothing(tmp_path, programs):
    assert start(tmp_path, programs()) == 0
    assert start(tmp_path, programs(learner="sys.exit(9)", sampler="sys.exit(9)"), resume=True) == 0


def test_children_leave_with_a_killed_runner(tmp_path):
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from heterorl.local.processes import ManagedProcess\n"
        "p = ManagedProcess((sys.executable, '-c', 'import time; time.sleep(600)'), dict(os.environ), Path(sys.argv[1]))\n"
        "print(p.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, runner, tmp_path / "child.log"], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(timeout=10)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_failed_preparation_shows_its_message_and_leaves_nothing(tmp_path, programs, capsys):
    prepare = "put('model/half.bin', 1); print('error: row 3 has no answer', file=sys.stderr); sys.exit(2)"
    assert start(tmp_path, programs(prepare=prepare)) == 2
    assert "error: row 3 has no answer" in capsys.readouterr().out
    assert not (tmp_path / "runs/demo").exists()


def test_an_earlier_runs_folder_is_refused_with_the_ways_out(tmp_path, programs):
    assert start(tmp_path, programs()) == 0
    with pytest.raises(RunFolderError, match=r"--resume.*--set name=.*delete"):
        start(tmp_path, programs())


def test_resume_without_a_folder_is_refused(tmp_path, programs):
    with pytest.raises(RunFolderError, match="nothing to resume"):
        start(tmp_path, programs(), resume=True)
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_use_names_the_process_that_uses_it(tmp_path, programs):
    holder = _holder(tmp_path / "runs/demo")
    try:
        with pytest.raises(RunFolderError, match=f"in use by another run \\(pid {holder.pid}\\)"):
            start(tmp_path, programs(), resume=True)
    finally:
        holder.kill()
        holder.communicate()


def _holder(root: Path) -> subprocess.Popen[str]:
    """Another runner that has claimed the folder."""
    root.mkdir(parents=True)
    (root / "run.json").write_text(json.dumps(manifest().resolved()))
    code = (
        "import sys, time; from pathlib import Path; from heterorl.local.preflight import claim;"
        "from heterorl.exchange.exchange import Exchange; root = Path(sys.argv[1]);\n"
        "with claim(root / 'x.yaml', Exchange(root).run, root.parent, resume=True): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_resume_with_another_spec_lists_the_fields_that_differ(tmp_path, programs):
    assert start(tmp_path, programs()) == 0
    changed = manifest(seed=7, learner={"steps": 4, "batch": {"groups": 16}})
    with pytest.raises(RunFolderError, match=r"learner\.batch\.groups: 32 before, 16 now; seed: 0 before, 7 now"):
        start(tmp_path, programs(), changed, resume=True)


def test_a_resumed_run_may_train_longer_but_not_shorter():
    assert differences(manifest(), manifest(learner={"steps": 9})) == []
    assert differences(manifest(), manifest(learner={"steps": 3})) == [
        "learner.steps: 4 before, 3 now (it may only grow)"
    ]


def test_sampler_pools_may_come_go_and_change_their_delay_when_a_run_resumes():
    near, far = {"name": "near", "engine": "transformers"}, {"name": "far", "engine": "transformers"}
    late = {**near, "delay": {"distribution": "constant", "lower": 5}}
    assert differences(manifest(samplers=[near]), manifest(samplers=[far, late])) == []
    other = {**near, "engine": "vllm"}
    assert differences(manifest(samplers=[near]), manifest(samplers=[other])) == [
        "samplers.near.engine: transformers before, vllm now"
    ]


def test_paths_are_read_from_the_manifests_folder_and_kept_absolute(tmp_path, programs):
    (tmp_path / "rows.jsonl").write_text("")
    run = manifest(data={"train": {"source": "file", "path": "rows.jsonl"}})
    assert start(tmp_path, programs(), run) == 0
    assert Exchange(tmp_path / "runs/demo").spec.data.train.path == str(tmp_path / "rows.jsonl")


def test_a_missing_data_file_is_refused_before_anything_is_written(tmp_path, programs):
    run = manifest(data={"train": {"source": "file", "path": "rows.jsonl"}})
    with pytest.raises(DataError, match=r"data\.train\.path: .*rows\.jsonl does not exist"):
        start(tmp_path, programs(), run)
    assert not (tmp_path / "runs").exists()


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_disk_too_small_is_refused_with_the_need_and_the_ways_out(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(RunFolderError, match=r"10 MB free; this run needs about 1\d\d MB .*--runs-dir"):
        check_space(tmp_path / "runs/demo", manifest().spec)


def test_a_disk_that_fills_up_is_one_line_and_leaves_no_new_folder(tmp_path, programs, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heterorl.exchange.storage.Files.replace", full)
    with pytest.raises(RunFolderError, match="no space left on the disk"):
        start(tmp_path, programs())
    assert not (tmp_path / "runs/demo").exists()


def test_vllm_that_is_not_installed_is_refused_with_the_extra_to_install(tmp_path, programs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"samplers\.far\.engine: vllm .* pip install 'heterorl\[sampler\]'"):
        start(tmp_path, programs(), manifest(samplers=[{"name": "far", "engine": "vllm"}]))


def spec_with_gpus(share: bool = False) -> RunSpec:
    pools = [{"name": "near", "engine": "transformers", "replicas": 2, "gpus": 1}]
    return manifest(
        learner={"steps": 4, "gpus": 2, "processesPerReplica": 2}, samplers=pools, local={"shareGpus": share}
    ).spec


def test_gpus_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"4 GPUs are asked for \(learner 2, near-0 1, near-1 1\) and 0 found"):
        check_gpus(spec_with_gpus(), [])
    with pytest.raises(UserError, match="shareGpus: true"):
        check_gpus(spec_with_gpus(), ["0", "1"])
    check_gpus(spec_with_gpus(share=True), ["0", "1"])


def test_every_process_gets_its_own_gpus_or_shares_them_round_robin():
    own = assign_gpus(spec_with_gpus(), ["0", "1", "2", "3"])
    assert own == {"learner": ["0", "1"], "near-0": ["2"], "near-1": ["3"], "evaluate": []}
    shared = assign_gpus(spec_with_gpus(share=True), ["0", "1"])
    assert shared == {"learner": ["0", "1"], "near-0": ["0"], "near-1": ["1"], "evaluate": []}


def test_gpus_are_counted_by_nvidia_smi_and_limited_to_the_visible_ones(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: a)'\necho 'GPU 1: H200 (UUID: b)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_devices() == ["1"]


def test_a_child_sees_its_threads_and_devices_and_no_others():
    env = process_env(3, ["5", "7"])
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert process_env(1, [])["CUDA_VISIBLE_DEVICES"] == ""


# ── evaluations ──────────────────────────────────────────────────────────────────────────────────────────────────────
def versions(*steps: int) -> list[Version]:
    return [Version(step, 1) for step in steps]


def test_step_0_each_interval_and_the_end_are_evaluated():
    assert due_versions(versions(0, 1, 2, 3, 4, 5), [], 2) == versions(0, 2, 4)
    assert due_versions(versions(0, 1, 2, 3, 4, 5), versions(0, 2, 4), 2) == []
    assert due_versions(versions(0, 1, 2, 3, 4, 5), versions(0, 2, 4), 2, finished=True) == versions(5)
    assert due_versions(versions(0, 1), [], 0, finished=True) == []


def test_a_version_due_but_not_published_is_replaced_by_the_next():
    # published every 3 steps, evaluated every 4: 4 stands for 6, 8 for 9
    assert due_versions(versions(0, 3, 6, 9), [], 4) == versions(0, 6, 9)


def test_a_version_published_again_is_not_evaluated_again():
    assert due_versions([Version(4, 1), Version(4, 2)], versions(4), 2, finished=True) == []


def test_evaluations_run_one_at_a_time_and_the_last_version_is_evaluated_after_the_end(tmp_path, programs):
    learner = (
        """
for step in (0, 2, 4):
    put(f"weights/v{step:08d}-i0001/manifest.json", {})
"""
        + TRAINED
    )
    evaluate = """
lock = os.open(root / "evaluating", os.O_CREAT | os.O_EXCL)
time.sleep(0.1)
put(f"evals/{options['--version']}.json", {"average": 0.5, "sets": {}})
os.unlink(root / "evaluating")
"""
    run = manifest(evaluation={"everySteps": 3, "engine": "transformers"}, data={"evals": [{"label": "sums"}]})
    assert start(tmp_path, programs(learner=learner, evaluate=evaluate), run) == 0
    exchange = Exchange(tmp_path / "runs/demo")
    assert list(exchange.read_evals()) == versions(0, 4)
    assert exchange.files.list(exchange.root / "pins") == []


def test_an_evaluation_that_fails_is_left_out_and_the_run_succeeds(tmp_path, programs, capsys):
    learner = 'put("weights/v00000004-i0001/manifest.json", {}); ' + TRAINED
    run = manifest(evaluation={"everySteps": 3, "engine": "transformers"}, data={"evals": [{"label": "sums"}]})
    assert start(tmp_path, programs(learner=learner, evaluate="sys.exit(1)"), run) == 0
    assert "gave no result and is left out" in capsys.readouterr().out


def test_a_recorded_delay_is_written_into_the_spec_so_that_it_stands_on_its_own(tmp_path):
    (tmp_path / "lag.csv").write_text("step,lag\n0,3\n1,\n2,5\n")
    delay = {
        "distribution": "trace",
        "unit": "steps",
        "model": "transit",
        "trace": {"path": "lag.csv", "column": "lag"},
    }
    run = run_of(samplers=[{"name": "far", "engine": "transformers", "delay": delay}])
    (pool,) = with_absolute_paths(run, tmp_path, must_exist=True).spec.samplers
    assert (pool.delay.trace.values, pool.delay.trace.path) == ([3.0, 5.0], None)
