"""The local run's folder and machine: everything that is checked before the first process starts.

`claim` is the one way in. It refuses what cannot work (folder in use, another spec, no space, no GPU, no vLLM) before
anything is written, and holds the folder's lock until the run and every process it started are gone. `look` refuses the
same and goes no further.
"""

from __future__ import annotations

import fcntl
import glob
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from heterorl.blame import explained
from heterorl.errors import DataError, RunFolderError, UserError
from heterorl.exchange.exchange import Exchange
from heterorl.local.outages import Outages, single_tries
from heterorl.monitoring.boards import check_boards
from heterorl.spec.load import inline_traces
from heterorl.spec.mutability import LIVE, changes, is_refused_live, within
from heterorl.spec.paths import input_paths
from heterorl.spec.run import HeteroRLRun, RunSpec

_FLOOR_BYTES = 100_000_000  # rollouts, logs and metrics of a small run
_CHECKPOINT_BYTES_PER_PARAMETER = 16  # fp32 weights and two moments, and the weights in the run's dtype


@contextmanager
def claim(manifest: Path, run: HeteroRLRun, runs_dir: Path, *, resume: bool) -> Iterator[tuple[Exchange, int]]:
    """The run's folder, ready for its processes, and the descriptor of its lock, to be handed on to them.

    Raises RunFolderError, DataError or UserError before anything is written; waits for what is out of reach. A fresh
    run that ends before its preparation is complete leaves no folder behind.
    """
    outages = Outages(runs_dir.resolve() / run.metadata.name, print)
    run, root = outages.until_over(lambda: look(manifest, run, runs_dir, resume=resume))
    with explained(root):
        exchange = Exchange(root, files=single_tries())
        lock = outages.until_over(lambda: _lock(exchange.lock_file))
        try:
            outages.until_over(lambda: exchange.create(run))
            yield exchange, lock
        finally:
            with suppress(OSError):  # what is out of reach stays, and can be resumed
                if not resume and exchange.is_empty:
                    shutil.rmtree(root)
            os.close(lock)


def look(manifest: Path, run: HeteroRLRun, runs_dir: Path, *, resume: bool = False) -> tuple[HeteroRLRun, Path]:
    """The run with absolute paths, and its folder, when it could start here; raises as `claim` and writes nothing."""
    run = with_absolute_paths(run, manifest.resolve().parent, must_exist=not resume)
    root = runs_dir.resolve() / run.metadata.name
    check_engines(run.spec)
    check_boards(run.spec.monitoring)
    check_gpus(run.spec, gpu_devices())
    check_folder(root, run, resume=resume)
    check_space(root, run.spec)
    return run, root


def runs_dir_of(manifest: Path, run: HeteroRLRun) -> Path | None:
    """Where the run's folder lies, if the manifest is the resolved one of that folder."""
    root = manifest.resolve().parent
    is_own = root.name == run.metadata.name and manifest.resolve() == Exchange(root).run_file
    return root.parent if is_own else None


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_folder(root: Path, run: HeteroRLRun, *, resume: bool) -> None:
    """Refuse a folder that is in use, used by another spec, or not there; writes nothing."""
    exchange = Exchange(root)
    if exchange.lock_file.exists():
        os.close(_lock(exchange.lock_file))
    name = run.metadata.name
    if not resume:
        if root.exists() and any(root.iterdir()):
            raise RunFolderError(
                f"{root} holds an earlier run; resume it with --resume, choose another name with"
                f" --set name={name}-2, or delete the folder"
            )
        return
    if not root.exists():
        raise RunFolderError(f"{root} does not exist, so there is nothing to resume; run without --resume")
    changes = differences(exchange.run, run)
    if changes:
        raise RunFolderError(
            f"{root} was started with another spec: {'; '.join(changes)}; undo these changes, or start a run of its own"
            f" by --set name={name}-2 without --resume"
        )


def differences(old: HeteroRLRun, new: HeteroRLRun) -> list[str]:
    """Fields that differ and may not, as `learner.batch.groups: 32 before, 16 now`. Sampler groups may come and go."""
    found = []
    for path, was, is_ in changes(old, new):
        if is_refused_live(path, was, is_):
            hint = " (it may only grow)" if within(path, LIVE) else ""
            found.append(f"{'.'.join(path)}: {was} before, {is_} now{hint}")
    return found


def _lock(path: Path) -> int:
    """Take the lock, or say who has it. Held by the descriptor and its copies, so never left behind by a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        with os.fdopen(descriptor, "rb") as file:
            holder = file.read(32).decode().strip() or "unknown"
        raise RunFolderError(
            f"{path.parent} is in use by another run (pid {holder}); wait for it, stop it with `kill {holder}`,"
            " or choose another name by --set name=..."
        ) from None
    except OSError:
        os.close(descriptor)  # or it would be locked to whoever tries again
        raise
    return descriptor


def with_absolute_paths(run: HeteroRLRun, base: Path, *, must_exist: bool) -> HeteroRLRun:
    """The run with model and data paths made absolute, relative to the manifest's folder `base`, and traces read in."""
    tree = inline_traces(run, base).resolved()
    for given in input_paths(tree["spec"]):
        path = Path(os.path.abspath(base / Path(given.value).expanduser()))
        if must_exist and not path.exists() and not glob.glob(str(path), recursive=True):
            raise DataError(
                f"{given.field}: {path} does not exist; a relative path is read from the manifest's folder {base}"
            )
        given.set(path)
    return HeteroRLRun.model_validate(tree)


