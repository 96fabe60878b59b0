"""Bounded decoding: cache layers that forget keys which no later query can see.

They sit in transformers' own cache objects beside ordinary layers, so that `generate()` and its beam search run as ever. To
the host such a layer looks as long as all tokens seen; only the dispatcher learns which keys are left, by their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from .ops.block_sparse import DECODING
from .ops.decode_rows import entries_at, rows_attention
from .ops.implementation import require_torch
from .ops.patterns import Pattern

if TYPE_CHECKING:
    from .base import AttentionContext, EfficientAttention

SLACK = 64
"""Tokens by which a store may outgrow what is needed before it is pruned, and by which `crop` can always go back."""


class BoundedLayer(DynamicLayer):
    """Cache layer that keeps the keys which causal queries of `pattern` can still see.

    With t tokens seen and row starts s, key j stays while `pattern.needed(j - s, t - SLACK - s)`, `j ≥ t - SLACK`, or the
    call's `global_attention_mask` is True at j. Pruned whenever `SLACK` keys more are stored than the last time, so that a
    step costs no more than appending; O(needed + 2 · SLACK) keys at any length. Nothing is pruned while compiling.

    Attributes:
        keys, values: (B, H, R, D), in order of their tokens, the newest last.
        positions: (B, R) index of each key among all tokens, -1 = spare entry, in front; `None` = nothing was dropped yet.
        key_positions: the same for the keys that the last `update` returned.
        dropped: (B, R) bool, which of these keys it forgot; `None` = none.
        seen: tokens seen so far.
        row_start: (B,) index of each row's first real token, `seen` for a row without any yet.
    """

    def __init__(self, pattern: Pattern):
        super().__init__()
        self.pattern = pattern
        self.row_start: Tensor | None = None
        self._forget()

    @property
    def is_anchored(self) -> bool:
        """Rows must start at the same token in every call."""
        return not self.pattern.shift_invariant

    def _forget(self) -> None:
        self.positions: Tensor | None = None
        self.key_positions: Tensor | None = None
        self.dropped: Tensor | None = None
        self.seen = self.pruned_at = self._kept = 0
        self._global_mask: Tensor | None = None
        self._is_prepared = False

    def prepare(self, row_start: Tensor, global_mask: Tensor | None) -> None:
        """Facts of the call to come: row starts (B,), and (B, ≤ tokens) which tokens stay visible for good."""
        self.row_start, self._global_mask, self._is_prepared = row_start, global_mask, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, N, D) keys and values. Returns all keys and values held before this call and the new ones.

        Raises:
            RuntimeError: the call did not come through a model with efficient attention, which alone knows what is left.
        """
        if not self._is_prepared:
            raise RuntimeError(
                "this cache was filled by a model with efficient attention and has forgotten keys that other models need: "
                "start with a new cache."
            )
        self._is_prepared = False
        batch, _, new, _ = key_states.shape
        keys, values = super().update(key_states, value_states)
        if self.positions is not None:
            index = torch.arange(self.seen, self.seen + new, device=keys.device)
            self.positions = torch.cat([self.positions, index.expand(batch, -1)], dim=-1)
        self.seen += new
        self.key_positions, self.dropped = self.positions, None
        if keys.shape[2] > self._kept + SLACK and not torch.compiler.is_compiling():
            self._prune(keys, values)
        return keys, values

    def _prune(self, keys: Tensor, values: Tensor) -> None:
        assert self.row_start is not None
        following, device = self.seen - SLACK, keys.device
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.seen, device=device).expand(keys.shape[0], -1)
        start = self.row_start.to(device)[:, None]
        keep = self.pattern.needed(positions - start, following - start)
        if not self.pattern.shift_invariant:
            keep = keep & (positions >= start)  # patterns with absolute positions say nothing of those before a row
        keep = keep | (positions >= following)
        if self._global_mask is not None:
            keep = keep | entries_at(positions, self._global_mask.to(device))
        keep = keep & (positions >= 0)
        self._kept = int(keep.sum(-1).max())
        if self._kept == keep.shape[1]:
            return
        self.dropped = ~keep
        # stable: what stays keeps its order, behind the spare entries of rows that keep less
        order = keep.int().argsort(dim=-1, stable=True)[:, keep.shape[1] - self._kept :]
        self.positions = torch.where(keep, positions, -1).gather(1, order)
        order = order[:, None, :, None]
        self.keys = keys.gather(2, order.expand(-1, keys.shape[1], -1, keys.shape[3]))
        self.values = values.gather(2, order.expand(-1, values.shape[1], -1, values.shape[3]))
        self.pruned_at = max(self.pruned_at, following)

    def get_seq_length(self) -> int:
        """Tokens seen so far, those forgotten included."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: so many that later queries need forgotten keys again, or a positive number.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted generation may give a tensor
        length = self.seen + tokens_to_remove
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, the tokens to take back.")
        if length < self.pruned_at:
            raise ValueError(
                f"crop({tokens_to_remove}) of a cache of {self.seen} tokens: keys have been forgotten that queries before "
                f"token {self.pruned_at} need, so that no more than {self.seen - self.pruned_at} tokens can be taken back."
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]
        if self.positions is not None:
            self.positions = self.positions[:, :tokens_to_remove]
        self.seen = length

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda x: x[indices.to(x.device)])

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.positions is not None:
            self.positions = rows(self.positions)
        if self.row_start is not None:
            self.row_start = rows(self.row_start)


def attend_kept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    context: AttentionContext,
    columns: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Causal attention of `pattern` over the keys that a `BoundedLayer` kept: see `ops.decode_rows.rows_attention`.

    Raises:
        ValueError: an explicit `implementation` that does not decode.
    """
    require_torch(implementation, DECODING)
    return rows_attention(
        query,
        key,
        value,
        pattern.visible_per_head,
        scaling=context.scaling,
        key_padding_mask=context.key_padding_mask,
        relative_bias=context.relative_bias,
        dropout=context.dropout,
        query_offset=context.query_offset,
        row_start=context.row_start,
        key_positions=context.key_positions,
        columns=columns,
    )


