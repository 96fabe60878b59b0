"""Bounded decoding: cache layers that forget keys which no later query can see.

They sit in transformers' own cache objects next to ordinary layers, so that `generate()` and its beam search run as ever. To
the host such a layer looks as long as all tokens seen; only the dispatcher learns which keys are left, by their positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_efficient.ops.decoding import entries_at
from hf_efficient.ops.graph import is_captured
from hf_efficient.patterns.pattern import Pattern

SLACK = 64
"""Tokens by which a store may outgrow what is needed before it is pruned, and by which `crop` can always go back."""


class BoundedLayer(DynamicLayer):
    """Cache layer that keeps the keys which causal queries of `pattern` can still see.

    With t tokens seen and row starts s, key j stays while `pattern.needed(j - s, t - SLACK - s)`, `j ≥ t - SLACK`, or the
    call's `global_attention_mask` is True at j. Pruned whenever `SLACK` keys more are stored than the last time, so that a
    step costs no more than appending; O(needed + 2 · SLACK) keys at any length. Nothing is pruned while compiling.

    While it records (`activate_past_recording`), t are the tokens that were left at the last `crop`: a draft of any length
    can be taken back, and its keys are held in addition.

    Without gradients new keys are written behind the old ones, into room that is made for `SLACK` tokens at a time.

    Attributes:
        keys, values: (B, H, R, D), in order of their tokens, the newest last; `None` = none yet.
        positions: (B, R) index of each key among all tokens, -1 = spare entry, in front; `None` = nothing was dropped yet.
        key_positions: the same for the keys that the last `update` returned. has_spares: some of them may be -1.
        dropped: (B, R) bool, which of these keys it forgot; `None` = none.
        seen: tokens seen so far.
        row_start: (B,) index of each row's first real token, `seen` for a row without any yet.
        record_past: it records; transformers ends that by setting it to False.
    """

    def __init__(self, pattern: Pattern):
        super().__init__()
        self.pattern = pattern
        self.row_start: Tensor | None = None
        self.record_past = False
        self._forget()

    # what is held lies in front of room for more, and whatever is set has none

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self._held]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys, self._held = keys, 0 if keys is None else keys.shape[2]

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values[:, :, : self._held]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = values

    @property
    def positions(self) -> Tensor | None:
        return None if self._positions is None else self._positions[:, : self._held]

    @positions.setter
    def positions(self, positions: Tensor | None) -> None:
        self._positions = positions

    @property
    def has_forgotten(self) -> bool:
        """Some keys are no longer there."""
        return self.positions is not None

    @property
    def is_anchored(self) -> bool:
        """Rows must start at the same token in every call."""
        return not self.pattern.shift_invariant

    def _forget(self) -> None:
        # those of tokens to come are known: they follow
        self.positions = None
        self.key_positions: Tensor | None = None
        self.dropped: Tensor | None = None
        self.has_spares = self._spares = False
        self.seen = self.pruned_at = self._kept = self._settled = 0
        self._global_mask: Tensor | None = None
        self._is_prepared = False

    def activate_past_recording(self) -> None:
        """Keep what drafts need from now on: before a `crop`, no token seen later is forgotten or makes others be."""
        if not self.record_past:
            self.record_past, self._settled = True, self.seen

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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        keys, values, before = self.keys, self.values, self._positions
        assert keys is not None and values is not None
        if before is not None and (missing := self._held - before.shape[1]) > 0:
            first = self.seen + key_states.shape[2] - missing
            self._positions = torch.cat([before, self._following(first, missing + SLACK)], dim=-1)
        self.seen += key_states.shape[2]
        self.key_positions, self.has_spares, self.dropped = self.positions, self._spares, None
        if self._held >= self._kept + SLACK and not is_captured():
            self._prune()
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def _append(self, *states: Tensor) -> None:
        """New keys and values behind those that are held."""
        held, end = self._held, self._held + states[0].shape[2]
        stores = [x for x in (self._keys, self._values) if x is not None]
        # a graph may need the old ones as they were
        if torch.is_grad_enabled() or is_captured() or (held and not all(map(_fits, stores, states))):
            old = [x[:, :, :held] for x in stores] if held else [x[:, :, :0] for x in states]
            self.keys, self.values = (torch.cat(parts, dim=2) for parts in zip(old, states, strict=True))
            return
        is_frozen = stores[0].is_inference() and not torch.is_inference_mode_enabled()
        if end > stores[0].shape[2] or is_frozen or not held:
            old, stores = stores, [x.new_empty(*x.shape[:2], end + max(0, SLACK - 1), x.shape[3]) for x in states]
            for store, x in zip(stores, old if held else (), strict=False):
                store[:, :, :held] = x[:, :, :held]
            self._keys, self._values = stores
        for store, new in zip(stores, states, strict=True):
            store[:, :, held:end] = new
        self._held = end

    def _following(self, first: int, count: int) -> Tensor:
        """(B, `count`) positions from `first` on."""
        assert self._keys is not None
        return torch.arange(first, first + count, device=self._keys.device).expand(self._keys.shape[0], -1)

    def _prune(self) -> None:
        following = (self._settled if self.record_past else self.seen) - SLACK
        if following > 0 or not self.record_past:
            self._drop_before(following)

    def _drop_before(self, following: int) -> None:
        """Forget all keys that no query from token `following` on can see."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None and self.row_start is not None
        device, positions = keys.device, self.positions
        if positions is None:
            positions = self._following(0, self.seen)
        start = self.row_start.to(device)[:, None]
        keep = self.pattern.needed(positions - start, following - start)
        if not self.pattern.shift_invariant:
            keep = keep & (positions >= start)  # patterns with absolute positions say nothing of those before a row
        keep = keep | (positions >= following)
        if self._global_mask is not None:
            keep = keep | entries_at(positions, self._global_mask.to(device))
        keep = keep & (positions >= 0)
        fewest, self._kept = (int(x) for x in keep.sum(-1).aminmax())
        if self._kept == keep.shape[1]:
            return
        self.dropped = ~keep
        # stable: what stays keeps its order, behind the spare entries of rows that keep less
        order = keep.int().argsort(dim=-1, stable=True)[:, keep.shape[1] - self._kept :]
        self._spares = fewest < self._kept
        self.positions = torch.where(keep, positions, -1).gather(1, order)
        order = order[:, None, :, None]
        keys, values = (x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))
        self.keys, self.values = keys, values
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
        if not self.is_initialized:
            return  # a layer that was left out, as in early exit
        if length < self.pruned_at:
            raise ValueError(
                f"crop({tokens_to_remove}) of a cache of {self.seen} tokens: keys have been forgotten that queries before "
                f"token {self.pruned_at} need, so that no more than {self.seen - self.pruned_at} tokens can be taken back. "
                f"Draft at most {SLACK} tokens at once (prompt_lookup_num_tokens, num_assistant_tokens); with any number, "
                "convert the model: only generate() of its Efficient class tells the cache of drafts before the first call."
            )
        self._settled = length
        if tokens_to_remove == 0:
            return
        self._held += tokens_to_remove
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


def _fits(store: Tensor, new: Tensor) -> bool:
    """New entries can be written into a store: of one kind, and of no graph."""
    same_kind = store.dtype == new.dtype and store.device == new.device and not store.requires_grad
    return same_kind and store.shape[:2] == new.shape[:2] and store.shape[3] == new.shape[3]
