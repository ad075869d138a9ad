"""The factory of training engines: the device, the other ranks, the policy, and the engine of the chosen strategy."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from heterorl.errors import ModelError, SiteError
from heterorl.spec.run import LearnerSpec, RunSpec
from heterorl_learner import ranks
from heterorl_learner.engines.adapters import add_adapters
from heterorl_learner.engines.packing import choose_reading
from heterorl_learner.engines.policy import Policy
from heterorl_learner.engines.torch_ddp import DTYPES, TorchEngine, TrainingEngine


def build_engine(folder: Path, spec: RunSpec) -> TrainingEngine:
    """The engine of `learner.strategy` with the weights of a Hugging Face folder.

    It meets the other ranks first. Raises ModelError for the folder and SiteError for missing GPUs.
    """
    learner, dtype = spec.learner, DTYPES[spec.model.dtype]
    device = _device(learner)
    plain = learner.strategy == "torch"
    ranks.join(device, group_of_one=not plain)
    attention = choose_attention(spec.model.attn_implementation, dtype)
    lora = spec.model.lora
    # Plain PyTorch trains in float32; what is frozen needs no more than the run's own precision.
    held = torch.float32 if plain and not lora.is_on else dtype
    policy = load_policy(folder, held, attention, learner.gradient_checkpointing)
    if lora.is_on:
        add_adapters(policy.model, spec.model, base=folder, seed=spec.seed + lora.seed)
    policy.to(device).reading = choose_reading(policy, spec, device, autocast=plain and dtype == torch.bfloat16)
    engine: TrainingEngine
    if plain:
        engine = TorchEngine(policy, spec, device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when DeepSpeed is imported
        from heterorl_learner.engines.deepspeed_zero import DeepSpeedEngine

        engine = DeepSpeedEngine(policy, spec, device)
    if spec.algorithm.kl_to_reference.weight and not lora.is_on:
        engine.reference = load_policy(folder, dtype, attention).requires_grad_(False).to(device)
        engine.reference.reading = policy.reading
    return engine


def load_policy(
    folder: Path, dtype: torch.dtype, attention: str | None, gradient_checkpointing: bool = False
) -> Policy:
    """The model of a Hugging Face folder, on the CPU, ready to train.

    Dropout and all else that draws random numbers in training is switched off: with it the learner's probabilities
    would never match the samplers'. Only layers that recompute their activations are told that they train.
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
    policy = Policy(model).eval()
    for layer in policy.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
    return policy


def choose_attention(wanted: str, dtype: torch.dtype) -> str | None:
    """The attention kernel for `model.attnImplementation`; auto is flash_attention_2 where it can run, otherwise None:
    what transformers takes for the model, which is sdpa where the model has it.

    Raises ModelError when flash_attention_2 is asked for and cannot run.
    """
    flash = find_spec("flash_attn") is not None and torch.cuda.is_available() and dtype == torch.bfloat16
    if wanted == "auto":
        return "flash_attention_2" if flash else None
    if wanted == "flash_attention_2" and not flash:
        raise ModelError(
            "model.attnImplementation is flash_attention_2, which needs a GPU, the flash-attn package"
            " and dtype bfloat16; set auto, or install what is missing"
        )
    return wanted


def _device(learner: LearnerSpec) -> torch.device:
    if learner.gpus == 0:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise SiteError(
            f"learner.gpus is {learner.gpus}, but rank {index} of this node finds {torch.cuda.device_count()} GPUs; see"
            " nvidia-smi there, or set learner.gpus and processesPerReplica to what the node has"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
