r"""What a step costs in memory, estimated from the model's configuration before anything is allocated.

    weights, gradients, optimizer    16 bytes a parameter: float32 weights, gradients and the two moments of AdamW; a
                                     bfloat16 autocast keeps copies of the weights (2). With ZeRO (Rajbhandari et al.,
                                     arXiv 1910.02054, section 3) 2 + 2 + 12 bytes in bfloat16, with float32 sums of the
                                     gradients (4); the stages divide optimizer, gradients and weights by the ranks.
                                     What LoRA freezes takes its w bytes and nothing else
    activations                      n (32 h + w (2 q + 2 k + 4 f)) a layer: counted as in Korthikanti et al. (arXiv
                                     2205.05198, section 4.1), for RMS norms in float32, rotary attention that keeps no
                                     scores, and a gated MLP. With gradientCheckpointing 4 n h a layer, and one whole
    attention mask                   4 n^2 where attention is not flash_attention_2; eager also keeps its scores,
                                     2 a n^2 w a layer
    logits                           8 bytes for each of a tile (`engines.policy`): in float32, and what is made of
                                     them. They are made as a whole, n v (w + 16), where a model makes something
                                     unusual of its head's output; of that the learner warns when it starts

n: tokens of a micro-batch, all taken as completions; h, q, k, f: widths of the hidden state, queries, keys and MLP; a:
heads; v: vocabulary; w: bytes of `model.dtype`. Allocators and libraries come on top: a fifth, or a gigabyte on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heterorl.spec.run import RunSpec
from heterorl_learner.engines.policy import TILE


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def step_memory(
    spec: RunSpec, config: Any, num_parameters: int, attention: str | None, num_frozen: int = 0
) -> StepMemory:
    """The memory of a step of a run; `config`: the model's, of transformers; `attention`: its kernel, None for sdpa.

    `num_parameters`: those that are trained; `num_frozen`: those that are not, with LoRA.
    """
    width, tokens, shape = (2 if spec.model.dtype == "bfloat16" else 4), tokens_at_once(spec), config.get_text_config()
    return StepMemory(
        *_states(spec, num_parameters, num_frozen, width),
        activations=_activations(shape, tokens, width, attention, spec.learner.gradient_checkpointing),
        logits=8 * min(TILE, tokens * shape.vocab_size),
    )


def tokens_at_once(spec: RunSpec) -> int:
    """Tokens of the largest micro-batch: the budget, or one sequence that is longer."""
    longest = spec.generation.max_prompt_tokens + spec.generation.max_completion_tokens - 1
    return max(spec.learner.batch.tokens_per_micro_batch, longest)


def _states(spec: RunSpec, parameters: int, frozen: int, width: int) -> tuple[int, int, int]:
    """Weights, gradients and optimizer."""
    if spec.learner.strategy == "torch":
        return parameters * (4 + (2 if width == 2 else 0)) + width * frozen, 4 * parameters, 8 * parameters
    stage, ranks = int(spec.learner.strategy.removeprefix("zero")), spec.learner.world_size
    divided, everything = parameters // ranks, parameters + frozen
    sums = 4 * divided if width == 2 else 0
    weights = width * (everything // ranks if stage == 3 else everything)
    return weights, width * (divided if stage >= 2 else parameters) + sums, 12 * divided


def _activations(config: Any, tokens: int, width: int, attention: str | None, checkpointing: bool) -> int:
    layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = tokens * (32 * hidden + width * (2 * queries + 2 * keys + 4 * mlp))
    if attention == "eager":
        layer += 2 * heads * tokens**2 * width
    mask = 0 if attention == "flash_attention_2" else 4 * tokens**2
    kept: int = layers * 4 * tokens * hidden + layer if checkpointing else layers * layer
    return mask + kept
