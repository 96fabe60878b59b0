"""Block-sparse attention as two differentiable torch operators over the Triton kernels.

`block_sparse` is the entry. The operators take a pattern as JSON text and look its tile table up inside, so that a compiled
graph holds one opaque node and no tables. They are known to autograd, to fake tensors and hence to `torch.compile`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_efficient.kernels.common import (
    DTYPES,
    refuse_second_derivatives,
    require_interpreter,
    strides,
    token_major,
    unsupported_device,
)
from hf_efficient.kernels.configs import Config, Tile, dot_precision, padded_width, select
from hf_efficient.patterns.parse import parse_pattern
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.tile_table import TileTable, tile_table

LOG2E = math.log2(math.e)
# tile steps of one program of the bias gradient, and the most programs that share a class
BIAS_STEPS, BIAS_PIECES = 64, 64

Pair = tuple[Tensor, Tensor]


def block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern,
    scaling: float,
    is_causal: bool = False,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Pair | None = None,
    segments: Pair | None = None,
    query_offset: int = 0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling · q·k + bias) · v over the keys that the pattern and the vectors show, by fused kernels.

    Query i, at position `query_offset + i`, sees key j iff the pattern shows (query_offset + i, j), and j ≤ query_offset + i
    if causal, and `keep[b, j]`, and `k_pos ≤ q_pos`, and `q_seg = k_seg`. A query that sees nothing returns 0.

    Args:
        query: (B, H, N, D), 16 ≤ D ≤ 128, float16, bfloat16 or float32. Under autocast all three take its type.
        key, value: (B, HK, S, D), H a multiple of HK.
        keep: (B or 1, S) bool, True = may be seen.
        bias: (H, 2R + 1) added to the logits at offsets j - (query_offset + i) = -R … R, constant beyond.
        positions, segments: each (of queries, of keys), integers (B or 1, H or 1, N) and (B or 1, H or 1, S).
        softcap: c > 0 where `scaling · q·k` becomes `c · tanh(scaling · q·k / c)`, before the bias.

    Returns:
        (B, H, N, D) output, and (B, H, N) float32 natural log-sum-exp of the visible logits, -inf for a query that sees
        nothing. Both are differentiable, in query, key, value and bias.

    Raises:
        ValueError: what `unsupported` names; shapes that do not fit.

    O(tiles) time; O(B · H · N) memory beside the outputs, more where long rows are split. Nothing is atomic: equal calls
    give equal bits.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    reason = unsupported(query, key, value)
    if reason is not None:
        raise ValueError(reason)
    _check(query, key, value, pattern, keep, bias)
    if bias is not None and positions is not None:
        raise ValueError("a relative bias counts positions in order: it does not go with `positions`.")
    if bias is not None:
        bias = bias.float()
        # one value for every offset; the kernels want the two ends apart
        bias = bias.expand(-1, 3) if bias.shape[1] == 1 else bias
    out, lse = torch.ops.hf_efficient.block_sparse_forward(
        query,
        key,
        value,
        None if keep is None else keep.to(torch.uint8).expand(query.shape[0], -1).contiguous(),
        bias,
        *_vectors(positions, "positions", query, key),
        *_vectors(segments, "segments", query, key),
        pattern.spec(),
        scaling,
        is_causal,
        query_offset,
        softcap,
    )
    return out, lse


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0, is_linear: bool = False
) -> str | None:
    """Why the kernels can't take these tensors, with the remedy; `None` if they can.

    With `is_linear`, query and key are log-features of `linear_attention`.
    """
    if is_linear:
        from hf_efficient.kernels import linear_attention_op

        return linear_attention_op.unsupported(query, key, value)
    device, dtype, width = query.device, query.dtype, query.shape[-1]
    if any(x.device != device or x.dtype != dtype for x in (key, value)):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        return f"query, key and value must share one dtype and one device, got {kinds}; cast or move them first."
    if reason := unsupported_device(device):
        return reason
    if dtype not in DTYPES:
        return f"the fused kernels compute float16, bfloat16 and float32, got {dtype}; use implementation='torch'."
    if not 16 <= width <= 128 or value.shape[-1] != width or key.shape[-1] != width:
        widths = ", ".join(str(x.shape[-1]) for x in (query, key, value))
        return f"the fused kernels take equal head widths from 16 to 128, got {widths}; use implementation='torch'."
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        return "the fused kernels need the last dimension dense; call .contiguous() on query, key and value."
    if dropout > 0:
        return f"the fused kernels have no dropout, got {dropout}; set it to 0 or use implementation='torch'."
    return None


def _check(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, keep: Tensor | None, bias: Tensor | None
) -> None:
    batch, heads = query.shape[:2]
    if key.shape != value.shape or key.shape[0] != batch or heads % key.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(
            f"query (B, H, N, D) needs key and value (B, HK, S, D) with H a multiple of HK, got {shapes}."
        )
    if pattern.num_heads not in (1, heads):
        raise ValueError(f"the pattern is made for {pattern.num_heads} heads, query has {heads}.")
    if keep is not None and keep.shape not in ((batch, key.shape[2]), (1, key.shape[2])):
        raise ValueError(f"keep must be {(batch, key.shape[2])}, one entry per key, got {tuple(keep.shape)}.")
    if bias is not None and (bias.dim() != 2 or bias.shape[0] != heads or bias.shape[1] % 2 == 0):
        raise ValueError(f"bias must be ({heads}, 2R + 1), over offsets -R … R, got {tuple(bias.shape)}.")


def _vectors(pair: Pair | None, name: str, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Per-token integers of queries and keys as contiguous int32 (B, 1 or H, length), the same 1 or H for both."""
    if pair is None:
        return None, None
    batch, heads = query.shape[:2]
    shared = max(x.shape[1] for x in pair)
    for x, length in zip(pair, (query.shape[2], key.shape[2]), strict=True):
        if x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads) or x.shape[2] != length:
            raise ValueError(f"{name} must be (B or 1, H or 1, {length}), got {tuple(x.shape)}.")
    of_queries, of_keys = (x.to(torch.int32).expand(batch, shared, -1).contiguous() for x in pair)
    return of_queries, of_keys


