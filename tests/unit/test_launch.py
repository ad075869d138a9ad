import sys
import threading
import time

import psutil
import pytest

from heterorl.exchange import Exchange
from heterorl.spec import HeteroRLRun
from heterorl_learner import launch
from heterorl_learner.launch import rendezvous_of, serve, threads_of

TRAINED = """
import os, sys
with open(f"{sys.argv[1]}/new", "w") as file:
    file.write('{"step": 5, "finished": true}')
os.rename(f"{sys.argv[1]}/new", f"{sys.argv[1]}/learner.json")
"""


@pytest.fixture
def exchange(tmp_path):
    def with_learner(**learner):
        spec = {"learner": {"steps": 5, **learner}, "samplers": [{"name": "near"}]}
        manifest = {"apiVersion": "heterorl.dev/v1alpha1", "kind": "HeteroRLRun", "metadata": {"name": "demo"}}
        exchange = Exchange(tmp_path)
        exchange.create(HeteroRLRun.model_validate({**manifest, "spec": spec}))
        return exchange

    return with_learner


def python(code, exchange):
    return [sys.executable, "-c", code, str(exchange.root)]


def served(exchange, command, stop):
    """The pod's life on a thread, and where its exit code will be."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(serve(exchange, command, stop)), daemon=True)
    thread.start()
    return thread, codes


def test_a_trained_learner_idles_until_its_pod_is_stopped(exchange):
    pod, stop = exchange(), threading.Event()
    thread, codes = served(pod, python(TRAINED, pod), stop)
    while not pod.learner:
        time.sleep(0.02)
    thread.join(timeout=1)
    assert thread.is_alive()
    stop.set()
    thread.join()
    assert codes == [0]


def test_a_pod_that_comes_after_the_last_step_starts_nothing(exchange):
    pod, stop = exchange(), threading.Event()
    pod.write_learner({"step": 5, "finished": True})
    stop.set()
    assert serve(pod, python("raise SystemExit(9)", pod), stop) == 0


def test_a_finished_learner_goes_on_when_steps_were_added(exchange):
    pod = exchange(steps=8)
    pod.write_learner({"step": 5, "finished": True})
    assert serve(pod, python("raise SystemExit(9)", pod), threading.Event()) == 9


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137), ("raise SystemExit(0)", 0)],
)
def test_a_learner_that_ends_early_gives_its_exit_code_to_the_pod(exchange, code, expected):
    pod = exchange()
    assert serve(pod, python(code, pod), threading.Event()) == expected


def test_sigterm_reaches_every_rank_and_is_waited_for(exchange, tmp_path):
    pod, stop = exchange(processesPerReplica=2), threading.Event()
    rank = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
def save(*_):
    time.sleep(0.3)
    (place.with_suffix(".saved")).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
place.touch()
time.sleep(60)
"""
    thread, codes = served(pod, python(rank, pod), stop)
    while not all((tmp_path / name).exists() for name in "01"):
        time.sleep(0.02)
    stop.set()
    thread.join()
    assert codes == [0]
    assert all((tmp_path / f"{name}.saved").exists() for name in "01")


def test_the_ranks_of_the_second_pod_are_counted_after_those_of_the_first(exchange, tmp_path, monkeypatch):
    for name, value in {"MASTER_ADDR": "run-learner-0.run-learner", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    pod = exchange(replicas=3, processesPerReplica=2)
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    code = (
        "import os, sys, pathlib\n"
        f"values = [os.environ[name] for name in {names}]\n"
        "(pathlib.Path(sys.argv[1]) / f'rank-{os.environ[\"RANK\"]}').write_text(' '.join(values))"
    )
    assert serve(pod, python(code, pod), threading.Event()) == 0
    # Node 1 of 3 with 2 ranks each: global ranks 2 and 3 of 6.
    assert (tmp_path / "rank-2").read_text() == "run-learner-0.run-learner 29500 2 0 6 2"
    assert (tmp_path / "rank-3").read_text() == "run-learner-0.run-learner 29500 3 1 6 2"


def test_a_single_pod_meets_nobody_and_shares_its_cores_among_its_ranks(exchange):
    learner = exchange(processesPerReplica=4).spec.learner
    assert rendezvous_of(learner, {}) is None
    assert threads_of(learner, {"OMP_NUM_THREADS": "10"}) == 2
    assert threads_of(learner, {"OMP_NUM_THREADS": "2"}) == 1
    assert threads_of(exchange(threads=3).spec.learner, {"OMP_NUM_THREADS": "10"}) == 3


def test_ranks_do_not_outlive_a_rank_that_failed(exchange, tmp_path):
    pod = exchange(processesPerReplica=2)
    code = (
        "import os, sys, pathlib, time\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "(pathlib.Path(sys.argv[1]) / 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    assert serve(pod, python(code, pod), threading.Event()) == 3
    pid = tmp_path / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


def test_a_pod_without_its_spec_says_what_is_missing_and_exits_2(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(launch, "setup_logging", lambda _: None)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    assert launch.main(["--root", str(tmp_path), "--spec", str(tmp_path / "absent.json")]) == 2
    assert "absent.json is missing" in caplog.text
