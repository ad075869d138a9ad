"""Talks to the API server: few verbs on plain dicts, and errors classified by what to do about them.

The `kubernetes` package brings configuration, credentials, TLS and the connection pool. Objects stay JSON: thousands of
typed models would cost more than the requests themselves.

ApiError
├── Transient    throttled, overloaded, unreachable: try again later
├── Conflict     another manager holds a field (apply), or the name is taken (create)
├── Invalid      the object is refused: what the user wrote does not work
├── Forbidden    the operator lacks a right
└── NotFound     no such object, or no such namespace
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import config
from kubernetes.client import ApiClient, Configuration

from heterorl.kubernetes.names import Object
from heterorl_operator import metrics
from heterorl_operator.resources import POD, ResourceKind

_TIMEOUT_S = (5.0, 30.0)  # to connect, to answer
_PAGE, _METADATA_PAGE = 25, 100
"""Objects of a list that are in memory at once: a page and, while it is read, the next."""
_JSON = "application/json"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
_STATUS_MANAGER = "heterorl-operator"
"""Of every installation: what one wrote into a status, its successor can take out again."""
# What the API server says, with status 500, to an apply with an unknown or wrongly typed field.
_OBJECTS_FAULT = ("failed to create typed patch object", "unable to convert unstructured object")


class ApiError(Exception):
    """The API server's answer was no."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(message)


class Transient(ApiError):
    """It may well work in a moment; `retry_after_s` is the server's wish, if it had one."""

    retry_after_s: float | None = None


class Conflict(ApiError):
    """Another field manager holds what we would change, or another object has the name."""


class Invalid(ApiError):
    """The object is not acceptable, and will not become so by trying again."""


class Forbidden(ApiError):
    """The operator's role does not allow it."""


class NotFound(ApiError):
    """It is not there."""


def in_cluster() -> bool:
    """Whether this process runs in a pod."""
    return _IN_CLUSTER in os.environ


def connect(pool_size: int) -> ApiClient:
    """A client with the pod's service account, or with the current context of the kubeconfig."""
    settings = Configuration()
    if in_cluster():
        config.load_incluster_config(client_configuration=settings)
    else:
        config.load_kube_config(client_configuration=settings)
    settings.connection_pool_maxsize = pool_size
    settings.retries = False  # ours is the queue's back-off
    return ApiClient(settings)


class Api:
    """The verbs. Safe to use from several threads."""

    def __init__(self, client: ApiClient, manager: str) -> None:
        """`manager` owns the fields that are applied."""
        self._client, self.manager = client, manager

    def list(
        self,
        kind: ResourceKind,
        namespace: str | None,
        selector: str = "",
        *,
        fields: str = "",
        metadata_only: bool = False,
    ) -> Iterator[Object]:
        """Objects of a namespace (or of all), by label and field selector, page by page.

        They lack `kind` and `apiVersion`.
        """
        query = {"limit": str(_METADATA_PAGE if metadata_only else _PAGE)}
        query |= {"labelSelector": selector} if selector else {}
        query |= {"fieldSelector": fields} if fields else {}
        accept = _METADATA if metadata_only else _JSON
        while True:
            page = self._request("GET", kind.path(namespace), query, accept=accept)
            yield from page["items"]
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    def get(self, kind: ResourceKind, namespace: str, name: str) -> Object | None:
        """The object, or None."""
        try:
            return self._request("GET", kind.path(namespace, name))
        except NotFound:
            return None

    def apply(self, kind: ResourceKind, desired: Object, *, force: bool = False) -> Object:
        """Server-side apply; Conflict when another manager holds a field that would change, unless forced."""
        metadata = desired["metadata"]
        return self._apply(kind.path(metadata["namespace"], metadata["name"]), desired, force, self.manager)

    def apply_status(self, kind: ResourceKind, namespace: str, name: str, status: Object) -> Object:
        """Server-side apply of the status alone."""
        body = {"apiVersion": kind.api_version, "kind": kind.name, "metadata": {"name": name}, "status": status}
        return self._apply(kind.path(namespace, name, "status"), body, True, _STATUS_MANAGER)

    def create(self, kind: ResourceKind, desired: Object) -> Object:
        """Create; Conflict when there is one of that name."""
        return self._request("POST", kind.path(desired["metadata"]["namespace"]), body=desired)

    def delete(self, kind: ResourceKind, namespace: str, name: str, uid: str) -> None:
        """Delete that very object, in the background; one that is gone is fine."""
        options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            self._request("DELETE", kind.path(namespace, name), body=options)
        except (NotFound, Conflict):
            return  # gone, or another object has the name by now

    def merge(self, kind: ResourceKind, namespace: str, name: str, patch: Object) -> Object:
        """Merge a patch into an object."""
        return self._request("PATCH", kind.path(namespace, name), {}, patch, "application/merge-patch+json")

    def through_proxy(self, namespace: str, pod: str, port: int, path: str) -> str:
        """What a pod answers to a GET, by way of the API server."""
        return self._raw("GET", POD.path(namespace, f"{pod}:{port}", f"proxy{path}"), {}).decode()

    def _apply(self, path: str, body: Object, force: bool, manager: str) -> Object:
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        return self._request("PATCH", path, query, body, "application/apply-patch+yaml")

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
    ) -> Object:
        return dict(json.loads(self._raw(method, path, query or {}, body, content_type, accept)))

    def _raw(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
    ) -> bytes:
        settings = self._client.configuration
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": self.manager}
        for auth in settings.auth_settings().values():  # asked each time: tokens are renewed
            headers[auth["key"]] = auth["value"]
        if method != "GET":
            metrics.WRITES.inc()
        url = f"{settings.host}{path}?{urlencode(query)}" if query else f"{settings.host}{path}"
        try:
            answer = self._client.rest_client.pool_manager.request(
                method,
                url,
                headers=headers,
                body=json.dumps(body, allow_nan=False).encode() if body is not None else None,
                timeout=urllib3.Timeout(*_TIMEOUT_S),
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            metrics.ERRORS.labels("unreachable").inc()
            raise Transient(0, "Unreachable", f"the API server does not answer: {error}") from error
        if answer.status >= 400:
            metrics.ERRORS.labels(str(answer.status)).inc()
            raise _error(answer.status, answer.data, answer.headers.get("Retry-After"))
        return bytes(answer.data)


def _error(status: int, body: bytes, retry_after: str | None) -> ApiError:
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    answer: dict[str, Any] = parsed if isinstance(parsed, dict) else {}  # a pod behind the proxy may send anything
    reason = answer.get("reason") or f"HTTP{status}"
    message = answer.get("message") or body[:1024].decode(errors="replace") or reason
    kinds = {403: Forbidden, 404: NotFound, 409: Conflict, 400: Invalid, 415: Invalid, 422: Invalid}
    if status in kinds or any(fault in message for fault in _OBJECTS_FAULT):
        return kinds.get(status, Invalid)(status, reason, message)
    error = Transient(status, reason, message)
    error.retry_after_s = float(retry_after) if retry_after and retry_after.isdigit() else None
    return error