# ── disk space ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_space(root: Path, spec: RunSpec) -> None:
    """Refuse to start when the disk cannot hold what the run keeps."""
    place, free = free_space(root)
    used = sum(path.lstat().st_size for path in root.rglob("*")) if root.exists() else 0
    needed = max(estimated_bytes(spec) - used, _FLOOR_BYTES)
    if free < needed:
        raise RunFolderError(
            f"{place} has {in_bytes(free)} free; this run needs about {in_bytes(needed)} for"
            f" {spec.exchange.retention.weights} weights versions and {spec.learner.checkpoint.keep} checkpoints; free"
            " some space, choose another disk with --runs-dir, or lower learner.checkpoint.keep"
        )


def free_space(root: Path) -> tuple[Path, int]:
    """The nearest folder that exists, and the bytes free on its disk."""
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    return place, shutil.disk_usage(place).free


def in_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def estimated_bytes(spec: RunSpec) -> int:
    """Bytes the run's folder will take, roughly; a model on the Hub counts as nothing, as its size is not known."""
    width = 2 if spec.model.dtype == "bfloat16" else 4
    match spec.model.source:
        case "tiny":
            tiny = spec.model.tiny
            parameters = 12 * tiny.hidden_size**2 * tiny.num_layers + 512 * tiny.hidden_size
        case "path":
            files = Path(spec.model.path or ".").glob("*.safetensors")
            parameters = sum(path.stat().st_size for path in files) // width
        case "hub":
            parameters = 0
    copies = 1 + spec.exchange.retention.weights + 1 + 1  # the start, versions, one being written, the output
    checkpoints = (spec.learner.checkpoint.keep + 1) * _CHECKPOINT_BYTES_PER_PARAMETER
    return parameters * (copies * width + checkpoints) + _FLOOR_BYTES


# ── engines and devices ──────────────────────────────────────────────────────────────────────────────────────────────
def check_engines(spec: RunSpec) -> None:
    """Refuse `engine: vllm` where vLLM is not installed."""
    fields = [f"samplers.{pool.name}.engine" for pool in spec.samplers if pool.engine == "vllm"]
    if spec.evaluation.every_steps and spec.evaluation.engine == "vllm":
        fields.append("evaluation.engine")
    if fields and importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{', '.join(fields)}: vllm is asked for and not installed; pip install 'heterorl[sampler]' (GPU) or"
            " 'heterorl[sampler-cpu]', or write engine: transformers"
        )


def gpu_devices() -> list[str]:
    """Ids of the NVIDIA GPUs that processes started here may use, without importing torch."""
    found = _listed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return found
    return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]


def _listed_gpus() -> list[str]:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines()) if listing.returncode == 0 else 0
    except (OSError, subprocess.TimeoutExpired):
        folder = Path("/proc/driver/nvidia/gpus")
        count = len(list(folder.iterdir())) if folder.is_dir() else 0
    return [str(index) for index in range(count)]


def gpu_demands(spec: RunSpec) -> dict[str, int]:
    """GPUs by process: learner, every slot as `far-0`, evaluate."""
    demands = {"learner": spec.learner.gpus * spec.learner.replicas}
    demands |= {str(slot): spec.pool(slot.pool).gpus for slot in spec.slots}
    demands["evaluate"] = spec.evaluation.gpus if spec.evaluation.every_steps else 0
    return demands


def check_gpus(spec: RunSpec, devices: list[str]) -> None:
    """Refuse to start with fewer GPUs than the processes need."""
    demands = gpu_demands(spec)
    needed = max(demands.values()) if spec.local.share_gpus else sum(demands.values())
    if needed <= len(devices):
        return
    asked = ", ".join(f"{name} {count}" for name, count in demands.items() if count)
    ways = "write gpus: 0 to run on the CPU"
    if devices and not spec.local.share_gpus and max(demands.values()) <= len(devices):
        ways += ", or local.shareGpus: true to let processes share devices"
    many = "1 GPU is" if needed == 1 else f"{needed} GPUs are"
    raise UserError(f"{many} asked for ({asked}) and {len(devices)} found by nvidia-smi; {ways}")


def assign_gpus(spec: RunSpec, devices: list[str]) -> dict[str, list[str]]:
    """Devices by process: each its own, or round robin when they are shared."""
    assigned: dict[str, list[str]] = {}
    cursor = 0
    for name, count in gpu_demands(spec).items():
        assigned[name] = [devices[(cursor + i) % len(devices)] for i in range(count)]
        cursor += count
    return assigned
