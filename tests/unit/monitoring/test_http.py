"""The pages that processes answer over HTTP."""

import socket
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


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_every_address_is_of_ipv6_and_ipv4_alike(address):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with (
        Endpoint("::", 0, {"/ready": text_page(lambda: (True, "yes"))}) as endpoint,
        urllib.request.urlopen(f"http://{address}:{endpoint.port}/ready", timeout=5) as answer,
    ):
        assert answer.read() == b"yes\n"


def test_a_machine_without_ipv6_is_served_by_ipv4(monkeypatch):
    real = socket.socket

    def without_ipv6(family=socket.AF_INET, *arguments, **options):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, *arguments, **options)

    monkeypatch.setattr("socketserver.socket.socket", without_ipv6)
    with Endpoint("::", 0, {"/ready": text_page(lambda: (True, "yes"))}) as endpoint:
        monkeypatch.undo()
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/ready", timeout=5) as answer:
            assert answer.status == 200
