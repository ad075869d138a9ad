import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest

from builders import exchange_at, run_of
from heterorl.exchange.canary import Canary
from heterorl.exchange.crash_budget import Attempts, attempts_of
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.records import Evaluation, LearnerHeartbeat
from heterorl.exchange.version import Version
from heterorl.monitoring.run_metrics import parse_progress
from heterorl_learner import launch
from heterorl_learner.launch import LearnerPod, rendezvous_of, threads_of

TRAINED = """
import os, sys
with open(f"{sys.argv[1]}/new", "w") as file:
    file.write('{"step": 5, "finished": true}')
os.rename(f"{sys.argv[1]}/new", f"{sys.argv[1]}/learner.json")
"""
# A rank that serves metrics as the learner does, until it is told to go.
SERVING = """
import pathlib, signal, sys, threading
from heterorl.monitoring.metrics import Metrics
from heterorl.spec.run import MonitoringSpec
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
with Metrics.open(pathlib.Path(sys.argv[1]) / "metrics", "learner", MonitoringSpec(prometheusPort=9400), run="demo") as m:
    m.write(3, {"reward": 0.5})
    stop.wait(60)
"""


@pytest.fixture
def exchange(tmp_path):
    def with_learner(uid=None, prepared=True, spec=None, **learner):
        spec = {"learner": {"steps": 5, **learner}, "samplers": [{"name": "near"}], **(spec or {})}
        exchange = exchange_at(tmp_path, run_of("demo", metadata={"uid": uid}, **spec))
        if prepared:
            exchange.mark_prepared()
        return exchange

    return with_learner


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(launch, "_POLL_S", 0.02)
    monkeypatch.setenv("POD_UID", "pod-a")


def python(code, exchange):
    return [sys.executable, "-c", code, str(exchange.root)]


def serve(exchange, code, stop=None):
    return LearnerPod(exchange, python(code, exchange), stop or threading.Event()).serve()


def served(exchange, code, stop):
    """The pod, its life on a thread, and where its exit code will be."""
    codes = []
    pod = LearnerPod(exchange, python(code, exchange), stop)
    thread = threading.Thread(target=lambda: codes.append(pod.serve()), daemon=True)
    thread.start()
    return pod, thread, codes


