"""Learners are asked how far they are: real HTTP on loopback."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from heterorl.monitoring.http import Endpoint
from heterorl.monitoring.run_metrics import RunProgress, to_text
from heterorl_operator.client import Transient
from heterorl_operator.learner_poller import PollResult, ProgressPoller, Target
from unit.operator.operator_world import KEY


class Learner:
    """Answers as a learner's pod does."""

    def __init__(self):
        self.reset()
        self._endpoint = Endpoint("127.0.0.1", 0, {"/metrics": self._page})
        self.target = Target("run-learner-0", "uid-1", "127.0.0.1", self._endpoint.port)

    def reset(self):
        self.progress, self.status, self.asked = RunProgress(step=1, steps=9, prepared=True), 200, 0
        self.raw = None

    def _page(self):
        self.asked += 1
        return self.status, "text/plain", to_text(self.progress, "run") if self.raw is None else self.raw

    def says(self, **progress):
        self.progress = replace(self.progress, **progress)

    def __enter__(self):
        self._endpoint.__enter__()
        return self

    def __exit__(self, *error):
        self._endpoint.__exit__(*error)


@pytest.fixture(scope="module")
def listening():
    with Learner() as answering:
        yield answering


@pytest.fixture
def learner(listening):
    listening.reset()
    return listening


@pytest.fixture
def nobody():
    """A place where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Target("run-learner-0", "uid-0", "127.0.0.1", probe.getsockname()[1])


@pytest.fixture
def changes():
    return []


@pytest.fixture
def poller(changes):
    asking = ProgressPoller(None, "pod-ip", 0.02, changes.append, threads=2)
    asking.start()
    yield asking
    asking.stop()


def wait_for(look):
    deadline = time.monotonic() + 5
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def test_a_learner_is_polled_again_and_again_and_only_changes_are_reported(learner, poller, changes):
    poller.want(KEY, learner.target)
    wait_for(lambda: learner.asked >= 3)
    assert changes == [KEY]
    assert poller.latest(KEY).progress == learner.progress
    learner.says(step=2)
    wait_for(lambda: len(changes) == 2)
    assert poller.latest(KEY).progress.step == 2


def test_a_stall_is_reported_once_a_minute(learner, poller, changes):
    learner.says(stalled_s=1.0)
    poller.want(KEY, learner.target)
    wait_for(lambda: changes == [KEY])
    learner.says(stalled_s=59.0)
    wait_for(lambda: poller.latest(KEY).progress.stalled_s >= 59.0)
    assert changes == [KEY]
    learner.says(stalled_s=61.0)
    wait_for(lambda: changes == [KEY, KEY])
    assert 61 <= poller.stalled_s(KEY) < 66


def test_time_in_which_no_learner_should_train_is_not_a_stall(learner, poller, changes):
    learner.says(stalled_s=1.0)
    poller.want(KEY, learner.target)
    wait_for(lambda: changes == [KEY])
    poller.want(KEY, None)  # its pod is gone, and should come back
    assert poller.stalled_s(KEY) >= 1
    poller.want(KEY, None, at_rest=True)
    assert poller.stalled_s(KEY) is None


def test_a_learner_that_stops_answering_is_reported_once_and_its_last_progress_stays(learner, poller, changes):
    poller.want(KEY, learner.target)
    wait_for(lambda: len(changes) == 1)
    learner.status = 503
    wait_for(lambda: poller.latest(KEY).failures >= 2)
    result = poller.latest(KEY)
    assert result.unreachable == "pod run-learner-0: it answered with status 503"
    assert result.progress == learner.progress
    assert len(changes) == 2
    learner.status = 200
    wait_for(lambda: not poller.latest(KEY).unreachable)
    wait_for(lambda: len(changes) == 3)


@pytest.mark.parametrize("answer", [b"# nothing of ours\n", b"\xff\xfe", b"heterorl_run_prepared{ 1\n"])
def test_an_answer_that_is_not_a_learners_counts_as_none(learner, poller, answer):
    learner.raw = answer
    poller.want(KEY, learner.target)
    wait_for(lambda: poller.latest(KEY).unreachable)
    assert poller.latest(KEY).progress is None


def test_an_unreachable_learner_is_reported_in_words_that_stay_the_same(nobody, poller):
    words = set()
    poller.want(KEY, nobody)
    for failures in (1, 2, 3):
        wait_for(lambda failures=failures: poller.latest(KEY).failures >= failures)
        words.add(poller.latest(KEY).unreachable)
    assert len(words) == 1  # or each of them would be written into the status
    assert "refused" in words.pop()


def test_an_answer_without_an_end_is_cut_off(poller):
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65_536)
            except OSError:
                return  # whoever asked hung up

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    poller.want(KEY, Target("pod", "uid", "127.0.0.1", server.server_port))
    wait_for(lambda: poller.latest(KEY).unreachable)
    server.shutdown()
    server.server_close()


def test_polling_stops_on_request_and_the_last_answer_stays_until_the_run_is_forgotten(learner, poller):
    poller.want(KEY, learner.target)
    wait_for(lambda: poller.latest(KEY).progress)
    learner.status = 503
    wait_for(lambda: poller.latest(KEY).unreachable)
    poller.want(KEY, None)
    time.sleep(0.05)
    asked = learner.asked
    time.sleep(0.1)
    assert learner.asked == asked
    result = poller.latest(KEY)
    assert (result.progress.step, result.unreachable, result.failures) == (1, "", 0)
    poller.forget(KEY)
    assert poller.latest(KEY) == PollResult()


def test_another_pod_is_polled_at_once_however_long_the_last_one_did_not_answer(learner, nobody, changes):
    asking = ProgressPoller(None, "pod-ip", 0.01, changes.append, threads=1)
    asking.start()
    asking.want(KEY, nobody)
    wait_for(lambda: asking.latest(KEY).failures >= 4)
    learner.status = 503  # it does not listen yet
    asking.want(KEY, learner.target)
    wait_for(lambda: learner.asked)
    wait_for(lambda: asking.latest(KEY).failures)
    assert asking.latest(KEY).failures <= 2
    learner.status = 200
    wait_for(lambda: asking.latest(KEY).progress)
    asking.stop()


def test_a_learner_that_does_not_answer_is_polled_with_back_off(learner, poller):
    learner.status = 503
    poller.want(KEY, learner.target)
    time.sleep(0.6)  # 20 ms apart that would be 30 times; doubled each time it is at 0, 20, 60, 140, 300, 620 ms
    assert 3 <= learner.asked <= 7


def test_through_the_api_server_it_asks_the_same_pod(learner, changes):
    class Proxy:
        def through_proxy(self, namespace, pod, port, path):
            assert (namespace, pod, port, path) == ("lab", "run-learner-0", learner.target.port, "/metrics")
            if learner.status != 200:
                raise Transient(503, "ServiceUnavailable", "no endpoints")
            return to_text(learner.progress, "run").decode()

    asking = ProgressPoller(Proxy(), "proxy", 0.02, changes.append, threads=1)
    asking.start()
    asking.want(KEY, learner.target)
    wait_for(lambda: asking.latest(KEY).progress == learner.progress)
    learner.status = 503
    wait_for(lambda: asking.latest(KEY).unreachable == "pod run-learner-0: no endpoints")
    asking.stop()
