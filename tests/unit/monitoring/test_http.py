"""The pages that processes answer over HTTP."""

import urllib.error
import urllib.request

import pytest

from heterorl.monitoring.http import Endpoint, text_page


@pytest.fixture
def get():
    def broken():
        raise OSError(5, "Input/output error")

    pages = {
        "/good": text_page(lambda: (True, "training")),
        "/bad": text_page(lambda: (False, "waiting")),
        "/broken": broken,
    }

    def get(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with Endpoint("127.0.0.1", 0, pages) as endpoint:
        yield get


def test_a_probe_is_told_yes_or_no_and_why(get):
    assert get("/good") == (200, "training\n")
    assert get("/bad") == (503, "waiting\n")


def test_an_unknown_page_names_the_known_ones(get):
    assert get("/") == (404, "there are /good, /bad, /broken\n")


def test_a_page_that_fails_is_an_error_and_not_the_end(get):
    status, text = get("/broken")
    assert (status, "Input/output error" in text) == (500, True)
    assert get("/good")[0] == 200
