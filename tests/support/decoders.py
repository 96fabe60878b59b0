"""Tiny random decoders of any causal model type, by the usual names of their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_efficient.testing import VOCABULARY
from hf_efficient.testing.sizes import fields_of

# two heads of queries share one of keys and values; optional norms are on, every other layer of SmolLM3 has no rotation
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=160,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    qk_layernorm=True,
    use_qk_norm=True,
    no_rope_layer_interval=2,
    use_sliding_window=False,
    layer_types=["full_attention"] * 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 16),
)


def tiny_decoder(model_type: str, **overrides: Any) -> Any:
    """In eval mode and fp32, with weights large enough that attention matters, and eager attention."""
    kind = CONFIG_MAPPING[model_type]
    known = fields_of(kind)
    config = kind(**{name: value for name, value in SIZES.items() if name in known} | overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
        elif parameter.requires_grad:  # norms and biases too say something
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model


def save_decoder(path: Path, model_type: str, **overrides: Any) -> Path:
    """An original tiny checkpoint with its tokenizer, as `tiny.save_source` makes one of a tested family."""
    tiny_decoder(model_type, **overrides).save_pretrained(path)
    tiny_tokenizer("gpt2").save_pretrained(path)
    return path


def prompts(model: Any) -> dict[str, Tensor]:
    """Three rows of 24 tokens that end at the right edge, two of them padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (3, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :1] = 0
    return {"input_ids": ids.where(mask.bool(), model.config.pad_token_id), "attention_mask": mask}
