"""LoRA in the learner's model: adapters that peft puts into its linear layers, and that alone are trained.

The model keeps its class, forward and names; an adapted layer `q_proj` becomes `q_proj.base_layer` with
`q_proj.lora_A.default` and `q_proj.lora_B.default` beside it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heterorl.errors import ModelError
from heterorl.spec.run import ModelSpec

_NAME = "default"
"""Of the adapter, within peft."""


def add_adapters(model: PreTrainedModel, spec: ModelSpec, *, base: Path, seed: int) -> None:
    """Freeze the model and put adapters into it, float32 and with B = 0: it still computes what it did.

    `base`: the model's folder. Raises ModelError when the model does not have the layers that are to get an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model  # not loaded where there are no adapters

    lora, from_hub = spec.lora, spec.source == "hub"
    chosen = _chosen_layers(model, lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules or "all-linear",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in chosen.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(spec.name if from_hub else base.resolve()),
        revision=spec.revision if from_hub else None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of experts that it did not find
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    if config.target_parameters:
        raise ModelError(
            f"model.lora: {type(model).__name__} keeps the experts of a layer in one tensor, which gets no adapters;"
            " name linear layers outside of the experts in targetModules, such as q_proj, k_proj, v_proj and o_proj"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_config(model: PreTrainedModel) -> str | None:
    """The text of peft's adapter_config.json; None for a model without adapters."""
    if not hasattr(model, "peft_config"):
        return None
    peft: Any = model.peft_config[_NAME]
    config = peft.to_dict() | {"inference_mode": True}
    return json.dumps({key: sorted(value) if isinstance(value, set) else value for key, value in config.items()})


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the model's adapters by the names that they have in peft's files."""
    return {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".lora_" in name
    }


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The starting model for as long as the block lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _chosen_layers(model: PreTrainedModel, names: list[str]) -> dict[str, nn.Module]:
    """The linear layers with these names, or all but the output head; ModelError where there is none."""
    head = model.get_output_embeddings()
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    if not names:
        return {name: layer for name, layer in linear.items() if layer is not head}
    chosen = {name: [at for at in linear if f".{at}".endswith(f".{name}")] for name in names}
    for name, found in chosen.items():
        if not found:
            known = ", ".join(sorted({at.rpartition(".")[2] for at in linear}))
            raise ModelError(f"model.lora.targetModules: the model has no linear layer {name}; it has {known}")
        if any(linear[at] is head for at in found):
            raise ModelError(f"model.lora.targetModules: {name} is the output head, which gets no adapter; remove it")
    return {at: linear[at] for found in chosen.values() for at in found}
