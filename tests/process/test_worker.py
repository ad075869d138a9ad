"""A function that hangs, crashes, eats memory or raises costs one call, and the next one finds a child that works."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from heterorl.errors import HeteroRLError
from heterorl.worker import CallFailed, Worker

PATIENT_S = 60.0
MODULE = """
import os, signal, subprocess, sys, threading, time
print("importing")
started = [os.getpid()]

def act(what, *args):
    return globals()[what](*args)

def echo(value): print("noise", flush=True); return value
def pid(): return os.getpid()
def origin(): return started
def keep(value=None): started.append(value); return len(started)
def sleep(): time.sleep(1000)
def deaf():
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    while True: pass
def inside_c(): return 9 ** 9 ** 9
def bare_except():
    while True:
        try: time.sleep(1000)
        except BaseException: pass
def eat():
    started.append("eaten")
    started.append(bytearray(64 << 30))
def eat_slowly():
    while True: started.append(bytearray(64 << 20))
def swallow():
    try: eat_slowly()
    except MemoryError: del started[1:]; return "survived"
def leave(): os._exit(7)
def abort(): os.abort()
def leave_politely(): sys.exit("bye")
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def wrong(): return inner(0)
def inner(x): return 1 / x
def deep(): return deep()
def not_json(): return object()
def spawn():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid
def spawn_and_leave(path):
    open(path, "w").write(str(spawn())); leave()
def read_input(): return sys.stdin.read()
def main_thread(): return threading.current_thread() is threading.main_thread()
def odd_text(): return "\\ud800 \\u2028 é \\n"
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("package")
    (folder / "acts.py").write_text(MODULE)
    (folder / "broken.py").write_text("import no_such_module\n")
    sys.path.insert(0, str(folder))
    yield folder / "acts.py"
    sys.path.remove(str(folder))


@pytest.fixture
def worker(module: Path) -> Iterator[Worker]:
    with Worker("acts.act", memory_bytes=512 << 20) as worker:
        yield worker


def failure(worker: Worker, *args: object, time_limit_s: float = PATIENT_S) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        worker.call(*args, time_limit_s=time_limit_s)
    return caught.value


@pytest.mark.parametrize("value", [1.5, "é\u2028\n", None, {"a": [1, float("inf")]}, ["x" * 1_000_000] * 3])
def test_arguments_and_values_go_through_whatever_is_printed_meanwhile(worker: Worker, value: object) -> None:
    assert worker.call("echo", value, time_limit_s=PATIENT_S) == value


def test_a_child_serves_many_calls_in_its_main_thread_and_reads_no_input(worker: Worker) -> None:
    pids = {worker.call("pid", time_limit_s=PATIENT_S) for _ in range(3)}
    assert len(pids) == 1
    assert pids != {os.getpid()}
    assert worker.call("main_thread", time_limit_s=PATIENT_S)
    assert worker.call("read_input", time_limit_s=PATIENT_S) == ""
    assert worker.call("odd_text", time_limit_s=PATIENT_S) == "\ud800 \u2028 é \n"


@pytest.mark.parametrize("act", ["sleep", "deaf", "inside_c", "bare_except"])
def test_what_hangs_is_killed_at_its_limit(worker: Worker, act: str) -> None:
    first = worker.call("pid", time_limit_s=PATIENT_S)
    started = time.monotonic()
    assert failure(worker, act, time_limit_s=0.5).reason == "time"
    assert time.monotonic() - started >= 0.5
    assert not psutil.pid_exists(first)
    assert worker.call("pid", time_limit_s=PATIENT_S) != first


@pytest.mark.parametrize("act", ["eat", "eat_slowly"])
def test_what_eats_memory_is_refused_it_and_its_leftovers_are_gone(worker: Worker, act: str) -> None:
    failed = failure(worker, act)
    assert failed.reason == "memory"
    assert f"in {act}" in failed.trace
    assert worker.call("keep", time_limit_s=PATIENT_S) == 2  # the module as imported, and what `keep` adds


def test_a_function_may_handle_its_own_want_of_memory(worker: Worker) -> None:
    assert worker.call("swallow", time_limit_s=PATIENT_S) == "survived"


