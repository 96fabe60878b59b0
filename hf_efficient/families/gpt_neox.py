"""GPT-NeoX and Persimmon: one projection for q, k and v, side by side for each head; a part of each is rotated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_efficient.attention.base.geometry import LinearWeights, SourceAttention
from hf_efficient.families.llama import LlamaFamily
from hf_efficient.families.rotary import RotaryPositions


class GPTNeoXFamily(LlamaFamily):
    """`query_key_value` gives (q, k, v) of head 0, then those of head 1, and so on."""

    def source_attention(self, module: Any) -> SourceAttention:
        fused = module.query_key_value
        weights = self._parts(module, fused.weight.detach().T)
        biases: Any = (None,) * 3 if fused.bias is None else self._parts(module, fused.bias.detach())
        query, key, value = (
            LinearWeights(weight.flatten(-2).T, None if bias is None else bias.flatten(-2))
            for weight, bias in zip(weights, biases, strict=True)
        )
        return SourceAttention(query, key, value)

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        _, key, value = self._parts(module, module.query_key_value(hidden))
        norm = getattr(module, self.key_norm, None) if self.key_norm else None
        return (key if norm is None else norm(key)).transpose(1, 2), value.transpose(1, 2)

    def _parts(self, module: Any, fused: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of (…, H, D) each, from (…, 3 · H · D)."""
        return fused.unflatten(-1, (self.heads(module).query, 3, -1)).unbind(-2)


FAMILIES = tuple(
    GPTNeoXFamily(
        model_type=model_type,
        stack_classes=(f"{prefix}Model",),
        attention_classes=(f"{prefix}Attention",),
        projections=("query_key_value",),
        positions=RotaryPositions(),
        key_norm=key_norm,
    )
    for model_type, prefix, key_norm in (("gpt_neox", "GPTNeoX", None), ("persimmon", "Persimmon", "k_layernorm"))
)
