"""Llama and its relatives: causal decoders with q, k, v projections of their own, rotary positions and grouped heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.attention.base.geometry import LinearWeights, SourceAttention
from hf_efficient.families.base import ModelFamily, fill_linear
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.rotary import RotaryPositions

DENSE: tuple[set[str], ...] = (
    {"gate_proj", "up_proj", "down_proj"},
    {"gate_up_proj", "down_proj"},
    {"up_proj", "down_proj"},
    {"fc1", "fc2"},
    {"dense_h_to_4h", "dense_4h_to_h"},
)
ACTIVATIONS = ("act_fn", "activation_fn", "act")


class LlamaFamily(ModelFamily):
    """Flat layers: the host's own layer adds the residual of attention, and holds a feed-forward part `mlp`."""

    def side(self, stack: Any) -> str:
        return "decoder"  # these configs have no is_decoder, or one that changes nothing

    def feed_forward_name(self, layer: Any) -> str:
        parts = dict(layer.mlp.named_children()) if hasattr(layer, "mlp") else {}
        activation = next((parts.pop(name) for name in ACTIVATIONS if name in parts), nn.Identity())
        if isinstance(parts.get("dropout"), nn.Dropout):  # GTE's, between the two products
            del parts["dropout"]
        if set(parts) not in DENSE or any(True for _ in activation.parameters()):
            kind = type(getattr(layer, "mlp", None)).__name__
            raise ValueError(
                f"the feed-forward parts of {self.model_type} ({kind}) are experts already, or more than two products and "
                "an activation: it can't be upcycled."
            )
        return "mlp"

    def feed_forward_products(self, layer: Any) -> list[str]:
        return [f"mlp.{name}" for name in _products(layer.mlp)]

    def feed_forward(self, layer: Any) -> Dense:
        mlp = layer.mlp
        *firsts, down = (mlp.get_submodule(name) for name in _products(mlp))
        activation = next(getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name))
        up_bias = None if firsts[0].bias is None else torch.cat([first.bias for first in firsts])
        up = torch.cat([first.weight for first in firsts]).T
        dropout = float(getattr(mlp, "residual_dropout", 0.0))
        inner = getattr(getattr(mlp, "dropout", None), "p", 0.0)
        is_gated = len(firsts) == 2 or hasattr(mlp, "gate_up_proj")
        return Dense(up, down.weight.T, up_bias, down.bias, activation, is_gated, inner_dropout=inner, dropout=dropout)

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        layer.mlp = mlp = getattr(self.modeling, self.stack_classes[0].removesuffix("Model") + "MLP")(config)
        *firsts, down = (mlp.get_submodule(name) for name in _products(mlp))
        biases = [None] * len(firsts) if dense.up_bias is None else dense.up_bias.chunk(len(firsts))
        for first, weight, bias in zip(firsts, dense.up.T.chunk(len(firsts)), biases, strict=True):
            fill_linear(first, weight, bias)
        fill_linear(down, dense.down.T, dense.down_bias)
        mark_initialised(mlp)


