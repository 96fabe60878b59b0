"""Causal linear attention as two differentiable torch operators over the Triton kernels, known to `torch.compile`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.kernels.common import (
    DTYPES,
    dense,
    refuse_second_derivatives,
    require_interpreter,
    strides,
    token_major,
    unsupported_device,
)
from hf_efficient.kernels.configs import LinearConfig, LinearTile, linear_precision, padded_width, select_linear


def linear_attention(
    log_query: Tensor, log_key: Tensor, value: Tensor, sums: Tensor | None = None, maximum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`y_i = Σ_{j≤i} φ(q_i)·φ(k_j) v_j / Σ_{j≤i} φ(q_i)·φ(k_j)` with `φ = exp(log-features)`, by fused kernels.

    Products of tiles are computed in TensorFloat-32 where the values have half precision, which it holds exactly, or where
    PyTorch allows it, else in float32. No features, however far apart they lie, make a visible key vanish that counts.

    Args:
        log_query, log_key: (B, H, N, M) float32; a key of -inf in every feature does not exist.
        value: (B, H, N, D), D ≤ 128, float16, bfloat16 or float32.
        sums, maximum: (B, H, M, D + 1) and (B, H, 1, M) float32 of a `FeatureState`, which every query sees.

    Returns:
        (B, H, N, D) output and (B, H, N) log of the denominator, float32; 0 and -inf for a query without keys. Both are
        differentiable, in the features, value and sums.

    Raises:
        ValueError: what `unsupported` names.

    O(N · M · D) time; while a pass runs, memory for one (M, D + 1) state per chunk of 16 to 64 tokens. Nothing is atomic:
    equal calls give equal bits.
    """
    reason = unsupported(log_query, log_key, value)
    if reason is not None:
        raise ValueError(reason)
    out, lse = torch.ops.hf_efficient.linear_attention_forward(log_query, log_key, value, sums, maximum)
    return out, lse


def unsupported(log_query: Tensor, log_key: Tensor, value: Tensor) -> str | None:
    """Why the kernels can't take these tensors, with the remedy; `None` if they can."""
    if any(x.device != log_query.device for x in (log_key, value)):
        devices = ", ".join(str(x.device) for x in (log_query, log_key, value))
        return f"log-features and values must lie on one device, got {devices}; move them first."
    if reason := unsupported_device(log_query.device):
        return reason
    if log_query.dtype != torch.float32 or log_key.dtype != torch.float32:
        kinds = f"{log_query.dtype} and {log_key.dtype}"
        return f"the fused kernels take log-features in float32, got {kinds}; use implementation='torch'."
    if value.dtype not in DTYPES:
        return f"the fused kernels take float16, bfloat16 and float32 values, got {value.dtype}; use implementation='torch'."
    if log_query.dim() != 4 or log_key.shape != log_query.shape or value.shape[:-1] != log_query.shape[:-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (log_query, log_key, value))
        return f"the fused kernels take (B, H, N, M) log-features and (B, H, N, D) values, got {shapes}; use 'torch'."
    if value.shape[-1] > 128:
        return f"the fused kernels take heads of up to 128, got {value.shape[-1]}; use implementation='torch'."
    return None


# ---- one call ----------------------------------------------------------------------------------------------------


class States(NamedTuple):
    """(places, slots, M, D) sums of values, (places, slots, M) sums of ones, and the maxima both were divided by."""

    sums: Tensor | None
    ones: Tensor | None
    tops: Tensor | None

    def pointers(self) -> dict[str, Any]:
        slots = 0 if self.sums is None else self.sums.shape[1]
        return dict(SUMS=self.sums, ONES=self.ones, TOPS=self.tops, slots=slots)


