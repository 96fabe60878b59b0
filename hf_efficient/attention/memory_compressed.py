"""Memory-compressed attention: the own block token by token, all others as pooled keys of several tokens each."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from hf_efficient.attention.base.keys_shown import keys_shown
from hf_efficient.cache.pooled import CompressedLayer
from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.compression import CompressedMemory, mean_bias
from hf_efficient.ops.context import AttentionContext, ExtraKeys
from hf_efficient.ops.padding import first_real_token, real_tokens, shift_rows
from hf_efficient.ops.pooled_keys import in_groups, log_count, strided_convolution
from hf_efficient.ops.relative_bias import RelativeBias, mean_group_bias
from hf_efficient.ops.softmax import masked_attention
from hf_efficient.patterns.kinds import BlockWindow

# new tokens that are computed at once while decoding
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class MemoryCompressedAttentionConfig(EfficientAttentionConfig):
    """Options of memory-compressed attention.

    Args:
        compression_rate: c, tokens that a pooled key stands for.
        block_size: tokens of a block, which see each other as they are; a multiple of `compression_rate`.
    """

    mechanism: ClassVar[str] = "memory_compressed"

    compression_rate: int = 4
    block_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("compression_rate", "block_size")
        fits = self.block_size % self.compression_rate == 0
        self._require("block_size", fits, f"a multiple of compression_rate={self.compression_rate}")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        rate, keys = self.compression_rate, keys_shown(BlockWindow(block_size=self.block_size), geometry, length)
        for start in range(0, length, self.block_size):
            tokens = min(self.block_size, length - start)
            others = start // rate if geometry.is_causal else -(-length // rate) - -(-tokens // rate)
            keys += tokens * others / length
        return keys

    @classmethod
    def of_size(cls, size: int, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        size = max(size, 2 * math.isqrt(length))  # below, more pooled keys would cost more than smaller blocks save
        rate = max(1, 2 * length // size)
        return cls(compression_rate=rate, block_size=rate * max(1, size // 2 // rate))


@register_mechanism
class MemoryCompressedAttention(EfficientAttention):
    """A query sees its own block of keys, and all other blocks by their pooled keys, in one softmax.

    With σ(t) the block of token t, pooled key u of the tokens uc … uc + c - 1 and |u| the real ones among them:

        k̃_u = c / |u| Σ_r k_{uc + r} W_r,   ṽ_u = c / |u| Σ_r v_{uc + r} V_r        W_r, V_r (D, D) per head
        logit of j:  s q_i·k_j + b(j - i)                                where σ(j) = σ(i), causal: j ≤ i
        logit of u:  s q_i·k̃_u + mean_{j in u} b(j - i) + log |u|        where σ(u) ≠ σ(i), causal: σ(u) < σ(i)

    W_r = V_r = I / c at the start: pooled keys are means, and where their tokens are equal the logarithm makes up for the
    number of these exactly. Blocks count from a row's first real token. Every real token is seen once, alone or pooled.

    O(N² / c + N · block_size) time and memory, and with a relative bias O(N²) additions. While decoding, N / c pooled
    keys and the keys of the last block are kept. Source: Liu et al. 2018 (arXiv 1801.10198), §4.2.3,
    "memory-compressed" and "local" attention. Departures: both in one softmax in place of alternating layers, log-counts,
    and compression after the projection, per head.
    """

    Config = MemoryCompressedAttentionConfig
    config: MemoryCompressedAttentionConfig
    facts = MechanismFacts(
        title="Memory-compressed attention",
        paper="arXiv 1801.10198",
        kind="downsampling",
        time="n²/c + n·b",
        memory="n²/c + n·b",
        exact_when="compression_rate = 1 or block_size ≥ n",
        training="works without training; training restores detail far away",
    )

    def __init__(self, config: MemoryCompressedAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        shape = (geometry.num_heads, config.compression_rate, geometry.head_dim, geometry.head_dim)
        self.key_convolution = nn.Parameter(torch.empty(shape))
        self.value_convolution = nn.Parameter(torch.empty(shape))
        # what the cache forgets is measured in the rows as they come
        self.left_aligned = not geometry.is_causal

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for weight in self.parameters(recurse=False):
                weight.copy_(torch.eye(weight.shape[-1], device=weight.device) / self.config.compression_rate)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {name: "means of the tokens of a pooled key" for name in ("key_convolution", "value_convolution")}

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, compression_rate=1)

    def cache_layer(self) -> CompressedLayer | None:
        return CompressedLayer(BlockWindow(block_size=self.config.block_size)) if self.geometry.is_causal else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if query.shape[2] < key.shape[2] or context.key_positions is not None:
            return self._decode(query, key, value, context)
        key_padding_mask = context.key_padding_mask
        start = None
        if key_padding_mask is not None and not self.left_aligned:
            start = first_real_token(key_padding_mask)
            query, key, value = (shift_rows(x, start, 2) for x in (query, key, value))
            key_padding_mask = shift_rows(key_padding_mask, start, 1)
        out, memory = self._whole_rows(query, key, value, key_padding_mask, context)
        layer = context.recurrent
        if isinstance(layer, CompressedLayer) and layer.dropped is not None:
            dropped = layer.dropped if start is None else shift_rows(layer.dropped, start, 1)
            layer.append(memory, in_groups(dropped, self.config.compression_rate))
        if start is None:
            return out
        # queries before a row's first real token have no past, but the shift put them behind all its keys
        started = torch.arange(out.shape[2], device=out.device) >= start[:, None]
        return shift_rows(out, -start, 2).where(started[:, None, :, None], 0.0)

    def _whole_rows(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, context: AttentionContext
    ) -> tuple[Tensor, CompressedMemory]:
        """Attention of rows that start at their first token, and their pooled keys."""
        n, block = key.shape[2], self.config.block_size
        token_mask = real_tokens(key_padding_mask, key).expand(key.shape[0], -1)
        memory = self._compress(key, value, token_mask, 0)
        own = torch.arange(n, device=key.device)[:, None] // block
        other = memory.number[:1] // (block // self.config.compression_rate)
        visible = other < own if context.is_causal else other != own
        bias = log_count(memory.token_mask.sum(-1), key.dtype)[:, :, None]
        if context.relative_bias is not None:
            bias = bias + mean_group_bias(context.relative_bias, memory.token_mask[:, 0], n)
        extra = ExtraKeys(memory.keys, memory.values, visible & memory.token_mask.any(-1), bias)
        call = dataclasses.replace(context, key_padding_mask=key_padding_mask, extra=extra)
        out = block_sparse_attention(query, key, value, BlockWindow(block_size=block), call)
        return out, memory

    def _compress(self, key: Tensor, value: Tensor, token_mask: Tensor, first: Tensor | int) -> CompressedMemory:
        """Pooled (B, H, S, D) keys whose row b starts at token `first[b]`, a multiple of the rate."""
        rate = self.config.compression_rate
        keys = strided_convolution(key, token_mask, self.key_convolution)
        values = strided_convolution(value, token_mask, self.value_convolution)
        token_mask = in_groups(token_mask, rate)[:, None]
        tokens = torch.arange(keys.shape[2] * rate, device=key.device).unflatten(0, (-1, rate))
        tokens = (tokens + first).expand(token_mask.shape)
        return CompressedMemory(keys, values, token_mask, tokens, tokens[:, 0, :, 0] // rate)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """New queries over the pooled keys of the cache and the keys that it kept, whose complete blocks are pooled."""
        positions, mask = context.key_positions, context.key_padding_mask
        if positions is None:
            positions = torch.arange(key.shape[2], device=key.device)[None]
        batch, start = key.shape[0], context.row_start
        if start is None:
            start = torch.zeros(1, dtype=torch.long, device=key.device) if mask is None else first_real_token(mask)
        exists = ((positions >= 0) & (positions >= start[:, None])).expand(batch, -1)
        shift = first_real_token(exists)
        key, value = (shift_rows(x, shift, 2) for x in (key, value))
        token_mask = shift_rows(exists if mask is None else exists & mask, shift, 1)
        first = (positions.expand(batch, -1).gather(1, shift[:, None]) - start[:, None]).clamp(min=0)
        memory = self._compress(key, value, token_mask, first[..., None, None])
        layer = context.recurrent
        before = layer.state if isinstance(layer, CompressedLayer) else None
        if isinstance(layer, CompressedLayer) and layer.dropped is not None:
            layer.append(memory, in_groups(shift_rows(layer.dropped, shift, 1), self.config.compression_rate))
        memory = memory if before is None else before.followed_by(memory)
        new = torch.arange(query.shape[2], device=key.device) + context.query_offset
        rows = (new - start[:, None]).expand(batch, -1)
        tokens = (first + torch.arange(key.shape[2], device=key.device))[:, None]
        keys, values = (torch.cat(pair, dim=2) for pair in ((memory.keys, key), (memory.values, value)))
        outputs = []
        # a few at a time: the logits of many new tokens over single keys would be quadratic
        for part, row in zip(query.split(CHUNK, dim=2), rows.split(CHUNK, dim=1), strict=True):
            logits = self._logits(row, tokens, token_mask, memory, context.relative_bias).to(query.dtype)
            outputs.append(
                masked_attention(
                    part, keys, values, attn_mask=logits, dropout_p=context.dropout, scale=context.scaling
                )
            )
        return torch.cat(outputs, dim=2)

    def _logits(
        self, rows: Tensor, token: Tensor, token_mask: Tensor, memory: CompressedMemory, bias: RelativeBias | None
    ) -> Tensor:
        """(B, 1 or H, N, G + S) what is added to the logits of pooled keys and of keys (B, 1, S) at queries (B, N)."""
        block, row = self.config.block_size, rows[..., None]
        near = token_mask[:, None] & (token // block == row // block) & (token <= row)
        far = memory.token_mask.any(-1) & (
            memory.number[:, None] // (block // self.config.compression_rate) < row // block
        )
        counts = log_count(memory.token_mask.sum(-1), memory.keys.dtype).expand_as(far)
        logits = torch.cat([counts, torch.zeros_like(near)], dim=-1)[:, None]
        if bias is not None:
            logits = logits + torch.cat([mean_bias(bias, memory, rows), bias.at(token - row).transpose(0, 1)], dim=-1)
        return logits.masked_fill(~torch.cat([far, near], dim=-1)[:, None], float("-inf"))
