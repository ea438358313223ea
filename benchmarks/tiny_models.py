"""Small random models of any architecture in transformers: `save_tiny(name, folder, seed)` writes a model folder.

A name of `TYPES` is the `model_type` of a configuration, with "/image-text" for the multimodal class of a type that has
a class for text, too.

Each configuration is the default one of its type with small numbers: `SIZES` by the name of the attribute, in the
configuration and its sub-configurations, and `OVERRIDES` for the types that need other values.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from opd.models.source import EMBEDDED

CAUSAL, IMAGE_TEXT = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
WITH_IMAGES = "/image-text"  # marks the multimodal class of a type that also has a class for text
TYPES = (
    *CAUSAL,
    *(
        f"{name}{WITH_IMAGES}" if name in CAUSAL else name
        for name in IMAGE_TEXT
        if CAUSAL.get(name) != IMAGE_TEXT[name]
    ),
)
STOP_IDS = (2, 50, 60, 70)  # several, so that responses of random models end at different lengths
LAYERS = 4
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")


def _named(value: object, names: str) -> dict[str, object]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_named(145, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input shape_vocab_size"),
    **_named(145, "pronunciation_vocab_size encoder_hash_byte_group_vocab"),
    **_named(32, "hidden_size d_model n_embd emb_dim embed_dim embedding_size embedding_dim word_embed_proj_dim"),
    **_named(32, "lru_width attention_hidden_size input_size input_embedding_size output_embedding_size output_dim"),
    **_named(32, "decoder_hidden_size out_hidden_size projection_dim text_embed_dim text_hidden_size"),
    **_named(32, "shape_embed_dim pronunciation_embed_dim router_hidden_size hidden_size_global"),
    **_named(
        32, "vision_hidden_size adapter_in_dim adapter_out_dim adapter_input_size moe_hidden_size backbone_hidden_size"
    ),
    **_named(64, "intermediate_size ffn_dim d_ff dff dim_ff d_inner n_inner ffn_hidden_size feed_forward_size mlp_dim"),
    **_named(64, "encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp dense_intermediate_size mamba_d_ssm"),
    **_named(32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size share_expert_dim"),
    **_named(32, "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size"),
    **_named(LAYERS, " ".join(LAYER_COUNTS)),
    **_named(2, "encoder_layers num_encoder_layers depth num_global_layers"),
    **_named(4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    **_named(4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads"),
    **_named(4, "swa_num_attention_heads num_sliding_attention_heads linear_num_value_heads"),
    **_named(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups"),
    **_named(16, "index_n_heads"),  # with few heads many scores are 0 after the ReLU, and top-k among ties is arbitrary
    **_named(8, "mamba_n_heads mamba_num_heads n_mamba_heads"),  # of 8 numbers each: twice the hidden size
    **_named(8, "head_dim swa_head_dim v_head_dim qk_nope_head_dim kv_channels d_kv d_head dim_head rotary_dim"),
    **_named(8, "attention_head_size attention_head_dim index_head_dim query_pre_attn_scalar linear_head_dim"),
    **_named(8, "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_headdim mamba_head_dim"),
    **_named(64, "projector_hidden_size alignment_intermediate_size num_embeddings"),
    **_named(4, "qk_rope_head_dim"),
    **_named(12, "qk_head_dim"),
    **_named(
        16, "kv_lora_rank q_lora_rank o_lora_rank adapter_rank laurel_rank gated_norm_rank mamba_dt_rank hc_lowrank"
    ),
    **_named(4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk"),
    **_named(1, "n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace n_shared_experts"),
    **_named(8, "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size hidden_size_per_layer_input"),
    **_named(8, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size"),
    **_named(8, "local_attention index_topk"),
    **_named(512, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    **_named(512, "max_target_positions"),
    **_named(0.2, "initializer_range init_std embed_init_std embedding_initializer_range"),
    **_named(0.0, "router_jitter_noise input_jitter_noise"),
    **_named(32, "image_size base_channels nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel"),
    **_named(8, "patch_size"),
    **_named(0, "pad_token_id"),
    **_named(1, "bos_token_id decoder_start_token_id"),
    **_named(2, "eos_token_id"),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}  # of half a head
HALF_MROPE = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}}  # of half the rotated half of a head
HEAD = {"head_dim": 8}
CONV_LAYERS = ["conv", "full_attention", "conv", "full_attention"]
HYBRID_LAYERS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
LATENT_HALF = {"qk_nope_head_dim": 4, "qk_head_dim": 8, "head_dim": 8}  # half of each head is rotated
OTHER_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 12}
DOTS3 = {"head_dim": 16, "per_layer_config": {"02": OTHER_HEADS, "03": OTHER_HEADS}}
INDEXER = {"n_heads": 16, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 4}
QWEN4 = {f"indexer_{name}": size for name, size in INDEXER.items()} | {"ple_embed_dim": 32, "split_ngram_parts": 4}
COMPASS = {"rope_parameters": {"full_attention": MROPE["rope_parameters"]}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 144}},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "cosmos3_edge": {"text_config": MROPE},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3], "num_experts_per_tok": 2}},
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 144}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}},
    "florence2": {"vision_config": {"embed_dim": [32] * 4}},
    "gemma3n_text": {
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
        "intermediate_size": [64] * 8,
        "activation_sparsity_pattern": [0.95, 0.95, *[0.0] * 6],
    },
    "glm46v": {"text_config": MROPE},
    "glm4v": {"text_config": MROPE},
    "glm4v_moe": {"text_config": HALF_MROPE},
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "glm_ocr": {"text_config": MROPE},
    "glmga": {"text_config": MROPE},
    "granite4_vision": {
        "deepstack_layer_map": [[1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1, 2],
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "hunyuan_vl": {"text_config": HEAD | MROPE},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": CONV_LAYERS},
    "lfm2_moe": {"layer_types": CONV_LAYERS, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": HEAD,
    "mistral4": LATENT_HALF,
    "mistral_large4": {"text_config": LATENT_HALF},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "muse_spark": {"audio_config": {"hidden_sizes": [8, 16, 24, 32]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2, "max_img_size": 32}},
    "paddleocr_vl": {"text_config": MROPE},
    "qwen2_5_omni_thinker": {"text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"w_init_variance_scale": 1.0, "final_w_init_variance_scale": 1.0},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 32]},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": HYBRID_LAYERS, "attention_hidden_size": 64},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": HYBRID_LAYERS,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return the default configuration of a type with small sizes."""
    config_class = CONFIG_MAPPING[model_type]
    values = _shrunk(config_class())
    values.pop("model_type", None)
    return config_class(**_merged(values, OVERRIDES.get(model_type, {})))


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Return the values that make a configuration small, with those of its sub-configurations."""
    default = config.to_dict()
    is_size = lambda value: isinstance(value, (int, float)) and value != 0  # 0 turns something off
    values = {name: SIZES[name] for name, value in default.items() if name in SIZES and is_size(value)}
    if "kv_lora_rank" in values:  # latent attention: every head has its keys, and rotates a part of them
        rotated = values.get("qk_rope_head_dim", 0)
        values |= {"num_key_value_heads": values["num_attention_heads"], "head_dim": rotated}
        values["qk_head_dim"] = values["qk_nope_head_dim"] + rotated
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    values |= {name: _shrunk(part) for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    return {"model_type": config.model_type, **values, **_few_layers(default)}


def _few_layers(default: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of layers of a small model, and the first values of each list with a value per layer."""
    count = next((name for name in LAYER_COUNTS if name in default), None)
    if count is None:
        return {}
    per_layer = {name: x for name, x in default.items() if isinstance(x, (list, tuple)) and len(x) == default[count]}
    kinds = {name: x for name, x in per_layer.items() if len(set(map(str, x))) < len(x) > LAYERS}
    layers = max(LAYERS, *map(_first_of_every_kind, kinds.values()), 0)
    return {count: layers, **{name: [SIZES.get(name, kind) for kind in kinds[name][:layers]] for name in kinds}}


def _first_of_every_kind(kinds: Sequence[object]) -> int:
    """Return the length of the shortest prefix that has every value of a list."""
    return 1 + max(kinds.index(kind) for kind in kinds)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with nested changes."""
    out = dict(values)
    for name, change in changes.items():
        nested = isinstance(change, Mapping) and isinstance(out.get(name), Mapping)
        out[name] = _merged(out[name], change) if nested else change
    return out


def auto_class(name: str) -> Any:  # the two classes share no base that declares their constructors
    """Return the class of transformers that loads a type as a language model."""
    return AutoModelForCausalLM if name in CAUSAL else AutoModelForImageTextToText


def save_tiny(name: str, folder: Path, *, seed: int) -> PreTrainedModel:
    """Write a random model with the embedded tokenizer, and return it.

    Parameters that are constant at initialisation, such as norms, biases and sinks, get noise: an error in their use
    would be invisible.
    """
    torch.manual_seed(seed)
    model = auto_class(name).from_config(tiny_config(name.removesuffix(WITH_IMAGES))).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config = GenerationConfig(eos_token_id=list(STOP_IDS), pad_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED / "teacher").save_pretrained(folder)
    return model
