"""LoRA adapters as files, in the format of peft, and how they become part of the weights again.

    adapter_config.json          rank r, alpha, which layers (peft's LoraConfig)
    adapter_model.safetensors    base_model.model.LAYER.lora_A.weight [r, in] and ...lora_B.weight [out, r]

W + alpha / r * B A is computed in float32 from W in the run's data type, and rounded once to that type.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError

from heterorl.errors import CorruptFile
from heterorl.exchange.storage import persistently

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def base_tensors(model_dir: Path, dtype: Literal["float32", "bfloat16"]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder in this data type, by the names of its files; of tied ones one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    read = partial(AutoModelForCausalLM.from_pretrained, model_dir, dtype=getattr(torch, dtype))
    model = persistently(read, what="the model")
    tensors = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}


def merge_into(folder: Path, base: dict[str, Tensor], check: Callable[[], None] = lambda: None) -> None:
    """Replace the adapters in a folder by the whole weights that they make of `base` (`base_tensors`).

    `check` is called before each layer; what it raises ends it. CorruptFile if the adapters do not fit the model.
    """
    from safetensors.torch import load_file, save_file

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        scale, transposed = config["lora_alpha"] / config["r"], config["fan_in_fan_out"]
        parts = load_file(folder / ADAPTER_WEIGHTS)
    except (FileNotFoundError, ValueError, KeyError, SafetensorError) as error:
        raise CorruptFile(f"{folder}: the adapters cannot be read: {error!r}") from error
    merged = dict(base)
    for layer in sorted({name.rpartition(".lora_")[0] for name in parts}):
        check()
        name = f"{layer.removeprefix(_PREFIX)}.weight"
        try:
            down, up = parts[f"{layer}.lora_A.weight"], parts[f"{layer}.lora_B.weight"]
            merged[name] = _merged(base[name], down, up, scale, transposed)
        except (KeyError, RuntimeError) as error:
            raise CorruptFile(f"{folder}: the adapter of {layer} does not fit the model: {error}") from error
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):  # what reads the folder would put them on top
        (folder / file).unlink()


def _merged(weight: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool) -> Tensor:
    """`transposed`: the layer keeps its weight as [in, out], as those of GPT-2 do."""
    change = (up.float() @ down.float()) * scale
    change = change.T if transposed else change
    if change.shape != weight.shape:
        raise RuntimeError(f"it is {tuple(change.shape)}, the layer {tuple(weight.shape)}")
    return (weight.float() + change).to(weight.dtype)
