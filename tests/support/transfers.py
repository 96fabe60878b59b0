"""What tests of attention transfer share."""

from __future__ import annotations

from typing import Any

from pairs import MAIN, Pair
from torch import Tensor

import hf_efficient as he
from hf_efficient.testing import tiny_model

Inputs = dict[str, Tensor]
OUTPUT_PROJECTIONS = ("attention.output.dense", "attn.c_proj", "SelfAttention.o")
END_TO_END = {"hidden_states": 1.0, "embedding": 0.5, "logits": 0.1}


def pair_of(label: str) -> Pair:
    return next(pair for pair in MAIN if pair.label == label)


def linformer(family: str = "bert", **options: Any) -> Any:
    """A tiny model converted to Linformer."""
    model = tiny_model(family)
    handle = he.patch_attention(model, "linformer", **({"rank": 8} | options))
    assert handle.active
    return model


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["efficient"]))


def heads(model: Any, inputs: Inputs, side: str | None) -> list[Tensor]:
    """(B, N, H·D) heads of every self-attention layer, as they enter its output projection."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for name, module in model.named_modules()
        if name.endswith(OUTPUT_PROJECTIONS) and (side is None or name.startswith(side))
    ]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def relative(actual: Tensor, expected: Tensor, mask: Tensor) -> Tensor:
    real = mask.bool()
    return (actual - expected)[real].square().sum() / expected[real].square().sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