def bounded_cache(
    cache: Cache | None, mechanisms: Mapping[int, EfficientAttention], config: Any, has_cross_attention: bool
) -> tuple[Cache, Cache]:
    """A cache whose layers at the indices of `mechanisms` are the mechanisms' own; all others stay what they are.

    Args:
        cache: the call's; `None` makes the one that the host would make. Only an empty dynamic cache gets other layers.

    Returns:
        The cache for the host, and the part of it that serves self-attention.
    """
    if cache is None:
        cache = DynamicCache(config=config)
        if has_cross_attention:
            cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    plain = isinstance(own, DynamicCache) and all(
        type(layer) is DynamicLayer or isinstance(layer, BoundedLayer) for layer in own.layers
    )
    if plain and own.get_seq_length() == 0 and not torch.compiler.is_compiling():
        own.layers.extend(DynamicLayer() for _ in range(max(mechanisms) + 1 - len(own.layers)))
        for index, mechanism in mechanisms.items():
            own.layers[index] = mechanism.cache_layer()  # type: ignore[assignment]
    return cache, own


def prepare_layers(
    cache: Cache,
    mechanisms: Mapping[int, EfficientAttention],
    tokens: Tensor,
    mask: Tensor | None,
    marked: Tensor | None,
) -> bool:
    """Tell the bounded layers of `cache` about a call; False if it has none.

    Args:
        tokens: (B, N, …) what comes in. mask: (B, S) its `attention_mask`. marked: (B, ≤ S) its `global_attention_mask`.

    Raises:
        ValueError: rows start elsewhere than when keys were forgotten.
    """
    layers = {index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, BoundedLayer)}
    if mask is None:
        start = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
    else:
        # the number of leading zeros, also of a row of zeros
        start = (mask.bool().cumsum(-1) == 0).sum(-1)
    anchored = [x for x in layers.values() if x.positions is not None and x.is_anchored]
    for layer in anchored[:1]:  # all layers of a stack have had the same masks
        before = layer.row_start
        if before is not None and bool(((start != before) & (torch.minimum(start, before) < layer.seen)).any()):
            raise ValueError(
                "attention_mask says that rows start at other tokens than when the cache was filled: give the mask of all "
                "tokens seen so far with every call."
            )
    for index, layer in layers.items():
        takes_marks = getattr(mechanisms.get(index), "uses_global_attention_mask", False)
        layer.prepare(start, marked if takes_marks else None)
    return bool(layers)
