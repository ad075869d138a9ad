"""The policy as a Hugging Face folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from heterorl.exchange.exchange import Exchange
from heterorl.exchange.published_folder import replaced
from heterorl.exchange.storage import persistently
from heterorl_learner.engines.torch_ddp import TrainingEngine, save_tensors


def save_model(exchange: Exchange, engine: TrainingEngine, folder: Path) -> None:
    """Write weights, config and tokenizer into a staged folder. Every rank calls it, rank 0 writes."""
    tensors = engine.full_state_dict()
    if engine.rank == 0:
        weights = shutil.ignore_patterns("*.safetensors*", "*.bin*")
        persistently(lambda: shutil.copytree(exchange.model_dir, folder, ignore=weights, dirs_exist_ok=True))
        save_tensors(tensors, folder / "model.safetensors")


def write_output(exchange: Exchange, engine: TrainingEngine) -> None:
    """Publish the trained model; an earlier output stands until it does. Every rank calls it."""
    if engine.rank != 0:
        save_model(exchange, engine, exchange.output_dir)
        return
    with replaced(exchange.files, exchange.output_dir) as staged:
        save_model(exchange, engine, staged)
        exchange.require_incarnation()
