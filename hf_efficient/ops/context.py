"""The facts of one attention call: what softmax attention needs, and what a mechanism is told besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from hf_efficient.ops.pooling import PackedRows
    from hf_efficient.ops.relative_bias import RelativeBias


class Recurrence(Protocol):
    """A cache layer that keeps a state of keys: `cache.recurrent.RecurrentLayer` and what derives from it."""

    state: Any


class ExtraKeys(NamedTuple):
    """Keys that every query may see beside its window, in the same softmax (Longformer's global columns).

    Attributes:
        key, value: (B, H, G, D).
        keep: (B or 1, N or 1, G) bool, True where query n may see extra key g.
        bias: (B or 1, H or 1, N or 1, G or 1) additive, or `None`; one for all extra keys costs least.
    """

    key: Tensor
    value: Tensor
    keep: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class AttentionCall:
    """What softmax attention over a pattern depends on, but for the heads and the pattern.

    Attributes:
        key_padding_mask: (B, S) bool, True = real token; `None` = all real.
        is_causal: query i may only see keys j ≤ i + `query_offset`.
        query_offset: tokens before the first query; while decoding those in the cache, also forgotten ones, else 0.
        scaling: factor on q·k, as the host gives it (1.0 in T5).
        dropout: probability for attention weights; 0.0 in eval mode.
        relative_bias: lazy additive bias over key - query offsets, or `None`; gradients reach its table.
        row_start: (B,) index of each row's first real key, where rows were *not* aligned to the left (decoding);
            `None` = every row starts at 0.
        key_positions: (B, S) index of each key among all tokens, -1 = no key (False in `key_padding_mask`), where the
            mechanism's `cache_layer` forgot keys; `None` = key j is token j, and `query_offset` is S - N. The last N
            keys are always those of the queries.
        extra: further keys in the same softmax; `key_padding_mask` must hide them where the pattern shows them as well.
        segments, positions: (of queries, of keys), integers (B, 1 or H, N) and (B, 1 or H, S): visible only where segments
            are equal, and where the key's position is at most the query's.
        softcap: c of `c · tanh(s q·k / c)`, which the logits become before biases and masks; `None` = they stay.
        return_lse: whether the log-sum-exp is needed; `block_sparse_attention` sets it from its own argument.
    """

    is_causal: bool
    scaling: float
    key_padding_mask: Tensor | None = None
    query_offset: int = 0
    dropout: float = 0.0
    relative_bias: RelativeBias | None = None
    row_start: Tensor | None = None
    key_positions: Tensor | None = None
    extra: ExtraKeys | None = None
    segments: tuple[Tensor, Tensor] | None = None
    positions: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    return_lse: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """How the softmax is computed wherever `ops.softmax.attend` computes a part of it."""
        return dict(scaling=self.scaling, dropout=self.dropout, softcap=self.softcap)

    @property
    def by_vectors(self) -> bool:
        """Visibility depends on numbers that tokens carry, not on where they stand alone."""
        return self.segments is not None or self.positions is not None


@dataclass(frozen=True)
class AttentionContext(AttentionCall):
    """What a mechanism is told about one call; it leaves `extra`, `segments`, `positions` and `return_lse` to the mechanism.

    Attributes:
        global_attention_mask: (B, S) bool or 0/1, True = global token, or `None`; may be shorter while decoding.
        hidden_states: (B, N, hidden_size), only for mechanisms with `needs_hidden_states`.
        project: `project(hidden)` sends (B, G, hidden_size) through the host's own key and value projections and returns
            (key, value), each (B, H, G, D); only for mechanisms with `needs_project`.
        cos_sin: (B, N, 2 R) cosines and sines by which the host rotated queries and keys, for `ops.rotary.Rotation`; only
            for mechanisms with `needs_rotation`.
        input_ids: (B, N), only for mechanisms with `needs_input_ids`.
        rows: where the layer runs on pooled tokens (`pooling`): how the rows of the call lie in `query`, `key`, `value` and
            `hidden_states`, which then have one entry per pooled token: (B, H, windows, D) and (B, windows, hidden_size), or
            (1, H, all windows, D) for packed rows. `hidden_states` are those of the keys, if these are pooled differently.
        recurrent: the mechanism's `cache_layer` where that holds a state of keys; what the last update returned is to be
            added to it by the mechanism.
        sinks: (H,) logits that stand in the denominator of each head's softmax, with no value; `None` = none.
        grid: (rows, columns) of the patches of this call's pictures, where they are not those of the layer's geometry.
    """

    global_attention_mask: Tensor | None = None
    hidden_states: Tensor | None = None
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    cos_sin: Tensor | None = None
    input_ids: Tensor | None = None
    rows: PackedRows | None = None
    recurrent: Recurrence | None = None
    sinks: Tensor | None = None
    grid: tuple[int, int] | None = None