def wait_until(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def ends(exchange, node=0):
    return [(attempt.outcome, attempt.code) for attempt in attempts_of(exchange).get(node, [])]


# ── the pod's life ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_trained_learner_idles_until_its_pod_is_stopped(exchange):
    run, stop = exchange(), threading.Event()
    pod, thread, codes = served(run, TRAINED, stop)
    wait_until(lambda: run.learner)
    thread.join(timeout=0.5)
    assert thread.is_alive()
    assert pod.readiness()[0]
    stop.set()
    thread.join()
    assert codes == [0]
    assert ends(run) == [("clean", 0)]


@pytest.mark.parametrize("call", ["begin_attempt", "end_attempt"])
def test_how_the_ranks_ended_is_noted_once_the_volume_is_within_reach(exchange, monkeypatch, call):
    run, errors, real = exchange(), [OSError(errno.EIO, "Input/output error")] * 2, getattr(Exchange, call)

    def away_twice(*arguments):
        if errors:
            raise errors.pop()
        return real(*arguments)

    monkeypatch.setattr(Exchange, call, away_twice)
    monkeypatch.setattr("heterorl.local.outages._PAUSE_S", 0.0)
    assert serve(run, "raise SystemExit(3)") == 3
    assert ends(run) == [("crashed", 3)]


def test_a_pod_that_is_told_to_go_does_not_wait_for_the_volume(exchange, monkeypatch):
    def away(*_):
        stop.set()
        raise OSError(errno.EIO, "Input/output error")

    stop = threading.Event()
    monkeypatch.setattr(Exchange, "begin_attempt", away)
    with pytest.raises(SystemExit) as left:
        serve(exchange(), "raise SystemExit(9)", stop)
    assert left.value.code == 143


def test_a_pod_that_comes_after_the_last_step_starts_nothing(exchange):
    run, stop = exchange(), threading.Event()
    run.write_learner(LearnerHeartbeat(step=5, finished=True))
    _, thread, codes = served(run, "raise SystemExit(9)", stop)
    thread.join(timeout=0.3)
    stop.set()
    thread.join()
    assert codes == [0]
    assert ends(run) == []


def test_a_finished_learner_goes_on_when_steps_were_added(exchange):
    run = exchange(steps=8)
    run.write_learner(LearnerHeartbeat(step=5, finished=True))
    assert serve(run, "raise SystemExit(9)") == 9


def test_a_pod_waits_for_the_preparation_of_its_own_run(exchange, tmp_path):
    run, stop = exchange(prepared=False), threading.Event()
    pod, thread, codes = served(run, "raise SystemExit(9)", stop)
    thread.join(timeout=0.3)
    assert thread.is_alive()
    assert not pod.readiness()[0]
    run.mark_prepared()
    thread.join()
    assert codes == [9]


SAVING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(sys.argv[1], "saved").touch())
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(60)
"""


def test_ranks_of_a_run_whose_volume_was_taken_over_are_killed_and_the_pod_tells_why(exchange, tmp_path):
    volume = exchange(uid="old").root
    specs = {}
    for uid in ("old", "new"):
        specs[uid] = tmp_path / f"{uid}.json"
        manifest = exchange(uid=uid, spec={"resume": True}, prepared=False).run.resolved()
        specs[uid].write_text(json.dumps({**manifest, "metadata": {"name": f"{uid}-run", "uid": uid}}))
    old, new = (Exchange(volume, spec_file=spec) for spec in specs.values())
    old.create(old.run)
    old.mark_prepared()
    stop = threading.Event()
    pod, thread, codes = served(old, SAVING, stop)
    wait_until((volume / "started").exists)
    new.occupy()
    Attempts(new, 0, "pod-b").begin()
    wait_until(lambda: pod._ranks is None)
    told = parse_progress(pod.metrics().decode())
    assert told.gave_up == (
        "VolumeInUse",
        "run new-run has taken over the volume (resume: true)",
    )
    assert not (volume / "saved").exists()
    assert ends(new) == [(None, None)]
    assert ends(old) == [(None, None)]
    stop.set()
    thread.join()
    assert codes == [0]


def test_a_pod_whose_learner_was_followed_by_another_pods_idles_and_tells_by_whom(exchange):
    run = exchange()
    code = (
        "import os, sys\n"
        "from heterorl.exchange.exchange import Exchange\n"
        "for launcher in (os.environ['HETERORL_LAUNCHER'], 'pod-b'):\n"
        "    learner = Exchange(sys.argv[1])\n"
        "    learner.launcher = launcher\n"
        "    learner.begin_incarnation()\n"
        "sys.exit(143)"
    )
    stop = threading.Event()
    pod, thread, codes = served(run, code, stop)
    wait_until(lambda: "has taken over" in pod.readiness()[1])
    assert "incarnation 2" in pod.readiness()[1]
    time.sleep(0.2)
    stop.set()
    thread.join()
    assert (codes, ends(run)) == ([0], [("signalled", 143)])  # one start, which is not charged


def test_a_run_that_comes_to_a_volume_in_use_has_not_given_up(exchange, tmp_path):
    volume = exchange(uid="old").root
    spec = tmp_path / "new.json"
    spec.write_text(json.dumps({**exchange(uid="old").run.resolved(), "metadata": {"name": "new", "uid": "new"}}))
    pod = LearnerPod(
        Exchange(volume, spec_file=spec), python("raise SystemExit(9)", exchange(uid="old")), threading.Event()
    )
    assert parse_progress(pod.metrics().decode()).gave_up is None
    assert "waiting until the preparation" in pod.readiness()[1]


@pytest.mark.parametrize(
    ("code", "expected", "outcome"),
    [
        ("import os; os.kill(os.getpid(), 9)", 137, ("crashed", -9)),
        ("raise SystemExit(0)", 0, ("clean", 0)),
        ("raise SystemExit(1)", 1, ("crashed", 1)),
    ],
)
def test_a_learner_that_ends_early_gives_its_exit_code_to_the_pod(exchange, code, expected, outcome):
    run = exchange()
    assert serve(run, code) == expected
    assert ends(run) == [outcome]


def test_an_error_for_the_user_leaves_the_pod_idle_and_tells_why(exchange):
    run, stop = exchange(), threading.Event()
    pod, thread, codes = served(run, "print('error: no such optimizer'); raise SystemExit(2)", stop)
    wait_until(lambda: ends(run) == [("crashed", 2)])
    thread.join(timeout=0.3)
    assert thread.is_alive()
    assert not pod.readiness()[0]
    progress = parse_progress(pod.metrics().decode())
    assert progress.gave_up == (
        "UserError",
        "the learner exited with a user error: exit code 2: error: no such optimizer",
    )
    stop.set()
    thread.join()
    assert codes == [0]
    assert ends(run) == [("crashed", 2)]


def test_a_new_pod_tries_again_after_an_error_for_the_user(exchange, monkeypatch):
    run, stop = exchange(), threading.Event()
    _, thread, _ = served(run, "raise SystemExit(2)", stop)
    wait_until(lambda: ends(run) == [("crashed", 2)])
    stop.set()
    thread.join()
    monkeypatch.setenv("POD_UID", "pod-b")
    assert serve(run, "raise SystemExit(7)") == 7


def test_a_used_up_budget_leaves_the_pod_idle_until_it_is_raised(exchange):
    run, stop = exchange(spec={"failurePolicy": {"learnerRestarts": 1}}), threading.Event()
    assert serve(run, "raise SystemExit(1)") == 1
    pod, thread, codes = served(run, "raise SystemExit(1)", stop)
    wait_until(lambda: ends(run) == [("crashed", 1)] * 2)
    thread.join(timeout=0.3)
    assert thread.is_alive()
    assert parse_progress(pod.metrics().decode()).gave_up[0] == "LearnerCrashed"
    run.create(exchange(spec={"failurePolicy": {"learnerRestarts": 9}}).run)
    thread.join()
    assert codes == [1]
    assert len(ends(run)) == 3


def test_a_container_that_was_killed_is_charged_at_the_next_start(exchange):
    run = exchange()
    command = [sys.executable, "-m", "heterorl_learner", "launch", "--root", str(run.root)]
    # Its ranks wait for others that never come.
    run.create(exchange(replicas=2).run)
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: ends(run) == [(None, None)])
        process.kill()
    assert serve(exchange(), "raise SystemExit(9)") == 9
    assert ends(run) == [("crashed", None), ("crashed", 9)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────────────────────────
SAVES = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1]) / os.environ.get("RANK", "0")
def save(*_):
    time.sleep(0.3)
    (place.with_suffix(".saved")).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
place.touch()
time.sleep(60)
"""


