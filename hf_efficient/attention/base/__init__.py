"""What mechanisms share: config, module, geometry, registry and the bases of whole groups."""

from hf_efficient.attention.base.geometry import AttentionGeometry, LinearWeights, SourceAttention
from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig, MechanismFacts
from hf_efficient.attention.base.registry import (
    attention_config,
    attention_configs,
    describe,
    get_mechanism,
    list_mechanisms,
    register_mechanism,
)

__all__ = [
    "AttentionGeometry",
    "EfficientAttention",
    "EfficientAttentionConfig",
    "LinearWeights",
    "MechanismFacts",
    "SourceAttention",
    "attention_config",
    "attention_configs",
    "describe",
    "get_mechanism",
    "list_mechanisms",
    "register_mechanism",
]
