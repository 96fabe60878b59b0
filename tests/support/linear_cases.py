"""Calls of causal linear attention that reach every branch of its kernels; PyTorch's form in float64 is their definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_efficient.ops.linear_attention import FeatureState, absorb, linear_attention


@dataclass(frozen=True)
class LinearCase:
    """One call; lengths are for the interpreter and grow by `scale` elsewhere.

    Attributes:
        n, more: queries, and how many keys there are beyond them (negative: fewer).
        keep: which keys are real: "left" or "right" padding, "row" (one batch entry has none), or `None`.
        state: whether keys were folded into a state before.
        outlier: what one key in the middle has more in one feature.
        spread, level: standard deviation of the log-features, and mean of those of keys.
    """

    name: str
    n: int
    more: int = 0
    batch: int = 1
    heads: int = 1
    features: int = 16
    width: int = 8
    keep: str | None = None
    state: bool = False
    outlier: float = 0.0
    spread: float = 2.0
    level: float = 0.0

    def __str__(self) -> str:
        return self.name

    @property
    def bound(self) -> float:
        """The largest relative error in float32: of rounding an exponent, which grows with it."""
        return 3e-6 if self.spread < 10 and self.level == 0 else 5e-5


LINEAR_CASES = (
    LinearCase("one token and a state", n=1, state=True),
    LinearCase("two tokens, few features", n=2, features=3, width=1),
    LinearCase("padding on the left, small keys", n=63, keep="left", features=64, level=-200.0),
    LinearCase("padding on the right, far apart", n=40, keep="right", spread=100.0),
    LinearCase("an entry without keys", n=17, batch=2, keep="row"),
    LinearCase("an outlier", n=97, features=100, width=64, outlier=40.0),
    LinearCase("a huge outlier", n=63, outlier=2000.0),
    LinearCase("several chunks and a state", n=150, state=True),
    LinearCase("more keys than queries", n=20, more=13, state=True),
    LinearCase("fewer keys than queries", n=33, more=-13),
)


def linear_inputs(case: LinearCase, scale: int = 1) -> list[Tensor]:
    """Log-features of queries and keys and values, float32, and with a state its means and levels."""
    n, s = case.n * scale, (case.n + case.more) * scale
    shape, earlier = (case.batch, case.heads), 7
    # values as a model has them: (B, N, H, D) in memory
    value = torch.randn(case.batch, s + earlier, case.heads, case.width).transpose(1, 2)
    key = case.level + case.spread * torch.randn(*shape, s + earlier, case.features)
    query = case.spread * torch.randn(*shape, n, case.features)
    state = absorb(None, key[:, :, :earlier], value[:, :, :earlier]) if case.state else ()
    key, value = key[:, :, earlier:].clone(), value[:, :, earlier:]
    key[:, :, s // 2, 1] += case.outlier
    if case.keep is not None:
        gone = {"left": slice(0, s // 3), "right": slice(s - s // 3, None), "row": slice(None)}[case.keep]
        key[-1, :, gone] = float("-inf")
    return [query, key, value, *state]


def moved(inputs: Sequence[Tensor], device: str, dtype: torch.dtype, value_dtype: torch.dtype) -> list[Tensor]:
    """Leaves of the same values elsewhere, which want gradients."""
    kinds = (dtype, dtype, value_dtype, dtype, dtype)
    found = [x.detach().to(device, kind) for x, kind in zip(inputs, kinds, strict=False)]
    return [x.requires_grad_() for x in found]


def attend(inputs: Sequence[Tensor], implementation: str) -> tuple[Tensor, Tensor]:
    query, key, value, *state = inputs
    options: dict[str, Any] = dict(state=FeatureState(*state) if state else None, implementation=implementation)
    out, lse = linear_attention(query, key, value, is_causal=True, return_lse=True, **options)
    return out, lse


def linear_results(inputs: Sequence[Tensor], implementation: str) -> dict[str, Tensor]:
    """Output, log-sum-exp (0 where there is none) and every gradient, through both of them."""
    out, lse = attend(inputs, implementation)
    generator = torch.Generator().manual_seed(1)
    weight, lse_weight = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    visible = lse.detach() > -float("inf")
    assert out.detach()[~visible].eq(0).all(), "rows that see nothing"
    lse = torch.where(visible, lse, 0.0)
    loss = (out.double() * weight.to(out.device)).sum() + (lse.double() * lse_weight.to(out.device)).sum()
    names = ("query", "key", "value", "means", "levels")
    gradients = torch.autograd.grad(loss, inputs)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(names, gradients, strict=False))
