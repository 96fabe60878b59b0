"""Mechanisms that are only their pattern: everything else is done by `ops.block_sparse_attention`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.keys_shown import keys_shown
from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.attention.base.registry import attention_config
from hf_efficient.cache.bounded import BoundedLayer
from hf_efficient.ops.backend import IMPLEMENTATIONS, require_torch
from hf_efficient.ops.block_sparse.attention import DECODING, block_sparse_attention
from hf_efficient.ops.block_sparse.traceable import is_traceable
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.decoding import pattern_attention
from hf_efficient.ops.softmax import with_sinks
from hf_efficient.patterns.kinds import GlobalColumns, GlobalRows, Window
from hf_efficient.patterns.pattern import Pattern, parts_of
from hf_efficient.patterns.sets import PerHead

SHARED_OPTIONS: dict[str, Any] = {"layers": None, "side": None, "implementation": "auto"}
"""What a pattern inside a combination leaves to the combination."""


@dataclass(frozen=True, kw_only=True)
class PatternAttentionConfig(EfficientAttentionConfig):
    """Options of a mechanism whose visible keys follow from positions.

    Args:
        implementation: `"auto"`, `"torch"`, `"triton"` or `"flex"`; all but `"auto"` select one, without a fallback.
    """

    implementation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("implementation", self.implementation in IMPLEMENTATIONS, f"one of {', '.join(IMPLEMENTATIONS)}")

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        """Which keys a query may see in this layer; causality comes on top of it."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern")

    def beyond_pattern(self) -> str | None:
        """The option, as `name=value`, that does more than show keys, and that a combination of patterns lacks therefore."""
        return None

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        extra = self.attention_class.num_extra_tokens(self)
        return keys_shown(self.visible_keys(geometry), geometry, length, extra)

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
    def keeps_to_host(cls, config: Any, geometry: AttentionGeometry) -> bool:
        """Whether the host's own window, cap of the logits and sinks hold for all that `forward` computes."""
        return cls.forward is PatternAttention.forward

    @classmethod
    def honours_sliding_window(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return cls.keeps_to_host(config, geometry)

    @classmethod
    def repeats_window(cls, config: Any, geometry: AttentionGeometry) -> bool:
        if geometry.sliding_window is None or cls.num_extra_tokens(config):
            return False
        left, right = geometry.sliding_window
        window = Window(left=left, right=right)
        return any(part & window == window for part in parts_of(config.visible_keys(geometry)))

    @classmethod
    def honours_softcap(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return cls.keeps_to_host(config, geometry)

    @classmethod
    def honours_sinks(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return cls.keeps_to_host(config, geometry)

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if geometry.has_sinks and config.implementation == "flex":
            reasons.append(
                "implementation='flex' gives no log-sum-exp, which sinks need: use 'auto', 'torch' or 'triton'"
            )
        return reasons

    @classmethod
    def graph_refusal(cls, config: Any, geometry: AttentionGeometry) -> str | None:
        if config.implementation not in ("auto", "torch"):
            return f"implementation={config.implementation!r} computes on this machine alone: convert with 'auto'"
        pattern = config.visible_keys(geometry)
        if geometry.sliding_window is not None:
            left, right = geometry.sliding_window
            pattern = pattern & Window(left=left, right=right)
        return None if is_traceable(pattern) else super().graph_refusal(config, geometry)

    def __init__(self, config: PatternAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.pattern = self.inside_window(config.visible_keys(geometry))
        # the patches of a picture stay where they are, whichever of them are hidden
        self.left_aligned = not self.pattern.shift_invariant and geometry.grid is None

    def inside_window(self, pattern: Pattern) -> Pattern:
        """What `pattern` shows inside the host's own window."""
        if self.geometry.sliding_window is None:
            return pattern
        left, right = self.geometry.sliding_window
        return pattern & Window(left=left, right=right)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        return self.attend(query, key, value, context)

    def _pattern_in(self, grid: tuple[int, int]) -> Pattern:
        """What it shows in pictures of another size."""
        return self.inside_window(self.config.visible_keys(dataclasses.replace(self.geometry, grid=grid)))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, pattern: Pattern | None = None
    ) -> Tensor:
        """`block_sparse_attention` with `pattern`, else that of this layer, on the implementation of the config."""
        if pattern is None:
            pattern = self.pattern if context.grid is None else self._pattern_in(context.grid)
        facts: dict[str, Any] = dict(implementation=self.config.implementation)
        if context.sinks is None:
            return block_sparse_attention(query, key, value, pattern, context, **facts)
        found = block_sparse_attention(query, key, value, pattern, context, return_lse=True, **facts)
        return with_sinks(*found, context.sinks)

    def attend_kept(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        pattern: Pattern,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of `pattern` and `columns` over the keys that a `BoundedLayer` kept: see `pattern_attention`.

        Raises:
            ValueError: an explicit implementation that does not decode.
        """
        require_torch(self.config.implementation, DECODING)
        call = context if context.sinks is None else dataclasses.replace(context, return_lse=True)
        window = self.geometry.sliding_window
        options: dict[str, Any] = dict(columns=columns, reach=None if window is None else window[0])
        return with_sinks(*pattern_attention(query, key, value, pattern, call, **options), context.sinks)

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


def with_prefix(pattern: Pattern, count: int) -> Pattern:
    """The pattern of a picture's patches with `count` tokens in front of them, which see all tokens and are seen by all."""
    prefix = tuple(range(count))
    return pattern | GlobalColumns(positions=prefix) | GlobalRows(positions=prefix) if count else pattern


def picture_refusals(geometry: AttentionGeometry, follows_host: bool) -> list[str]:
    """Why a mechanism can't follow the pictures of its host."""
    if follows_host and geometry.position_scheme == "grid" and geometry.grid is None:
        return [
            "the tokens of this host's pictures do not lie in one grid (a random part of the patches, or a grid of its own "
            "for each picture): use a mechanism without a grid, such as local"
        ]
    return []
