"""Softmax attention over a pattern: one function for every fixed pattern, on every device.

`reference_attention` is the definition. `block_sparse_attention` computes the same without N×N tensors: it takes a pattern
apart into pieces that have a fast form (windows, tables of tiles, residue classes of a stride, a few dense rows) and merges
the pieces exactly by their log-sum-exps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hf_efficient.ops.backend import require_torch, resolve
from hf_efficient.ops.block_sparse.decompose import Backend
from hf_efficient.ops.block_sparse.torch_backend import torch_attention
from hf_efficient.ops.block_sparse.traceable import is_traceable, traceable_attention
from hf_efficient.ops.block_sparse.windows import window_attention
from hf_efficient.ops.context import AttentionCall
from hf_efficient.ops.decoding import last_token_attention, pattern_attention
from hf_efficient.ops.graph import is_tracing
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.ops.softmax import Partial, Result, additive_mask, attend
from hf_efficient.patterns.kinds import Window
from hf_efficient.patterns.pattern import Pattern

DECODING = "queries of new tokens against a cache are computed by PyTorch alone"
GRAPHS = "graphs for other runtimes are made of PyTorch's operators alone"


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    call: AttentionCall,
    *,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    call: AttentionCall,
    *,
    return_lse: Literal[True],
    implementation: str = "auto",
) -> Partial: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    call: AttentionCall,
    *,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | Partial:
    """`y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j` over the keys j that `pattern` shows query i.

    Args:
        query: (B, H, N, D). key, value: (B, HK, S, D); H a multiple of HK (grouped queries), S ≥ N.
        pattern: on token positions, counted from each row's first token; of 1 or H heads.
        call: scaling, causality, padding, bias, …; an `AttentionContext` is one.
        return_lse: also return the log-sum-exp of the logits, with its gradient, see `merge_attention`.
        implementation: `"auto"`, `"torch"`, `"triton"` or `"flex"`; an explicit one never falls back: while decoding only
            the first two are possible.

    Returns:
        (B, H, N, D), and with `return_lse` (B, H, N); a query that sees nothing gives 0 and -inf. Time and memory grow with
        the tiles that the pattern touches.

    Raises:
        ValueError: shapes, devices, dtypes or options that do not fit together, or that `implementation` can't take.
    """
    if call.return_lse != return_lse:
        call = dataclasses.replace(call, return_lse=return_lse)
    if pattern.num_heads == 1:
        # one pattern for each of one head
        pattern = pattern.head(0)
    _check(query, key, value, pattern, call)
    if query.shape[2] < key.shape[2] or call.key_positions is not None:
        require_torch(implementation, DECODING)
        out, lse = _decode(query, key, value, pattern, call)
    elif is_tracing() and is_traceable(pattern) and not call.by_vectors:
        require_torch(implementation, GRAPHS)
        out, lse = traceable_attention(query, key, value, pattern, call)
    else:
        backend = resolve(implementation, query, key, value, dropout=call.dropout)
        out, lse = _backend(backend)(query, key, value, pattern, call)
    return (out, lse) if return_lse and lse is not None else out


def _decode(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> Result:
    """Queries of new tokens against the keys in a cache."""
    if call.by_vectors or call.extra is not None:
        raise ValueError("decoding (fewer queries than keys) takes no segments, positions or extra keys.")
    if not call.is_causal:
        raise ValueError(f"{query.shape[2]} queries and {key.shape[2]} keys: only a causal pattern can decode.")
    if isinstance(pattern, Window) and query.shape[2] == 1:
        return last_token_attention(query, key, value, pattern, call)
    if isinstance(pattern, Window):
        # what the cache forgot lies to the left of all windows, so the queries end a gapless run of tokens
        call = dataclasses.replace(call, query_offset=key.shape[2] - query.shape[2])
        return window_attention(query, key, value, pattern, call)
    return pattern_attention(query, key, value, pattern, call)


def _backend(name: str) -> Backend:
    if name == "torch":
        return torch_attention
    # Triton and FlexAttention are imported only where they are used
    from hf_efficient.ops.block_sparse import kernel_backends

    return kernel_backends.triton_attention if name == "triton" else kernel_backends.flex_attention


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall, *, return_lse: bool = False
) -> Any:
    """The definition of `block_sparse_attention` with an N×S tensor of logits; for tests, O(N·S)."""
    key, value = expand_heads(query, key, value)
    rows = torch.arange(call.query_offset, call.query_offset + query.shape[2], device=query.device)[:, None]
    columns = torch.arange(key.shape[2], device=query.device)[None]
    seen = _dense_mask(pattern, rows, columns, call.is_causal)[None]
    if call.key_padding_mask is not None:
        seen = seen & call.key_padding_mask[:, None, None]
    if call.segments is not None:
        seen = seen & (call.segments[0][..., None] == call.segments[1][..., None, :])
    if call.positions is not None:
        seen = seen & (call.positions[1][..., None, :] <= call.positions[0][..., None])
    logits = additive_mask(seen, query.dtype)
    if call.relative_bias is not None:
        logits = logits + call.relative_bias.at(columns - rows)[None].to(query.dtype)
    out, lse = attend(query, key, value, logits, scaling=call.scaling, return_lse=True, softcap=call.softcap)
    return (out, lse) if return_lse else out


def _dense_mask(pattern: Pattern, rows: Tensor, columns: Tensor, is_causal: bool) -> Tensor:
    """(H or 1, N, S) bool."""
    seen = pattern.visible_per_head(rows, columns)
    return seen & (columns <= rows) if is_causal else seen


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: AttentionCall) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    heads, kv_heads = query.shape[1], key.shape[1]
    if query.dim() != 4 or key.shape != value.shape or key.shape[::3] != query.shape[::3] or heads % kv_heads:
        raise ValueError(f"{shapes} do not fit: (B, H, N, D) and twice (B, H or a divisor of H, S, D) are needed.")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries and {key.shape[2]} keys: every query needs a key of its own.")
    if len({x.device for x in (query, key, value)}) > 1 or len({x.dtype for x in (query, key, value)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        raise ValueError(f"query, key and value must have one dtype on one device, not {kinds}.")
    if pattern.num_heads not in (1, heads):
        raise ValueError(f"the pattern is made for {pattern.num_heads} heads, but there are {heads}.")
    keep = call.key_padding_mask
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (key.shape[0], key.shape[2])):
        raise ValueError(
            f"key_padding_mask of {keep.dtype} {tuple(keep.shape)} must be bool {(key.shape[0], key.shape[2])}."
        )
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap={call.softcap} must be greater than 0, or None.")
    if call.positions is not None and call.relative_bias is not None:
        raise ValueError("a relative bias counts positions in order: it does not go with `positions`.")
