"""A tiny random model of every family, and which of a block's matrices are routers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "llama-eager-bias": ("llama", SMALL | {"attn_implementation": "eager", "attention_bias": True}),
    "mistral-sliding": ("mistral", SMALL | {"sliding_window": 8}),
    "qwen2": ("qwen2", SMALL),
    "qwen2-sliding": ("qwen2", SMALL | SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", SMALL | {"head_dim": 8}),
    "gemma2": ("gemma2", SMALL | SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", SMALL | SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", SMALL),
    "opt": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    # As OPT-350m: the norms stand behind attention and MLP, and what they return is the residual, too.
    "opt-post-norm": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "gpt-neox": ("gpt_neox", SMALL),
    "falcon": ("falcon", SMALL | {"multi_query": True, "parallel_attn": True}),
    "falcon-alibi": ("falcon", SMALL | {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "falcon-new": ("falcon", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2": ("gpt2", GPT),
    "mixtral": ("mixtral", SMALL | {"num_local_experts": 4}),
    "qwen2-moe": ("qwen2_moe", SMALL | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("qwen3_moe", SMALL | EXPERTS | {"head_dim": 8}),
    "olmoe": ("olmoe", SMALL | EXPERTS),
    "gpt-oss": ("gpt_oss", SMALL | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 8}),
}

# Attention with compressed keys.
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}
# The first MLP is dense, the others have experts.
DEEPSEEK = MLA | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# Linear attention in turns with attention; its norm is per head.
LINEAR: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
# The last blocks read the keys of earlier ones.
SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 8,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
}
MAMBA: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 16,
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
LOOKING: dict[str, Any] = {
    "text_config": SMALL | SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "boi_token_index": 90,
    "eoi_token_index": 91,
    "image_token_index": 92,
}

# Families in which not every matrix is pruned, or whose exports are harder than those above.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": ("qwen3_next", SMALL | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}),
    "qwen3.5": ("qwen3_5_text", SMALL | LINEAR),
    "olmo-hybrid": ("olmo_hybrid", SMALL | LINEAR | {"linear_num_key_heads": 4}),
    "granite-hybrid": ("granitemoehybrid", SMALL | MAMBA),
    "lfm2": ("lfm2", SMALL | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    "deepseek-v2": ("deepseek_v2", SMALL | DEEPSEEK),
    "deepseek-v3": ("deepseek_v3", SMALL | DEEPSEEK),
    "minicpm3": ("minicpm3", SMALL | MLA),
    "gemma3n": (
        "gemma3n_text",
        SMALL
        | SHARED
        | {
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
    ),
    "gemma4": ("gemma4_text", SMALL | SHARED | {"global_head_dim": 8}),
    "olmo2": ("olmo2", SMALL),
    "cohere2": ("cohere2", SMALL | SLIDING),
    "gemma3-vision": ("gemma3", LOOKING),
}


def tiny(family: str) -> PreTrainedModel:
    """The family's model with seeded random weights, in float32 and evaluation mode."""
    model_type, settings = (FAMILIES | MORE)[family]
    torch.manual_seed(1)
    settings = dict(settings)
    attention = settings.pop("attn_implementation", None)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager", dtype=torch.float32
    )
    # Freshly made models have equal norms and zero biases: stir them, so that leaving one out would show.
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()
