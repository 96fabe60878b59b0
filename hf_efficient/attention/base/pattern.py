"""Mechanisms that are only their pattern: everything else is done by `ops.block_sparse_attention`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.cache.bounded import BoundedLayer
from hf_efficient.ops.backend import IMPLEMENTATIONS, require_torch
from hf_efficient.ops.block_sparse.attention import DECODING, block_sparse_attention
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.decoding import rows_attention
from hf_efficient.ops.softmax import with_sinks
from hf_efficient.patterns.kinds import Window
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.sets import PerHead

SHARED_OPTIONS: dict[str, Any] = {"layers": None, "side": None, "implementation": "auto"}
"""What a pattern inside a combination leaves to the combination."""


@dataclass(frozen=True, kw_only=True)
class PatternAttentionConfig(EfficientAttentionConfig):
    """Options of a mechanism whose visible keys follow from positions.

    Args:
        implementation: `"auto"`, `"torch"`, `"triton"` or `"flex"`; an explicit one never falls back.
    """

    implementation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("implementation", self.implementation in IMPLEMENTATIONS, f"one of {', '.join(IMPLEMENTATIONS)}")

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        """Which keys a query may see in this layer; causality comes on top of it."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern")

    def reach(self, geometry: AttentionGeometry) -> int | None:
        is_plain = self.attention_class.forward is PatternAttention.forward
        return self.visible_keys(geometry).reach if is_plain else None

    def __or__(self, other: EfficientAttentionConfig) -> PatternAttentionConfig:
        """Both patterns in one softmax: a config of the mechanism `combined`.

        Raises:
            ValueError: `layers`, `side` or `implementation` differ, or `other` is no pattern.
        """
        if not isinstance(other, EfficientAttentionConfig):
            return NotImplemented
        mine, theirs = ({n: getattr(c, n, default) for n, default in SHARED_OPTIONS.items()} for c in (self, other))
        if mine != theirs:
            raise ValueError(
                f"{self.mechanism} | {other.mechanism}: {mine} and {theirs} differ; give both the same, or none."
            )
        bare = (
            dataclasses.replace(c, **{n: v for n, v in SHARED_OPTIONS.items() if hasattr(c, n)}) for c in (self, other)
        )
        both = attention_config("combined", patterns=tuple(bare), **mine)
        assert isinstance(both, PatternAttentionConfig)
        return both


class PatternAttention(EfficientAttention):
    """`y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j` over the keys j that the config's pattern shows query i.

    Causal layers additionally require j ≤ i, layers with a window of the host's that it shows key j. Where a bounded number
    of past keys is enough, the cache keeps no more.
    """

    config: PatternAttentionConfig
    by_rotation = False

    grouped_heads = True

    @classmethod
    def is_pattern_alone(cls, config: Any) -> bool:
        """Whether every output is attention over what the pattern shows, with no keys or rows of another kind."""
        return cls.forward is PatternAttention.forward

    @classmethod
    def honours_sliding_window(cls, config: Any) -> bool:
        return cls.is_pattern_alone(config)

    @classmethod
    def honours_softcap(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return cls.is_pattern_alone(config)

    @classmethod
    def honours_sinks(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return cls.is_pattern_alone(config)

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if geometry.has_sinks and config.implementation == "flex":
            reasons.append(
                "implementation='flex' gives no log-sum-exp, which sinks need: use 'auto', 'torch' or 'triton'"
            )
        return reasons

    def __init__(self, config: PatternAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.pattern = config.visible_keys(geometry)
        if geometry.sliding_window is not None:
            left, right = geometry.sliding_window
            self.pattern = self.pattern & Window(left=left, right=right)
        self.left_aligned = not self.pattern.shift_invariant

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        return self.attend(query, key, value, context)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, pattern: Pattern | None = None
    ) -> Tensor:
        """`block_sparse_attention` with `pattern`, else that of this layer, on the implementation of the config."""
        pattern = self.pattern if pattern is None else pattern
        facts: dict[str, Any] = dict(implementation=self.config.implementation)
        if context.sinks is None:
            return block_sparse_attention(query, key, value, pattern, context, **facts)
        found = block_sparse_attention(query, key, value, pattern, context, return_lse=True, **facts)
        return with_sinks(*found, context.sinks)

    def cache_layer(self) -> BoundedLayer | None:
        if not (self.geometry.is_causal and self.pattern.is_bounded):
            return None
        return BoundedLayer(self.pattern)


def two_part_pattern(policy: str, first: Pattern, second: Pattern, geometry: AttentionGeometry) -> Pattern:
    """Two patterns over heads or layers: `"split"` gives the first half of the heads `first` and the others `second`,
    `"interleaved"` gives even layers `first` and odd ones `second`, anything else every head both, in one softmax."""
    if policy == "interleaved":
        return second if geometry.layer % 2 else first
    if policy == "split":
        half = -(-geometry.num_heads // 2)
        return PerHead(parts=(first,) * half + (second,) * (geometry.num_heads - half))
    return first | second


def two_part_refusals(name: str, policy: str, whole: str, geometry: AttentionGeometry) -> list[str]:
    """Why a layer can't have the policy that its option `name` asks for; `whole` is the one that always works."""
    if policy == "split" and geometry.num_heads < 2:
        return [f"{name}='split' needs at least 2 heads, the {geometry.side} has 1: use {name}={whole!r}"]
    if policy == "interleaved" and geometry.num_layers < 2:
        return [f"{name}='interleaved' needs at least 2 layers, the {geometry.side} has 1: use {name}={whole!r}"]
    return []


def attend_kept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    context: AttentionContext,
    columns: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Causal attention of `pattern` over the keys that a `BoundedLayer` kept: see `ops.decoding.rows_attention`.

    Raises:
        ValueError: an explicit `implementation` that does not decode.
    """
    require_torch(implementation, DECODING)
    return rows_attention(query, key, value, pattern.visible_per_head, context, columns=columns)[0]
