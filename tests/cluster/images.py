"""HeteroRL's images in the test cluster: `make images` upon a plain Debian, and what their pods need besides.

The operator's image is complete. Those of learner and sampler lack their dependencies, which are gigabytes: their pods
mount this machine's site-packages instead. Pod Security forbids folders of the node in pods, so both these and the
run's volume come through claims. Image layers are kept in ~/.cache/heterorl/images; remove it to build afresh.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.harness import Cluster, Unavailable

ROOT = Path(__file__).parents[2]
PREFIX, TAG = "localhost/heterorl", "test"
"""As for `heterorl render --images PREFIX --image-tag TAG`."""
OPERATOR, LEARNER, SAMPLER = (f"{PREFIX}/{name}:{TAG}" for name in ("operator", "learner", "sampler"))

SUITE, PACKAGES = "bookworm", ("python3", "ca-certificates")
SUITE_PYTHON = (3, 11)
USER_ID = 1000
_PACKAGES_MOUNT = "/packages"
# How pip and uv reach their registry, where the environment says so; the last two name files.
_REGISTRY_ENV = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_CERT", "SSL_CERT_FILE")
_FILE_ENV = _REGISTRY_ENV[2:]


def lacking() -> str | None:
    """What this machine lacks to build the images and run their pods, and how to get it; None when it has all."""
    for tool in ("buildah", "debootstrap", "make"):
        if not shutil.which(tool):
            return f"images for the cluster need {tool}: apt-get install {tool}"
    if sys.version_info[:2] != SUITE_PYTHON:
        wanted, found = (".".join(map(str, version)) for version in (SUITE_PYTHON, sys.version_info[:2]))
        return f"pods use this environment's packages with Debian's Python {wanted}, and it is of {found}"
    return None


@functools.cache
def build_archive() -> Path:
    """An archive of the three images, built once a session; Unavailable says what this machine lacks."""
    if lack := lacking():
        raise Unavailable(lack)
    folder = _cache_folder()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may start together
        base = _base_image(folder)
        _make_images(folder, base, "operator")
        _make_images(folder, base, "learner sampler", "--build-arg", "WITH_DEPENDENCIES=false")
        return _export(folder)


def inspect(name: str) -> dict[str, Any]:
    """The image's OCI configuration: `config` with its user, environment and labels, `history`."""
    found: dict[str, Any] = json.loads(_buildah(_cache_folder(), "inspect", "--type", "image", name))["OCIv1"]
    return found


@dataclass(frozen=True)
class Site:
    """A namespace made ready for runs: Pod Security `restricted` is enforced, and volumes are there to be claimed."""

    cluster: Cluster
    namespace: str
    folder: Path
    """Where the volumes are, by the name of their run."""

    @property
    def pod_template(self) -> dict[str, Any]:
        """What every `podTemplate` of a run must hold here."""
        return {
            "env": [
                {"name": "PYTHONPATH", "value": _PACKAGES_MOUNT},
                {"name": "TORCHDYNAMO_DISABLE", "value": "1"},  # else vLLM compiles a kernel for a minute, on a CPU
            ],
            "volumes": [{"name": "packages", "persistentVolumeClaim": {"claimName": "packages", "readOnly": True}}],
            "volumeMounts": [{"name": "packages", "mountPath": _PACKAGES_MOUNT, "readOnly": True}],
        }

    def make_volume(self, run: str) -> Path:
        """A folder for the claim that the run of this name makes."""
        volume = self.folder / run
        volume.mkdir()
        os.chown(volume, USER_ID, USER_ID)  # no driver does it for a folder of the node
        self._offer(volume, f"{run}-volume", "ReadWriteMany")
        return volume

    def adopt(self, manifest: dict[str, Any]) -> Path:
        """Let the manifest's pods run here: fill in its podTemplates, and make its volume, whose folder is given back."""
        spec = manifest["spec"]
        for role in (spec["learner"], spec.setdefault("evaluation", {}), *spec["samplers"]):
            role["podTemplate"] = {**self.pod_template, **role.get("podTemplate", {})}
        manifest["metadata"]["namespace"] = self.namespace
        return self.make_volume(manifest["metadata"]["name"])

    def _offer(self, path: Path, claim: str, mode: str) -> None:
        """A PersistentVolume of a folder, for the claim of that name alone."""
        spec = {
            "accessModes": [mode],
            "capacity": {"storage": "1Ti"},  # nobody holds a folder to it
            "claimRef": {"namespace": self.namespace, "name": claim},
            "hostPath": {"path": str(path)},
            "persistentVolumeReclaimPolicy": "Retain",
        }
        metadata = {"name": f"{self.namespace}-{claim}", "labels": {"site": self.namespace}}
        self._apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec})

    def _apply(self, document: dict[str, Any]) -> None:
        self.cluster.kubectl("apply", "-n", self.namespace, "-f", "-", stdin=json.dumps(document))


