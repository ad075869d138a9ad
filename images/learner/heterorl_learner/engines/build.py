"""The factory of training engines: devices, process group, and the engine of the chosen strategy."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch binds it where its stubs do not look

from heterorl.errors import UserError
from heterorl.spec.run import LearnerSpec, RunSpec
from heterorl_learner.engines.base import TrainingEngine


def build_engine(folder: Path, spec: RunSpec) -> TrainingEngine:
    """The engine of `learner.strategy` with the weights of a Hugging Face folder.

    Under torchrun it joins the process group first, and leaves it in `close`. Raises ModelError for the folder and
    UserError for missing GPUs.
    """
    device = _device(spec.learner)
    if not dist.is_initialized():
        _join_process_group(device, alone=spec.learner.strategy != "torch")
    if spec.learner.strategy == "torch":
        from heterorl_learner.engines.torch_ddp import TorchEngine

        return TorchEngine(folder, spec, device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when DeepSpeed is imported
    from heterorl_learner.engines.deepspeed_zero import DeepSpeedEngine

    return DeepSpeedEngine(folder, spec, device)


def _join_process_group(device: torch.device, alone: bool) -> None:
    """Joins torchrun's ranks; with `alone` a single process makes a group of one, as DeepSpeed needs it."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Rank 0 may wait for rollouts for hours while the others wait for rank 0.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    elif alone:
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _device(learner: LearnerSpec) -> torch.device:
    if learner.gpus == 0:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise UserError(
            f"learner.gpus is {learner.gpus}, but rank {index} of this machine finds {torch.cuda.device_count()} GPUs;"
            " set learner.gpus and processesPerReplica to what is there, or gpus: 0 to train on the CPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
