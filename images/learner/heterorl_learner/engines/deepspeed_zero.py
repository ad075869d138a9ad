"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and weights (3) divided among the ranks, on GPUs or CPUs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from heterorl.errors import UserError
from heterorl.exchange.storage import persistently
from heterorl.spec.run import RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.policy import Policy
from heterorl_learner.engines.torch_ddp import Saving, TrainingEngine, build_optimizer, unique_tensors, write_state

CHECKPOINT_TAG = "deepspeed"
BUCKET_ELEMENTS = 200_000_000


class DeepSpeedEngine(TrainingEngine):
    """Weights in the spec's dtype, with float32 master weights and gradient sums beside bfloat16 ones."""

    _zero: Any
    """`policy` again, by DeepSpeed's own interface, which is untyped."""

    def __init__(self, policy: Policy, spec: RunSpec, device: torch.device) -> None:
        super().__init__(policy, spec, device)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # None of DeepSpeed's own kernels is used; declared unavailable, none is compiled, which takes over a minute.
        deepspeed.ops.__compatible_ops__ = {}
        engine, *_ = deepspeed.initialize(
            model=self._bare,
            optimizer=build_optimizer(self._bare, spec.learner),
            config=zero_config(spec, self._bare),
            dist_init_required=False,
        )
        self.policy, self._zero = engine, engine
        engine.checkpoint_engine = PersistentFiles()
        engine._copy_recovery_script = lambda folder: None  # a checkpoint has the model beside it
        self._partitioned = spec.learner.strategy == "zero3"

    def _step(self, learning_rate: float) -> float:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self._zero.step()  # where the norm is not finite it leaves the update out and clears the gradient
        return float(self._zero.get_global_grad_norm()) if self._zero.was_step_applied() else math.nan

    def save(self, folder: Path) -> Saving:
        """DeepSpeed writes at once: what it holds is its own to copy."""
        self._zero.save_checkpoint(str(folder), tag=CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=True)
        tensors = self.full_state_dict()
        ranks.barrier()
        return Saving(lambda: None, lambda: tensors)

    def load(self, folder: Path) -> None:
        saved = len(list((folder / CHECKPOINT_TAG).glob("*_optim_states.pt")))
        if saved != self.world_size:
            raise UserError(
                f"{folder} holds the optimizer state of {saved} ranks, but this learner has {self.world_size};"
                f" ZeRO divides it by rank: set learner.replicas and processesPerReplica so that they make {saved}"
            )
        whole = self.adapter_config is None  # what is frozen is not in it
        self._zero.load_checkpoint(str(folder), tag=CHECKPOINT_TAG, load_module_strict=whole)

    def _accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        self._zero.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self._zero.backward(loss * self.world_size)  # DeepSpeed averages over ranks; the shares are to be summed

    def _gather_tensors(self, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {}
        for name, tensor in unique_tensors(self._bare).items():
            # One gather at a time, never nested: leaving an inner one would take the outer one's weights away.
            with deepspeed.zero.GatheredParameters([tensor], enabled=self._partitioned):
                if self.rank == 0:
                    tensors[name] = self._copied(tensor, into.get(name))
        return tensors


class PersistentFiles(TorchCheckpointEngine):  # type: ignore[misc]  # untyped
    """How DeepSpeed writes and reads the files of a checkpoint: again from the beginning after an error that passes.

    Each rank tries its own files again, so the ranks need not agree on anything.
    """

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; an error is raised, which DeepSpeed would only log."""
        persistently(lambda: os.makedirs(path, exist_ok=exist_ok), what=path)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file."""
        persistently(lambda: write_state(state_dict, Path(path)), what=path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file."""
        return persistently(lambda: super(PersistentFiles, self).load(path, map_location), what=path)


def zero_config(spec: RunSpec, policy: Policy) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    How many micro-batches make a step varies, so the engine tells DeepSpeed which is the last (see `_accumulating`) and
    the number of accumulation steps stays 1, which also keeps DeepSpeed from dividing the loss by it.
    """
    num_parameters = sum(p.numel() for p in policy.parameters())
    bucket = min(num_parameters, BUCKET_ELEMENTS)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.learner.optimizer.max_grad_norm,
        "bf16": {"enabled": spec.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": int(spec.learner.strategy.removeprefix("zero")),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Norms stay whole on every rank, matrices are divided.
            "stage3_param_persistence_threshold": 10 * policy.model.config.hidden_size,
        },
    }
