"""A feed-forward layer of a host model, as experts need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Dense(NamedTuple):
    """A feed-forward part as the input × output matrices of its two products.

    `up` is (hidden, inner), or (hidden, 2 · inner) = [gate, up] where `is_gated`; `down` is (inner, hidden).
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    is_gated: bool = False
    inner_dropout: float = 0.0
    dropout: float = 0.0
