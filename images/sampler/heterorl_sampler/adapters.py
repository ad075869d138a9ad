"""Whole weights out of LoRA adapters, for engines that compute with nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

from heterorl.errors import ModelError
from heterorl.exchange.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_tensors, merge_into
from heterorl.exchange.exchange import Exchange
from heterorl_sampler.engines.model_files import Dtype, own_dtype


class Merger:
    """Puts adapters into the starting model, of which it keeps a copy on this machine's disk."""

    def __init__(self, model_dir: Path, dtype: Dtype, scratch: Path) -> None:
        """`scratch`: an existing folder of this machine, which belongs to the caller."""
        self._model_dir, self._dtype, self._file = model_dir, dtype, scratch / "base.safetensors"

    def merge_into(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        """Replace the adapters in a folder by whole weights; `check` may end it by raising."""
        if not self._file.exists():
            staged = self._file.with_suffix(".part")
            save_file(base_tensors(self._model_dir, self._dtype), staged)
            staged.rename(self._file)
        merge_into(folder, load_file(self._file), check)


@contextmanager
def whole_model(folder: Path) -> Iterator[Path]:
    """A model's folder as it is; of one with adapters, a temporary folder with the model that they make.

    ModelError when the model that the adapters belong to is not on this machine.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    run = Exchange(folder.resolve().parent)
    told = Path(json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
    base = run.model_dir if run.run_file.exists() else told  # a run's folder may have been moved
    if not (base / "config.json").is_file():
        raise ModelError(
            f"{folder} holds adapters of {base}, which is no folder here; write the model's folder into"
            f" base_model_name_or_path of its {ADAPTER_CONFIG}"
        )
    with tempfile.TemporaryDirectory(prefix="heterorl-merged-") as scratch:
        merged = Path(scratch)
        link_all_but_weights(base, merged)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copy(folder / name, merged)
        merge_into(merged, base_tensors(base, own_dtype(base)))
        yield merged


def link_all_but_weights(model_dir: Path, folder: Path) -> None:
    """Links to configuration and tokenizer of a model's folder."""
    for path in model_dir.iterdir():
        if path.is_file() and ".safetensors" not in path.suffixes:
            (folder / path.name).symlink_to(path.resolve())
