"""`python -m heterorl_operator`: the operator, until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

from heterorl.errors import UserError
from heterorl.kubernetes.manifests import Images
from heterorl.logs import setup_logging
from heterorl_operator.app import Operator, Options
from heterorl_operator.client import ApiError

log = logging.getLogger("heterorl_operator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, set up, watch; exit code 2 for a user's error, 1 for what a restart may fix."""
    options = _parse(arguments)
    try:
        Operator(options).run()
    except UserError as error:
        log.error("%s", error)
        return error.exit_code
    except ApiError as error:
        log.error("the operator exits and must be restarted: %s", error)
        return 1
    except Exception:
        log.exception("the operator exits and must be restarted")
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="heterorl_operator", description=__doc__)
    add = parser.add_argument
    add("--namespace", action="append", default=[], metavar="NAME", help="watch this namespace (repeatable) [all]")
    add("--release", default="heterorl", help="name of this installation, which owns what it makes [heterorl]")
    add("--release-namespace", default="default", metavar="NAME", help="where it is installed [default]")
    add("--learner-image", default="heterorl/learner", metavar="IMAGE", help="of learners and preparations")
    add("--sampler-image", default="heterorl/sampler", metavar="IMAGE", help="of samplers and evaluations")
    add("--image-pull-policy", choices=["Always", "IfNotPresent", "Never"], help="of the runs' pods [Kubernetes']")
    add(
        "--image-pull-secret", action="append", default=[], metavar="NAME", help="Secret of the runs' pods (repeatable)"
    )
    add(
        "--progress",
        choices=["auto", "pod-ip", "proxy"],
        default="auto",
        help="how to reach learners: at their pods' addresses, or by the API server; auto: the first inside a cluster",
    )
    add("--progress-seconds", type=float, default=15.0, metavar="S", help="how often to poll a learner [15]")
    add("--workers", type=int, default=8, metavar="N", help="runs reconciled at the same time [8]")
    add("--resync-seconds", type=float, default=600.0, metavar="S", help="reconcile each run at least this often [600]")
    add("--host", default="::", metavar="ADDRESS", help="address of /healthz and /metrics [::, all of IPv6 and IPv4]")
    add("--port", type=int, default=8080, metavar="PORT", help="port of /healthz and /metrics [8080]")
    add("--log-format", choices=["json", "plain"], default="json", help="[json]")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="[info]")
    add("--take-over", action="store_true", help="also take runs that another operator kept")
    args = parser.parse_args(arguments)
    os.environ["HETERORL_LOG_FORMAT"], os.environ["HETERORL_LOG_LEVEL"] = args.log_format, args.log_level
    setup_logging("operator")
    return Options(
        namespaces=tuple(args.namespace),
        release=args.release,
        release_namespace=args.release_namespace,
        images=Images(args.learner_image, args.sampler_image, args.image_pull_policy, tuple(args.image_pull_secret)),
        progress=args.progress,
        progress_s=args.progress_seconds,
        workers=args.workers,
        resync_s=args.resync_seconds,
        host=args.host,
        port=args.port,
        take_over=args.take_over,
    )


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # Python would wait for threads that are in the middle of something
