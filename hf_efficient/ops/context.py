"""The facts of one attention call that a mechanism is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from hf_efficient.ops.linear_attention import FeatureState
    from hf_efficient.ops.pooling import PackedRows
    from hf_efficient.ops.relative_bias import RelativeBias


class Recurrence(Protocol):
    """A cache layer that keeps a state of the keys it forgot: `cache.recurrent.RecurrentLayer` and what derives from it."""

    state: FeatureState | None

    def fold(self, log_key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> None:
        """Add what the last update forgot to the state."""


@dataclass
class AttentionContext:
    """Facts of one call.

    Attributes:
        key_padding_mask: (B, S) bool, True = real token; `None` = all real.
        is_causal: query i may only see keys j ≤ i + `query_offset`.
        query_offset: tokens before the first query; while decoding those in the cache, also forgotten ones, else 0.
        scaling: factor on q·k, as the host gives it (1.0 in T5).
        dropout: probability for attention weights; 0.0 in eval mode.
        relative_bias: lazy additive bias over key - query offsets, or `None`.
        global_attention_mask: (B, S) bool or 0/1, True = global token, or `None`; may be shorter while decoding.
        hidden_states: (B, N, hidden_size), only for mechanisms with `needs_hidden_states`.
        project: `project(hidden)` sends (B, G, hidden_size) through the host's own key and value projections and returns
            (key, value), each (B, H, G, D); only for mechanisms with `needs_project`.
        input_ids: (B, N), only for mechanisms with `needs_input_ids`.
        row_start: (B,) index of each row's first real key, where rows were *not* aligned to the left (decoding);
            `None` = every row starts at 0.
        key_positions: (B, S) index of each key among all tokens, -1 = no key (False in `key_padding_mask`), where the
            mechanism's `cache_layer` forgot keys; `None` = key j is token j, and `query_offset` is S - N. The last N
            keys are always those of the queries.
        rows: where the layer runs on pooled tokens (`pooling`): how the rows of the call lie in `query`, `key`, `value` and
            `hidden_states`, which then have one entry per pooled token: (B, H, windows, D) and (B, windows, hidden_size), or
            (1, H, all windows, D) for packed rows. `hidden_states` are those of the keys, if these are pooled differently.
        recurrent: the mechanism's `cache_layer` where that holds a state of the keys it forgot; the mechanism must `fold`
            into it what the last update forgot.
    """

    is_causal: bool
    scaling: float
    key_padding_mask: Tensor | None = None
    query_offset: int = 0
    dropout: float = 0.0
    relative_bias: RelativeBias | None = None
    global_attention_mask: Tensor | None = None
    hidden_states: Tensor | None = None
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    input_ids: Tensor | None = None
    row_start: Tensor | None = None
    key_positions: Tensor | None = None
    rows: PackedRows | None = None
    recurrent: Recurrence | None = None
