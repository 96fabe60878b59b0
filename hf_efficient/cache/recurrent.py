"""Decoding in constant memory where no key is forgotten without trace: what leaves the window joins a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_efficient.cache.bounded import BoundedLayer


class RecurrentLayer(BoundedLayer):
    """Cache layer that keeps the keys of a pattern, and of all others a state that a subclass defines.

    The state is a tuple of tensors whose first axis is the batch. It holds the keys that no query from token t - SLACK on
    can see by the pattern, with t tokens seen, so that `crop` goes back as far as in every bounded layer.

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
        self.state: Any = None

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
