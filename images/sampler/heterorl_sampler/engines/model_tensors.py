"""The tensors of a model, as its files have them and as transformers does.

The two differ: files have a tensor an expert where transformers has one a layer, names with or without a prefix,
buffers that nobody needs. transformers knows how its own models are read, so it is asked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from heterorl.errors import CorruptFile
from heterorl.exchange.canary import tensor_shapes


class ModelTensors:
    """What tensors the model of a folder has; takes no memory for them."""

    def __init__(self, model_dir: Path) -> None:
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
        self.head = self._in_files(self._model.get_output_embeddings())
        """What files call the output head: lm_head.weight, or embed_out.weight of a GPT-NeoX; "" for none."""
        self._embedding = self._in_files(self._model.get_input_embeddings())

    @property
    def adaptable(self) -> list[str]:
        """Last parts of the names of the layers that LoRA may adapt: the linear ones but for the output head."""
        head = self._model.get_output_embeddings()
        layers = [name for name, own in self._model.named_modules() if isinstance(own, nn.Linear) and own is not head]
        return sorted({name.rpartition(".")[2] for name in layers})

    def shared_with_head(self, files: list[Path]) -> str:
        """What the files call the input embedding where they have no head, as of a tied model; "" where they have one.

        Such as model.embed_tokens.weight; older files leave out the prefix of the model without its head.
        """
        names, prefix = tensor_shapes(files), f"{self._model.base_model_prefix}."
        found = [name for name in (self._embedding, self._embedding.removeprefix(prefix)) if name in names]
        return found[0] if found and self.head not in names else ""

    def require_all(self, files: list[Path]) -> None:
        """CorruptFile naming a difference, unless the files hold every tensor of the model and no other.

        vLLM would skip what is missing, and transformers fill it with random numbers.
        """
        load(self._model, {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(files).items()})

    def _in_files(self, module: nn.Module | None) -> str:
        names = {id(own): f"{name}.weight" for name, own in self._model.named_modules()}
        if id(module) not in names:
            return ""
        (in_files,) = revert_weight_conversion(self._model, {names[id(module)]: torch.empty(0)})
        return str(in_files)


def load(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Give a model the tensors of its files, as `from_pretrained` does; CorruptFile unless they are exactly its own."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    device, mapping = next(model.parameters()).device, get_model_conversion_mapping(model)
    # It declares the two classes that there are, where the mapping declares the one that they share.
    options = LoadStateDictConfig(device_map={"": device}, weight_mapping=mapping)  # type: ignore[arg-type]
    found, _ = convert_and_load_state_dict_in_model(model, tensors, options)
    model.tie_weights(found.missing_keys, recompute_mapping=False)
    differences = [
        *((name, f"is absent, the model has {expected[name]}") for name in found.missing_keys),
        *((name, "is there, the model has none") for name in found.unexpected_keys),
        *((name, f"is {tuple(shape)}, the model has {tuple(own)}") for name, shape, own in found.mismatched_keys),
        *((name, f"cannot be made: {error.splitlines()[-1]}") for name, error in found.conversion_errors.items()),
    ]
    for name, difference in sorted(differences):
        raise CorruptFile(f"weights: {name} {difference}")
