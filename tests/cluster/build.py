"""Builds the programs of the test cluster from the Go modules beside this file: `python tests/cluster/build.py [NAME...]`.

They go to a cache folder named after the modules' sums, so a change of a version builds anew and nothing else does.
A build that was cut off goes on where it stopped: Go keeps what it compiled, and a program appears by a rename.
A program that lies in KUBEBUILDER_ASSETS is taken from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
KUBERNETES = "v1.37.2"

# By module; in the order of use, so that the small clusters can start while the rest still builds.
PROGRAMS = {
    "tools": {
        "etcd": "go.etcd.io/etcd/server/v3",
        "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
        "kubectl": "k8s.io/kubernetes/cmd/kubectl",
        "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
        "helm": "helm.sh/helm/v4/cmd/helm",
        "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
        "kwok": "sigs.k8s.io/kwok/cmd/kwok",
        "kubelet": "k8s.io/kubernetes/cmd/kubelet",
        "coredns": "github.com/coredns/coredns",
    },
    "containerd": {
        "containerd": "github.com/containerd/containerd/v2/cmd/containerd",
        "containerd-shim-runc-v2": "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        "ctr": "github.com/containerd/containerd/v2/cmd/ctr",
    },
    "pause": {"pause": "."},
}
NAMES = [name for packages in PROGRAMS.values() for name in packages]
# Clients and Helm parse the server's version, which Go would leave at v0.0.0.
LDFLAGS = f"-s -w -X k8s.io/component-base/version.gitVersion={KUBERNETES}"


def bin_folder() -> Path:
    """Where this version of the programs is, or will be."""
    sums = hashlib.sha256(LDFLAGS.encode())
    for module in PROGRAMS:
        for file in sorted((HERE / module).iterdir()):
            sums.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "heterorl" / f"cluster-{sums.hexdigest()[:12]}" / "bin"


def find(name: str) -> Path | None:
    """The built program of that name, or None."""
    folders = [Path(assets)] if (assets := os.environ.get("KUBEBUILDER_ASSETS")) else []
    for folder in [*folders, bin_folder()]:
        if os.access(folder / name, os.X_OK):
            return folder / name
    return None


def build(names: list[str]) -> None:
    """Build the programs among `names` that are missing; RuntimeError says what failed."""
    folder = bin_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may start together
        missing = [name for name in names if not find(name)]
        if missing and not shutil.which("go"):
            raise RuntimeError(f"{', '.join(missing)} not built, and Go is not installed: install Go 1.26 or newer")
        for count, name in enumerate(missing, 1):
            print(f"[{count}/{len(missing)}] building {name} ...", flush=True)
            start = time.monotonic()
            _build_one(name, folder)
            print(f"[{count}/{len(missing)}] built {name} in {time.monotonic() - start:.0f} s", flush=True)


def _build_one(name: str, folder: Path) -> None:
    module, package = next((module, packages[name]) for module, packages in PROGRAMS.items() if name in packages)
    partial = folder / f".{name}.partial"
    command = ["go", "build", "-trimpath", "-buildvcs=false", "-ldflags", LDFLAGS, "-o", str(partial), package]
    built = subprocess.run(command, cwd=HERE / module, env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"})
    if built.returncode:
        raise RuntimeError(f"{name} could not be built, see above; try again: what compiled is kept")
    partial.replace(folder / name)


def main(arguments: list[str]) -> int:
    """The command line."""
    if unknown := sorted(set(arguments) - set(NAMES)):
        print(f"unknown: {', '.join(unknown)}; known are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    try:
        build(arguments or NAMES)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"the cluster's programs are in {bin_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
