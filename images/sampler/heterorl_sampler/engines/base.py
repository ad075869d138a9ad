"""The interface of inference engines: vLLM, and transformers for tiny models.

Tokens in, tokens and behaviour log-probabilities out. Log-probabilities are those of the sampling distribution:
repetition penalty, temperature, min-p, top-k and top-p applied in that order and renormalized, as vLLM's
`processed_logprobs`. They come with the token, never from a second forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from safetensors import SafetensorError, safe_open

from heterorl.errors import CorruptFile, ModelError
from heterorl.spec.run import GenerationSpec

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Completion:
    """One completion; the token that ended it is its last."""

    token_ids: list[int]
    """Generated tokens."""
    logp: list[float]
    """Log-probability of each token under the sampling distribution."""
    truncated: bool
    """Whether the length limit ended it, rather than an end-of-sequence token."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, named as vLLM names them."""

    max_tokens: int
    """Maximum number of tokens, including the end-of-sequence token."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy decoding, with log-probabilities at temperature 1."""
    top_p: float = 1.0
    """Top-p (nucleus) sampling; 1 disables."""
    top_k: int = 0
    """Top-k sampling; 0 disables."""
    min_p: float = 0.0
    """Min-p sampling: minimum probability relative to the most likely token; 0 disables."""
    repetition_penalty: float = 1.0
    """Repetition penalty on tokens seen so far, including those of the prompt; 1 disables."""

    @classmethod
    def of(cls, generation: GenerationSpec) -> Self:
        """That of a run's rollouts."""
        return cls(
            max_tokens=generation.max_completion_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
        )


def never() -> bool:
    """The `stop` of a generation that runs to its end."""
    return False


class InferenceEngine(Protocol):
    """A model on this machine that generates and scores; not for use from several threads."""

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, stop: Callable[[], bool] = never
    ) -> list[list[Completion] | None]:
        """`n` completions of each prompt, in the order of the prompts; the same seed and weights repeat them.

        `stop` is asked after every token; once it says yes, groups that are not complete come back as None.
        """
        ...

    def load_weights(self, folder: Path) -> None:
        """Serve the weights in `folder` (safetensors in Hugging Face names) and forget every cached prefix.

        Raises CorruptFile, with the old weights still served, when names or shapes are not this model's.
        """
        ...

    def score(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Log-probabilities, at temperature 1, of each text's second and later tokens given those before."""
        ...

    def close(self) -> None:
        """Give back memory and temporary files."""
        ...


def end_token_ids(model_dir: Path) -> list[int]:
    """Tokens that end a completion: of generation_config.json, of config.json, of the tokenizer where there is one."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (model_dir / name).is_file():
            found = json.loads((model_dir / name).read_text()).get("eos_token_id")
            ends.update(found if isinstance(found, list) else [] if found is None else [found])
    if (model_dir / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(model_dir).eos_token_id
        ends.update([] if found is None else [found])
    if not ends:
        raise ModelError(f"{model_dir}: no end-of-sequence token; set eos_token_id in generation_config.json")
    return sorted(ends)


def context_length(model_dir: Path) -> int:
    """Tokens that the model was made for, prompt and completion together."""
    from transformers import AutoConfig

    length: int = AutoConfig.from_pretrained(model_dir).get_text_config().max_position_embeddings
    return length


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files in a folder that may hold others beside them; ModelError if there are none."""
    if files := sorted(folder.glob("model*.safetensors")):
        return files
    raise ModelError(f"{folder}: no model.safetensors; only weights in safetensors are read")


def tensor_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the files' headers; CorruptFile if one cannot be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "numpy") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{path}: {error}") from error
    return shapes


def require_same_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """CorruptFile naming the first difference, unless the weights fit the model; vLLM would skip what is missing."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CorruptFile(
                f"weights: {name} is {found.get(name, 'absent')}, the model has {expected.get(name, 'none')}"
            )
