"""Hybrids: exact softmax attention in a window, a learned feature map for every key outside it, in one normalisation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.kernel import KernelAttention, drop_keys, normalised, without_autocast
from hf_efficient.attention.base.keys_shown import keys_shown
from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.registry import window_only
from hf_efficient.cache.features import FeatureLayer
from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.block_sparse.windows import window_sides
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.linear_attention import log_kernel
from hf_efficient.ops.linear_beyond_window import far_future, far_past, window_means
from hf_efficient.ops.padding import first_real_token
from hf_efficient.ops.softmax import Partial, additive_mask, attend, merge_attention
from hf_efficient.patterns.kinds import GlobalColumns, Window

# with these the far part is of use before it is trained
START = {"log_scale": -1.0, "sharpness": 0.5}


@dataclass(frozen=True, kw_only=True)
class HybridAttentionConfig(EfficientAttentionConfig):
    """Options of a learned feature map, alone or with a window.

    Args:
        attention_window: w, in tokens, even; 0 = no window. Encoder: w // 2 keys on each side plus the token itself are
            exact. Causal: the last w keys, the token itself included.
        sink_tokens: so many tokens from each row's first real one on are exact for every query, in addition to a window.
        feature_dim: rows of the map of each head; `None` = the head's width D.
    """

    features_per_row: ClassVar[int] = 1

    attention_window: int = 0
    sink_tokens: int = 0
    feature_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_even("attention_window")
        sinks = self.sink_tokens
        fits = type(sinks) is int and sinks >= 0 and (self.attention_window > 0 or sinks == 0)
        self._require("sink_tokens", fits, "an integer ≥ 0, and 0 without a window: give attention_window as well")
        if self.feature_dim is not None:
            self._require_positive("feature_dim")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        features = self.features_per_row * (self.feature_dim or geometry.head_dim)
        if not self.attention_window:
            return features
        left, right = window_sides(self.attention_window, geometry.is_causal)
        exact = Window(left=left, right=right) | GlobalColumns(positions=tuple(range(self.sink_tokens)))
        return features + keys_shown(exact, geometry, length)


class HybridAttention(KernelAttention):
    """`y_i = Σ_j p_ij v_j / Σ_j p_ij` with `p_ij = exp(s · q_i·k_j + b(j - i))` in the window of query i and for the first
    tokens of its row (sinks), and for all other keys

        p_ij = exp(g + a (L_i - m_i) + s · q_i·k̄_i + b_far) φ(q_i)·φ(k_j)

    with the log-sum-exp L_i and the mean m_i of the window's logits (in it the bias averaged over all offsets of a window),
    the mean k̄_i of its keys, b_far the bias of all far keys in that direction, and g, a learned per head: the far part is
    measured against what the window holds, the less the sharper the window is (a < 1), and nothing changes when a number is
    added to all logits of a query. The parts are computed apart and merged by their log-sum-exps, with gradients through
    these. Without a window only φ is left. A subclass gives φ.
    """

    config: HybridAttentionConfig
    relative_bias_refusal = None
    traceable = True
    transfer_learning_rate: ClassVar[float] = 1e-2

    def __init__(self, config: HybridAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.by_position = bool(config.attention_window or config.sink_tokens)
        shape = (geometry.num_heads, config.feature_dim or geometry.head_dim, geometry.head_dim)
        self.query_map, self.key_map = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        if config.attention_window:
            self.log_scale, self.sharpness = (nn.Parameter(torch.empty(geometry.num_heads)) for _ in START)
        left, right = window_sides(max(1, config.attention_window), geometry.is_causal)
        self.pattern = Window(left=left, right=right)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for parameter in (self.query_map, self.key_map):
                parameter.copy_(_identity_rows(*parameter.shape[1:]))
            if self.config.attention_window:
                for name, value in START.items():
                    getattr(self, name).fill_(value)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        origin = {"query_map": "identity", "key_map": "identity"}
        return origin | ({name: f"{value}" for name, value in START.items()} if self.config.attention_window else {})

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if not geometry.has_relative_bias:
            return reasons
        smallest = _smallest_window(geometry)
        if config.attention_window < smallest:
            reasons.append(
                f"{config.mechanism}: attention_window={config.attention_window} leaves keys outside whose relative bias "
                f"differs from token to token, which a feature map can't carry: give attention_window={smallest} or more, "
                "or use local"
            )
        return reasons

    @classmethod
    def graph_refusal(cls, config: Any, geometry: AttentionGeometry) -> str | None:
        if config.attention_window and not geometry.is_causal:
            return f"{config.mechanism} beyond a window has no form whose length stays open: use attention_window=0"
        return super().graph_refusal(config, geometry)

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(config, attention_window=max(2 * length, _smallest_window(geometry)))

    @classmethod
    def control_config(cls, config: Any) -> EfficientAttentionConfig | None:
        return window_only(config)

    def cache_layer(self) -> FeatureLayer | None:
        if not self.geometry.is_causal:
            return None
        sinks, exact = self.config.sink_tokens, self.pattern.left
        pattern = self.pattern | GlobalColumns(positions=tuple(range(sinks))) if sinks else self.pattern
        return FeatureLayer(pattern, exact)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if not self.config.attention_window:
            return super().forward(query, key, value, context)
        with without_autocast(query):
            near = self._near(query, key, value, context)
            scales = self._log_scales(query, key, near[1], context)
            exact = [near]
            if self.config.sink_tokens:
                exact.append(self._at_sinks(query, key, value, context))
            far = self._far(query, key, drop_keys(value, context), scales, context)
            out, _ = merge_attention(*((part.to(far[0][0].dtype), lse) for part, lse in exact), *far)
        return out.to(query.dtype)

    def log_features_of(self, query: Tensor, key: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        log_query, log_key = super().log_features_of(query, key, context)
        if self.config.sink_tokens:
            log_key = log_key.masked_fill(self._is_sink(context, key)[:, None, :, None], float("-inf"))
        return log_query, log_key

    def _is_sink(self, context: AttentionContext, key: Tensor) -> Tensor:
        """(B or 1, S) bool: the first tokens of each row."""
        index: Tensor = torch.arange(key.shape[2], device=key.device)[None]
        if context.key_positions is None:
            index = index - _first_entry(context, key) if key.shape[2] else index
        else:
            index = context.key_positions - (0 if context.row_start is None else context.row_start[:, None])
        return (index >= 0) & (index < self.config.sink_tokens)

    def _near(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Partial:
        return block_sparse_attention(query, key, value, self.pattern, context, return_lse=True)

    def _at_sinks(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Partial:
        """Exact attention to the sinks that lie outside the window of a query."""
        n, s, count = query.shape[2], key.shape[2], self.config.sink_tokens
        entries = _first_entry(context, key) + torch.arange(count, device=key.device)
        exists, entries = entries < s, entries.clamp(max=s - 1).expand(key.shape[0], -1)
        if context.key_padding_mask is not None:
            exists = exists & context.key_padding_mask.gather(1, entries)
        position = entries if context.key_positions is None else context.key_positions.gather(1, entries)
        offset = (
            position[:, None]
            - torch.arange(context.query_offset, context.query_offset + n, device=key.device)[:, None]
        )
        visible = exists[:, None] & ((offset < -self.pattern.left) | (offset > self.pattern.right))
        if context.is_causal:
            visible = visible & (offset <= 0)
        logits = additive_mask(visible, query.dtype)[:, None]
        if context.relative_bias is not None:
            logits = logits + context.relative_bias.at(offset).transpose(0, 1).to(query.dtype)
        index = entries[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        keys, values = key.gather(2, index), value.gather(2, index)
        out, lse = attend(
            query, keys, values, logits, scaling=context.scaling, dropout=context.dropout, return_lse=True
        )
        assert lse is not None
        return out, lse

    def _far(
        self, query: Tensor, key: Tensor, value: Tensor, scales: tuple[Tensor, Tensor], context: AttentionContext
    ) -> list[Partial]:
        left, right = self.pattern.left + 1, self.pattern.right + 1
        if context.is_causal:
            parts = [self._past(query, key, value, context, left)]
        else:
            features = self.log_features_of(query, key, context)
            parts = [far_past(*features, value, left), far_future(*features, value, right)]
        return [(out, lse + scale) for (out, lse), scale in zip(parts, scales, strict=False)]

    def _log_scales(
        self, query: Tensor, key: Tensor, near_lse: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """What is added to the logarithms of the far weights of the past and of the future: (B, H, N) each."""
        dtype, (left, right) = near_lse.dtype, (self.pattern.left, self.pattern.right)
        means = window_means(key.to(dtype), context.key_padding_mask, left, right, query.shape[2])
        level = context.scaling * (query.to(dtype) * means).sum(-1)
        start = level + self.log_scale.to(dtype)[:, None]
        share, bias = self.sharpness.to(dtype)[:, None], context.relative_bias
        near_bias = past = future = torch.zeros((), dtype=dtype, device=key.device)
        if bias is not None:
            offsets = torch.arange(-left, right + 1, device=key.device)
            ends = torch.tensor([-bias.saturation, bias.saturation], device=key.device)
            near_bias = bias.at(offsets).to(dtype).mean(-1, keepdim=True)
            past, future = bias.at(ends).to(dtype).split(1, dim=-1)
        # queries whose window is empty are padding
        scale = start + share * torch.where(near_lse.isfinite(), near_lse - level - near_bias, 0.0)
        return scale + past, scale + future

    def attention_weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        if not self.config.attention_window:
            return super().attention_weights(query, key, context)
        n, s = query.shape[2], key.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            log_query, log_key = self.log_features_of(query, key, context)
            logits = log_kernel(log_query, log_key)
            offset = torch.arange(s, device=key.device) - torch.arange(s - n, s, device=key.device)[:, None]
            near_lse = self._near(query, key, torch.zeros_like(key), context)[1]
            past, future = self._log_scales(query, key, near_lse, context)
            logits = logits + torch.where(offset < 0, past[..., None], future[..., None])
            exact = (query.to(logits.dtype) @ key.to(logits.dtype).transpose(-1, -2)) * context.scaling
            if context.relative_bias is not None:
                exact = exact + context.relative_bias.at(offset).to(logits.dtype)
            is_exact = (offset >= -self.pattern.left) & (offset <= self.pattern.right)
            if self.config.sink_tokens:
                is_exact = is_exact | self._is_sink(context, key)[:, None, None]
            return normalised(torch.where(is_exact, exact, logits), context)


def _smallest_window(geometry: AttentionGeometry) -> int:
    """All keys outside it have one relative bias in each direction, from the first one on."""
    if not geometry.has_relative_bias:
        return 0
    reach = geometry.relative_bias_reach
    return max(2, reach + reach % 2 if geometry.is_causal else 2 * (reach - 1))


def _first_entry(context: AttentionContext, key: Tensor) -> Tensor:
    """(B or 1, 1) index, among the keys that are there, of each row's first token."""
    if context.key_positions is not None:
        start = 0 if context.row_start is None else context.row_start[:, None]
        return (context.key_positions < start).sum(-1, keepdim=True)
    if context.key_padding_mask is not None:
        return first_real_token(context.key_padding_mask)[:, None]
    return torch.zeros(1, 1, dtype=torch.long, device=key.device)


def _identity_rows(rows: int, width: int) -> Tensor:
    """(rows, width): the identity, then further orthogonal matrices from a fixed seed."""
    blocks, generator = [torch.eye(width, device="cpu")], torch.Generator().manual_seed(0)
    while len(blocks) * width < rows:
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu"))
        blocks.append((q * r.diagonal().sign()).to(torch.float32))
    return torch.cat(blocks)[:rows]
