"""The cache of linear attention: a state of all keys that are seen through features, and the keys that are seen exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from hf_efficient.cache import bounded
from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.linear_attention import FeatureState, absorb
from hf_efficient.patterns.kinds import Window
from hf_efficient.patterns.pattern import Pattern


class Earlier(NamedTuple):
    """The state of all tokens before `end`."""

    end: int
    state: FeatureState | None

    def changed(self, change: Callable[[Tensor], Tensor]) -> Earlier:
        return self if self.state is None else Earlier(self.end, FeatureState(*map(change, self.state)))


class FeatureLayer(RecurrentLayer):
    """Cache layer that hands out a state of past keys, and the keys that are not in it.

    With t tokens seen, `state` holds all but the last `exact` of them, which the next query sees exactly. For `crop`, the
    layer also keeps a state of before token t - SLACK - exact and all keys since then: after that, `update` returns all
    these, so that the mechanism folds them in again. The layer knows no feature map. O(exact + 2 · SLACK) keys, those of
    `pattern` besides, and three times (M, D + 1) numbers per head. A step takes O(M · D), whatever was seen.

    Attributes:
        state: of all tokens before the last `pending` ones; `None` = of none.
        pending: how many of the last keys that `update` returned are not in the state. Any before them are sinks, or in it.
    """

    state: FeatureState | None

    def __init__(self, pattern: Pattern, exact: int = 0):
        super().__init__(pattern)
        self.exact = exact

    @property
    def has_forgotten(self) -> bool:
        return self.state is not None

    def _forget(self) -> None:
        super()._forget()
        self.pending = self._counted = 0
        self._last = Earlier(0, None)
        self._next: Earlier | None = None

    def _prune(self) -> None:
        """Nothing before `fold`, which has the state that stands for the keys to go."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, N, D) keys and values. Returns those that are not in the state, the new ones last.

        Where sinks were told apart from forgotten keys, all that are held: the last `pending` are not in the state.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.pending = self.seen - self._counted
        if self._counted and isinstance(self.pattern, Window):
            self.key_positions = self._following(self._counted, self.pending)
            keys, values = keys[:, :, -self.pending :], values[:, :, -self.pending :]
        elif self._counted and self.positions is None:
            self.key_positions = self._following(0, self.seen)
        return keys, values

    def fold(self, log_key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> None:
        """Add pending keys to the state, with their graph: all but the last `exact`; to be called once after every update.

        Args:
            log_key: (B, H, R, M) their log-features, -inf = the key does not exist.
            value: (B, H, R, D).
            log_decay: (B, H, R) logarithms of what each of these tokens leaves of all that came before it; `log_key` is
                then measured from before the first of them. `None` = everything.
        """
        # a crop must find a state of before these
        limit = (self._settled if self.record_past else self.seen) - bounded.SLACK - self.exact
        first = min(max(0, limit - self._counted), log_key.shape[2])
        for start, end in ((0, first), (first, log_key.shape[2])):
            if start == end:
                continue
            part = slice(start, end)
            is_all = end - start == log_key.shape[2]
            own = (log_key, value) if is_all else (log_key[:, :, part], value[:, :, part])
            self._absorb(*own, None if log_decay is None else log_decay[..., part])
            if log_decay is not None:
                log_key = log_key + log_decay[..., part].sum(-1)[..., None, None]
            self._keep_for_crop(limit)

    def _absorb(self, log_key: Tensor, value: Tensor, log_decay: Tensor | None) -> None:
        self.state = absorb(self.state, log_key, value)
        if log_decay is not None:
            self.state = self.state._replace(levels=self.state.levels + log_decay.sum(-1, keepdim=True))
        self._counted += log_key.shape[2]

    def _keep_for_crop(self, limit: int) -> None:
        """Go on to the next state that a crop may find, once no crop can ask for what is before it."""
        following, now = self._next, Earlier(self._counted, self.state)
        if following is None or following.end <= self._last.end:
            self._next = following = now
        if self._last.end < following.end <= limit and not is_captured():
            self._last, self._next = following, now
            self._drop_before(following.end + self.exact)

    def _drop_before(self, following: int) -> None:
        if not isinstance(self.pattern, Window):
            super()._drop_before(following)
            return
        assert self.keys is not None and self.values is not None
        count = self.seen - self._last.end
        self.keys, self.values = self.keys[:, :, -count:].clone(), self.values[:, :, -count:].clone()
        self.pruned_at = following

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self._counted > self.seen - self.exact:
            self._counted, self.state = self._last
        if self._next is not None and self._next.end > self.seen - self.exact:
            self._next = None

    def _change_state(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change_state(change)
        self._last = self._last.changed(change)
        self._next = self._next and self._next.changed(change)
