"""Keys per query: in one unit, how much a mechanism computes."""

from __future__ import annotations

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.ops.block_sparse.windows import window_sides
from hf_efficient.patterns.kinds import Full, Window
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.tile_table import visible_pairs


def keys_shown(pattern: Pattern, geometry: AttentionGeometry, length: int, extra_tokens: int = 0) -> float:
    """Keys that a pattern shows a query inside causality and the host's own window: the mean over queries and heads.

    Args:
        length: n, tokens of a row without padding.
        extra_tokens: g learned tokens in front of the row, which all see and which see all, except in the last layer, whose
            extra tokens nobody reads: `g + g (n + g) / n` more.
    """
    if geometry.sliding_window is not None:
        left, right = geometry.sliding_window
        pattern = pattern & Window(left=left, right=right)
    pairs = visible_pairs(pattern.at_length(length), length, length, is_causal=geometry.is_causal)
    read = extra_tokens * (length + extra_tokens) if geometry.layer < geometry.num_layers - 1 else 0
    return (pairs + read) / length + extra_tokens


def all_keys(geometry: AttentionGeometry, length: int) -> float:
    """Of full attention."""
    return keys_shown(Full(), geometry, length)


def newest_keys(count: int, geometry: AttentionGeometry, length: int) -> float:
    """At most `count` keys, of those that causality leaves."""
    if not geometry.is_causal:
        return min(count, length)
    return keys_shown(Window(left=count - 1, right=0), geometry, length)


def window_keys(attention_window: int, geometry: AttentionGeometry, length: int, extra_tokens: int = 0) -> float:
    """Of a sliding window, 0 = there is none, and extra tokens in front of the row."""
    if not attention_window:
        return 0.0
    left, right = window_sides(attention_window, geometry.is_causal)
    return keys_shown(Window(left=left, right=right), geometry, length, extra_tokens)
