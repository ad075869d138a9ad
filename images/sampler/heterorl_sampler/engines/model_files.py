"""What a model's folder says: its context, and the tokens that end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from heterorl.errors import ModelError

Dtype = Literal["bfloat16", "float32"]


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


def own_dtype(model_dir: Path) -> Dtype:
    """The data type the model was saved in; bfloat16 for all that is not float32."""
    config = json.loads((model_dir / "config.json").read_text())
    return "float32" if "float32" in (config.get("dtype"), config.get("torch_dtype")) else "bfloat16"


def context_length(model_dir: Path) -> int:
    """Tokens that the model was made for, prompt and completion together; no bound for one that counts no positions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if (length := getattr(config, name, None) or -1) > 0:
            return int(length)
    return 2**31 - 1