class OpArguments(NamedTuple):
    """The operators' common arguments, dense in their last dimension, and what every launch derives from them."""

    log_query: Tensor
    log_key: Tensor
    value: Tensor
    sums: Tensor | None
    maximum: Tensor | None

    @property
    def config(self) -> LinearConfig:
        return select_linear(self.value.device, self.value.dtype, self.value.shape[-1])

    @property
    def places(self) -> int:
        return self.value.shape[0] * self.value.shape[1]

    def chunks(self, tile: LinearTile) -> int:
        return -(-self.value.shape[2] // tile.chunk)

    def grid(self, tile: LinearTile) -> tuple[int]:
        """One program per chunk of every head."""
        return (self.chunks(tile) * self.places,)

    def sizes(self, tile: LinearTile) -> dict[str, Any]:
        """Lengths and compile-time constants of a kernel with this tile."""
        _, heads, n, features = self.log_key.shape
        width = self.value.shape[-1]
        return dict(
            N=n, chunks=self.chunks(tile), H=heads, C=tile.chunk, M=features,
            BK=min(tile.slice, padded_width(features)), D=width, BD=padded_width(width),
            PRECISION=linear_precision(self.value.dtype), num_warps=tile.warps, num_stages=1,
        )  # fmt: skip

    def inputs(self) -> dict[str, Any]:
        return dict(
            X=self.log_query, A=self.log_key, V=self.value,
            **strides(self.log_query, "sx"), **strides(self.log_key, "sa"), **strides(self.value, "sv"),
        )  # fmt: skip

    def earlier(self, tile: LinearTile) -> States:
        """What every chunk sees of the keys before it, the call's own state among them; slot t is for chunk t."""
        own = None if self.sums is None else self.sums.flatten(0, 1)
        count = self.chunks(tile) - 1
        if count == 0 and own is None:
            return States(None, None, None)
        states = self._slots(count + 1)
        if own is not None and self.maximum is not None:
            first = (own[..., :-1], own[..., -1], self.maximum.flatten(0, 2))
            for x, y in zip(states, first, strict=True):
                x[:, 0] = y  # type: ignore[index]
        facts: dict[str, Any] = dict(A=self.log_key, LSE=None, V=self.value, WEIGHT=None, LAST_FIRST=False)
        facts |= strides(self.log_key, "sa") | strides(self.value, "sv")
        return self._summed(tile, states, count, facts)

    def later(self, tile: LinearTile, dout: Tensor, lse: Tensor, delta: Tensor) -> States:
        """What the queries after it hand every chunk; slot t is for the last chunk but t. Where the call has a state, a slot
        more holds the sums over all chunks, which are handed to it."""
        count = self.chunks(tile) - (self.sums is None)
        if count == 0:
            return States(None, None, None)
        facts: dict[str, Any] = dict(A=self.log_query, LSE=lse, V=dout, WEIGHT=-delta, LAST_FIRST=True)
        facts |= strides(self.log_query, "sa") | strides(dout, "sv")
        return self._summed(tile, self._slots(count + 1), count, facts)

    def _slots(self, slots: int) -> States:
        """States of which the first slot is empty and the others are not yet filled."""
        m, d = self.log_key.shape[-1], self.value.shape[-1]
        shapes = ((m, d), (m,), (m,))
        states = States(*(self.log_key.new_empty(self.places, slots, *shape) for shape in shapes))
        for x, nothing in zip(states, (0.0, 0.0, float("-inf")), strict=True):
            x[:, 0] = nothing  # type: ignore[index]
        return states

    def _summed(self, tile: LinearTile, states: States, count: int, facts: dict[str, Any]) -> States:
        """Fill the slots after the first with sums over the first `count` chunks from one end."""
        from hf_efficient.kernels import linear_attention as kernels

        if count == 0:
            return states
        sizes, rows, m = self.sizes(tile), self.config.scanned, self.log_key.shape[-1]
        slices = -(-m // sizes["BK"])
        sizes["num_warps"] = 4
        kernels.chunk_states[(count * slices * self.places,)](count=count, **facts, **states.pointers(), **sizes)
        rest = {name: sizes[name] for name in ("M", "D", "BD", "num_warps")}
        kernels.scan[(-(-m // rows) * self.places,)](**states.pointers(), R=rows, **rest)
        return states


def _call(*inputs: Any) -> OpArguments:
    return OpArguments(*(x if x is None else dense(x) for x in inputs))  # type: ignore[arg-type]


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from hf_efficient.kernels import linear_attention as kernels

    call = _call(*inputs)
    tile = call.config.forward
    out, lse = _empty_results(call.value)
    with torch.cuda.device_of(out):
        states = call.earlier(tile)
        kernels.forward[call.grid(tile)](
            OUT=out, LSE=lse, **strides(out, "so"), **states.pointers(), **call.inputs(), **call.sizes(tile)
        )
    return out, lse


def _empty_results(value: Tensor) -> tuple[Tensor, Tensor]:
    out = token_major(value, torch.float32)
    return out, value.new_empty(value.shape[:3], dtype=torch.float32)


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hf_efficient.kernels import linear_attention_backward as kernels

    call, dout = _call(*inputs), dense(grad_out)
    dx, da, dv, dsums = _empty_gradients(*inputs)
    delta = _delta(dout, grad_lse, out, lse)
    shared = dict(DOUT=dout, LSE=lse, DELTA=delta, **strides(dout, "sg"), **call.inputs())
    with torch.cuda.device_of(out):
        tile = call.config.query_gradient
        states = call.earlier(tile)
        kernels.query_gradient[call.grid(tile)](
            DX=dx, **strides(dx, "sd"), **states.pointers(), **shared, **call.sizes(tile)
        )
        tile = call.config.key_gradient
        states = call.later(tile, dout, lse, delta)
        kernels.key_gradient[call.grid(tile)](
            DA=da, DV=dv, **strides(da, "sd"), **strides(dv, "se"), **states.pointers(), **shared, **call.sizes(tile)
        )
        if call.maximum is not None:
            _fill_state_gradient(dsums, states, call.maximum)
    return dx, da, dv, dsums


def _fill_state_gradient(dsums: Tensor, later: States, maximum: Tensor) -> None:
    """`Σ_i exp(x_i + maximum - lse_i) [dout_i, -δ_i]`, of which `later` ends with the sums without `maximum`."""
    assert later.sums is not None and later.ones is not None and later.tops is not None
    shape = maximum.shape[:2]
    factor = (maximum.squeeze(2) + later.tops[:, -1].unflatten(0, shape)).exp()
    dsums[..., :-1] = later.sums[:, -1].unflatten(0, shape) * factor[..., None]
    dsums[..., -1] = later.ones[:, -1].unflatten(0, shape) * factor


def _delta(dout: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """(B, H, N) `dout · out - dlse`; 0 for rows that saw nothing, where whoever merges may hand back NaN."""
    delta = (dout * out).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    return delta.masked_fill(lse == float("-inf"), 0.0).contiguous()


def _empty_gradients(
    log_query: Tensor, log_key: Tensor, value: Tensor, sums: Tensor | None, maximum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, da = (x.new_empty(x.shape) for x in (log_query, log_key))
    return dx, da, token_major(value, value.dtype), value.new_empty(0) if sums is None else sums.new_empty(sums.shape)


# ---- registration ------------------------------------------------------------------------------------------------

_INPUTS = "Tensor log_query, Tensor log_key, Tensor value, Tensor? sums, Tensor? maximum"
_LIBRARY = torch.library.Library("hf_efficient", "FRAGMENT")
_LIBRARY.define(f"linear_attention_forward({_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"linear_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    require_interpreter()
    return _forward(*args)


def _backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_interpreter()
    return _backward(*args)


_LIBRARY.impl("linear_attention_forward", _forward, "CUDA")
_LIBRARY.impl("linear_attention_backward", _backward, "CUDA")
_LIBRARY.impl("linear_attention_forward", _forward_cpu, "CPU")
_LIBRARY.impl("linear_attention_backward", _backward_cpu, "CPU")


@torch.library.register_fake("hf_efficient::linear_attention_forward", lib=_LIBRARY)
def _forward_fake(log_query: Tensor, log_key: Tensor, value: Tensor, *state: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(value)


@torch.library.register_fake("hf_efficient::linear_attention_backward", lib=_LIBRARY)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(*inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dx, da, dv, dsums = torch.ops.hf_efficient.linear_attention_backward(grad_out, grad_lse, out, lse, *inputs)
    return dx, da, dv, None if inputs[3] is None else dsums, None


torch.library.register_autograd(
    "hf_efficient::linear_attention_forward", _differentiate, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd("hf_efficient::linear_attention_backward", refuse_second_derivatives, lib=_LIBRARY)
