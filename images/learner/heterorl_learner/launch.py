"""`python -m heterorl_learner launch --root ROOT --spec FILE`: one pod of the learner.

    wait for the preparation ─▶ start the ranks ─▶ they end ─┬─▶ trained: idle, so that `kubectl logs` still answers
                                                             ├─▶ given up: idle, not ready
                                                             └─▶ else: end with their exit code, to be started again

It starts the pod's ranks as `heterorl run` does and hands SIGTERM on to them. A StatefulSet starts again whatever ends;
so a pod that has nothing more to do, its devices given back, idles until it is scaled away. All its life it serves
/ready and /metrics: first the run's progress, read from the volume, then the metrics of the rank that trains.

How the ranks ended is kept on the volume (`heterorl.exchange.crash_budget`): exit code 2 and a used-up budget are given
up. A pod that is told to go says so there at once. The first pod then has all ranks, which train together,
save and leave.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST

from heterorl.entry import Process
from heterorl.errors import VOLUME_IN_USE
from heterorl.exchange.crash_budget import Attempts, attempts_of, gave_up, outcome_of
from heterorl.exchange.evaluations import Pins, due_now
from heterorl.exchange.exchange import Exchange
from heterorl.exchange.learner_state import LAUNCHER
from heterorl.exit_codes import TOLD_TO_GO, describe_exit
from heterorl.local.outages import Outages
from heterorl.local.processes import ManagedProcess, Rendezvous
from heterorl.monitoring.http import Endpoint, text_page
from heterorl.monitoring.run_metrics import run_progress, to_text
from heterorl.monitoring.snapshot import SnapshotReader
from heterorl.spec.run import LearnerSpec

log = logging.getLogger("heterorl_learner.launch")

_POLL_S = 0.5
"""How often the volume is polled."""
_SCRAPE_S = 2.0


def serve(process: Process) -> int:
    """Train unless it is done, then idle; the exit code is that of the ranks, as a shell would give it."""
    pod = LearnerPod(process.exchange, [sys.executable, "-m", "heterorl_learner", *process.arguments], process.stop)
    pages = {"/metrics": lambda: (200, CONTENT_TYPE_LATEST, pod.metrics()), "/ready": text_page(pod.readiness)}
    host = os.environ.get("HETERORL_METRICS_HOST", "127.0.0.1")
    with Endpoint(host, pod.exchange.spec.monitoring.prometheus_port, pages), process.stop.finishing(math.inf):
        return pod.serve()


class LearnerPod:
    """One pod of the learner. Each of its ranks runs `command`; `stop` is set when the pod is told to go."""

    def __init__(self, exchange: Exchange, command: Sequence[str], stop: threading.Event) -> None:
        self.exchange = exchange
        self._command, self._stop, self._env = command, stop, dict(os.environ)
        self._node = int(self._env.get("NODE_RANK", "0"))
        pod = self._env.get("POD_UID", "")
        exchange.launcher = self._env[LAUNCHER] = pod or uuid.uuid4().hex
        self._attempts = Attempts(exchange, self._node, pod)
        self._outages = Outages(exchange.root, log.warning)
        self._reader = SnapshotReader(exchange)
        self._ranks: ManagedProcess | None = None
        self._started: float | None = None
        # Only the operator evaluates, and it gives the run its uid: without it no pins are needed.
        self._pins = Pins(exchange) if self._node == 0 and exchange.run.metadata.uid else None

    def serve(self) -> int:
        """Run the ranks once; return their exit code, or idle until told to stop where another start would not help."""
        self._reached(self._attempts.settle)
        said = None
        while not self._stop.is_set():
            if (reason := self._reason_to_idle()) is None:
                code = self._run_ranks()
                if not self._is_taken_over() and (self._stop.is_set() or self._reason_to_idle() is None):
                    return code if code >= 0 else 128 - code
                continue
            if reason != said:
                log.info("%s", reason)
            said = reason
            self._keep_versions()
            self._stop.wait(_POLL_S)
        return 0

    def _reason_to_idle(self) -> str | None:
        """Why no ranks are to be started now, in words; None to start them."""
        try:
            return self._nothing_to_do()
        except OSError as error:
            return f"waiting for the volume: {error}"

    def _nothing_to_do(self) -> str | None:
        policy = self.exchange.spec.failure_policy
        why = gave_up(attempts_of(self.exchange), policy, self.exchange.successor)
        if why and why[0] == VOLUME_IN_USE:
            return f"idling, because {why[1]}"
        if self.exchange.prepared is None:
            return "waiting until the preparation has put model and data of this run on the volume"
        if self.exchange.trained:
            return "trained; idling until this pod is scaled away"
        if (other := self.exchange.successor_of_launcher) is not None:
            return f"idling, because {other}"
        if why and (why[0] != "UserError" or self._attempts.asked_for_its_user()):
            return f"idling, because {why[1]}"
        return None

    # ── the ranks ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _run_ranks(self) -> int:
        learner = self.exchange.spec.learner
        env = {
            **self._env,
            "OMP_NUM_THREADS": str(threads_of(learner, self._env)),
            "HETERORL_METRICS_HOST": "127.0.0.1",
            "HETERORL_METRICS_PORT": "0",  # any free one, which the rank notes in the file
        }
        self._reached(lambda: self.exchange.files.remove(self._port_file))
        file = self.exchange.logs_dir / (f"learner-node{self._node}.log" if self._node else "learner.log")
        meeting = rendezvous_of(learner, self._env)
        self._reached(self._attempts.begin)
        self._started = self.exchange.now()
        ranks = ManagedProcess(
            self._command, env, file, ranks=learner.processes_per_replica, rendezvous=meeting, echo=True
        )
        self._ranks = ranks
        code = self._wait_for(ranks)
        self._ranks = self._started = None
        if not self._is_taken_over():
            self._reached(lambda: self._attempts.end(outcome_of(code), code, ranks.last_line))
        log.log(logging.ERROR if code else logging.INFO, "the learner ended: %s", describe_exit(code))
        return code

    def _wait_for(self, ranks: ManagedProcess) -> int:
        """The ranks' exit code once all are gone, or minus the signal's number; they are told when they are to go."""
        gone_before, kill_at = self._pods_gone(), None
        while (code := ranks.poll()) is None:
            if self._is_taken_over():
                # Told to leave they would save, on a volume that is the other run's by now.
                ranks.signal(signal.SIGKILL)
            elif kill_at is None and (self._stop.is_set() or self._pods_gone() - gone_before):
                with self._outages.lived_through():
                    self._attempts.end("signalled")
                ranks.signal(signal.SIGTERM)
                # By then another pod that was told to go is gone, and those that train with it would wait for ever.
                kill_at = time.monotonic() + self.exchange.spec.learner.pod_template.termination_grace_period_seconds
            elif kill_at is not None and time.monotonic() >= kill_at:
                ranks.signal(signal.SIGKILL)
            self._keep_versions()
            time.sleep(_POLL_S)
        return code

    def _reached(self, operation: Callable[[], object]) -> None:
        """Do it once the volume is within reach; a pod that is told to go meanwhile goes."""

        def wait(seconds: float) -> None:
            if self._stop.wait(seconds):
                raise SystemExit(TOLD_TO_GO)

        self._outages.until_over(operation, wait=wait)

    def _is_taken_over(self) -> bool:
        """Whether another run goes on from our volume: two learners would train each other's rollouts."""
        try:
            return self.exchange.successor is not None
        except OSError:
            return False  # the volume is out of sight for a moment

    def _pods_gone(self) -> set[tuple[int, float]]:
        """Attempts of other pods that were told to go; only the first pod acts on them."""
        if self._node != 0 or self.exchange.spec.learner.replicas == 1:
            return set()
        try:
            found = attempts_of(self.exchange).items()
        except OSError as error:
            log.warning("attempts of the other pods: %s", error)
            return set()
        return {(node, a.started) for node, of_node in found if node for a in of_node if a.outcome == "signalled"}

    def _keep_versions(self) -> None:
        """Keep what waits for its evaluation from being retired; at the next look if the volume fails for a moment."""
        try:
            if self._pins is not None and self.exchange.prepared is not None:
                self._pins.keep(due_now(self.exchange, finished=self.exchange.trained))
        except OSError as error:
            log.warning("versions due for evaluation: %s", error)

    # ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def metrics(self) -> bytes:
        """The run's progress, then what the rank that trains says itself."""
        progress = run_progress(self._reader.read(), training_since=self._started)
        return to_text(progress, self.exchange.run.metadata.name) + (self._rank_metrics() or b"")

    def readiness(self) -> tuple[bool, str]:
        """Whether the engine is built, as far as this pod can tell, or the run is trained; and how it is."""
        if self.exchange.prepared is not None and self.exchange.trained:
            return True, "trained"
        if self._ranks is None:
            return False, self._reason_to_idle() or "starting the ranks"
        serves = self._node > 0 or self._rank_metrics() is not None
        return serves, "training" if serves else "building the engine"

    def _rank_metrics(self) -> bytes | None:
        """The metrics of rank 0, which it serves once its engine is built; None before, and where it is elsewhere."""
        if self._ranks is None or self._node > 0:
            return None
        try:
            port = int(self._port_file.read_text())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_SCRAPE_S) as answer:
                return bytes(answer.read())
        except (OSError, ValueError):
            return None

    @property
    def _port_file(self) -> Path:
        return self.exchange.metrics_dir / "learner.port"


def rendezvous_of(learner: LearnerSpec, env: Mapping[str, str]) -> Rendezvous | None:
    """Where this pod's ranks meet those of the others; None when there are no others."""
    if learner.replicas == 1:
        return None
    return Rendezvous(env["MASTER_ADDR"], int(env["MASTER_PORT"]), int(env["NODE_RANK"]), learner.replicas)


def threads_of(learner: LearnerSpec, env: Mapping[str, str]) -> int:
    """Threads of each rank: the spec's, or an even share of the pod's cores, given as OMP_NUM_THREADS."""
    cores = int(env.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return learner.threads or max(1, cores // learner.processes_per_replica)
