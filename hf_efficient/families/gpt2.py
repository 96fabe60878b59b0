"""GPT-2: one fused, transposed q-k-v projection, causal, absolute positions from row 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..base import LinearWeights, SourceAttention
from .base import ModelFamily


class GPT2Family(ModelFamily):
    """`c_attn` is a `Conv1D` of weight (in, 3 · out); one class serves self- and cross-attention."""

    def is_cross_attention(self, name: str, module: nn.Module) -> bool:
        return bool(getattr(module, "is_cross_attention", False))

    def side(self, stack: Any) -> str:
        return "decoder"

    def heads(self, module: Any) -> tuple[int, int]:
        return module.num_heads, module.head_dim

    def source_attention(self, module: Any) -> SourceAttention:
        weights = module.c_attn.weight.detach().T.chunk(3)
        biases = module.c_attn.bias.detach().chunk(3)
        query, key, value = map(LinearWeights, weights, biases)
        return SourceAttention(query, key, value)

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        _, key, value = (
            x.unflatten(-1, self.heads(module)).transpose(1, 2) for x in module.c_attn(hidden).chunk(3, -1)
        )
        return key, value


FAMILIES = (
    GPT2Family(model_type="gpt2", stack_class="GPT2Model", attention_class="GPT2Attention", position_table="wpe"),
)
