"""`python -m heterorl_learner.launch --root ROOT --spec FILE`: one pod of the learner.

It starts the pod's ranks as `heterorl run` does, hands SIGTERM on to them, and ends with their exit code, so that the
container's restart is theirs. A StatefulSet starts again whatever ends; so once the run is trained, and the ranks have
given their devices back, the pod idles until it is scaled away, and `kubectl logs` still answers.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from heterorl.errors import HeteroRLError
from heterorl.exchange import Exchange
from heterorl.logs import setup_logging
from heterorl.processes import Process, Rendezvous, describe_exit
from heterorl.spec import Learner

log = logging.getLogger("heterorl_learner.launch")

_POLL_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Train unless it is done, then idle; the exit code is that of the ranks, as a shell would give it."""
    parser = argparse.ArgumentParser(prog="heterorl_learner.launch", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the run's folder on the shared volume")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="the resolved spec [ROOT/run.json]")
    args = parser.parse_args(arguments)
    setup_logging("learner-pod")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    given = ["--root", str(args.root), *(["--spec", str(args.spec)] if args.spec else [])]
    try:
        return serve(Exchange(args.root, spec_file=args.spec), [sys.executable, "-m", "heterorl_learner", *given], stop)
    except HeteroRLError as error:
        log.error("%s", error)
        return error.exit_code


def serve(exchange: Exchange, command: Sequence[str], stop: threading.Event) -> int:
    """Run the pod's ranks, each with `command`, until they end or `stop`; idle once the run is trained."""
    learner = exchange.spec.learner
    if not is_trained(exchange):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads_of(learner, os.environ))}
        meeting = rendezvous_of(learner, os.environ)
        ranks = Process(command, env, None, ranks=learner.processes_per_replica, rendezvous=meeting)
        code = wait_for(ranks, stop)
        if code or not is_trained(exchange):
            if not stop.is_set():
                log.error("the learner ended early: %s", describe_exit(code))
            return code if code >= 0 else 128 - code
    log.info("trained; idling until this pod is scaled away")
    stop.wait()
    return 0


def is_trained(exchange: Exchange) -> bool:
    """Whether the last step is trained and the output written."""
    status = exchange.learner
    return bool(status.get("finished")) and status.get("step", 0) >= exchange.spec.learner.steps


def wait_for(ranks: Process, stop: threading.Event) -> int:
    """The ranks' exit code once all are gone, or minus the signal's number; `stop` is handed on to them."""
    asked = False
    while (code := ranks.poll()) is None:
        if asked:
            time.sleep(_POLL_S)
        elif stop.wait(_POLL_S):
            ranks.signal(signal.SIGTERM)
            asked = True
    return code


def rendezvous_of(learner: Learner, env: Mapping[str, str]) -> Rendezvous | None:
    """Where this pod's ranks meet those of the others; None when there are no others."""
    if learner.replicas == 1:
        return None
    return Rendezvous(env["MASTER_ADDR"], int(env["MASTER_PORT"]), int(env["NODE_RANK"]), learner.replicas)


def threads_of(learner: Learner, env: Mapping[str, str]) -> int:
    """Threads of each rank: the spec's, or an even share of the pod's cores, given as OMP_NUM_THREADS."""
    cores = int(env.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return learner.threads or max(1, cores // learner.processes_per_replica)


if __name__ == "__main__":
    sys.exit(main())
