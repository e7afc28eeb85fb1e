"""Every family of causal language models in the installed transformers, tiny and random.

Here is how each is built: settings that all share, what single families need beside them, and
variants under which a result may depend on the length of the batch. Nothing here scores.
"""

import torch
from report import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CONTEXT = 24
# Weights as they are made give every token the same logits, and attend to all alike.
GAIN = 8
# What configurations call the lengths that they allow. A family that knows none of these reads
# as much as its tokenizer says.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
)
# Set in every configuration that has the name, and in its parts.
SMALL = {
    "vocab_size": 3072,  # the bundled tokenizer's
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "dff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(POSITIONS, CONTEXT),
    # Shorter than the context, or their edges are not seen.
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 8),
    **dict.fromkeys(("local_attention", "keep_window_size", "index_topk"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size", "block_size"), 8),
    **dict.fromkeys(("index_block_size", "floor_scale", "log_scaling_n_floor"), 4),
    "index_topk_blocks": 2,
    "use_sliding_window": True,
    "max_window_layers": 1,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "is_decoder": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

UNSET = object()  # leave what the configuration itself has
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16,
}
AFTER_PADDING = {"max_position_embeddings": CONTEXT + 3}  # positions begin behind the padding id
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
QWEN3_5 = HYBRID | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
GEMMA4 = {
    "global_head_dim": 16,
    "num_key_value_heads": 2,
    "vocab_size_per_layer_input": 3072,
    "hidden_size_per_layer_input": 8,
}
# What a family needs beside SMALL; settings of a part stand under the part's name.
SPECIAL: dict[str, dict] = {
    "bailing_hybrid": HYBRID,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 16},
    "blt": {
        "use_cache": False,  # its cache does not know the number of its layers
        "encoder_hash_byte_group_vocab": 512,
        "decoder_config": {"hidden_size_global": 32},
    },
    "camembert": AFTER_PADDING,
    "codegen": {"num_attention_heads": 4, "n_head": 4, "rotary_dim": 8},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE | {"mrope_section": [4, 2, 2]}}
    },
    "data2vec-text": AFTER_PADDING,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense"] * 2,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 3072,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": HYBRID | {"mamba_n_heads": 4, "mamba_d_state": 16},
    # Its table has more rows than the logits that it returns.
    "inkling2_text": {"vocab_size": 3080, "unpadded_vocab_size": 3072},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID,
    "lfm2_moe": CONVOLUTION | {"num_dense_layers": 1},
    "lfm3": CONVOLUTION,
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "mimo_v2_flash": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_key_value_heads": 1,
    },
    "prophetnet": {
        # Its n-gram streams also read the position behind the last one.
        "max_position_embeddings": CONTEXT + 4,
        "num_hidden_layers": UNSET,
        **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
        **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 2),
        "num_buckets": 8,
        "relative_max_distance": 16,
    },
    "qwen3_5": {"text_config": QWEN3_5},
    "qwen3_5_moe": {"text_config": QWEN3_5},
    "qwen3_5_moe_text": QWEN3_5,
    "qwen3_5_text": QWEN3_5,
    "qwen3_next": QWEN3_5,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 6],
        "num_buckets": 4,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roberta": AFTER_PADDING,
    "roberta-prelayernorm": AFTER_PADDING,
    "rwkv": {"rescale_every": 1},
    "xlm-roberta": AFTER_PADDING,
    "xlm-roberta-xl": AFTER_PADDING,
    "xlnet": {"max_position_embeddings": UNSET},
    "xlstm": {"hidden_size": 128, "num_heads": 2},
    "xmod": AFTER_PADDING | {"languages": ["en"], "default_language": "en"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
NOT_ALONE = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "reads the keys and values of a larger model",
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "reads and writes audio codes, not tokens"),
}
# "family:what differs" -> what differs.
VARIANTS: dict[str, dict] = {
    "llama:linear": {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
    "llama:dynamic": {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}},
    "llama:longrope": {"rope_parameters": ROPE | LONG_ROPE},
    "llama:yarn": {
        "rope_parameters": ROPE
        | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12}
    },
    "llama:llama3": {
        "rope_parameters": ROPE
        | {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 12,
        }
    },
    "phi3:longrope": {
        "rope_parameters": ROPE | LONG_ROPE,
        "original_max_position_embeddings": 16,
    },
    "bert:encoder": {"is_decoder": False},
    "falcon:alibi": {"alibi": True},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    # Eager attention fills masks with the smallest float64, which is -inf in its float32 softmax.
    "gemma2:float64": {"dtype": torch.float64},
    "gpt_neox:sequential": {"use_parallel_residual": False},
    "mpt:positions": {"attn_config": {"alibi": False}},
    "opt:projected": {"word_embed_proj_dim": 16},
    "prophetnet:ngram3": {"ngram": 3},
    "reformer:seeded": {"hash_seed": 0},
    "reformer:local": {"attn_layers": ["local", "local"]},
    "xlm:causal": {"causal": True},
    "xlnet:uni": {"attn_type": "uni"},
}
NAMES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def small_config(config_class: type, special: dict):
    """A configuration with SMALL and special settings, and so are those of its parts."""
    default = config_class()
    known = {*default.to_dict(), *default.attribute_map}
    settings = {name: value for name, value in SMALL.items() if name in known} | special
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            settings[name] = small_config(type(part), special.get(name, {}))
    return config_class(**{k: value for k, value in settings.items() if value is not UNSET})


def build(name: str) -> tuple[PreTrainedModel, object]:
    """(model, tokenizer) of a family or a variant, on the CPU, in float32 unless it says another.

    Raises:
        NotImplementedError: the family does not score texts by itself.
        Exception: whatever transformers raises where it cannot build the family.
    """
    family = name.partition(":")[0]
    if family in NOT_ALONE:
        raise NotImplementedError(NOT_ALONE[family])
    special = SPECIAL.get(family, {}) | VARIANTS.get(name, {})
    dtype = special.pop("dtype", torch.float32)
    config = small_config(CONFIG_MAPPING[family], special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(GAIN)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    # XLNet states -1.
    lengths = [getattr(config.get_text_config(), name, None) or -1 for name in POSITIONS]
    tokenizer.model_max_length = 10**30 if max(lengths) > 0 else CONTEXT
    return model, tokenizer
