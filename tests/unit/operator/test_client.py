"""The verbs against a real HTTP server on loopback: what is asked, and how answers are told apart."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes.client import ApiClient, Configuration

from heterorl_operator.client import Api, ApiError, Conflict, Forbidden, Invalid, NotFound, Transient
from heterorl_operator.resources import DEPLOYMENT, EVENT, POD, RUN, SERVICE

MANAGER = "heterorl-operator/ns/release"


class Server:
    """Answers with what a test prepared, and notes what was asked."""

    def __init__(self):
        self.answers, self.asked = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                outer.asked.append((self.command, url.path, query, json.loads(body) if body else None, self.headers))
                status, headers, content = outer.answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = do_DELETE = answer

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{self._server.server_port}"

    def says(self, content, status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.answers.append((status, {name.replace("_", "-"): value for name, value in headers.items()}, content))

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    with Server() as answering:
        yield answering


@pytest.fixture
def api(server):
    with ApiClient(Configuration(host=server.host)) as client:
        yield Api(client, MANAGER)


def test_a_list_goes_on_page_by_page(server, api):
    server.says({"items": [{"n": 1}, {"n": 2}], "metadata": {"continue": "more"}})
    server.says({"items": [{"n": 3}], "metadata": {}})
    assert [each["n"] for each in api.list(DEPLOYMENT, None, "heterorl.dev/run")] == [1, 2, 3]
    (_, path, first, _, _), (_, _, second, _, _) = server.asked
    assert path == "/apis/apps/v1/deployments"
    assert first["labelSelector"] == second["labelSelector"] == "heterorl.dev/run"
    assert "continue" not in first
    assert second["continue"] == "more"


def test_objects_are_applied_by_this_installation_and_statuses_by_any(server, api):
    for _ in range(3):
        server.says({})
    api.apply(DEPLOYMENT, {"metadata": {"namespace": "lab", "name": "it"}})
    api.apply(DEPLOYMENT, {"metadata": {"namespace": "lab", "name": "it"}}, force=True)
    api.apply_status(RUN, "lab", "run", {"state": "Running"})
    first, forced, status = server.asked
    assert first[:2] == ("PATCH", "/apis/apps/v1/namespaces/lab/deployments/it")
    assert first[2] == {"fieldManager": MANAGER, "force": "false"}
    assert forced[2] == {"fieldManager": MANAGER, "force": "true"}
    assert first[4]["Content-Type"] == "application/apply-patch+yaml"
    assert status[1] == "/apis/heterorl.dev/v1alpha1/namespaces/lab/heterorlruns/run/status"
    # A field stays while any manager holds it: a status has one, or a successor of another name could not clear it.
    assert status[2] == {"fieldManager": "heterorl-operator", "force": "true"}


def test_what_is_not_there_is_none_and_what_is_gone_is_deleted(server, api):
    server.says({"message": "not found"}, 404)
    assert api.get(SERVICE, "lab", "it") is None
    for status in (404, 409):
        server.says({"message": "gone, or another one"}, status)
        api.delete(POD, "lab", "it", "uid-1")
    method, path, _, body, _ = server.asked[-1]
    assert (method, path) == ("DELETE", "/api/v1/namespaces/lab/pods/it")
    assert body == {"propagationPolicy": "Background", "preconditions": {"uid": "uid-1"}}


def test_a_pod_is_asked_through_the_server(server, api):
    server.says(b"heterorl_run_step 1\n")
    assert api.through_proxy("lab", "run-learner-0", 9400, "/metrics") == "heterorl_run_step 1\n"
    assert server.asked[0][1] == "/api/v1/namespaces/lab/pods/run-learner-0:9400/proxy/metrics"


UNTYPED = "failed to create typed patch object (lab/it; apps/v1, Kind=Deployment): .spec.nodes: field not declared"


@pytest.mark.parametrize(
    ("status", "answer", "kind"),
    [
        (403, {"reason": "Forbidden", "message": "no"}, Forbidden),
        (404, {"message": "no"}, NotFound),
        (409, {"message": "no"}, Conflict),
        (400, {"message": "no"}, Invalid),
        (422, {"message": "no"}, Invalid),
        (500, {"message": UNTYPED}, Invalid),
        (500, {"message": "etcdserver: request timed out"}, Transient),
        (401, {"message": "token expired"}, Transient),
        (429, {"message": "slow down"}, Transient),
        (503, b"<html>no backend</html>", Transient),
        (502, b'["what a pod may say"]', Transient),
        (504, b"", Transient),
    ],
)
def test_an_error_says_by_its_kind_what_to_do_about_it(server, api, status, answer, kind):
    server.says(answer, status)
    with pytest.raises(ApiError) as raised:
        api.create(EVENT, {"metadata": {"namespace": "lab"}})
    assert type(raised.value) is kind
    assert raised.value.status == status
    assert str(raised.value)


@pytest.mark.parametrize(("header", "wish"), [("7", 7.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), (None, None)])
def test_the_servers_wish_to_wait_is_kept(server, api, header, wish):
    server.says({"message": "slow down"}, 429, **({"Retry_After": header} if header else {}))
    with pytest.raises(Transient) as raised:
        api.get(RUN, "lab", "run")
    assert raised.value.retry_after_s == wish


def test_a_server_that_is_not_there_is_transient():
    with ApiClient(Configuration(host="http://127.0.0.1:9")) as client, pytest.raises(Transient) as raised:
        Api(client, MANAGER).get(RUN, "lab", "run")
    assert "does not answer" in str(raised.value)


def test_what_json_cannot_say_is_not_sent(server, api):
    with pytest.raises(ValueError, match="JSON compliant"):
        api.apply_status(RUN, "lab", "run", {"learner": {"reward": float("nan")}})
    assert server.asked == []
