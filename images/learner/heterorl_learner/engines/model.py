"""The policy: a causal language model of transformers, read as log-probabilities of given tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from heterorl.errors import ModelError
from heterorl_learner.batching import MicroBatch


class Policy(nn.Module):
    """Wraps the language model, so that what DDP and DeepSpeed call as `forward` yields log-probabilities."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logit_index: Tensor, target_ids: Tensor, temperature: float
    ) -> Tensor:
        """Log-probability of every target token; the tensors are those of a `MicroBatch`.

        Without attention_mask and cache, transformers reads the sequences' borders from the positions (block-diagonal
        mask, or varlen attention with flash_attention_2); with either given, sequences silently see each other.
        """
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logit_index
        ).logits[0]
        logits = logits.float() / temperature  # [T, vocabulary]: never made for prompt tokens
        logp: Tensor = logits.gather(1, target_ids[:, None])[:, 0] - logits.logsumexp(1)
        return logp


def token_logps(policy: nn.Module, batch: MicroBatch, temperature: float) -> Tensor:
    """Log-probability of every completion token at the generation's temperature: float32 [T], in the batch's order.

    `policy` is a `Policy`, bare or wrapped by DDP or DeepSpeed.
    """
    logp: Tensor = policy(batch.input_ids, batch.position_ids, batch.logit_index, batch.target_ids, temperature)
    return logp


def load_policy(folder: Path, dtype: torch.dtype, attention: str, gradient_checkpointing: bool = False) -> Policy:
    """The model of a Hugging Face folder, on the CPU, ready to train.

    Dropout is switched off: with it the learner's probabilities would never match the samplers'.
    Raises ModelError when the folder holds no model that can be read.
    """
    disable_progress_bar()  # logs are read by people and collectors
    try:
        config = AutoConfig.from_pretrained(folder)
        config.update({key: 0.0 for key, value in config.to_dict().items() if "drop" in key and type(value) is float})
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder} holds no causal language model that can be read: {reason}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model).train()


def choose_attention(wanted: str, dtype: torch.dtype) -> str:
    """The attention kernel for `model.attnImplementation`; auto is flash_attention_2 where it can run, otherwise sdpa.

    Raises ModelError when flash_attention_2 is asked for and cannot run.
    """
    flash = find_spec("flash_attn") is not None and torch.cuda.is_available() and dtype == torch.bfloat16
    if wanted == "auto":
        return "flash_attention_2" if flash else "sdpa"
    if wanted == "flash_attention_2" and not flash:
        raise ModelError(
            "model.attnImplementation is flash_attention_2, which needs a GPU, the flash-attn package"
            " and dtype bfloat16; write auto, or put that right"
        )
    return wanted
