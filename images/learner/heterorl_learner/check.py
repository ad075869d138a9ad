"""The learner's part of `heterorl check`: model, tokenizer, data and prompts as `prepare` reads them, and memory.

Nothing is trained and no weights are loaded. What the sampler's part needs, the tokenizer and the tokenised problems,
is left in the folder that the check works in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from heterorl.data.datasets import PreparedData
from heterorl.exchange.exchange import Exchange
from heterorl.spec.run import RunSpec
from heterorl_learner.engines.adapters import add_adapters
from heterorl_learner.engines.build import choose_attention
from heterorl_learner.engines.torch_ddp import DTYPES
from heterorl_learner.memory import StepMemory, step_memory, tokens_at_once
from heterorl_learner.prepare import Inputs, read_inputs, write_tables
from heterorl_learner.tiny import build_model

PROMPTS_SHOWN = 3
TOKENS_SHOWN = 12
"""At either end of a prompt."""


def check(exchange: Exchange) -> None:
    """Read the run's inputs and print what they are. Raises ModelError, DataError and UserError."""
    spec = exchange.spec
    inputs = read_inputs(spec, exchange.root)
    model = _on_meta(spec, inputs)
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is of) for of in (True, False))
    counted = f"{_millions(trained + frozen)} parameters" + (
        f", of them {_millions(trained)} in adapters" * bool(frozen)
    )
    print(f"model     {inputs.folder or 'tiny'}: {model.config.model_type}, {counted}")
    for name, table in inputs.tables.items():
        print(f"data      {_counted(name, table)}")
    for row in inputs.tables["train"].rows[:PROMPTS_SHOWN]:
        _show(row, inputs.tokenizer)
    attention = choose_attention(spec.model.attn_implementation, DTYPES[spec.model.dtype])
    print(f"memory    {_memory(spec, step_memory(spec, model.config, trained, attention, frozen))}")
    write_tables(exchange, {"train": inputs.tables["train"]})
    inputs.tokenizer.save_pretrained(exchange.model_dir)


def _on_meta(spec: RunSpec, inputs: Inputs) -> Any:
    """The model without memory for its weights; ModelError for adapters that it cannot have."""
    with torch.device("meta"):
        if inputs.folder is None:
            model = build_model(spec.model.tiny, inputs.tokenizer)
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(inputs.folder))
        if spec.model.lora.is_on:
            add_adapters(model, spec.model, base=inputs.folder or Path(), seed=0)
        return model


def _counted(name: str, table: PreparedData) -> str:
    left_out = {"too long": table.skipped, **table.bad}
    reasons = "; ".join(f"{count} left out: {reason}" for reason, count in left_out.items() if count)
    return f"{name}: {len(table.rows)} problems" + (f"; {reasons}" if reasons else "")


def _show(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """One prompt as the model reads it, the tokens that it is, and the reference answer."""
    ids = row["prompt_ids"]
    tokens = [f"{token} {tokenizer.decode([token])!r}" for token in ids]
    if len(ids) > 2 * TOKENS_SHOWN:
        tokens[TOKENS_SHOWN:-TOKENS_SHOWN] = ["..."]
    print(f"prompt    row {row['id']}, {len(ids)} tokens, answer {row['answer']!r}")
    for line in str(tokenizer.decode(ids)).splitlines():
        print(f"          | {line}")
    print(f"          {', '.join(tokens)}")


def _memory(spec: RunSpec, cost: StepMemory) -> str:
    ranks = spec.learner.world_size
    parts = [("weights", cost.weights), ("gradients", cost.gradients), ("optimizer", cost.optimizer)]
    parts += [("activations", cost.activations), ("logits", cost.logits)]
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts)
    here = f"this machine has {_size(psutil.virtual_memory().total)}"
    if spec.learner.gpus and torch.cuda.is_available():
        here = f"a GPU here has {_size(torch.cuda.get_device_properties(0).total_memory)}"
    return (
        f"a step of {tokens_at_once(spec)} tokens at once takes about {_size(cost.total)} on each of {ranks} ranks"
        f" ({listed}); {here}"
    )


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
