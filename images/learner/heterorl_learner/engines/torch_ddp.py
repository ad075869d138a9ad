"""Plain PyTorch: one process, or DDP over several."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from heterorl.spec.run import RunSpec
from heterorl_learner import ranks
from heterorl_learner.batching import MicroBatch
from heterorl_learner.engines.base import Policy, TrainingEngine, build_optimizer, unique_tensors

STATE_FILE = "engine.pt"


class TorchEngine(TrainingEngine):
    """float32 weights throughout; with dtype bfloat16 they are the master weights of a bfloat16 autocast.

    In bfloat16 itself an update below 1/256 of a weight would be lost, and at a rate of 1e-6 nearly all are.
    """

    def __init__(self, policy: Policy, spec: RunSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self._bare = policy
        self._optimizer = build_optimizer(self._bare, spec.learner)
        self._max_grad_norm = spec.learner.optimizer.max_grad_norm
        self.policy = self._bare
        if self.world_size > 1:
            self.policy = DistributedDataParallel(self._bare, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def _step(self, learning_rate: float) -> float:
        gradients = [p.grad for p in self._bare.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if norm.isfinite():
            clip_grads_with_norm_(self._bare.parameters(), self._max_grad_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm.item()

    def full_state_dict(self) -> dict[str, Tensor]:
        if self.rank != 0:
            return {}
        return {
            name: tensor.detach().to("cpu", self.dtype, copy=True)
            for name, tensor in unique_tensors(self._bare).items()
        }

    def save(self, folder: Path) -> None:
        if self.rank == 0:
            state = {"policy": self._bare.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, folder / STATE_FILE)
        ranks.barrier()

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        self._bare.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _logps(self, batch: MicroBatch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return super()._logps(batch)

    def _accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        if is_last or not isinstance(self.policy, DistributedDataParallel):
            return nullcontext()
        return self.policy.no_sync()

    def _backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # DDP averages over ranks; the shares are to be summed
