"""The peers: how the authors of the GEPO paper (arXiv 2508.17850) move weights and rollouts, rebuilt as small functions.

Their learner saves the whole state dict inside the step, over one file; their samplers load it, and push tensor by
tensor into the engine. A second forward gives the behaviour log-probabilities. Rollouts are pickled as they are
batched: padded, with masks. Generation goes in waves, each as long as its longest completion. A queue is a folder that
is listed, and between two looks lies a second.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAD = 0
SLEEP_S = 1.0


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def padded(
    prompts: list[NDArray[np.int32]],
    completions: list[NDArray[np.int32]],
    logps: list[NDArray[np.float32]],
    rewards: NDArray[np.float32],
    *,
    max_prompt: int,
    max_completion: int,
) -> dict[str, Any]:
    """A batch as the trainers of TRL have it: prompts padded on the left, completions on the right, int64 with masks."""
    import torch

    def rows(values: Iterable[NDArray[Any]], width: int, left: bool, dtype: torch.dtype) -> torch.Tensor:
        out = torch.full((len(completions), width), PAD, dtype=dtype)
        for row, value in zip(out, values):
            row[slice(width - len(value), None) if left else slice(len(value))] = torch.from_numpy(value).to(dtype)
        return out

    return {
        "prompt_ids": rows(prompts, max_prompt, True, torch.int64),
        "prompt_mask": rows([np.ones_like(ids) for ids in prompts], max_prompt, True, torch.int64),
        "completion_ids": rows(completions, max_completion, False, torch.int64),
        "completion_mask": rows([np.ones_like(ids) for ids in completions], max_completion, False, torch.int64),
        "old_per_token_logps": rows(logps, max_completion, False, torch.float32),
        "rewards": torch.from_numpy(rewards.copy()),
    }


def pickled(batch: Mapping[str, Any]) -> bytes:
    """What they write to the volume."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(batch), buffer)
    return buffer.getvalue()


def unpickled(data: bytes) -> dict[str, Any]:
    """And read."""
    import torch

    batch: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=False)
    return batch


# ── the queue ────────────────────────────────────────────────────────────────────────────────────────────────────────
def listed(folder: Path, *, step: int, max_steps: int, count: int) -> list[str] | None:
    """The oldest admissible files by one look at the folder; None while there are too few.

    Each look sorts all paths and takes the version out of each name. They do it for each file of a batch; here one look
    serves the whole.
    """
    found = []
    for path in sorted(folder.glob("v*")):
        version = int(path.name.split("-")[0][1:])
        if step - version <= max_steps:
            found.append(path.name)
    return found[:count] if len(found) >= count else None


def waited_for(look: Callable[[], list[str] | None]) -> list[str]:
    """Look, and sleep a second as long as there are too few."""
    while (found := look()) is None:
        time.sleep(SLEEP_S)
    return found


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def save_in_the_step(state: Mapping[str, Any], path: Path) -> None:
    """Write the whole state dict over the one file, while training waits."""
    import torch

    torch.save(dict(state), path)


def load_and_push(path: Path, model: Any, push: Callable[[Iterable[tuple[str, Any]]], object]) -> None:
    """Read it into a model of the sampler's own, then give the engine one tensor after the other."""
    import torch

    model.load_state_dict(torch.load(path, weights_only=True))
    for name, tensor in model.state_dict().items():
        push([(name, tensor)])


def second_forward(model: Any, ids: Any, temperature: float = 1.0) -> Any:
    """Log-probabilities [B, L-1] of tokens [B, L] by another forward of a transformers model."""
    import torch

    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].float() / temperature
        return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def waves(requests: list[Any], size: int, generate: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Generate `size` requests at a time, the next ones when the last of them has ended."""
    return [out for begin in range(0, len(requests), size) for out in generate(requests[begin : begin + size])]
