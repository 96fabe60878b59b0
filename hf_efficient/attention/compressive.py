"""Compressive Transformer: what leaves the memory of Transformer-XL is kept as fewer, pooled keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import AttentionGeometry, EfficientAttentionConfig, MechanismFacts, register_mechanism
from hf_efficient.attention.base.segment import CHUNK, Far, SegmentAttention, SegmentAttentionConfig, pieces
from hf_efficient.cache.segments import SegmentLayer
from hf_efficient.ops import compression as ops
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.padding import shift_rows
from hf_efficient.ops.pooled_keys import log_count

COMPRESSIONS = ("mean", "max", "conv", "dilated", "most_used")


@dataclass(frozen=True, kw_only=True)
class CompressiveAttentionConfig(SegmentAttentionConfig):
    """Options of the Compressive Transformer: those of every attention in segments, and

    Args:
        compressed_memory_length: G, pooled keys, the newest, that a segment sees.
        compression_rate: c, tokens that leave the memory for each pooled key; `segment_length` is a multiple of it.
        compression: `"mean"`, `"max"` (per channel), `"conv"`, `"dilated"`, or `"most_used"`, which keeps every c-th token.
        reconstruction_weight: of the attention-reconstruction loss of every batch, which trains convolutions only; 0 = no
    """

    mechanism: ClassVar[str] = "compressive"

    compressed_memory_length: int = 256
    compression_rate: int = 4
    compression: str = "conv"
    reconstruction_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("compressed_memory_length", "compression_rate")
        self._require("compression", self.compression in COMPRESSIONS, f"one of {', '.join(COMPRESSIONS)}")
        self._require("segment_length", self.segment_length % self.unit == 0, f"a multiple of {self.unit}")
        if self.compression == "most_used":
            rule = "at least segment_length, so that a whole segment has seen what leaves the memory"
            self._require("memory_length", self.memory_length >= self.segment_length, rule)
        weight = self.reconstruction_weight
        learns = self.compression in ("conv", "dilated")
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and weight >= 0
        rule = "a number ≥ 0, and 0 unless compression is conv or dilated, which alone have parameters"
        self._require("reconstruction_weight", is_number and (learns or not weight), rule)

    @property
    def unit(self) -> int:
        """Tokens that are compressed together."""
        return self.compression_rate * (ops.DILATION if self.compression == "dilated" else 1)

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        sizes = self.segment_length, self.memory_length, self.compression_rate, self.compressed_memory_length
        return super().keys_per_query(geometry, length) + ops.compressed_keys_shown(length, *sizes)


@register_mechanism
class CompressiveAttention(SegmentAttention):
    """A token sees its own segment up to itself, the M tokens before it, and before those pooled keys of c tokens each.

    With T and M as in Transformer-XL, the tokens that leave the memory when segment w ends are block w,
    `[w T - M, (w + 1) T - M)`, of which every c make a pooled key: block w makes numbers w T / c … (w + 1) T / c - 1.
    A query of segment τ sees the pooled keys g with `τ T / c - G ≤ g < τ T / c`, in one softmax with its tokens j,
    `τ T - M ≤ j ≤ i`:

        logit of j:  s q_i·k_j + b(j - i)
        logit of g:  s q_i·k̃_g + mean_{t in g} b(t - i) + log |g|          |g| the real tokens of g

        mean, conv:  k̃_g = c / |g| Σ_r k_{g,r} W_r, likewise ṽ_g with V_r; W_r = V_r = I / c for mean and at the start
        dilated:     the same, with tokens r, r + 2, r + 4, … of every 2 c in one pooled key, so that each has one
        max:         of every channel of the real keys and values
        most_used:   |g| = 1: of block w the T / c tokens with the largest `Σ_i softmax_j(s q_i·k_j)`, sums over the real i
                     of segment w and softmax over the block: what its last readers looked at, by content alone

    Positions count from a row's first real token, so one forward, segments and single steps are the same. Memory and pooled
    keys take no gradient from later segments (`stop_gradient`), except the convolutions. These can also learn from the loss
    `Σ ‖attn(q, k, v) - attn(q, k̃, ṽ)‖² / Σ ‖attn(q, k, v)‖²` over blocks w and queries q of segment w, whose gradient
    reaches nothing else: every training step adds `reconstruction_weight` times it.

    O(N (T + M + G)) time, O(N D) memory and the logits kept for gradients; decoding keeps T + M + G keys.
    Source: Rae et al. 2020 (arXiv 1911.05507), §3. Departures: compression after the projection, per head; log-counts; the
    most used tokens are chosen by their last readers' weights.
    """

    Config = CompressiveAttentionConfig
    config: CompressiveAttentionConfig
    facts = MechanismFacts(
        title="Compressive Transformer",
        paper="arXiv 1911.05507",
        kind="recurrence",
        time="n·(T + M + G)",
        memory="n·(T + M + G)",
        exact_when="memory_length or segment_length ≥ n; compression_rate = 1 with enough pooled keys",
        training="works without training; training restores detail far away",
    )
    reconstruction_loss: Tensor | None = None
    """Of the last training step, where the config asks for it."""

    def __init__(self, config: CompressiveAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        if config.compression in ("conv", "dilated"):
            shape = (geometry.num_heads, config.compression_rate, geometry.head_dim, geometry.head_dim)
            self.key_convolution = nn.Parameter(torch.empty(shape))
            self.value_convolution = nn.Parameter(torch.empty(shape))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for weight in self.parameters(recurse=False):
                weight.copy_(torch.eye(weight.shape[-1], device=weight.device) / self.config.compression_rate)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {name: "means of the tokens of a pooled key" for name, _ in self.named_parameters(recurse=False)}

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        # in one segment gradients are exact, too
        size = -(-length // config.unit) * config.unit
        return dataclasses.replace(config, segment_length=size, memory_length=max(size, config.memory_length))

    def training_logs(self) -> dict[str, Tensor]:
        return {} if self.reconstruction_loss is None else {"reconstruction_loss": self.reconstruction_loss}

    @property
    def _per_block(self) -> int:
        return self.config.segment_length // self.config.compression_rate

    @property
    def _learns(self) -> bool:
        return self.training and self.config.reconstruction_weight > 0 and torch.is_grad_enabled()

    @property
    def _needs_queries(self) -> bool:
        return self.config.compression == "most_used" or self._learns

    def _compress(self, span: ops.Span, scaling: float) -> ops.CompressedMemory:
        """Pooled keys of the blocks of `span`, through which backward meets the reconstruction loss where there is one."""
        config = self.config
        key, value = (x.detach() if config.stop_gradient else x for x in (span.key, span.value))
        if config.compression == "most_used":
            assert span.query is not None
            used = ops.attention_received(span.query, key, span.token_mask, span.read, config.segment_length, scaling)
            parts = ops.most_used(key, value, span.token_mask, used, config.segment_length, self._per_block)
        else:
            weights = [getattr(self, f"{name}_convolution", None) for name in ("key", "value")]
            parts = ops.compressed(key, value, span.token_mask, config.compression_rate, config.compression, weights)
        keys, values, real, index = parts
        if self._learns and span.query is not None:
            loss = ops.reconstruction_error(span, (keys, values, real), config.segment_length, scaling)
            self.reconstruction_loss = loss.detach()
            keys = ops.with_loss(keys, loss, config.reconstruction_weight)
        number = torch.arange(keys.shape[2], device=key.device) + span.first[:, None] * self._per_block
        tokens = index + (span.first * config.segment_length - config.memory_length)[:, None, None, None]
        return ops.CompressedMemory(keys, values, real, tokens, number)

    def _far(self, memory: ops.CompressedMemory, rows: Tensor, context: AttentionContext) -> Far:
        """The pooled keys as queries at (B or 1, N) `rows` see them."""
        limit = (rows // self.config.segment_length * self._per_block)[:, None, :, None]
        number = memory.number[:, None, None]
        visible = memory.token_mask.any(-1)[:, :, None] & (number < limit)
        visible = visible & (number >= limit - self.config.compressed_memory_length)
        logits = log_count(memory.token_mask.sum(-1), memory.keys.dtype)[:, :, None].masked_fill(
            ~visible, float("-inf")
        )
        if context.relative_bias is not None:
            logits = logits + ops.mean_bias(context.relative_bias, memory, rows)
        return Far(memory.keys, memory.values, logits.to(memory.keys.dtype))

    def _far_of_rows(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Any:
        size, per_block = self.config.segment_length, self._per_block
        first = self.config.memory_length // size  # the block of the first token
        span = ops.span_of_rows(query, key, value, context.key_padding_mask, size, self.config.memory_length)
        memory = self._compress(span, context.scaling)
        layer = context.recurrent
        if isinstance(layer, SegmentLayer):
            assert layer.row_start is not None
            if self._needs_queries:
                layer.keep_queries(shift_rows(query, -layer.row_start, 2))
            if layer.dropped is not None:
                dropped = shift_rows(layer.dropped, layer.row_start, 1)
                self._append(layer, memory, span.token_mask & ops.cut(dropped, 1, span.start, span.key.shape[2]))
        parts = [x.split(per_block, dim=2) for x in memory[:2]]

        def far_of(u: int, count: int) -> Far | None:
            if 0 < u <= first:
                return None
            # the first segment has the first block, which it does not see: parameters take part in every call
            last = max(1, u - first)
            low = max(0, last * per_block - self.config.compressed_memory_length)
            keys, values = (torch.cat(pieces(part, low, per_block, last), dim=2) for part in parts)
            here = slice(low, last * per_block)
            token_mask, tokens = memory.token_mask[:, :, here], memory.tokens[:, :, here]
            seen = ops.CompressedMemory(keys, values, token_mask, tokens, memory.number[:, here])
            return self._far(seen, u * size + torch.arange(count, device=key.device)[None], context)

        return far_of

    def _far_of_cache(
        self, query: Tensor, key: Tensor, value: Tensor, token: Tensor, context: AttentionContext
    ) -> Any:
        batch, key_padding_mask = key.shape[0], context.key_padding_mask
        token_mask = (token >= 0).expand(batch, -1) if key_padding_mask is None else (token >= 0) & key_padding_mask
        layer = context.recurrent if isinstance(context.recurrent, SegmentLayer) else None
        queries, read = self._queries_of_cache(query, token_mask, layer)
        sizes = self.config.segment_length, self.config.memory_length
        span, local = ops.span_of_cache(queries, key, value, token.expand(batch, -1), token_mask, read, *sizes)
        memory = self._compress(span, context.scaling).expanded(batch)
        before = None if layer is None else layer.state
        if layer is not None and layer.dropped is not None:
            self._append(layer, memory, span.token_mask & local(layer.dropped, 1))
        if before is not None:
            memory = before.followed_by(memory)
        return lambda rows: self._far(self._in_reach(memory, rows), rows, context)

    def _in_reach(self, memory: ops.CompressedMemory, rows: Tensor) -> ops.CompressedMemory:
        """What a whole chunk of queries at (B or 1, N) `rows` may see; of fewer queries all are looked at."""
        size, most = self.config.segment_length, self.config.compressed_memory_length
        reach = memory.token_mask.any(-1).any(1) & (memory.number < rows[:, -1:] // size * self._per_block)
        count = most + ((CHUNK - 1) // size + 1) * self._per_block
        return memory if rows.shape[1] < CHUNK or reach.shape[1] <= count else memory.last(reach, count)

    def _queries_of_cache(
        self, query: Tensor, token_mask: Tensor, layer: SegmentLayer | None
    ) -> tuple[Tensor | None, Tensor]:
        """(B, H, S, D) queries of all keys as far as they are needed, and (B, S) which of them are known and real."""
        if not self._needs_queries:
            return None, token_mask
        if layer is not None:
            query = layer.keep_queries(query)
        elif self.config.compression == "most_used":
            raise ValueError(
                "compression='most_used' asks who read a token, which this cache does not keep: leave past_key_values to "
                "the model, or begin with an empty DynamicCache."
            )
        unknown = token_mask.shape[1] - query.shape[2]
        known = torch.arange(token_mask.shape[1], device=token_mask.device) >= unknown
        return ops.cut(query, 2, -unknown, token_mask.shape[1]), token_mask & known

    def _append(self, layer: SegmentLayer, memory: ops.CompressedMemory, dropped: Tensor) -> None:
        """Keep what the cache forgot, (B, L) bool `dropped` real tokens: always whole blocks."""
        gone = dropped.unflatten(1, (-1, self.config.segment_length)).any(-1).repeat_interleave(self._per_block, dim=1)
        layer.append(memory.expanded(gone.shape[0]), gone[..., None], self.config.compressed_memory_length)
