"""The few pages a process answers over HTTP: to a kubelet's probes, to Prometheus, to the operator."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

log = logging.getLogger(__name__)

Page = Callable[[], tuple[int, str, bytes]]
"""Gives status, content type and body."""


def text_page(answer: Callable[[], tuple[bool, str]]) -> Page:
    """A page for a probe: 200 or 503, and a line that says why."""

    def page() -> tuple[int, str, bytes]:
        good, why = answer()
        return (200 if good else 503), "text/plain", f"{why}\n".encode()

    return page


class Endpoint:
    """Serves its pages, by path, on a port while it is open."""

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        """`port` 0 is any free one; `host` `::` is every address, of IPv6 and IPv4 alike.

        The pages are called from threads of its own, one at a time. OSError when the address cannot be used.
        """
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                try:
                    with lock:
                        status, kind, body = pages.get(self.path, _unknown)()
                except Exception as error:  # a page that fails is an error for its client only
                    log.warning("no answer to %s: %s", self.path, error)
                    status, kind, body = 500, "text/plain", f"{error}\n".encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Not logged: probes come every few seconds."""

        def _unknown() -> tuple[int, str, bytes]:
            return 404, "text/plain", f"there are {', '.join(pages)}\n".encode()

        self._server = _server(host, port, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True)
        self.port: int = self._server.server_port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _DualStack(ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def _server(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    if ":" not in host:
        return ThreadingHTTPServer((host, port), handler)
    try:
        return _DualStack((host, port), handler)
    except OSError as error:
        if host != "::" or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return ThreadingHTTPServer(("0.0.0.0", port), handler)  # a machine without IPv6
