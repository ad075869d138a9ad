"""A Kubernetes cluster for tests, made of its real programs (see `build.py`) and taken down to the last process.

    PYTHONPATH=tests python -m cluster.harness [LEVEL]     a cluster to play with, until Ctrl-C

    level        runs                                               for
    apiserver    etcd, kube-apiserver                               the CRD, RBAC, server-side apply
    controllers  + kube-controller-manager                          children, owners, deletion
    kwok         + kube-scheduler, kwok                             thousands of pods that only seem to run
    node         + kube-scheduler, containerd, kubelet (`node.py`)  pods that run; needs root

Every server runs in a session of its own, so that Ctrl-C reaches only the test, and dies with its parent (setpriv).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster import build, node

LEVELS = {
    "apiserver": ("etcd", "kube-apiserver"),
    "controllers": ("etcd", "kube-apiserver", "kube-controller-manager"),
    "kwok": ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok"),
    "node": ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "coredns", "containerd", "kubelet"),
}
# Programs that are not servers, or that a server starts.
HELPERS = {"node": ("containerd-shim-runc-v2", "ctr", "pause")}
PREFIX = "heterorl-cluster-"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 5.0

# Name of the user and its groups, by the name of the kubeconfig.
USERS = {
    "admin": ("admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{node.NAME}", "system:nodes"),
}
AUDIT_POLICY = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata"}]}


class Unavailable(Exception):
    """This machine cannot run the cluster that was asked for; the message says what it lacks."""


class Server:
    """One program of the cluster; its output goes to `log`."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        self.name, self.command, self.log = name, [str(part) for part in command], log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, from the main thread: the kernel ends it together with the thread that started it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it as a crash would."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, insist after a while."""
        try:
            self._signal(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self.kill()

    def _signal(self, number: int) -> None:
        """To the whole session: a server on a node has nsenter before it."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, number)
            self.process.wait(STOP_LIMIT_S)

    def check(self) -> None:
        """RuntimeError with the end of its log, if it has ended."""
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else None
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended with {code}; the end of {self.log}:\n{tail}")