@contextlib.contextmanager
def site(cluster: Cluster, namespace: str) -> Iterator[Site]:
    """Make the namespace ready for runs; what they left on their volumes goes with the cluster."""
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    folder = cluster.folder / "volumes" / namespace
    folder.mkdir(parents=True)
    made = Site(cluster, namespace, folder)
    made._offer(Path(sysconfig.get_path("purelib")), "packages", "ReadOnlyMany")
    size = {"requests": {"storage": "1Gi"}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "packages"}}
    made._apply({**claim, "spec": {"accessModes": ["ReadOnlyMany"], "resources": size}})
    yield made
    cluster.kubectl("delete", "persistentvolume", "-l", f"site={namespace}", "--wait=false")


# ── how the images are made ──────────────────────────────────────────────────────────────────────────────────────────
def _cache_folder() -> Path:
    """Where image layers are kept; a store of its own, beside those of the machine's other images."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "heterorl" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
    )
    return folder


def _base_image(folder: Path) -> str:
    """A plain Debian with Python, as `BASE_IMAGE`; made once."""
    key = hashlib.sha256(repr((SUITE, PACKAGES)).encode()).hexdigest()[:12]
    name = f"localhost/heterorl-base:{SUITE}-{key}"
    if _buildah(folder, "images", "--quiet", "--filter", f"reference={name}"):
        return name
    with tempfile.TemporaryDirectory(dir=folder) as root:
        _run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, root)
        for needless in ("cache/apt", "lib/apt/lists"):
            shutil.rmtree(Path(root) / "var" / needless)
        container = _buildah(folder, "from", "scratch")
        _buildah(folder, "add", "--quiet", container, f"{root}/", "/")
        _buildah(folder, "commit", "--quiet", "--rm", container, name)
    return name


def _make_images(folder: Path, base: str, names: str, *flags: str) -> None:
    for name in _REGISTRY_ENV:
        if name in os.environ:
            flags += ("--build-arg", name)
    for path in sorted({os.environ[name] for name in _FILE_ENV if name in os.environ}):
        flags += ("--volume", f"{path}:{path}:ro")
    variables = {"IMAGES": names, "REGISTRY": PREFIX, "TAG": TAG, "BASE_IMAGE": base, "BUILDER": "buildah"}
    variables["BUILD_FLAGS"] = " ".join(flags)
    _run("make", "-C", str(ROOT), "images", *(f"{key}={value}" for key, value in variables.items()), folder=folder)


def _export(folder: Path) -> Path:
    """One archive of all three, in which common layers are once."""
    archive = folder / "images.tar"
    with tempfile.TemporaryDirectory(dir=folder) as layout:
        for name in (OPERATOR, LEARNER, SAMPLER):
            _buildah(folder, "push", "--quiet", name, f"oci:{layout}:{name}")
        partial = archive.with_suffix(".partial")
        with tarfile.open(partial, "w") as packed:
            packed.add(layout, ".")
        partial.replace(archive)
    return archive


def _buildah(folder: Path, *arguments: str) -> str:
    return _run("buildah", *arguments, folder=folder).strip()


def _run(*command: str, folder: Path | None = None) -> str:
    """What the command prints; RuntimeError with the end of what it said when it fails."""
    # Without a container's isolation, which a container that tests run in may not grant.
    storage = {"CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf", "BUILDAH_ISOLATION": "chroot"} if folder else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **storage})
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout
