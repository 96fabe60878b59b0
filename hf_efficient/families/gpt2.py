"""GPT-2: one fused, transposed q-k-v projection, causal, absolute positions from row 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_efficient.attention.base.geometry import LinearWeights, SourceAttention
from hf_efficient.families.base import ModelFamily, fill_linear
from hf_efficient.families.feed_forward import Dense
from hf_efficient.families.initialised import mark_initialised
from hf_efficient.families.positions import PositionTable
from hf_efficient.families.stack import Heads


class GPT2Family(ModelFamily):
    """`c_attn` is a `Conv1D` of weight (in, 3 · out); one class serves self- and cross-attention."""

    def is_cross_attention(self, name: str, module: nn.Module) -> bool:
        return bool(getattr(module, "is_cross_attention", False))

    def side(self, stack: Any) -> str:
        return "decoder"

    def heads(self, module: Any) -> Heads:
        return Heads.alike(module.num_heads, module.head_dim)

    def source_attention(self, module: Any) -> SourceAttention:
        weights = module.c_attn.weight.detach().T.chunk(3)
        biases = module.c_attn.bias.detach().chunk(3)
        query, key, value = map(LinearWeights, weights, biases)
        return SourceAttention(query, key, value)

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads(module)
        _, key, value = (
            x.unflatten(-1, (heads.query, -1)).transpose(1, 2) for x in module.c_attn(hidden).chunk(3, -1)
        )
        return key, value

    # weights are input × output already

    def feed_forward_name(self, layer: Any) -> str:
        return "mlp"

    def feed_forward_products(self, layer: Any) -> list[str]:
        return ["mlp.c_fc", "mlp.c_proj"]

    def feed_forward(self, layer: Any) -> Dense:
        mlp = layer.mlp
        up, down = mlp.c_fc, mlp.c_proj
        return Dense(up.weight, down.weight, up.bias, down.bias, mlp.act, dropout=mlp.dropout.p)

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        layer.mlp = self.modeling.GPT2MLP(dense.up.shape[1], config)
        fill_linear(layer.mlp.c_fc, dense.up, dense.up_bias)
        fill_linear(layer.mlp.c_proj, dense.down, dense.down_bias)
        mark_initialised(layer.mlp)


class GPTBigCodeFamily(GPT2Family):
    """`c_attn` is an `nn.Linear`: all queries, then the one key and value that they share; without sharing, by head."""

    def heads(self, module: Any) -> Heads:
        return Heads(module.num_heads, module.kv_heads, module.head_dim, module.head_dim)

    def source_attention(self, module: Any) -> SourceAttention:
        weights = self._parts(module, module.c_attn.weight.detach().T)
        biases = self._parts(module, module.c_attn.bias.detach())
        query, key, value = (LinearWeights(weight.T, bias) for weight, bias in zip(weights, biases, strict=True))
        return SourceAttention(query, key, value)

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads(module)
        _, key, value = self._parts(module, module.c_attn(hidden))
        key, value = (x.unflatten(-1, (heads.key_value, -1)).transpose(1, 2) for x in (key, value))
        return key, value

    def _parts(self, module: Any, fused: Tensor) -> list[Tensor]:
        """q, k, v of (…, heads · D) each, from all of them in the last dimension."""
        heads = self.heads(module)
        if heads.key_value == 1:
            return list(fused.split([heads.query * heads.width, heads.width, heads.width], dim=-1))
        return [x.flatten(-2) for x in fused.unflatten(-1, (heads.query, 3, -1)).unbind(-2)]

    def feed_forward(self, layer: Any) -> Dense:
        dense = super().feed_forward(layer)
        return dense._replace(up=dense.up.T, down=dense.down.T)

    def restore_feed_forward(self, layer: Any, dense: Dense, config: Any) -> None:
        layer.mlp = self.modeling.GPTBigCodeMLP(dense.up.shape[1], config)
        fill_linear(layer.mlp.c_fc, dense.up.T, dense.up_bias)
        fill_linear(layer.mlp.c_proj, dense.down.T, dense.down_bias)
        mark_initialised(layer.mlp)


FAMILIES = (
    GPTBigCodeFamily(
        model_type="gpt_bigcode",
        stack_classes=("GPTBigCodeModel",),
        attention_classes=("GPTBigCodeAttention",),
        projections=("c_attn",),
        positions=PositionTable("wpe"),
    ),
    GPT2Family(
        model_type="gpt2",
        stack_classes=("GPT2Model",),
        attention_classes=("GPT2Attention",),
        projections=("c_attn",),
        positions=PositionTable("wpe"),
    ),
)
