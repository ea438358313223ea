"""Small random models of any architecture in transformers: `save_tiny(model_type, folder, seed)` writes a model folder.

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

from opd.models.load import EMBEDDED

TYPES = tuple(dict.fromkeys((*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)))
STOP_IDS = (2, 50, 60, 70, 80, 90, 100, 110)  # several, so that responses of random models end at different lengths
LAYERS = 4
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")


def _named(value: object, names: str) -> dict[str, object]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_named(145, "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    **_named(
        32,
        "hidden_size d_model n_embd emb_dim embed_dim embedding_size embedding_dim word_embed_proj_dim lru_width "
        "attention_hidden_size input_size input_embedding_size output_embedding_size decoder_hidden_size "
        "out_hidden_size projection_dim output_dim text_embed_dim",
    ),
    **_named(
        64,
        "intermediate_size ffn_dim d_ff dff dim_ff d_inner n_inner ffn_hidden_size feed_forward_size encoder_ffn_dim "
        "decoder_ffn_dim intermediate_size_mlp dense_intermediate_size mlp_dim",
    ),
    **_named(
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim",
    ),
    **_named(LAYERS, " ".join(LAYER_COUNTS)),
    **_named(2, "encoder_layers num_encoder_layers depth num_global_layers"),
    **_named(
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads "
        "num_sliding_attention_heads linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads n_mamba_heads",
    ),
    **_named(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups"),
    **_named(
        8,
        "head_dim swa_head_dim v_head_dim qk_nope_head_dim kv_channels d_kv d_head dim_head attention_head_size "
        "index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_headdim "
        "mamba_head_dim attention_head_dim rotary_dim query_pre_attn_scalar",
    ),
    **_named(16, "kv_lora_rank q_lora_rank o_lora_rank adapter_rank laurel_rank gated_norm_rank mamba_dt_rank"),
    **_named(4, "qk_rope_head_dim"),
    **_named(12, "qk_head_dim"),
    **_named(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk"),
    **_named(1, "n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace n_shared_experts"),
    **_named(8, "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size hidden_size_per_layer_input"),
    **_named(
        8,
        "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size local_attention "
        "index_topk",
    ),
    **_named(
        512,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_target_positions",
    ),
    **_named(0.2, "initializer_range init_std embed_init_std embedding_initializer_range"),
    **_named(0.0, "router_jitter_noise input_jitter_noise"),
    **_named(32, "image_size"),
    **_named(8, "patch_size"),
    **_named(0, "pad_token_id"),
    **_named(1, "bos_token_id decoder_start_token_id"),
    **_named(2, "eos_token_id"),
}
OVERRIDES: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return the default configuration of a type with small sizes."""
    config_class = CONFIG_MAPPING[model_type]
    values = _shrunk(config_class())
    values.pop("model_type", None)
    return config_class(**_merged(values, OVERRIDES.get(model_type, {})))


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Return the changes that make a configuration small, with those of its sub-configurations."""
    default = config.to_dict()
    values = {name: SIZES[name] for name in default if name in SIZES and default[name] is not None}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            values[name] = _shrunk(part)
    layer_name = next((name for name in LAYER_COUNTS if name in default), None)
    if layer_name is not None:
        per_layer = {
            name: value
            for name, value in default.items()
            if isinstance(value, (list, tuple)) and len(value) == default[layer_name] > LAYERS
        }
        values[layer_name] = max(LAYERS, *map(_first_of_every_kind, per_layer.values()), 0)
        values |= {name: list(value[: values[layer_name]]) for name, value in per_layer.items()}
    return {"model_type": config.model_type, **values}


def _first_of_every_kind(kinds: Sequence[object]) -> int:
    """Return the length of the shortest prefix that has every value of a list."""
    return 1 + max(kinds.index(kind) for kind in kinds)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with nested changes; a change to None removes the value."""
    out = dict(values)
    for name, change in changes.items():
        if isinstance(change, Mapping) and isinstance(out.get(name), Mapping):
            out[name] = _merged(out[name], change)
        else:
            out[name] = change
    return {name: value for name, value in out.items() if not (name in changes and changes[name] is ...)}


def auto_class(model_type: str) -> type:
    """Return the class of transformers that loads a type as a language model."""
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def save_tiny(model_type: str, folder: Path, *, seed: int) -> PreTrainedModel:
    """Write a random model with the embedded tokenizer, and return it.

    Parameters that are constant at initialisation, such as norms, biases and sinks, get noise: an error in their use
    would be invisible.
    """
    torch.manual_seed(seed)
    model = auto_class(model_type).from_config(tiny_config(model_type)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config = GenerationConfig(eos_token_id=list(STOP_IDS), pad_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED / "teacher").save_pretrained(folder)
    return model
