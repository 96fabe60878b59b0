"""Sizes of tiny models of any architecture, by the names that configs usually give them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

VOCABULARY = 99
SIZES: tuple[tuple[Any, str], ...] = (
    (32, "hidden_size d_model dim n_embd embedding_size embedding_dim word_embed_proj_dim embed_dim"),
    (2, "num_hidden_layers encoder_layers decoder_layers n_layers n_layer num_layers num_decoder_layers"),
    (2, "num_key_value_heads num_experts num_local_experts n_routed_experts mlp_ratio"),
    (4, "num_attention_heads encoder_attention_heads decoder_attention_heads n_heads n_head num_heads"),
    (48, "intermediate_size encoder_ffn_dim decoder_ffn_dim hidden_dim d_ff ffn_dim n_inner"),
    (8, "d_kv head_dim patch_size"),
    (0, "bos_token_id decoder_start_token_id"),
    (0.0, "hidden_dropout_prob attention_probs_dropout_prob attn_pdrop resid_pdrop embd_pdrop dropout"),
    (0.0, "hidden_dropout attention_dropout activation_dropout dropout_rate"),
    (24, "sliding_window local_attention"),
    (1, "pad_token_id num_experts_per_tok n_group topk_group"),
    (16, "intra_bottleneck_size moe_intermediate_size num_mel_bins kv_lora_rank q_lora_rank"),
    (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    (60, "max_source_positions"),
    (100, "max_target_positions"),
    (VOCABULARY, "vocab_size"),
    ("en_XX", "default_language"),
    ("layer_norm", "normalization_type"),  # MobileBERT's own norm only scales, so that random weights explode
    ((16,) * 7, "conv_dim"),
    (2, "eos_token_id"),
    (64, "image_size"),
    (3, "num_channels"),
)
SIZE_OF: dict[str, Any] = {name: size for size, names in SIZES for name in names.split()}
POSITIONS = ("max_position_embeddings", "n_positions")
# a config that has no use for some of the sizes gets fewer of them
LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("mlp_ratio",),
    ("conv_dim",),
    ("head_dim", "mlp_ratio", "num_key_value_heads"),
    tuple(name for name in SIZE_OF if "layers" not in name),
)


def fields_of(config_class: Any) -> set[str]:
    """Names of a config's own fields."""
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def tiny_sizes(config_class: Any, positions: int, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Sizes for those fields of a config class that it has, but for some."""
    sizes = SIZE_OF | dict.fromkeys(POSITIONS, positions)
    return {name: size for name, size in sizes.items() if name in fields_of(config_class) and name not in left_out}
