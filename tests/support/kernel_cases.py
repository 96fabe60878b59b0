"""Calls of block-sparse attention that reach every branch of its kernels, and their definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_efficient.ops.block_sparse.attention import reference_attention
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patterns.kinds import BlockWindow, Full, GlobalColumns, GlobalRows, Window
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.sets import PerHead

GLOBAL = GlobalColumns(positions=(0, 70)) | GlobalRows(positions=(0, 70))
NARROW = Window(left=20, right=20)


@dataclass(frozen=True)
class Case:
    """One call; lengths are for the interpreter and grow by `scale` elsewhere.

    Attributes:
        n, more: queries, and how many keys there are beyond them.
        radius: R of the bias over offsets -R … R, or `None`.
        keep: which keys are real: "left" or "right" padding, "holes", "row" (one batch entry has none), or `None`.
        positions, segments: 1 or H heads of them, or `None`.
        softcap: c of capped logits, so small that many are near it.
    """

    name: str
    pattern: Pattern
    n: int = 97
    more: int = 0
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    width: int = 16
    is_causal: bool = False
    radius: int | None = None
    keep: str | None = None
    positions: int | None = None
    segments: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        return self.name


def _per_head() -> PerHead:
    parts = (
        Window(left=3, right=3),
        GLOBAL | Window(left=9, right=3),
        Window(left=40, right=0),
        BlockWindow(block_size=16),
    )
    return PerHead(parts=parts)


CASES = (
    Case("one token", NARROW, n=1, radius=3, batch=2),
    Case("two tokens", Full(), n=2, is_causal=True, radius=1),
    Case("window", NARROW, n=63, batch=2, softcap=1.5),
    Case("even lengths", NARROW, n=128, radius=30),
    Case("causal with every key", Full(), n=200, is_causal=True, radius=7),
    Case("full tiles", Full(), n=200),
    Case("padding on the left", NARROW, batch=2, keep="left"),
    Case("padding on the right", NARROW, batch=2, keep="right", radius=12),
    Case("holes", NARROW | GLOBAL, batch=2, keep="holes", is_causal=True),
    Case("an entry without keys", NARROW, n=63, batch=2, keep="row", radius=5),
    Case("split rows and columns", NARROW | GLOBAL, n=200, radius=24, softcap=0.7),
    Case("split, heads differ", _per_head(), heads=4, kv_heads=4, radius=9),
    Case("grouped queries", NARROW | GLOBAL, heads=4, radius=6, softcap=1.5),
    Case("grouped queries, heads differ", _per_head(), heads=4, radius=6),
    Case("one bias for all offsets", NARROW, n=63, radius=0),
    Case("bias wider than the length", Full(), n=63, radius=100),
    Case("segments", Full(), batch=2, segments=1, radius=4),
    Case("segments per head", Window(left=60, right=60), heads=4, segments=4, n=63),
    Case("positions", Full(), n=63, batch=2, positions=1),
    Case(
        "positions per head, segments, grouped",
        Full(),
        heads=4,
        positions=4,
        segments=1,
        keep="holes",
        n=63,
        softcap=1.5,
    ),
    Case("more keys than queries", NARROW | GLOBAL, n=33, more=97, is_causal=True, radius=11),
    Case("width 64", NARROW, n=63, width=64, radius=5, softcap=30.0),
    Case("width 80", NARROW | GLOBAL, width=80, radius=5, heads=1, kv_heads=1),
    Case("width 128", NARROW, n=63, width=128, keep="right", heads=1, kv_heads=1),
)


class Results(NamedTuple):
    """Output, log-sum-exp (0 where there is none), and gradients of query, key, value and bias."""

    out: Tensor
    lse: Tensor
    gradients: tuple[Tensor, ...]

    def named(self) -> dict[str, Tensor]:
        names = ("query", "key", "value", "bias")
        return {"out": self.out, "lse": self.lse} | dict(zip(names, self.gradients, strict=False))


class Inputs(NamedTuple):
    """Tensors of a case: (query, key, value and perhaps bias), then what only shows or hides."""

    tensors: tuple[Tensor, ...]
    keep: Tensor | None
    positions: tuple[Tensor, Tensor] | None
    segments: tuple[Tensor, Tensor] | None

    def to(self, device: str, dtype: torch.dtype, bias_dtype: torch.dtype = torch.float32) -> Inputs:
        """Leaves of the same values elsewhere, which want gradients."""
        kinds = (dtype, dtype, dtype, bias_dtype)
        tensors = tuple(
            x.detach().to(device, kind).requires_grad_() for x, kind in zip(self.tensors, kinds, strict=False)
        )
        rest = [None if x is None else tuple(y.to(device) for y in x) for x in self[2:]]
        return Inputs(tensors, None if self.keep is None else self.keep.to(device), *rest)  # type: ignore[arg-type]


def inputs_of(case: Case, scale: int = 1) -> Inputs:
    """Random tensors of a case, `scale` times as long."""
    n, s, batch = case.n * scale, (case.n + case.more) * scale, case.batch
    # as a model has them: (B, N, H, D) in memory
    shapes = ((n, case.heads), (s, case.kv_heads), (s, case.kv_heads))
    tensors = [torch.randn(batch, length, heads, case.width).transpose(1, 2) for length, heads in shapes]
    if case.radius is not None:
        tensors.append(torch.randn(case.heads, 2 * case.radius + 1))
    return Inputs(
        tuple(tensors),
        _keep(case, s),
        _vectors(case.positions, n, s, batch, 50),
        _vectors(case.segments, n, s, batch, 3),
    )


def _keep(case: Case, length: int) -> Tensor | None:
    if case.keep is None:
        return None
    keep = torch.ones(case.batch, length, dtype=torch.bool)
    if case.keep == "holes":
        keep = torch.rand(case.batch, length) > 0.4
    else:
        part = {"left": slice(0, length // 3), "right": slice(length - length // 3, None), "row": slice(None)}
        keep[-1, part[case.keep]] = False
    return keep


def _vectors(heads: int | None, n: int, s: int, batch: int, values: int) -> tuple[Tensor, Tensor] | None:
    if heads is None:
        return None
    return torch.randint(values, (batch, heads, n)), torch.randint(values, (batch, heads, s))


def relative(bias: Tensor | None) -> RelativeBias | None:
    """The bias over offsets as the op's definition takes it."""
    if bias is None:
        return None
    radius = bias.shape[1] // 2
    return RelativeBias(bias.T, lambda offset: offset.clamp(-radius, radius) + radius, radius)


