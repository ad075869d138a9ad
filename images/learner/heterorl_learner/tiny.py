"""A small policy made on the spot, so that a run can be tried with no download.

It owns three things: a Qwen3-architecture model whose heads are 32 wide (the least vLLM takes on a CPU), a tokenizer
with one token a byte, and a brief supervision that leaves the model with something to improve: reinforcement learning
cannot start from a policy that is never right.

Shapes: B sequences in a batch, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from heterorl.spec.run import TinyModelSpec

logger = logging.getLogger(__name__)

MAX_POSITIONS = 8192
VOCAB_MULTIPLE = 64
BATCH_SIZE = 256
CHECK_EVERY = 10
HELD_OUT = 256

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to imitate, which ends with the end-of-turn token."""

    prompt_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True)
class Supervision:
    """How the supervision went: optimizer steps taken, and the held-out accuracy after the last."""

    steps: int
    accuracy: float


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte and three special ones; any text survives encoding and decoding."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tiny: TinyModelSpec, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A freshly initialised model of that shape in float32; the same seed gives the same weights."""
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=tiny.hidden_size,
        intermediate_size=3 * tiny.hidden_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.hidden_size // 32,
        num_key_value_heads=tiny.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tiny.tie_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
    )
    return model


def examples_from(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, boxed: bool) -> list[Example]:
    """The rows of a prepared data file as examples; `boxed` wraps each answer in `\\boxed{}` as the prompt asks."""
    examples = []
    for row in rows:
        text = f"\\boxed{{{row['answer']}}}" if boxed else row["answer"]
        target_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        examples.append(Example(row["prompt_ids"], target_ids))
    return examples


def supervise(
    model: Qwen3ForCausalLM,
    examples: Sequence[Example],
    tiny: TinyModelSpec,
) -> Supervision:
    """Train on the answers by cross-entropy until the held-out accuracy first passes `tiny.target_accuracy`.

    Prompts are split, not rows, so that a repeated problem is never on both sides. Deterministic for one seed, one
    set of examples and one number of threads.
    """
    train, held_out = _split(examples, tiny.seed)
    if tiny.target_accuracy == 0 or tiny.max_supervised_steps == 0:
        return Supervision(0, accuracy(model, held_out))
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny.supervised_learning_rate)
    batches = _batches(train, tiny.seed)
    for step in range(1, tiny.max_supervised_steps + 1):
        loss = -_target_logp(model, next(batches)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == tiny.max_supervised_steps:
            reached = accuracy(model, held_out)
            if step % (5 * CHECK_EVERY) == 0 or reached >= tiny.target_accuracy:
                logger.info("fine-tuning step %d: loss %.3f, held-out accuracy %.3f", step, loss.item(), reached)
            if reached >= tiny.target_accuracy:
                return Supervision(step, reached)
    logger.warning(
        "fine-tuning ended after %d steps at accuracy %.3f, below model.tiny.targetAccuracy %g;"
        " increase maxSupervisedSteps, or use an easier task or a larger model",
        step,
        reached,
        tiny.target_accuracy,
    )
    return Supervision(step, reached)


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, examples: Sequence[Example]) -> float:
    """Expected share of exact answers when sampling at temperature 1: the mean probability of the whole target.

    That is what the first steps' mean reward will be, without the noise of drawing samples.
    """
    probability = 0.0
    for start in range(0, len(examples), BATCH_SIZE):
        chunk = examples[start : start + BATCH_SIZE]
        rows = torch.repeat_interleave(torch.tensor([len(example.target_ids) for example in chunk]))
        logp = torch.zeros(len(chunk)).index_add_(0, rows, _target_logp(model, chunk))
        probability += logp.exp().sum().item()
    return probability / len(examples)


def _target_logp(model: Qwen3ForCausalLM, batch: Sequence[Example]) -> Tensor:
    """Log-probabilities of all target tokens, example by example (flat, float32).

    Padding stands at the end, where causal attention cannot see it, so no mask is needed.
    """
    sequences = [torch.tensor(example.prompt_ids + example.target_ids) for example in batch]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # [B, T]
    starts = torch.tensor([[len(example.prompt_ids)] for example in batch])
    ends = torch.tensor([[len(sequence)] for sequence in sequences])
    positions = torch.arange(tokens.shape[1])
    is_target = (positions >= starts) & (positions < ends)  # [B, T]
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state[is_target[:, 1:]]
    logp = model.lm_head(hidden).float().log_softmax(-1)  # [targets, V]
    target_logp: Tensor = logp.gather(-1, tokens[is_target].unsqueeze(-1)).squeeze(-1)
    return target_logp


def _split(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: a seeded draw of an eighth of the distinct prompts, at most `HELD_OUT`."""
    prompts = sorted({tuple(example.prompt_ids) for example in examples})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out_prompts = {prompts[index] for index in order[: min(HELD_OUT, len(prompts) // 8)]}
    train = [example for example in examples if tuple(example.prompt_ids) not in held_out_prompts]
    held_out = [example for example in examples if tuple(example.prompt_ids) in held_out_prompts]
    return train, held_out or train


def _batches(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """Endless batches drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        picks = torch.randint(len(examples), (BATCH_SIZE,), generator=generator)
        yield [examples[pick] for pick in picks.tolist()]
