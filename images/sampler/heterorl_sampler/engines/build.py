"""What an inference engine does, and the factory of engines: vLLM, and transformers for tiny models.

Tokens in, tokens and behaviour log-probabilities out. Log-probabilities are those of the sampling distribution:
repetition penalty, temperature, min-p, top-k and top-p applied in that order and renormalized, as vLLM's
`processed_logprobs`. They come with the token, never from a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from heterorl.errors import ModelError, UserError
from heterorl.exchange.rollout import Completion, Sampling
from heterorl_sampler.engines.model_files import Dtype, context_length

EngineName = Literal["vllm", "transformers"]


class InferenceEngine(Protocol):
    """A model on this machine that generates and scores; not for use from several threads."""

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, stop: Callable[[], bool] = ...
    ) -> list[list[Completion] | None]:
        """`n` completions of each prompt, in the order of the prompts; the same seed and weights repeat them.

        `stop` is asked after every token; once it says yes, groups that are not complete come back as None.
        """
        ...

    def load_weights(self, folder: Path) -> None:
        """Serve the weights in `folder` (safetensors in Hugging Face names, or adapters); forget every cached prefix.

        Raises CorruptFile, with the old weights still served, when names or shapes are not this model's.
        """
        ...

    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-probabilities, at temperature 1, of each text's second and later tokens given those before."""
        ...

    def close(self) -> None:
        """Give back memory and temporary files."""
        ...


def build_engine(
    kind: EngineName,
    model_dir: Path,
    *,
    dtype: Dtype,
    max_model_len: int,
    gpus: int = 0,
    tensor_parallel: int = 1,
    gpu_memory_utilization: float = 0.9,
    kv_cache_bytes: int = 256 * 2**20,
    lora_rank: int = 0,
) -> InferenceEngine:
    """Start an engine on the model in `model_dir`, for texts of up to `max_model_len` tokens.

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

        return TransformersEngine(model_dir, dtype=dtype, gpus=gpus)
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
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_bytes=kv_cache_bytes,
        lora_rank=lora_rank,
    )
