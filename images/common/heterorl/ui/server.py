"""The addresses of `heterorl ui`. Everything is GET and only reads.

    /                                the page, and its modules and style below /page/
    /api/runs                        every run in a card
    /api/run?run=                    one run: samplers, evaluations, what is in the way
    /api/curves?run=&run=&key=&...   curves of runs over each other, decimated to `points`
    /api/timeline?run=               who held which version
    /api/completions?run=&page=...   groups that a filter finds, and the histogram of their rewards
    /api/group?run=&number=          one group with all texts
    /api/answers?run=&set=&...       problems of an evaluation set that a filter finds
    /api/problem?run=&set=&row=      one problem with all its answers
    /api/settings?run=               the manifest beside its defaults

Where it listens on more than this machine, a token is asked for, once in the address and from then on in a cookie.
"""

from __future__ import annotations

import ipaddress
import json
import math
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from heterorl.errors import HeteroRLError, UserError
from heterorl.ui.answers import OUTCOMES
from heterorl.ui.completions import Filter
from heterorl.ui.library import Library
from heterorl.ui.run_view import RunView, curves_of

PAGE = Path(__file__).parent / "page"
_COOKIE = "heterorl-token"
_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline';"
    b" img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
_MOST_POINTS = 4000
_MOST_GROUPS = 200


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build_app(library: Library, *, token: str | None = None) -> Starlette:
    """The application. Without a token it answers only to names of this machine, so that no other site can ask it."""
    return Starlette(
        routes=[
            Route("/", _index),
            Route("/api/runs", _answer(library, _runs)),
            Route("/api/run", _answer(library, _run)),
            Route("/api/curves", _answer(library, _curves)),
            Route("/api/timeline", _answer(library, _timeline)),
            Route("/api/completions", _answer(library, _completions)),
            Route("/api/group", _answer(library, _group)),
            Route("/api/answers", _answer(library, _answers)),
            Route("/api/problem", _answer(library, _problem)),
            Route("/api/settings", _answer(library, _settings)),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=[Middleware(Guard, token=token), Middleware(GZipMiddleware, minimum_size=2000)],
    )


class Guard:
    """Lets in who has the token, or without one who came by a name of this machine; adds headers to each answer."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS.items()]
            await send(message)

        response = self._refusal(Request(scope))
        await (response or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if self._token is None:
            host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")
            if is_loopback(host):
                return None
            return PlainTextResponse("heterorl ui answers to localhost only; start it with --host and a token", 403)
        given = request.query_params.get("token")
        if given and secrets.compare_digest(given.encode(), self._token.encode()):
            response = RedirectResponse(request.url.path, 303)
            response.set_cookie(_COOKIE, given, httponly=True, samesite="strict")
            return response
        cookie = request.cookies.get(_COOKIE, "")
        if secrets.compare_digest(cookie.encode(), self._token.encode()):
            return None
        return PlainTextResponse("open the address that `heterorl ui` printed: it holds the token", 401)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────
async def _index(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", media_type="text/html")


Answer = Callable[[Library, Request], Any]


def _answer(library: Library, answer: Answer) -> Callable[[Request], Response]:
    """An endpoint; as it is not a coroutine, Starlette calls it on a thread."""

    def endpoint(request: Request) -> Response:
        try:
            found = answer(library, request)
        except KeyError as error:
            raise HTTPException(404, f"there is no run {error.args[0]!r}") from error
        except IndexError as error:
            raise HTTPException(404, "there is no such group or problem") from error
        except ValueError as error:
            raise HTTPException(400, f"{error}") from error
        except (HeteroRLError, OSError) as error:
            raise HTTPException(503, f"{error}") from error
        return Response(json.dumps(found, allow_nan=False, separators=(",", ":")), media_type="application/json")

    return endpoint


def _runs(library: Library, request: Request) -> Any:
    return {"folders": library.places, "runs": [run.card() for run in library.runs()]}


def _run(library: Library, request: Request) -> Any:
    return _named(library, request).overview()


def _curves(library: Library, request: Request) -> Any:
    runs = [library.run(name) for name in request.query_params.getlist("run")]
    x = request.query_params.get("x", "step")
    if x not in ("step", "time"):
        raise ValueError(f"x is {x!r}; expected step or time")
    points = min(_MOST_POINTS, _whole(request, "points") or 400)
    keys = request.query_params.getlist("key")
    return curves_of(runs, keys, x, _number(request, "from"), _number(request, "to"), points)


def _timeline(library: Library, request: Request) -> Any:
    stretches = min(_MOST_POINTS, _whole(request, "points") or 200)
    return _named(library, request).timeline(_number(request, "from"), _number(request, "to"), stretches)


def _completions(library: Library, request: Request) -> Any:
    run, truncated = _named(library, request), request.query_params.get("truncated")
    asked = Filter(
        step_from=_whole(request, "step_from"),
        step_to=_whole(request, "step_to"),
        pool=request.query_params.get("pool") or None,
        dataset=request.query_params.get("set") or None,
        reward_from=_number(request, "reward_from"),
        reward_to=_number(request, "reward_to"),
        truncated=None if not truncated else truncated == "yes",
    )
    with run.lock:
        return run.completions().query(
            asked, max(0, _whole(request, "page") or 0), min(_MOST_GROUPS, _whole(request, "size") or 25)
        )


def _group(library: Library, request: Request) -> Any:
    run = _named(library, request)
    with run.lock:
        number = _whole(request, "number")
        return run.completions().group(-1 if number is None else number)


def _answers(library: Library, request: Request) -> Any:
    run, outcome = _named(library, request), request.query_params.get("outcome") or None
    if outcome is not None and outcome not in OUTCOMES:
        raise ValueError(f"outcome is {outcome!r}; expected {', '.join(OUTCOMES)}")
    with run.lock:
        return run.answers().query(
            request.query_params.get("set", ""),
            _whole(request, "step"),
            outcome,
            request.query_params.get("words", ""),
            max(0, _whole(request, "page") or 0),
            min(_MOST_GROUPS, _whole(request, "size") or 25),
        )


def _problem(library: Library, request: Request) -> Any:
    run = _named(library, request)
    with run.lock:
        return run.answers().problem(request.query_params.get("set", ""), request.query_params.get("row", ""))


def _settings(library: Library, request: Request) -> Any:
    return {name: library.run(name).settings() for name in request.query_params.getlist("run")}


def _named(library: Library, request: Request) -> RunView:
    return library.run(request.query_params.get("run", ""))


def _number(request: Request, name: str) -> float | None:
    given = request.query_params.get(name)
    if not given:
        return None
    if not math.isfinite(number := float(given)):
        raise ValueError(f"{name} is {given}; expected a finite number")
    return number


def _whole(request: Request, name: str) -> int | None:
    given = request.query_params.get(name)
    return int(given) if given else None


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def serve(folders: Sequence[Path], host: str, port: int, token: str | None, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `port` 0 is any free one. `say` is told the address.

    Without a token of the caller's one is made up where `host` is more than this machine. UserError for an address that
    cannot be used.
    """
    import uvicorn

    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(16)
    app = build_app(Library(folders), token=token)
    with _listening(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        say(f"http://{name}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else ""))
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{host}:{port} cannot be used: {reason}; choose another address with --host and --port (0 is any free one)"
        ) from error