def definition(case: Case, inputs: Inputs, query_offset: int) -> tuple[Tensor, Tensor]:
    """Dense attention of the inputs' own dtype."""
    query, key, value, *bias = inputs.tensors
    call = AttentionCall(
        scaling=case.width**-0.5,
        is_causal=case.is_causal,
        key_padding_mask=inputs.keep,
        relative_bias=relative(bias[0] if bias else None),
        query_offset=query_offset,
        segments=inputs.segments,
        positions=inputs.positions,
        softcap=case.softcap,
    )
    return reference_attention(query, key, value, case.pattern, call, return_lse=True)


def results(
    case: Case, inputs: Inputs, attention: Callable[[Case, Inputs, int], tuple[Tensor, Tensor]], scale: int = 1
) -> Results:
    """Run `attention` forward and backward, through output and log-sum-exp both."""
    out, lse = attention(case, inputs, case.more * scale)
    generator = torch.Generator().manual_seed(1)
    weight, lse_weight = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    visible = lse.detach() > -float("inf")
    lse = torch.where(visible, lse, 0.0)
    loss = (out.double() * weight.to(out.device)).sum() + (lse.double() * lse_weight.to(out.device)).sum()
    gradients = torch.autograd.grad(loss, inputs.tensors)
    assert out.detach()[~visible].eq(0).all(), "rows that see nothing"
    return Results(out.detach(), lse.detach(), gradients)


def error(actual: Tensor, expected: Tensor) -> float:
    """Root of the summed squared differences, relative to that of the expected values, in float64; inf for NaN."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    if actual.isnan().any():
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def quick_interpreter() -> None:
    """Let Triton's interpreter patch `triton.language` once for a launch, and not anew for every function that is called."""
    from triton.runtime import interpreter

    patching_first = interpreter.InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        # the launch has patched it for all our functions; doing so again for each call costs most of the time
        if self.fn.__module__.startswith("hf_efficient"):
            return self.rewrite()(*args, **kwargs)
        return patching_first(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