# ---- one call ----------------------------------------------------------------------------------------------------


class OpArguments(NamedTuple):
    """The operators' common arguments, and what every launch derives from them."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None
    bias: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    pattern: str
    scaling: float
    is_causal: bool
    query_offset: int
    softcap: float | None = None

    @property
    def config(self) -> Config:
        return select(self.query.device, self.query.dtype, self.query.shape[-1], self.softcap is not None)

    def table(self, tile: Tile) -> TileTable:
        return tile_table(
            parse_pattern(self.pattern),
            self.query.shape[2],
            self.key.shape[2],
            tile.block_q,
            tile.block_k,
            radius=None if self.bias is None else self.bias.shape[1] // 2,
            query_offset=self.query_offset,
            is_causal=self.is_causal,
            device=self.query.device,
            cap=self.config.cap,
        )

    def bias_tiles(self, table: TileTable, transposed: bool = False) -> Tensor | None:
        """(H, classes, block_q, block_k) bias to base 2 of every class of tiles."""
        if self.bias is None:
            return None
        radius = self.bias.shape[1] // 2
        row = torch.arange(table.block_q, device=self.bias.device)[:, None]
        offset = torch.arange(table.block_k, device=self.bias.device)[None, :] - row
        near = (table.near[:, None, None] + offset).clamp(-radius, radius)
        far = torch.stack([torch.full_like(offset, -radius), torch.full_like(offset, radius)])
        index = torch.cat([far, near]) + radius
        index = index.transpose(1, 2) if transposed else index
        return (self.bias * LOG2E)[:, index].contiguous()

    def sizes(self, tile: Tile) -> dict[str, Any]:
        """Lengths and compile-time constants of a kernel with this tile."""
        heads, n, width = self.query.shape[1:]
        s = self.key.shape[2]
        return dict(
            N=n, S=s, H=heads, HK=self.key.shape[1], EVEN_N=n % tile.block_q == 0, EVEN_S=s % tile.block_k == 0,
            BM=tile.block_q, BN=tile.block_k, D=width, BD=padded_width(width),
            PRECISION="tf32" if dot_precision(self.query.dtype) == "tf32" else "ieee",
            # bfloat16 arithmetic is wrong in Triton's interpreter
            UP=self.query.device.type == "cpu" and self.query.dtype == torch.bfloat16,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def inputs(self) -> dict[str, Any]:
        """Query, key, value, the per-token vectors, and how products become logits to base 2."""
        cap = self.softcap
        return dict(
            Q=self.query, K=self.key, V=self.value, KEEP=self.keep,
            QPOS=self.query_positions, KPOS=self.key_positions, QSEG=self.query_segments, KSEG=self.key_segments,
            pos_heads=1 if self.query_positions is None else self.query_positions.shape[1],
            seg_heads=1 if self.query_segments is None else self.query_segments.shape[1],
            # tanh(x / c) is computed from exp(2 x / c)
            qk_scale=self.scaling * LOG2E * (1 if cap is None else 2 / cap), cap=None if cap is None else cap * LOG2E,
            **strides(self.query, "sq"), **strides(self.key, "sk"), **strides(self.value, "sv"),
        )  # fmt: skip

    def tiles(self, table: TileTable, transposed: bool = False) -> dict[str, Any]:
        """The tile lists of one direction and what their tiles refer to."""
        side = table.columns if transposed else table.rows
        return dict(
            WORK=side.work, OTHER=side.other, MASK=side.mask, CLASS=side.bias,
            MASKS=table.masks_t if transposed else table.masks, BIAS=self.bias_tiles(table, transposed),
            items=len(side.work), slots=side.num_slots, classes=len(table.near) + 2, PER_HEAD=table.heads > 1,
        )  # fmt: skip

    def programs(self, table: TileTable, heads: int) -> int:
        """How often the grid repeats the work items: tables per head name the head in the item."""
        return self.query.shape[0] * (1 if table.heads > 1 else heads)


def _slots(call: OpArguments, programs: int, slots: int, *shape: int) -> Tensor | None:
    return call.query.new_empty(programs, slots, *shape, dtype=torch.float32) if slots else None


# ---- launches ----------------------------------------------------------------------------------------------------


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from hf_efficient.kernels import block_sparse as kernels

    call = OpArguments(*args)
    query, tile = call.query, call.config.forward
    out, lse = token_major(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(query):
        table = call.table(tile)
        programs, rows, sizes = call.programs(table, query.shape[1]), table.rows, call.sizes(tile)
        part = _slots(call, programs, rows.num_slots, tile.block_q, query.shape[-1])
        part_lse = _slots(call, programs, rows.num_slots, tile.block_q)
        tensors = dict(OUT=out, LSE=lse, PART=part, PART_LSE=part_lse, **strides(out, "so"))
        kernels.forward[(len(rows.work) * programs,)](**tensors, **call.inputs(), **call.tiles(table), **sizes)
        if part is not None:
            kernels.combine[(len(rows.split) * programs,)](
                **tensors, SPLIT=rows.split, items=len(rows.split), slots=rows.num_slots, PER_HEAD=table.heads > 1,
                **{name: sizes[name] for name in ("N", "H", "EVEN_N", "BM", "D", "BD", "num_warps")},
            )  # fmt: skip
    return out, lse


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = OpArguments(*args)
    dout = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    delta = torch.empty_like(lse)
    gradient = dict(DOUT=dout, LSE=lse, DELTA=delta, **strides(dout, "sg"))
    with torch.cuda.device_of(dout):
        _row_delta(call, gradient, out, grad_lse)
        dq = _query_gradient(call, gradient)
        dk, dv = _key_gradient(call, gradient)
        dbias = _bias_gradient(call, gradient) if wants_bias else lse.new_empty(0)
    return dq, dk, dv, dbias


def _row_delta(call: OpArguments, gradient: dict[str, Any], out: Tensor, grad_lse: Tensor | None) -> None:
    from hf_efficient.kernels import block_sparse_backward as kernels

    batch, heads, n, _ = call.query.shape
    tile = call.config.query_gradient
    sizes = {name: value for name, value in call.sizes(tile).items() if name in ("N", "H", "EVEN_N", "BM", "D", "BD")}
    of_lse = dict.fromkeys(("slb", "slh", "sl"), 0) if grad_lse is None else strides(grad_lse, "sl")
    blocks = -(-n // tile.block_q)
    kernels.row_delta[(blocks * batch * heads,)](
        OUT=out, blocks=blocks, DLSE=grad_lse, **strides(out, "so"), **of_lse, **gradient, **sizes
    )


def _query_gradient(call: OpArguments, gradient: dict[str, Any]) -> Tensor:
    from hf_efficient.kernels import block_sparse_backward as kernels

    tile = call.config.query_gradient
    table = call.table(tile)
    rows, programs = table.rows, call.programs(table, call.query.shape[1])
    dq = token_major(call.query)
    part = _slots(call, programs, rows.num_slots, tile.block_q, call.query.shape[-1])
    kernels.query_gradient[(len(rows.work) * programs,)](
        DQ=dq, PART=part, scaling=call.scaling, **strides(dq, "sd"), **gradient,
        **call.inputs(), **call.tiles(table), **call.sizes(tile),
    )  # fmt: skip
    _sum_slots(call, table, dq, part, False)
    return dq


def _key_gradient(call: OpArguments, gradient: dict[str, Any]) -> Pair:
    from hf_efficient.kernels import block_sparse_backward as kernels

    tile = call.config.key_gradient
    table = call.table(tile)
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    columns, programs = table.columns, call.programs(table, heads)
    # each head of queries gives its share
    dk, dv = (token_major(call.key[:, :1].expand(-1, heads, -1, -1)) for _ in range(2))
    parts = [_slots(call, programs, columns.num_slots, tile.block_k, call.key.shape[-1]) for _ in range(2)]
    kernels.key_gradient[(len(columns.work) * programs,)](
        DK=dk, DV=dv, PART_K=parts[0], PART_V=parts[1], scaling=call.scaling, **strides(dk, "sd"), **gradient,
        **call.inputs(), **call.tiles(table, transposed=True), **call.sizes(tile),
    )  # fmt: skip
    for x, part in zip((dk, dv), parts, strict=True):
        _sum_slots(call, table, x, part, True)
    if heads > kv_heads:
        dk, dv = (token_major(call.key).copy_(x.unflatten(1, (kv_heads, -1)).sum(2)) for x in (dk, dv))
    return dk, dv


def _sum_slots(call: OpArguments, table: TileTable, x: Tensor, part: Tensor | None, transposed: bool) -> None:
    """Fill the split blocks of gradient `x` from their slots."""
    from hf_efficient.kernels import block_sparse_backward as kernels

    if part is None:
        return
    side = table.columns if transposed else table.rows
    block = table.block_k if transposed else table.block_q
    _, heads, length, width = x.shape
    kernels.sum_slots[(len(side.split) * call.programs(table, heads),)](
        X=x, PART=part, SPLIT=side.split, length=length, items=len(side.split), slots=side.num_slots, **strides(x, "sx"),
        H=heads, PER_HEAD=table.heads > 1, EVEN=length % block == 0, R=block, D=width, BD=padded_width(width),
    )  # fmt: skip


def _bias_gradient(call: OpArguments, gradient: dict[str, Any]) -> Tensor:
    """(H, 2R + 1) gradient of the bias."""
    from hf_efficient.kernels import block_sparse_backward as kernels

    assert call.bias is not None
    tile = call.config.bias_gradient
    table = call.table(tile)
    batch, heads = call.query.shape[:2]
    classes, pieces = len(table.near) + 2, _bias_pieces(table, batch)
    tiles = call.query.new_empty(pieces, heads, classes, tile.block_q, tile.block_k, dtype=torch.float32)
    # its dots stay exact in float32: with TensorFloat-32 ones it spills
    inputs = {name: x for name, x in call.inputs().items() if name not in ("QPOS", "KPOS", "pos_heads")}
    kernels.bias_gradient[classes * pieces, heads](
        DBIAS=tiles, START=table.class_start, ROW=table.class_row, COLUMN=table.class_column, MASK=table.class_mask,
        MASKS=table.masks, BIAS=call.bias_tiles(table), classes=classes, pieces=pieces, batch=batch,
        PER_HEAD=table.heads > 1, **gradient, **inputs, **call.sizes(tile) | {"PRECISION": "ieee"},
    )  # fmt: skip
    return _sum_by_offset(tiles.sum(0), table.near, call.bias.shape[1] // 2)


_LARGEST_CLASS: WeakKeyDictionary[TileTable, int] = WeakKeyDictionary()


def _bias_pieces(table: TileTable, batch: int) -> int:
    """How many programs share a class; its size is read from the device once per table."""
    if table not in _LARGEST_CLASS:
        _LARGEST_CLASS[table] = int(table.class_start.diff().max())
    return min(BIAS_PIECES, max(1, -(-_LARGEST_CLASS[table] * batch // BIAS_STEPS)))


def _sum_by_offset(tiles: Tensor, near: Tensor, radius: int) -> Tensor:
    """(H, 2R + 1) sums over equal offsets of (H, classes, block_q, block_k), by gathers so that the order is fixed."""
    heads, _, block_q, block_k = tiles.shape
    # with reversed rows a diagonal of constant offset runs down-left; rows one longer than its width stand it upright
    skew = torch.nn.functional.pad(tiles[:, 2:].flip(2), (0, block_q)).flatten(2)[..., :-block_q]
    diagonal = skew.unflatten(2, (block_q, block_q + block_k - 1)).sum(2)
    offset = near[:, None] + torch.arange(1 - block_q, block_k, device=near.device)
    low = tiles[:, 0].sum((1, 2)) + torch.where(offset <= -radius, diagonal, 0.0).sum((1, 2))
    high = tiles[:, 1].sum((1, 2)) + torch.where(offset >= radius, diagonal, 0.0).sum((1, 2))
    inner = torch.arange(1 - radius, radius, device=near.device)
    at = inner - near[:, None].long() + block_q - 1
    inside = (at >= 0) & (at < diagonal.shape[2])
    picked = diagonal.gather(2, at.clamp(0, diagonal.shape[2] - 1).expand(heads, -1, -1))
    return torch.cat([low[:, None], torch.where(inside, picked, 0.0).sum(1), high[:, None]], dim=1)


# ---- registration ------------------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor? bias, Tensor? query_positions, Tensor? key_positions, "
    "Tensor? query_segments, Tensor? key_segments, str pattern, float scaling, bool is_causal, SymInt query_offset, "
    "float? softcap=None"
)
_LIBRARY = torch.library.Library("hf_efficient", "FRAGMENT")
# the tables outlive a call: one made while a CUDA graph warms up would lie in the graph's own memory
_TAGS = (torch.Tag.cudagraph_unsafe,)
_LIBRARY.define(f"block_sparse_forward({_INPUTS}) -> (Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    f"block_sparse_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool wants_bias, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _forward_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    require_interpreter()
    return _forward(*args)


def _backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_interpreter()
    return _backward(*args)


_LIBRARY.impl("block_sparse_forward", _forward, "CUDA")
_LIBRARY.impl("block_sparse_backward", _backward, "CUDA")
_LIBRARY.impl("block_sparse_forward", _forward_cpu, "CPU")
_LIBRARY.impl("block_sparse_backward", _backward_cpu, "CPU")


@torch.library.register_fake("hf_efficient::block_sparse_forward", lib=_LIBRARY)
def _forward_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return token_major(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("hf_efficient::block_sparse_backward", lib=_LIBRARY)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = OpArguments(*args)
    # dense whatever the strides of the bias, as the kernel's result is
    dbias = call.bias.new_empty(call.bias.shape) if wants_bias and call.bias is not None else lse.new_empty(0)
    return token_major(call.query), token_major(call.key), token_major(call.value), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.rest = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wants_bias = ctx.needs_input_grad[4]
    dq, dk, dv, dbias = torch.ops.hf_efficient.block_sparse_backward(
        grad_out, grad_lse, out, lse, wants_bias, *tensors, *ctx.rest
    )
    return dq, dk, dv, None, dbias if wants_bias else None, *[None] * 9


torch.library.register_autograd(
    "hf_efficient::block_sparse_forward", _differentiate, setup_context=_setup_context, lib=_LIBRARY
)


torch.library.register_autograd("hf_efficient::block_sparse_backward", refuse_second_derivatives, lib=_LIBRARY)