class Cluster:
    """A running cluster; leave the `with` block and it is gone.

    `flags` adds flags to programs by name; `audit` has every request written to `audit_log`. With USE_EXISTING_CLUSTER
    set nothing is started, and `kubeconfig` is the one of KUBECONFIG.
    """

    def __init__(
        self, level: str = "apiserver", *, flags: Mapping[str, Sequence[str]] | None = None, audit: bool = False
    ) -> None:
        self.level, self.flags, self.audit = level, flags or {}, audit
        self.existing = os.environ.get("USE_EXISTING_CLUSTER", "").lower() in ("1", "true")
        self.servers: dict[str, Server] = {}
        self.host = "127.0.0.1"
        self.node: node.Node | None = None
        self._leaving = contextlib.ExitStack()

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    def __enter__(self) -> Self:
        self.programs = find_programs("existing" if self.existing else self.level)
        with contextlib.ExitStack() as leaving:
            self.folder = leaving.enter_context(_folder())
            if self.existing:
                self._use_existing()
            else:
                if self.level == "node":
                    self.host, self.node = (
                        node.API_ADDRESS,
                        leaving.enter_context(node.Node(self.folder, self.programs)),
                    )
                leaving.callback(self._stop_servers)
                self._start()
            self._leaving = leaving.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.close()

    def _use_existing(self) -> None:
        if "KUBECONFIG" not in os.environ:
            raise Unavailable("USE_EXISTING_CLUSTER is set without KUBECONFIG; set KUBECONFIG to that cluster's file")
        if self.flags or self.audit or self.level in ("kwok", "node"):
            raise Unavailable("this test needs a cluster of its own, with other flags or other nodes than this one's")
        self.kubeconfig = Path(os.environ["KUBECONFIG"])

    def _start(self) -> None:
        (self.folder / "logs").mkdir()
        self.audit_log = self.folder / "audit.jsonl"
        self.port, etcd, peer = free_ports(3)
        if self.node:
            self.port = node.API_PORT
        self.url = f"https://{self.host}:{self.port}"
        self._write_identities()
        flags = self._flags(etcd, peer)
        commands = self.node.servers() if self.node else {}
        for name in LEVELS[self.level]:
            command = commands.get(name) or [str(self.programs[name]), *flags[name]]
            command += self.flags.get(name, ())
            self.servers[name] = Server(name, command, self.folder / "logs" / f"{name}.log")
        for name in ("etcd", "kube-apiserver"):
            self.servers[name].start()
        self.wait("the API server", self.ready)
        for name, server in self.servers.items():
            if name == "kubelet" and self.node:  # it ends at once when it finds no container runtime
                self.wait("containerd", self.node.socket.exists)
                self.node.load_pause_image()
            if server.process is None:
                server.start()
        if "kube-controller-manager" in self.servers:
            self.wait("the controllers", lambda: bool(self.get("/api/v1/namespaces/default/serviceaccounts/default")))
        if self.level == "kwok":
            made = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.NAME}}
            self.kubectl("create", "-f", "-", stdin=json.dumps(made))
        if self.level in ("kwok", "node"):
            self.wait("the node", self._node_ready)

    def _node_ready(self) -> bool:
        found = self.get(f"/api/v1/nodes/{node.NAME}") or {}
        conditions = found.get("status", {}).get("conditions", [])
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def _stop_servers(self) -> None:
        for server in reversed(self.servers.values()):
            server.stop()

    def restart(self, name: str) -> None:
        """Kill a server and start it again, on the same port and data."""
        self.servers[name].kill()
        self.servers[name].start()
        self.wait(name, self.ready)

    # ── set-up ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _write_identities(self) -> None:
        """One key and certificate for the server and the service accounts; a token and a kubeconfig for each user."""
        names = f"subjectAltName=IP:127.0.0.1,IP:{self.host},DNS:localhost,DNS:kubernetes.default.svc"
        self.key, self.certificate = self.folder / "server.key", self.folder / "server.crt"
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=heterorl-test"]
        files = ["-keyout", str(self.key), "-out", str(self.certificate)]
        made = subprocess.run([*make, "-addext", names, *files], capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"openssl made no certificate: {made.stderr}")
        self.tokens = {name: secrets.token_hex(16) for name in USERS}
        lines = [f'{self.tokens[name]},{user},{user},"{groups}"' for name, (user, groups) in USERS.items()]
        (self.folder / "tokens.csv").write_text("\n".join(lines) + "\n")
        (self.folder / "audit-policy.json").write_text(json.dumps(AUDIT_POLICY))
        for name, token in self.tokens.items():
            self.write_kubeconfig(name, token)
        self.kubeconfig = self.folder / "admin.kubeconfig"

    def write_kubeconfig(self, name: str, token: str, namespace: str = "default") -> Path:
        """A kubeconfig that acts as the owner of the token."""
        path = self.folder / f"{name}.kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self.certificate)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": name, "context": {"cluster": "test", "user": name, "namespace": namespace}}],
        }
        path.write_text(json.dumps(config, indent=1))
        return path

    def _flags(self, etcd: int, peer: int) -> dict[str, list[str]]:
        """Flags of each program, by its name."""
        etcd_url, peer_url = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
        audit = [f"--audit-policy-file={self.folder}/audit-policy.json", f"--audit-log-path={self.audit_log}"]
        kubelet = [f"--kubelet-client-certificate={self.certificate}", f"--kubelet-client-key={self.key}"]
        return {
            "etcd": [
                f"--data-dir={self.folder}/etcd",
                f"--listen-client-urls={etcd_url}",
                f"--advertise-client-urls={etcd_url}",
                f"--listen-peer-urls={peer_url}",
                f"--initial-advertise-peer-urls={peer_url}",
                f"--initial-cluster=default={peer_url}",
                "--unsafe-no-fsync",  # nothing here outlives the test
                "--log-level=warn",
            ],
            "kube-apiserver": [
                f"--etcd-servers={etcd_url}",
                f"--bind-address={self.host}",
                f"--advertise-address={self.host}",
                "--endpoint-reconciler-type=none",  # a loopback address is no endpoint
                f"--secure-port={self.port}",
                f"--tls-cert-file={self.certificate}",
                f"--tls-private-key-file={self.key}",
                f"--token-auth-file={self.folder}/tokens.csv",
                "--authorization-mode=Node,RBAC",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={self.key}",
                f"--service-account-signing-key-file={self.key}",
                "--service-cluster-ip-range=198.19.0.0/16",
                "--kubelet-preferred-address-types=InternalIP",
                "--shutdown-delay-duration=0s",
                *(audit if self.audit else ()),
                *(kubelet if self.node else ()),
            ],
            "kube-controller-manager": [
                f"--kubeconfig={self.folder}/kube-controller-manager.kubeconfig",
                f"--root-ca-file={self.certificate}",
                f"--service-account-private-key-file={self.key}",
                "--use-service-account-credentials",
                "--leader-elect=false",
                "--secure-port=0",
                "--kube-api-qps=500",  # its default of 20 is what a benchmark would measure
                "--kube-api-burst=1000",
            ],
            "kube-scheduler": [
                f"--kubeconfig={self.folder}/kube-scheduler.kubeconfig",
                "--leader-elect=false",
                "--secure-port=0",
            ],
            "kwok": [
                f"--kubeconfig={self.folder}/admin.kubeconfig",
                f"--config={build.HERE}/kwok.yaml",
                "--manage-all-nodes",
                "--node-lease-duration-seconds=40",
            ],
        }

    # ── talking to it ────────────────────────────────────────────────────────────────────────────────────────────────
    def get(self, path: str) -> Any:
        """GET a path of the API as admin; None when it is not there or not answered yet."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.tokens['admin']}"})
        context = ssl.create_default_context(cafile=str(self.certificate))
        try:
            with urllib.request.urlopen(request, timeout=5, context=context) as answer:
                body = answer.read().decode()
                return json.loads(body) if answer.headers.get_content_type() == "application/json" else body
        except OSError:  # refused, timed out, or an HTTP error
            return None

    def ready(self) -> bool:
        """Whether the API server says that it can be used."""
        return bool(self.get("/readyz") == "ok")

    def wait(self, what: str, done: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
        """Wait until `done`; RuntimeError when a server ends meanwhile, TimeoutError after the limit."""
        deadline = time.monotonic() + limit_s
        while not done():
            for server in self.servers.values():
                if server.process:
                    server.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} was not ready within {limit_s:.0f} s; see {self.folder / 'logs'}")
            time.sleep(0.1)

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """What kubectl prints; RuntimeError with its message when it fails and `check` holds."""
        command = [str(self.programs["kubectl"]), f"--kubeconfig={self.kubeconfig}", *arguments]
        # It keeps what it learnt of an address, where another cluster may listen tomorrow.
        environment = {**os.environ, "KUBECACHEDIR": str(self.folder / "kubectl-cache")}
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    @contextlib.contextmanager
    def tunnel(self, namespace: str, pod: str, port: int) -> Iterator[str]:
        """`kubectl port-forward` to a port of a pod: the address on this machine that leads there."""
        command = [str(self.programs["kubectl"]), f"--kubeconfig={self.kubeconfig}", "port-forward", f"pod/{pod}"]
        where = (f":{port}", "--namespace", namespace, "--address", "127.0.0.1")
        with subprocess.Popen([*command, *where], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                said = process.stdout.readline()  # Forwarding from 127.0.0.1:40961 -> 6070
                yield said.split()[2]
            finally:
                process.terminate()


# ── what the machine has ─────────────────────────────────────────────────────────────────────────────────────────────
def find_programs(level: str) -> dict[str, Path]:
    """Paths of the programs that a level needs; Unavailable says what this machine lacks and how to get it."""
    if level == "node" and (lack := node.lacking()):
        raise Unavailable(lack)
    wanted = [*LEVELS.get(level, ()), *HELPERS.get(level, ()), "kubectl"]
    found = {name: path for name in wanted if (path := build.find(name))}
    if missing := [name for name in wanted if name not in found]:
        raise Unavailable(f"not built: {', '.join(missing)}; build with: python {build.__file__} {' '.join(missing)}")
    for tool in ("openssl", "setpriv"):
        if not shutil.which(tool):
            raise Unavailable(f"{tool} is not installed; install Debian's openssl and util-linux or their like")
    return found


def free_ports(count: int) -> list[int]:
    """That many loopback ports nobody listens on."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder for one cluster; a lock on it tells the living from what a killed test left, which is removed here."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (left / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            node.remove_control_groups(left.name)
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def main(arguments: list[str]) -> int:
    """The command line: a cluster to play with."""
    level = arguments[0] if arguments else "controllers"
    if level not in LEVELS:
        print(f"unknown level {level}; known are {', '.join(LEVELS)}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job would ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        with Cluster(level) as cluster:
            print(f"export KUBECONFIG={cluster.kubeconfig}\nexport PATH={build.bin_folder()}:$PATH\nCtrl-C ends it.")
            while True:
                time.sleep(1)
                for server in cluster.servers.values():
                    server.check()
    except KeyboardInterrupt:
        return 0
    except (Unavailable, RuntimeError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
