"""The work queue: each key once, by one worker at a time, nothing forgotten."""

from __future__ import annotations

import threading
import time

import pytest

from heterorl_operator.resources import RunKey
from heterorl_operator.workqueue import WorkQueue

A, B = RunKey("lab", "a"), RunKey("lab", "b")


@pytest.fixture
def queue():
    return WorkQueue()


def taken(queue):
    """The next key, which has to be there."""
    found = queue.get()
    assert found is not None
    return found[0]


def drained(queue):
    """Keys that are ready now, in order; worked on and done."""
    found, last = [], RunKey("", "last")
    queue.add(last, urgent=False)
    while (key := taken(queue)) != last:
        found.append(key)
        queue.done(key)
    queue.done(last)
    return found


def test_a_key_that_waits_is_there_once_and_the_first_comes_first(queue):
    for key in (A, B, A, A):
        queue.add(key)
    assert len(queue) == 2
    assert drained(queue) == [A, B]
    assert len(queue) == 0


def test_a_key_added_while_it_is_worked_on_comes_once_more_when_that_is_done(queue):
    queue.add(A)
    assert taken(queue) == A
    queue.add(A)
    queue.add(A)
    assert drained(queue) == []  # nobody else gets it meanwhile
    queue.done(A)
    assert drained(queue) == [A]


def test_what_is_urgent_goes_first_and_becomes_so_by_being_added_again(queue):
    c, d = RunKey("lab", "c"), RunKey("lab", "d")
    for key in (A, B, c):
        queue.add(key, urgent=False)
    queue.add(d)
    queue.add(B)
    queue.add(B, urgent=False)
    assert len(queue) == 4
    assert drained(queue) == [d, B, A, c]


def test_a_key_in_both_lines_is_worked_on_once_and_again_if_it_is_added_meanwhile(queue):
    queue.add(A, urgent=False)
    queue.add(A)
    assert taken(queue) == A
    queue.add(A, urgent=False)
    assert drained(queue) == []
    queue.done(A)
    assert drained(queue) == [A]
    assert len(queue) == 0


def test_one_key_is_never_at_two_workers(queue):
    at_work, most, looks = 0, 0, 0
    lock, enough = threading.Lock(), threading.Event()

    def work():
        nonlocal at_work, most, looks
        while found := queue.get():
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.001)
            with lock:
                at_work -= 1
                looks += 1
                if looks >= 20:
                    enough.set()
            queue.done(found[0])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    while not enough.is_set():
        queue.add(A)
    queue.close()
    for worker in workers:
        worker.join(5)
    assert most == 1


def test_a_delay_is_kept_and_the_earliest_of_several_counts(queue):
    began = time.monotonic()
    queue.add_after(A, 60.0)
    queue.add_after(A, 0.05)
    queue.add_after(A, 30.0)
    assert taken(queue) == A
    assert 0.05 <= time.monotonic() - began < 5
    queue.done(A)
    assert drained(queue) == []  # the others are forgotten


def test_an_added_key_does_not_wait_for_its_delay(queue):
    queue.add_after(A, 60.0)
    queue.add(A)
    assert drained(queue) == [A]


def test_a_worker_that_waits_for_a_late_key_takes_an_earlier_one(queue):
    queue.add_after(A, 60.0)
    found = []
    worker = threading.Thread(target=lambda: found.append(queue.get()))
    worker.start()
    queue.add_after(B, 0.02)
    worker.join(5)
    assert [key for key, _ in found] == [B]


def test_delays_of_several_keys_end_in_their_order_whichever_worker_waits(queue):
    order, lock = [], threading.Lock()

    def work():
        while found := queue.get():
            with lock:
                order.append(found[0].name)
            queue.done(found[0])

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for name, delay in (("c", 0.15), ("a", 0.05), ("b", 0.10)):
        queue.add_after(RunKey("lab", name), delay)
    deadline = time.monotonic() + 5
    while len(order) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    queue.close()
    for worker in workers:
        worker.join(5)
    assert order == ["a", "b", "c"]


def test_the_delay_doubles_with_each_failure_in_a_row_up_to_five_minutes(queue):
    delays = [queue.retry(A) for _ in range(12)]
    plain = [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    for delay, about in zip(delays, plain, strict=True):
        assert 0.8 * about <= delay <= 1.2 * about
    assert len(set(delays)) == 12  # spread, so that runs that failed together do not come back together


def test_a_success_makes_the_next_failure_the_first_and_keys_do_not_share_it(queue):
    for _ in range(5):
        queue.retry(A)
    assert queue.retry(B) <= 0.6
    queue.succeeded(A)
    assert queue.retry(A) <= 0.6


def test_a_server_that_asks_for_more_time_gets_it(queue):
    assert queue.retry(A, at_least_s=17.0) == 17.0
    assert queue.retry(B, at_least_s=0.001) >= 0.4


def test_closing_releases_every_worker_whatever_is_queued(queue):
    queue.add_after(A, 60.0)
    found = []
    workers = [threading.Thread(target=lambda: found.append(queue.get())) for _ in range(3)]
    for worker in workers:
        worker.start()
    queue.close()
    for worker in workers:
        worker.join(5)
    assert found == [None, None, None]
    queue.add(B)
    assert queue.get() is None


def test_how_long_a_key_waited_is_measured(queue):
    queue.add(A)
    time.sleep(0.03)
    found = queue.get()
    assert found is not None
    assert 0.03 <= found[1] < 5


def test_long_work_is_measured_and_a_long_queue_is_not(queue):
    queue.add(A)
    queue.add(B)
    time.sleep(0.03)
    assert queue.longest_s() == 0.0  # they wait, and nobody hangs
    taken(queue)
    time.sleep(0.03)
    assert 0.03 <= queue.longest_s() < 5
    queue.done(A)
    assert queue.longest_s() == 0.0
