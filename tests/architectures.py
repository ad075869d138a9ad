"""Every causal architecture of transformers as a tiny model with random weights.

Windows, chunks and top-k of sparse attention are 8, so that texts of a dozen tokens cross them; weights are wide, so
that what a token sees shows in what it predicts. vLLM's CPU kernels want heads of 32.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
LARGEST = 15_000_000
"""Parameters; what is larger could not be made small by its configuration."""

# fmt: off
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "initializer_range": 0.1, "init_std": 0.1,
    "is_decoder": True,
    # names of older families
    "n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 96, "n_positions": 512, "n_ctx": 512, "d_model": 64, "d_ff": 96,
    "dff": 96, "num_layers": 2, "num_heads": 2, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 2,
    "encoder_attention_heads": 2, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "ffn_dim": 96, "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 512, "rotary_dim": 16, "embedding_size": 64,
    "emb_dim": 64, "window_size": 8, "sliding_window": 8, "sliding_window_size": 8, "attention_chunk_size": 8, "local_attention": 8,
    "index_topk": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 32, "index_n_heads": 2, "index_head_dim": 32,
    # experts
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "expert_ffn_hidden_size": 48, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2, "num_dense_layers": 1,
    "zero_expert_num": 2,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "qk_head_dim": 32,
    # state space, linear attention
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_d_ssm": 128, "mamba_num_heads": 4, "mamba_head_dim": 32, "state_size": 16, "ssm_state_size": 16,
    "n_groups": 1, "n_mamba_heads": 2, "mamba_dt_rank": 4, "time_step_rank": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_head_dim": 32,
    "linear_num_heads": 2, "lru_width": 64,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    # embeddings of n-grams
    "ngram_vocab_size_base": 64, "split_ngram_parts": 1, "ple_embed_dim": 16, "hc_lowrank": 8,
}
LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "axk1": {"head_dim": 16, "num_key_value_heads": 2}, "axk2": {"num_key_value_heads": 2},
    "codegen": {"n_head": 4}, "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8}, "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96}},
    "deepseek_v2": {"num_key_value_heads": 2}, "deepseek_v3": {"head_dim": 16, "num_key_value_heads": 2},
    "deepseek_v32": {"num_key_value_heads": 2}, "diffllama": {"num_key_value_heads": 2},
    "glm4_moe_lite": {"num_key_value_heads": 2}, "glm_moe_dsa": {"num_key_value_heads": 2},
    "kimi_linear": {"num_key_value_heads": 2, "head_dim": 16, "layer_types": LINEAR_THEN_FULL, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "num_local_experts": 4},
    "falcon": {"ffn_hidden_size": 256},  # as in all of its models; vLLM knows no other
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_key_value_heads": 2, "head_dim": 16},
    "mamba2": {"num_heads": 4}, "minicpm3": {"num_key_value_heads": 2}, "youtu": {"num_key_value_heads": 2, "head_dim": 16},
    "modernbert-decoder": {"layer_types": ["full_attention", "sliding_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": LINEAR_THEN_FULL},
    "zamba": {"attention_hidden_size": 128, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
}
CANNOT = {
    "cohere_compass_text": "its default configuration lacks the frequencies of its own layers",
    "blt": "reads bytes, with an n-gram table of 500,000 rows",
    "fuyu": "images", "gemma3": "images", "gemma3n": "images and sound", "git": "images", "got_ocr2": "images",
    "mllama": "images", "phi4_multimodal": "images and sound", "emu3": "images", "musicgen": "sound",
    "musicgen_melody": "sound", "moshi": "sound", "gemma4": "images", "gemma4_unified": "images",
    "gemma4_assistant": "drafts for another model", "gemma4_unified_assistant": "drafts for another model",
    "whisper": "sound", "trocr": "images", "xmod": "asks for a language beside the tokens",
    "cpmant": "asks for lengths and segments beside the tokens", "xlm": "asks for languages beside the tokens",
}
"""Architectures of the mapping that are no text models, or take more than tokens."""
# fmt: on


def names() -> list[str]:
    """All of transformers' mapping for causal language models but those in `CANNOT`."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in CANNOT]


def tiny_config(name: str, **fields: Any) -> PreTrainedConfig:
    """The smallest configuration with each kind of layer that the architecture's default has."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    if "text_config" in getattr(kind, "sub_configs", {}):
        return kind(text_config=_shrunk(default.get_text_config()) | SPECIAL.get(name, {}) | fields)  # type: ignore[call-arg]
    return kind(**_shrunk(default) | SPECIAL.get(name, {}) | fields)


def _shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    given = default.to_dict()
    aliases = set(getattr(default, "attribute_map", {}))
    fields = {key: value for key, value in SMALL.items() if key in given and key not in aliases}
    optional = ("sliding_window", "q_lora_rank", "bos_token_id")
    fields = {key: value for key, value in fields.items() if not (key in optional and given[key] is None)}
    if kinds := list(dict.fromkeys(given.get("layer_types") or [])):
        fields["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return fields


def tiny_model(name: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """The model on the CPU in float32; ValueError when it does not become small."""
    config = tiny_config(name, **fields)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        return model


def save(name: str, folder: Path, *, shards: str = "1GB", **fields: Any) -> Path:
    """The same as a Hugging Face folder, without a tokenizer."""
    os.makedirs(folder, exist_ok=True)
    tiny_model(name, **fields).save_pretrained(folder, max_shard_size=shards)
    return folder