def test_sigterm_reaches_every_rank_and_is_waited_for(exchange, tmp_path):
    run, stop = exchange(processesPerReplica=2), threading.Event()
    _, thread, codes = served(run, SAVES, stop)
    wait_until(lambda: all((tmp_path / name).exists() for name in "01"))
    stop.set()
    thread.join()
    assert codes == [0]
    assert all((tmp_path / f"{name}.saved").exists() for name in "01")
    assert ends(run) == [("signalled", None)]


def test_when_another_pod_is_told_to_go_the_first_one_has_the_ranks_save_and_leave(exchange, tmp_path, monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    run, stop = exchange(replicas=2), threading.Event()
    pods = []
    for node in ("0", "1"):
        monkeypatch.setenv("NODE_RANK", node)
        pods.append(served(run, SAVES, stop if node == "1" else threading.Event()))
    wait_until(lambda: all((tmp_path / name).exists() for name in "01"))
    stop.set()
    for _, thread, codes in pods:
        thread.join()
        assert codes == [0]
    assert (tmp_path / "0.saved").exists()
    assert ends(run, 0) == ends(run, 1) == [("signalled", None)]


def test_ranks_that_wait_for_a_pod_that_is_gone_are_killed_when_its_grace_is_over(exchange, monkeypatch):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    run = exchange(replicas=2, podTemplate={"terminationGracePeriodSeconds": 1})
    _, thread, codes = served(run, deaf, threading.Event())
    wait_until(lambda: (run.logs_dir / "learner.log").exists() and (run.logs_dir / "learner.log").read_text())
    other = Attempts(run, 1, "pod-1")
    other.begin()
    other.end("signalled")
    thread.join()
    assert codes == [137]
    assert ends(run) == [("signalled", None)]


def test_the_ranks_of_the_second_pod_are_counted_after_those_of_the_first(exchange, tmp_path, monkeypatch):
    for name, value in {"MASTER_ADDR": "run-learner-0.run-learner", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    run = exchange(replicas=3, processesPerReplica=2)
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    code = (
        "import os, sys, pathlib\n"
        f"values = [os.environ[name] for name in {names}]\n"
        "(pathlib.Path(sys.argv[1]) / f'rank-{os.environ[\"RANK\"]}').write_text(' '.join(values))"
    )
    assert serve(run, code) == 0
    # Node 1 of 3 with 2 ranks each: global ranks 2 and 3 of 6.
    assert (tmp_path / "rank-2").read_text() == "run-learner-0.run-learner 29500 2 0 6 2"
    assert (tmp_path / "rank-3").read_text() == "run-learner-0.run-learner 29500 3 1 6 2"


def test_a_single_pod_needs_no_rendezvous_and_shares_its_cores_among_its_ranks(exchange):
    learner = exchange(processesPerReplica=4).spec.learner
    assert rendezvous_of(learner, {}) is None
    assert threads_of(learner, {"OMP_NUM_THREADS": "10"}) == 2
    assert threads_of(learner, {"OMP_NUM_THREADS": "2"}) == 1
    assert threads_of(exchange(threads=3).spec.learner, {"OMP_NUM_THREADS": "10"}) == 3


def test_ranks_do_not_outlive_a_rank_that_failed(exchange, tmp_path):
    run = exchange(processesPerReplica=2)
    code = (
        "import os, sys, pathlib, time\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "(pathlib.Path(sys.argv[1]) / 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    assert serve(run, code) == 3
    pid = tmp_path / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


def test_what_ranks_write_is_shown_and_stays_on_the_volume(exchange, capfd):
    run = exchange(processesPerReplica=2)
    code = "import os, sys; print('out', os.environ['RANK']); sys.exit(f\"err {os.environ['RANK']}\")"
    for _ in range(2):
        serve(run, f"import time; {code}" if run.logs_dir.exists() else code)
    shown = capfd.readouterr().out
    for rank, name in enumerate(("learner.log", "learner-rank1.log")):
        kept = (run.logs_dir / name).read_text().splitlines()
        assert {*kept} <= {f"err {rank}", f"out {rank}"}  # a rank is killed where it stands when the other has failed
        assert all(line in shown for line in kept)
    assert "err" in shown


def test_a_volume_that_takes_no_log_does_not_silence_the_learner(exchange, capfd):
    run = exchange()
    run.logs_dir.mkdir()
    (run.logs_dir / "learner.log").symlink_to("/dev/full")  # every write to it meets a full disk
    assert serve(run, "print('first'); print('second'); raise SystemExit(1)") == 1
    assert capfd.readouterr().out == "first\nsecond\n"
    assert attempts_of(run)[0][0].message == "second"


# ── what it serves ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_pod_is_ready_once_its_first_rank_serves_and_appends_its_metrics(exchange):
    run, stop = exchange(), threading.Event()
    pod, thread, _ = served(run, SERVING, stop)
    wait_until(lambda: pod.readiness() == (True, "training"))
    wait_until(lambda: b'heterorl_reward{process="learner",run="demo"} 0.5' in pod.metrics())
    assert parse_progress(pod.metrics().decode()).stalled_s is not None
    stop.set()
    thread.join()
    assert not pod.readiness()[0]


def test_a_further_pod_is_ready_while_its_ranks_run(exchange, monkeypatch, tmp_path):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    run, stop = exchange(replicas=2), threading.Event()
    pod, thread, _ = served(run, SAVES, stop)
    wait_until((tmp_path / "1").exists)
    assert pod.readiness()[0]
    assert (run.logs_dir / "learner-node1.log").exists()
    stop.set()
    thread.join()
    assert not pod.readiness()[0]


def test_the_launcher_answers_from_its_first_moment_to_its_last(exchange, tmp_path):
    port = free_port()
    run = exchange(prepared=False, spec={"monitoring": {"prometheusPort": port}})
    command = [sys.executable, "-m", "heterorl_learner", "launch", "--root", str(run.root)]

    def get(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    said = tmp_path / "said"
    with open(said, "w") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            wait_until(lambda: get("ready")[0] == 503)
            assert not parse_progress(get("metrics")[1]).prepared
            assert get("else")[0] == 404
            run.write_learner(LearnerHeartbeat(step=5, finished=True))
            run.mark_prepared()
            wait_until(lambda: get("ready")[0] == 200)
            assert parse_progress(get("metrics")[1]).finished
            wait_until(lambda: "idling until this pod is scaled away" in said.read_text())
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def test_a_pod_without_its_spec_says_what_is_missing_and_exits_2(tmp_path):
    command = [sys.executable, "-m", "heterorl_learner", "launch", "--root", str(tmp_path)]
    ended = subprocess.run([*command, "--spec", str(tmp_path / "absent.json")], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "absent.json is missing" in ended.stderr


# ── versions that wait for their evaluation ──────────────────────────────────────────────────────────────────────────
EVALUATING = {"data": {"evals": [{"label": "sums"}]}, "evaluation": {"everySteps": 4}}


def publish(exchange, step):
    (exchange.stage_weights(Version(step, 1)) / "model.safetensors").write_bytes(b"weights")
    exchange.commit_weights(Version(step, 1), Canary([[1, 2]], [[-0.5]]))


def test_versions_due_for_evaluation_are_kept_until_they_have_a_result(exchange):
    run, stop = exchange(uid="0f3c", spec=EVALUATING), threading.Event()
    for step in range(5):
        publish(run, step)
    _, thread, _ = served(run, SAVES, stop)
    wait_until(lambda: run.list_pinned() == [Version(0, 1), Version(4, 1)])
    run.write_eval(Version(0, 1), Evaluation(average=0.5))
    wait_until(lambda: run.list_pinned() == [Version(4, 1)])
    publish(run, 5)
    run.write_learner(LearnerHeartbeat(step=5, finished=True))
    wait_until(lambda: run.list_pinned() == [Version(4, 1), Version(5, 1)])
    stop.set()
    thread.join()


def test_nothing_is_kept_for_evaluations_that_are_not_made(exchange):
    run, stop = exchange(spec=EVALUATING), threading.Event()
    publish(run, 0)
    _, thread, _ = served(run, SAVES, stop)
    wait_until((run.root / "0").exists)
    thread.join(timeout=0.2)
    stop.set()
    thread.join()
    assert run.list_pinned() == []


def test_a_volume_that_cannot_be_read_for_a_moment_does_not_end_the_pod(exchange, caplog, monkeypatch):
    run, stop, away, listed = exchange(uid="0f3c", spec=EVALUATING), threading.Event(), threading.Event(), os.listdir

    def listdir(folder):
        if away.is_set() and folder == run.root / "weights":
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    run.files.retry_after_s = ()
    _, thread, codes = served(run, SAVES, stop)
    wait_until((run.root / "0").exists)
    away.set()
    wait_until(lambda: "Transport endpoint is not connected" in caplog.text)
    away.clear()
    assert thread.is_alive()
    stop.set()
    thread.join()
    assert codes == [0]


def test_a_launcher_lets_go_what_an_earlier_one_left(exchange):
    run, stop = exchange(uid="0f3c", spec=EVALUATING), threading.Event()
    publish(run, 0)
    run.write_eval(Version(0, 1), Evaluation(average=0.5))
    run.pin(Version(0, 1))
    _, thread, _ = served(run, SAVES, stop)
    wait_until(lambda: run.list_pinned() == [])
    stop.set()
    thread.join()
