"""The factory of engines: vLLM, and transformers for tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from heterorl.errors import ModelError, UserError
from heterorl_sampler.engines.base import InferenceEngine
from heterorl_sampler.engines.model_files import Dtype, context_length

EngineName = Literal["vllm", "transformers"]


def build_engine(
    kind: EngineName,
    model_dir: Path,
    *,
    dtype: Dtype,
    max_model_len: int,
    max_running: int | None = None,
    gpus: int = 0,
    tensor_parallel: int = 1,
    gpu_memory_utilization: float = 0.9,
    kv_cache_bytes: int = 256 * 2**20,
    lora_rank: int = 0,
) -> InferenceEngine:
    """Start an engine on the model in `model_dir`, for texts of up to `max_model_len` tokens.

    `max_running`: completions that are generated at a time, while further ones wait; None leaves that to the engine.
    With `lora_rank`, which vLLM alone has, `load_weights` takes folders of adapters of that rank (peft's files).
    Raises UserError when the engine is not installed, SiteError when a GPU is missing, ModelError for a bad folder.
    """
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir}: no config.json; a model is a Hugging Face folder with config and safetensors")
    context = context_length(model_dir)
    if max_model_len > context:
        raise ModelError(
            f"{model_dir}: prompt and completion may take {max_model_len} tokens, the model's context holds {context};"
            " lower generation.maxPromptTokens or maxCompletionTokens"
        )
    if kind == "transformers":
        from heterorl_sampler.engines.transformers import TransformersEngine

        return TransformersEngine(model_dir, dtype=dtype, max_running=max_running, gpus=gpus)
    try:
        from heterorl_sampler.engines.vllm import VLLMEngine
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(
            "engine: vllm, but vLLM is not installed; install heterorl[sampler] on a GPU machine, heterorl[sampler-cpu]"
            " without one, or set engine: transformers for a tiny model"
        ) from error
    return VLLMEngine(
        model_dir,
        dtype=dtype,
        max_model_len=max_model_len,
        max_running=max_running,
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_bytes=kv_cache_bytes,
        lora_rank=lora_rank,
    )
