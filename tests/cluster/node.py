"""A node for the test cluster: containerd and kubelet in Linux namespaces of their own, so that pods really run.

        this machine                                     the node's namespaces (network, mounts, processes)
    ┌─────────────────────────────┐                   ┌──────────────────────────────────────────────────┐
    │ API server  198.19.0.1:443  │   198.18.255.0/30 │ kubelet, containerd, its shims                   │
    │ CoreDNS     198.19.0.10:53  ├──── veth pair ────┤ forwards to a veth for each pod, 198.18.0.0/24   │
    └─────────────────────────────┘                   └──────────────────────────────────────────────────┘

The API server listens on the address of its own Service, and CoreDNS on the one pods are told, so neither pods nor
charts need a proxy or a special address. Pods reach this machine's end of the link and nothing beyond it. When the
first process of the namespaces ends, the kernel ends all others and takes mounts and interfaces away; only control
groups are left to remove.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

API_ADDRESS, DNS_ADDRESS = "198.19.0.1", "198.19.0.10"
API_PORT = 443
HOST_ADDRESS, NODE_ADDRESS = "198.18.255.1", "198.18.255.2"
POD_NETWORK = "198.18.0.0/24"
LINK = "heterorl-host"
NAME = "node"
PAUSE_IMAGE = "localhost/pause:1"
CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# The kubelet sets these for the whole machine; in the namespaces it finds copies in their place.
TUNABLES = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def lacking() -> str | None:
    """What this machine lacks for a node, and how to get it; None when it has all."""
    if os.geteuid() != 0:
        return "a node needs root: run the tests with sudo, or in a container of your own"
    for tool, package in {"runc": "runc", "unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}.items():
        if not shutil.which(tool):
            return f"a node needs {tool}: apt-get install {package}"
    if not _cni_folder():
        return "a node needs the CNI plugins ptp and host-local: apt-get install containernetworking-plugins"
    return None


class Node:
    """The node's namespaces and network, from entering the `with` block to leaving it."""

    def __init__(self, folder: Path, programs: Mapping[str, Path]) -> None:
        self.folder, self.programs = folder, programs
        self.socket = folder / "containerd.sock"
        self._leaving = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as leaving:
            make_control_groups(self.folder.name)
            leaving.callback(remove_control_groups, self.folder.name)
            self._unshare()
            leaving.callback(self._end)
            self._mount()
            self._connect()
            leaving.callback(_run, "ip", "link", "delete", LINK, check=False)
            self._write_files()
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.close()

    def inside(self, *command: str | Path) -> list[str]:
        """The command, to be run on the node."""
        spaces = ("--mount", "--net", "--pid", "--ipc", "--uts")
        return ["nsenter", "--target", str(self.init), *spaces, "--", *map(str, command)]

    def servers(self) -> dict[str, list[str]]:
        """Command of each server, in the order of their start."""
        kubelet = [
            f"--config={self.folder}/kubelet.json",
            f"--kubeconfig={self.folder}/kubelet.kubeconfig",
            f"--root-dir={self.folder}/kubelet",
            f"--cert-dir={self.folder}/kubelet-pki",
            f"--hostname-override={NAME}",
            f"--node-ip={NODE_ADDRESS}",
        ]
        # The shim and runc are found by name.
        path = f"PATH={self.programs['containerd'].parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        containerd = ["env", path, str(self.programs["containerd"]), "--config", f"{self.folder}/containerd.toml"]
        return {
            "coredns": [str(self.programs["coredns"]), "-conf", f"{self.folder}/Corefile"],
            "containerd": self.inside(*containerd),
            "kubelet": self.inside(self.programs["kubelet"], *kubelet),
        }

    def load_image(self, archive: Path) -> None:
        """Import an OCI or docker archive; pods use it with `imagePullPolicy: Never` or `IfNotPresent`."""
        ctr = (self.programs["ctr"], "--address", self.socket, "--namespace", "k8s.io")
        _run(*self.inside(*ctr, "images", "import", archive))

    def load_pause_image(self) -> None:
        """The image that holds a pod's namespaces."""
        archive = self.folder / "pause.tar"
        write_image(archive, PAUSE_IMAGE, self.programs["pause"])
        self.load_image(archive)

    # ── namespaces ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _unshare(self) -> None:
        """The first process: it reaps what becomes its child, and dies with this one."""
        namespaces = ("--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc")
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, str(self.programs["pause"])]
        log = self.folder / "unshare.log"
        with log.open("wb") as output:
            self._outer = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._outer.poll() is None:
            children = psutil.Process(self._outer.pid).children()
            if children and children[0].name() == "pause":
                self.init = children[0].pid
                return
            time.sleep(0.02)
        self._outer.kill()
        raise RuntimeError(f"unshare made no namespaces; this machine may forbid them: {log.read_text().strip()}")

    def _end(self) -> None:
        psutil.Process(self.init).kill()
        self._outer.wait()

    def _mount(self) -> None:
        """Fresh folders where programs write at fixed places."""
        for place in ("/run", "/var/log", "/var/lib"):
            _run(*self.inside("mount", "-t", "tmpfs", "tmpfs", place))
        tunables = self.folder / "tunables"
        for name, value in TUNABLES.items():
            copy = tunables / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(value)
            _run(*self.inside("mount", "--bind", copy, f"/proc/sys/{name}"))

    def _connect(self) -> None:
        """The link to this machine, and the way to the pods."""
        if (Path("/sys/class/net") / LINK).exists():
            raise RuntimeError(
                f"interface {LINK} exists: another cluster with a node runs on this machine; end it first"
            )
        _run("ip", "link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", str(self.init))
        for address in (f"{HOST_ADDRESS}/30", f"{API_ADDRESS}/32", f"{DNS_ADDRESS}/32"):
            _run("ip", "address", "add", address, "dev", LINK)
        _run("ip", "link", "set", LINK, "up")
        for arguments in ("link set lo up", f"address add {NODE_ADDRESS}/30 dev eth0", "link set eth0 up"):
            _run(*self.inside("ip", *arguments.split()))
        _run(*self.inside("ip", "route", "add", "default", "via", HOST_ADDRESS))
        _run(*self.inside("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"))
        _run("ip", "route", "add", POD_NETWORK, "via", NODE_ADDRESS, "dev", LINK)

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def _write_files(self) -> None:
        network = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "ptp",
                    "ipam": {"type": "host-local", "subnet": POD_NETWORK, "routes": [{"dst": "0.0.0.0/0"}]},
                }
            ],
        }
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "authentication": {"x509": {"clientCAFile": f"{self.folder}/server.crt"}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": "cluster.local",
            "resolvConf": f"{self.folder}/resolv.conf",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.folder.name}",  # else pods land in a group that other containerds share
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "syncFrequency": "5s",  # how soon pods see that their ConfigMap was edited; a minute by default
            "makeIPTablesUtilChains": False,
            "registerNode": True,
            # A full disk of this machine is not the pods' affair.
            "evictionHard": {"memory.available": "100Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }
        files = {
            "cni/pods.conflist": json.dumps(network),
            "kubelet.json": json.dumps(kubelet),
            "containerd.toml": self._containerd_config(),
            "resolv.conf": f"nameserver {DNS_ADDRESS}\n",
            "Corefile": self._corefile(),
        }
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    def _containerd_config(self) -> str:
        return f"""\
version = 3
root = "{self.folder}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt"]  # they write outside of the folder
[grpc]
address = "{self.socket}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true  # lowering it takes a capability that a container of ours may lack
enable_unprivileged_ports = false
enable_unprivileged_icmp = false
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{_cni_folder()}"]
conf_dir = "{self.folder}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false
"""

    def _corefile(self) -> str:
        return f"""\
cluster.local {{
    bind {DNS_ADDRESS}
    kubernetes {{
        kubeconfig {self.folder}/admin.kubeconfig admin
    }}
}}
. {{
    bind {DNS_ADDRESS}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


def write_image(archive: Path, name: str, program: Path) -> None:
    """A docker archive of an image that holds one static program and runs it."""

    def tar(files: Mapping[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as packed:
            for path, content in files.items():
                entry = tarfile.TarInfo(path)
                entry.size, entry.mode = len(content), 0o755
                packed.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    layer = tar({program.name: program.read_bytes()})
    config = {
        "os": "linux",
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
        "config": {"Entrypoint": [f"/{program.name}"], "User": "1000:1000"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    archive.write_bytes(
        tar(
            {
                "layer.tar": layer,
                "config.json": json.dumps(config).encode(),
                "manifest.json": json.dumps(manifest).encode(),
            }
        )
    )


def make_control_groups(name: str) -> None:
    """The control groups that all pods will be below, one in each hierarchy."""
    unified = (CONTROL_GROUPS / "cgroup.controllers").exists()
    for hierarchy in [CONTROL_GROUPS] if unified else CONTROL_GROUPS.iterdir():
        (hierarchy / name).mkdir(exist_ok=True)


def remove_control_groups(name: str) -> None:
    """Remove the control groups that pods of the cluster of that name left; they must have no process any more."""
    for top in [*CONTROL_GROUPS.glob(f"*/{name}"), *CONTROL_GROUPS.glob(name)]:
        for folder, _, _ in os.walk(top, topdown=False):
            for _ in range(50):  # the kernel may still be ending the last processes
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
                    break
                time.sleep(0.1)


def _cni_folder() -> str | None:
    return next((folder for folder in CNI_FOLDERS if (Path(folder) / "ptp").exists()), None)


def _run(*command: str | Path, check: bool = True) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