@pytest.mark.parametrize(("act", "ending"), [("leave", "code 7"), ("abort", "SIGABRT"), ("killed", "SIGKILL")])
def test_what_ends_its_process_costs_one_call(worker: Worker, act: str, ending: str) -> None:
    failed = failure(worker, act)
    assert (failed.reason, ending in str(failed)) == ("crash", True)
    assert worker.call("echo", 1, time_limit_s=PATIENT_S) == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("wrong", "ZeroDivisionError: division by zero"),
        ("deep", "RecursionError"),
        ("not_json", "TypeError: Object of type object is not JSON serializable"),
        ("leave_politely", "SystemExit: bye"),
    ],
)
def test_what_raises_tells_why_and_keeps_its_child(worker: Worker, act: str, message: str) -> None:
    child = worker.call("pid", time_limit_s=PATIENT_S)
    failed = failure(worker, act)
    assert failed.reason == "error"
    assert str(failed).startswith(message)
    assert worker.call("pid", time_limit_s=PATIENT_S) == child


def test_the_traceback_names_the_users_file_and_line_and_begins_there(worker: Worker, module: Path) -> None:
    trace = failure(worker, "wrong").trace
    line = next(n for n, text in enumerate(MODULE.splitlines(), 1) if text.startswith("def inner"))
    assert f'File "{module}", line {line}, in inner' in trace
    assert "worker.py" not in trace


def test_what_a_lost_call_started_goes_with_it(worker: Worker, tmp_path: Path) -> None:
    assert failure(worker, "spawn_and_leave", str(tmp_path / "pid")).reason == "crash"
    pid = int((tmp_path / "pid").read_text())
    assert psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)[1] == []


def test_a_new_child_loads_first_and_its_time_does_not_count(module: Path) -> None:
    with Worker("acts.act", load=["acts.act", "keep", "loaded"]) as worker:
        assert worker.load() == 2
        assert worker.call("keep", time_limit_s=PATIENT_S) == 3
        assert failure(worker, "sleep", time_limit_s=0.2).reason == "time"
        assert worker.call("keep", time_limit_s=PATIENT_S) == 3  # loaded again


def test_what_does_not_load_says_so_each_time(module: Path) -> None:
    with Worker("acts.act", load=["acts.wrong"]) as worker:
        for _ in range(2):
            with pytest.raises(CallFailed, match="ZeroDivisionError"):
                worker.load()
        assert "ZeroDivisionError" in str(failure(worker, "echo", 1))


def test_warm_up_is_done_once_for_all_children(module: Path) -> None:
    with Worker("acts.act", warm_up=["keep", "warm"]) as worker:
        pids = []
        for _ in range(2):
            pids.append(worker.call("pid", time_limit_s=PATIENT_S))
            (imported_by, warm) = worker.call("origin", time_limit_s=PATIENT_S)
            assert warm == "warm"
            assert failure(worker, "leave").reason == "crash"
        assert len({imported_by, *pids}) == 3


@pytest.mark.parametrize("function", ["no_such_package.act", "acts.no_such_function", "broken.act"])
def test_a_function_that_is_not_there_is_an_error_at_the_first_call(module: Path, function: str) -> None:
    with Worker(function) as worker, pytest.raises(HeteroRLError, match=f"calls {function} did not start"):
        worker.call(time_limit_s=PATIENT_S)


def test_a_killed_worker_is_replaced(worker: Worker) -> None:
    before = worker.call("pid", time_limit_s=PATIENT_S)
    for process in psutil.Process().children():
        if "acts.act" in process.cmdline():
            process.kill()
    assert worker.call("pid", time_limit_s=PATIENT_S) != before


def test_closing_ends_a_call_that_is_going_on(worker: Worker) -> None:
    child = worker.call("pid", time_limit_s=PATIENT_S)
    failures: list[CallFailed] = []
    caller = threading.Thread(target=lambda: failures.append(failure(worker, "deaf", time_limit_s=900)))
    caller.start()
    time.sleep(0.5)
    worker.close()
    caller.join(60)
    assert [failed.reason for failed in failures] == ["crash"]
    assert not psutil.pid_exists(child)
    assert failure(worker, "echo", 1).reason == "crash"


@pytest.mark.parametrize("act", ["pid", "deaf"])
def test_worker_and_child_leave_with_a_parent_that_is_killed(module: Path, act: str) -> None:
    script = (
        "import sys; from heterorl.worker import Worker; worker = Worker('acts.act')\n"
        "print(worker.call('pid', time_limit_s=60), flush=True)\n"
        f"worker.call({act!r}, time_limit_s=900); sys.stdin.read()\n"
    )
    path = os.pathsep.join([str(module.parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    family = [child, *child.parents()[:1]]
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs(family, timeout=30)[1] == []
