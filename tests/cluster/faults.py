"""A reverse proxy before the API server that answers wrongly, or hangs up, when it is told to."""

from __future__ import annotations

import json
import random
import ssl
import threading
from contextlib import closing, suppress
from http.client import HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cluster.harness import Cluster

HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "host", "accept-encoding"}
REASONS = {409: "Conflict", 422: "Invalid", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}


class FaultyProxy:
    """Plain HTTP on loopback in front of a cluster. `kubeconfig` leads through it, as admin.

    While `codes` holds any, `share` of the requests that write are answered with one of them instead of being passed
    on. `cut_watches` ends every stream that is open. `deaf`: watches stay open and bring nothing more.
    """

    def __init__(self, cluster: Cluster, *, seed: int = 0) -> None:
        self.codes: tuple[int, ...] = ()
        self.share = 0.5
        self.deaf = False
        self.injected: dict[int, int] = {}
        self._cluster, self._random = cluster, random.Random(seed)
        self._context = ssl.create_default_context(cafile=str(cluster.certificate))
        self._streams: set[HTTPSConnection] = set()
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                with suppress(ConnectionError, TimeoutError):
                    proxy._handle(self)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = handle_any

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # the operator hung up, or was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.kubeconfig = self._write_kubeconfig()

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.cut_watches()

    def cut_watches(self) -> int:
        """End every open stream; how many there were."""
        with self._lock:
            streams, self._streams = self._streams, set()
        for stream in streams:
            with suppress(OSError, AttributeError):
                stream.sock.shutdown(2)
        return len(streams)

    def _write_kubeconfig(self) -> Path:
        config = json.loads(self._cluster.kubeconfig.read_text())
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self._server.server_port}"}
        path = self._cluster.folder / f"faulty-{self._server.server_port}.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    def _fault(self, method: str) -> int | None:
        with self._lock:
            if method == "GET" or not self.codes or self._random.random() > self.share:
                return None
            code = self._random.choice(self.codes)
            self.injected[code] = self.injected.get(code, 0) + 1
            return code

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if code := self._fault(request.command):
            refusal = {"kind": "Status", "code": code, "reason": REASONS[code], "message": f"injected {REASONS[code]}"}
            self._answer(request, code, {"Content-Type": "application/json"}, json.dumps(refusal).encode())
            return
        upstream = HTTPSConnection(self._cluster.host, self._cluster.port, context=self._context)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        try:
            upstream.request(request.command, request.path, body or None, headers)
            answer = upstream.getresponse()
        except OSError:
            self._answer(request, 502, {}, b"the API server is away")
            return
        with closing(upstream):
            if "watch=true" not in request.path:
                self._answer(request, answer.status, dict(answer.getheaders()), answer.read())
                return
            self._stream(request, upstream, answer)

    def _answer(self, request: BaseHTTPRequestHandler, code: int, headers: dict[str, str], body: bytes) -> None:
        request.send_response(code)
        for name, value in headers.items():
            if name.lower() not in HOP_BY_HOP:
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _stream(self, request: BaseHTTPRequestHandler, upstream: HTTPSConnection, answer: HTTPResponse) -> None:
        with self._lock:
            self._streams.add(upstream)
        request.close_connection = True
        request.send_response(answer.status)
        request.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        request.send_header("Connection", "close")
        request.end_headers()
        try:
            while chunk := answer.read1(65536):
                if not self.deaf:
                    request.wfile.write(chunk)
                    request.wfile.flush()
        finally:
            with self._lock:
                self._streams.discard(upstream)
