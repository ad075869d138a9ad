"""What `helm test` runs: asks the API server to take a tiny run and to refuse a broken one, both as dry runs.

So nothing is kept and no pod starts. It shows that the kind is served, by the same definition that this operator has.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import urllib3
from kubernetes.client import ApiException, CustomObjectsApi
from kubernetes.config import ConfigException

from heterorl.errors import UserError
from heterorl.kubernetes.names import Object
from heterorl.spec.run import API_VERSION, KIND, HeteroRLRun
from heterorl_operator.client import connect
from heterorl_operator.resources import RUN

GOOD_SPEC: Object = {"model": {"source": "tiny"}, "samplers": [{"name": "near"}]}
BROKEN_SPEC: Object = {"model": {"source": "tiny"}, "samplers": [{"name": "near", "replicas": 0}]}

_UPDATE = "install that of this version: kubectl apply --server-side --force-conflicts -f crds/heterorlrun.yaml"


class _Refused(UserError):
    """The API server does not take a run, because of what is in it."""


def check(runs: CustomObjectsApi, namespace: str) -> None:
    """Try both runs and print what came of it; UserError says what is wrong and what to do."""
    try:
        spec = _create(runs, namespace, GOOD_SPEC)["spec"]
    except _Refused as refused:
        raise UserError(f"a good run was refused, so the cluster has another {KIND}; {_UPDATE}: {refused}") from refused
    print(f"namespace {namespace}: a tiny run was taken; as a dry run, so nothing is kept of it")

    expected = HeteroRLRun.model_validate(_manifest(GOOD_SPEC)).spec.model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    if differing := sorted(key for key in {*spec, *expected} if spec.get(key) != expected.get(key)):
        raise UserError(f"the cluster's {KIND} is of another version, it differs in {', '.join(differing)}; {_UPDATE}")
    print("its defaults are those that this operator has")

    try:
        _create(runs, namespace, BROKEN_SPEC)
    except _Refused as refused:
        print(f"a run that could never train was refused, as it should be: {refused}")
    else:
        raise UserError(f"a run without samplers was taken, so the cluster's {KIND} lacks its rules; {_UPDATE}")


def _create(runs: CustomObjectsApi, namespace: str, spec: Object) -> Object:
    try:
        taken: Any = runs.create_namespaced_custom_object(
            RUN.group,
            RUN.version,
            namespace,
            RUN.plural,
            _manifest(spec),
            dry_run="All",
            field_validation="Strict",
        )
    except ApiException as error:
        raise _explained(error, namespace) from error
    except urllib3.exceptions.HTTPError as error:
        raise UserError(f"the API server does not answer; may this pod reach it? {error}") from error
    return dict(taken)


def _explained(error: ApiException, namespace: str) -> UserError:
    try:
        message = str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError):
        message = str(error.reason)
    if error.status in (400, 422):
        return _Refused(message)
    if error.status == 404:
        return UserError(f"the cluster has no {KIND}; set crds.enabled=true, or {_UPDATE}: {message}")
    if error.status == 403:
        return UserError(f"this account may not create runs in namespace {namespace}; bind it a role: {message}")
    return UserError(f"the API server answered {error.status}: {message}")


def _manifest(spec: Object) -> Object:
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "helm-test"}, "spec": spec}


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="heterorl_operator.helm_test", description=__doc__)
    parser.add_argument("--namespace", required=True, help="where to try")
    arguments = parser.parse_args()
    try:
        with connect(pool_size=1) as client:
            check(CustomObjectsApi(client), arguments.namespace)
    except ConfigException as error:
        print(f"no way to reach a cluster; run in a pod, or set KUBECONFIG: {error}", file=sys.stderr)
        return UserError.exit_code
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