class FusedFamily(LlamaFamily):
    """One projection gives all queries, then all keys, then all values."""

    def source_attention(self, module: Any) -> SourceAttention:
        fused: Any = module.get_submodule(self.projections[0])
        weights = self._parts(module, fused.weight.detach().T)
        biases: Any = (None,) * 3 if fused.bias is None else self._parts(module, fused.bias.detach())
        query, key, value = (LinearWeights(weight.T, bias) for weight, bias in zip(weights, biases, strict=True))
        return SourceAttention(query, key, value)

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads(module)
        _, key, value = self._parts(module, module.get_submodule(self.projections[0])(hidden))
        key, value = (x.unflatten(-1, (heads.key_value, -1)).transpose(1, 2) for x in (key, value))
        return key, value

    def _parts(self, module: Any, fused: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of (…, heads · D) each, from all of them side by side."""
        heads = self.heads(module)
        return fused.split([n * heads.width for n in (heads.query, heads.key_value, heads.key_value)], dim=-1)


class NormAfterRotationFamily(LlamaFamily):
    """Keys are normalised after their rotation, so that the layer's own projections alone do not give them."""

    def projection_refusal(self, module: Any) -> str | None:
        return (
            f"{self.model_type} normalises its keys after their rotation, so new ones can't be projected: use a mechanism "
            "that mixes the tokens' own keys, such as local"
        )


def _products(mlp: nn.Module) -> list[str]:
    """Names of the linear layers of a feed-forward part: gate, where it has one of its own, up, down."""
    names = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h", "down_proj", "fc2", "dense_4h_to_h")
    return [name for name in names if hasattr(mlp, name)]


# model_type: (prefix of the class names, what differs from Llama)
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "apertus": ("Apertus", {"key_norm": "k_norm"}),
    "arcee": ("Arcee", {}),
    "bitnet": ("BitNet", {}),
    "cohere": ("Cohere", {"key_norm": "k_norm", "rotary_interleaved": True}),
    "ernie4_5": ("Ernie4_5", {"rotary_interleaved": True}),
    "gemma": ("Gemma", {}),
    "glm": ("Glm", {"rotary_interleaved": True}),
    "glm4": ("Glm4", {"rotary_interleaved": True}),
    "granite": ("Granite", {}),
    "helium": ("Helium", {"rotary_interleaved": True}),
    "hyperclovax": ("HyperCLOVAX", {}),
    "jais2": ("Jais2", {}),
    "nemotron": ("Nemotron", {}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {"key_norm": "k_norm"}),
    "phi": ("Phi", {"key_norm": "k_layernorm"}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"key_norm": "k_norm"}),
    "seed_oss": ("SeedOss", {}),
    "smollm3": ("SmolLM3", {}),
    "stablelm": ("StableLm", {"key_norm": "k_layernorm"}),
    # layers with a window of their own, by the config
    "cohere2": ("Cohere2", {"rotary_interleaved": True}),
    "exaone4": ("Exaone4", {"key_norm": "k_norm"}),
    "gemma2": ("Gemma2", {}),
    "gemma3_text": (
        "Gemma3Text",
        {
            "module_name": "gemma3",
            "model_classes": ("Gemma3TextModel", "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
            "attention_classes": ("Gemma3Attention",),
            "key_norm": "k_norm",
        },
    ),
    "gpt_oss": ("GptOss", {}),
    "ministral": ("Ministral", {}),
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {}),
    "olmo3": ("Olmo3", {"key_norm": "k_norm"}),
    "starcoder2": ("Starcoder2", {}),
    # sparse experts from the start
    "ernie4_5_moe": ("Ernie4_5_Moe", {"rotary_interleaved": True}),
    "flex_olmo": ("FlexOlmo", {"key_norm": "k_norm"}),
    "glm4_moe": ("Glm4Moe", {"key_norm": "k_norm"}),
    "granitemoe": ("GraniteMoe", {}),
    "granitemoeshared": ("GraniteMoeShared", {}),
    "hy_v3": ("HYV3", {"key_norm": "k_norm"}),
    "minimax_m2": ("MiniMaxM2", {"key_norm": "k_norm"}),
    "olmoe": ("Olmoe", {"key_norm": "k_norm"}),
    "phimoe": ("Phimoe", {}),
    "qwen2_moe": ("Qwen2Moe", {}),
    "qwen3_moe": ("Qwen3Moe", {"key_norm": "k_norm"}),
    "solar_open": ("SolarOpen", {}),
}
NORM_AFTER_ROTATION = {
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "nanochat": "NanoChat",
}


def _family(kind: type[LlamaFamily], model_type: str, prefix: str, **different: Any) -> LlamaFamily:
    usual: dict[str, Any] = dict(
        attention_classes=(f"{prefix}Attention",),
        projections=("q_proj", "k_proj", "v_proj"),
        positions=RotaryPositions(),
    )
    return kind(model_type=model_type, stack_classes=(f"{prefix}Model",), **usual | different)


FAMILIES = (
    *(_family(LlamaFamily, name, prefix, **different) for name, (prefix, different) in RELATIVES.items()),
    _family(FusedFamily, "phi3", "Phi3", projections=("qkv_proj",)),
    *(_family(NormAfterRotationFamily, name, prefix) for name, prefix in NORM_AFTER_ROTATION.items()),
)
