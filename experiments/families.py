"""Tries every causal family of the installed transformers: does the walk over its blocks compute what the model does?

    python experiments/families.py                       # all, a table; half an hour on two busy cores
    python experiments/families.py bamba gemma3n_text    # some
    python experiments/families.py --json families.json  # and all that was found, as JSON

A tiny random model of each family is built from its configuration: GENERIC gives what many configurations share,
CORRECTIONS what one family needs beside it. Each is tried in a process of its own with a time limit. A family is

    exact       its walk returns the model's own logits
    refused     esparse says in a sentence why it does not prune it
    wrong       the walk returns other logits and nothing says so
    crashed     an error that is no sentence of esparse's
    not built   transformers does not build or run it from these settings

The exit status is 1 if a family is wrong or crashed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS = 120  # for one family
VOCABULARY = 128
LAYERS = 4

GENERIC: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "n_ctx": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "window_size": 8,
    "attention_chunk_size": 16,
    "local_attention": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "chunk_size": 16,
    "state_size": 16,
    "time_step_rank": 4,
    "embedding_size": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
    "query_pre_attn_scalar": 8,
    "num_kv_shared_layers": 2,
    "hc_mult": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "is_decoder": True,
}

# What one family needs beside it (None: its own default). `text` is for the text part of a composite configuration,
# `text_type` its kind if the family leaves it open; `part` is the part of a composite one that the class takes.
MLA = {"num_key_value_heads": 4}
DOTS = MLA | {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 8, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8}
DOTS |= {"swa_v_head_dim": 8, "swa_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
SHARED_KEYS = {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "sliding_window": 16, "global_head_dim": 8}
SHARED_KEYS |= {"layer_types": ["sliding_attention", "full_attention"] * 3}
MUSIC = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_codebooks": 1}
MUSIC |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text": DOTS,
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        | {"moe_intermediate_size": 24, "num_local_experts": 2, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"downsample_hidden_size": 16, "adapter_input_size": 40, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS,
    "fuyu": {"text_type": "persimmon"},
    "gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 127},
    "gemma4": {"text": SHARED_KEYS},
    "gemma4_assistant": {
        "text_type": "gemma4_text",
        "backbone_hidden_size": 32,
        "text": {"num_kv_shared_layers": 4} | {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0},
    },
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified": {"text": SHARED_KEYS},
    "gemma4_unified_text": SHARED_KEYS,
    "gemma3n_text": SHARED_KEYS
    | {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6}
    | {"intermediate_size": [48] * 6},
    "git": {"vision_config": VISION},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA | {"indexer_types": ["full", "shared", "full", "shared"]},
    "got_ocr2": {
        "text_type": "qwen2",
        "vision_config": {"hidden_size": 32, "output_channels": 16, "mlp_dim": 48}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "global_attn_indexes": [1]},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": None},
    "hy_v4": {"indexer_types": ["full", "shared", "full", "shared"]},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop_text": {"loop_layer_index_start": 2, "loop_layer_index_end": 4, "n_layers_per_attn_res_block": 2}
    | {"num_hidden_layers": 6},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": MLA | {"num_layers": 2, "num_hidden_layers": None},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": MLA,
    "mllama": {"text": {"cross_attention_layers": [1]}},
    "moss_transcribe_diarize": {
        "text_type": "qwen3",
        "audio_config": {"hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 2, "num_attention_heads": 4},
    },
    "musicgen": {"part": "decoder"} | MUSIC,
    "musicgen_melody": {"part": "decoder"} | MUSIC,
    "phi4_multimodal": {
        "vision_config": VISION,
        "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 4}
        | {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32},
    },
    "qwen4_exp": {
        "text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
        | {"indexer_compress_ratio": 2}
    },
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    | {"indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attention_head_size": 8}
    | {"attn_layers": ["local"] * 4, "feed_forward_size": 48, "local_attn_chunk_length": 8}
    | {"lsh_attn_chunk_length": 8, "num_hashes": 1, "num_buckets": 4},
    "rwkv": {"rescale_every": 0},
    "sarvam_mla": MLA,
    "xmod": {"default_language": "en_XX"},
    "youtu": MLA,
    "zamba": {"num_key_value_heads": 4, "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2}
    | {"layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"], "attention_head_dim": 16}
    | {"attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_key_value_heads": 4}
    | {"mamba_d_state": 16, "n_mamba_heads": 4, "hybrid_layer_ids": [1, 3], "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def build(family: str) -> Any:
    """The family's tiny model with seeded random weights, in float32 and evaluation mode."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind = CONFIG_MAPPING[family]
    torch.manual_seed(0)
    corrections = dict(CORRECTIONS.get(family, {}))
    if "part" in corrections:
        kind = kind.sub_configs[corrections.pop("part")]
    fields = set(getattr(kind, "__dataclass_fields__", {}) or kind().to_dict()) | set(kind.attribute_map)
    if "text_config" in fields:
        text_type = corrections.get("text_type")
        inner = CONFIG_MAPPING[text_type] if text_type else kind.sub_configs["text_config"]
        known = set(getattr(inner, "__dataclass_fields__", {}) or inner().to_dict()) | set(inner.attribute_map)
        text = {k: v for k, v in GENERIC.items() if k in known} | corrections.get("text", {})
        settings: dict[str, Any] = {"text_config": text | ({"model_type": text_type} if text_type else {})}
        settings |= {key: value for key, value in corrections.items() if key not in ("text", "text_type")}
    else:
        settings = {key: value for key, value in GENERIC.items() if key in fields} | corrections
    config = kind(**{key: value for key, value in settings.items() if value is not None})
    make = AutoModelForCausalLM.from_config
    if "part" in CORRECTIONS.get(family, {}):
        make = getattr(transformers, CAUSAL[family])._from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in make(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"{size:,} parameters: the settings do not make it tiny")
    model = make(config, dtype=torch.float32).eval()
    # Freshly made models have equal norms and zero biases: stir them, so that leaving one out would show.
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def tried(family: str) -> dict[str, Any]:
    """What came of one family."""
    import torch

    tokens_SL = torch.randint(3, VOCABULARY - 8, (3, 24), generator=torch.Generator().manual_seed(3))
    try:
        model = build(family)
        with torch.no_grad():
            plain = model(input_ids=tokens_SL, use_cache=False).logits
        found: dict[str, Any] = {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    except Exception as error:
        return {"verdict": "not built", "why": said(error)}
    try:
        walked, facts = walk(model, tokens_SL)
    except ValueError as error:
        refused = found | {"verdict": "refused", "why": said(error)}
        return refused if type(error).__name__ == "UnsupportedModel" else refused | {"verdict": "crashed"}
    except Exception as error:
        return found | {"verdict": "crashed", "why": said(error)}
    try:
        facts |= pruned(model, tokens_SL)
    except Exception as error:
        facts |= {"prune": said(error)}
    difference = float((walked - plain).abs().max() / plain.abs().max())
    return found | facts | {"verdict": "exact" if difference <= 1e-6 else "wrong", "difference": difference}


def walk(model: Any, tokens_SL: Any) -> tuple[Any, dict[str, Any]]:
    """The logits of esparse's walk over the blocks."""
    import torch

    from esparse.models.activations import Activations
    from esparse.models.blocks import BlockModel

    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=48)
    stream = Activations(blocks, tokens_SL)
    for index in range(len(blocks.blocks)):
        stream.advance(index)
    logits = torch.cat([stream.logits(*part) for part in enumerate(blocks.micro_batches(tokens_SL))])
    return logits, {"blocks": len(blocks.blocks)}


