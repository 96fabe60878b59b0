"""Decoding in constant memory where no key is forgotten without trace: what leaves the window joins a state."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_efficient.cache.bounded import BoundedLayer
from hf_efficient.ops.linear_attention import FeatureState, absorb


class RecurrentLayer(BoundedLayer):
    """Cache layer that keeps the keys of a pattern, and of all others a state of `ops.linear_attention`.

    With t tokens seen, the state holds the keys that no query from token t - SLACK on can see by the pattern, so that
    `crop` goes back as far as in every bounded layer. The layer knows no feature map: it hands out what it will forget once
    more, and the mechanism folds that in. O(window + 2 · SLACK) keys and (M, D + 2) numbers per head, in fp32 at least: in
    bfloat16 the normaliser of positive features stops growing after a few hundred tokens.

    transformers' `LinearAttentionAndFullAttentionLayer` can't serve: it takes no token back once it has a recurrent state,
    doesn't repeat or select rows of it, and keeps all keys as well.

    Attributes:
        state: of the forgotten keys; `None` = nothing was forgotten.
    """

    @property
    def is_anchored(self) -> bool:
        """The masks of earlier calls kept padding out of the state: rows must go on starting there."""
        return True

    def _forget(self) -> None:
        super()._forget()
        self.state: FeatureState | None = None

    def fold(self, log_key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> None:
        """Add what the last `update` forgot to the state, with its graph; to be called once after every update.

        Args:
            log_key: (B, H, R, M) log-features of all keys that the update returned, -inf = the key does not exist.
            value: (B, H, R, D).
            log_decay: (B, H, R) logarithms of what each of these tokens leaves of all that came before it; `log_key` is
                then measured from before the first of them. `None` = everything.
        """
        if self.dropped is None:
            return
        log_key = log_key.masked_fill(~self.dropped[:, None, :, None], float("-inf"))
        self.state = absorb(self.state, log_key, value)
        if log_decay is not None:
            passed = (log_decay * self.dropped[:, None]).sum(-1, keepdim=True)
            self.state = self.state._replace(levels=self.state.levels + passed)

    def offload(self) -> None:
        super().offload()
        self._change_state(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._change_state(lambda x: x.to(self.device, non_blocking=True))

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        super()._select(rows)
        self._change_state(rows)

    def _change_state(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = type(self.state)(*map(change, self.state))