def pruned(model: Any, tokens_SL: Any) -> dict[str, Any]:
    """How much of the blocks' weights is pruned, what stays dense, and what was seen to be a router."""
    import torch

    from esparse.metrics.wanda import Wanda
    from esparse.models.blocks import BlockModel
    from esparse.patterns import NM
    from esparse.pruning.method import Method
    from esparse.pruning.prune import prune
    from esparse.records.report import Stages
    from esparse.shuffles import NoShuffle

    blocks = BlockModel(model, device=torch.device("cpu"), batch_tokens=48)
    method = Method(metric=Wanda(), pattern=NM(2, 4), shuffle=NoShuffle())
    result = prune(blocks, tokens_SL, method, stages=Stages())
    inside = [name.removeprefix(f"{blocks.prefix}.") for name in result.left_dense]
    return {
        "share": round(result.share_of_blocks, 4),
        "dense": sorted({name.partition(".")[2] for name in inside}),
        "routers": sorted({n.removeprefix(f"{blocks.prefix}.").partition(".")[2] for n in blocks.routers}),
        "pattern_holds": result.pattern_holds,
    }


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def in_words(one: dict[str, Any]) -> str:
    dense = f", dense: {', '.join(one['dense'])}" if one["share"] < 0.95 else ""
    return f"{100 * one['share']:.0f} % pruned{dense}"


def in_a_process(family: str) -> dict[str, Any]:
    """`tried`, with a limit of time and so that a crash takes nothing else along."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def work() -> None:
        there.send(tried(family))

    process = fork.Process(target=work)
    begun = time.monotonic()
    process.start()
    there.close()
    result: dict[str, Any] = {"verdict": "crashed", "why": f"no answer after {SECONDS} s"}
    if here.poll(SECONDS):
        try:
            result = here.recv()
        except EOFError:
            result = {"verdict": "crashed", "why": "the process died"}
    process.kill()
    process.join()
    return result | {"seconds": round(time.monotonic() - begun, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; none: all")
    parser.add_argument("--json", type=Path, help="file for all that was found")
    asked = parser.parse_args()
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = {}
    for family in asked.families or CAUSAL:
        found[family] = one = in_a_process(family)
        what = one.get("why") or f"{one['difference']:.1e}, {one.get('prune') or in_words(one)}"
        print(f"{family:28} {one['verdict']:10} {what}", flush=True)
    counts = Counter(one["verdict"] for one in found.values())
    print(f"\n{len(found)} families of transformers {transformers.__version__}: {dict(counts)}")
    if asked.json:
        asked.json.write_text(
            json.dumps({"transformers": transformers.__version__, "families": found}, indent=1) + "\n"
        )
    return 1 if counts["wrong"] or counts["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main())
