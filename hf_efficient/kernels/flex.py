"""The same attention by FlexAttention: an independent implementation to compare with, used only where it is asked for.

Its block mask is made from a `TileTable`, and so are the element masks, hence it takes every pattern and never evaluates an
N×S mask on the host. Source: Dong et al. 2024 (arXiv 2412.05496).
"""

from __future__ import annotations

import copy
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.tile_table import tile_table

BLOCK = 128


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern,
    scaling: float,
    is_causal: bool = False,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    query_offset: int = 0,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scaling · q·k + bias) · v over the keys that the pattern and `keep` show, as `kernels.library.block_sparse`.

    Args:
        query: (B, H, N, D). key, value: (B, HK, S, D), H a multiple of HK.
        keep: (B, S) bool, True = may be seen.
        bias: (H, 2R + 1) added to the logits at offsets -R … R, constant beyond; without a gradient.
        softcap: c where `scaling · q·k` becomes `c · tanh(scaling · q·k / c)`, before the bias.

    Returns:
        (B, H, N, D); a query that sees nothing gives 0.

    Raises:
        ValueError: a gradient that FlexAttention can't give (of the bias; any on the CPU), float64, a bias of a wrong shape.

    O(tiles) time on the device, O((N / 128) · (S / 128)) memory for its block lists. The first call of a kind compiles.
    """
    reason = refusal(query, key, value, bias)
    if reason is not None:
        raise ValueError(reason)
    n, s = query.shape[2], key.shape[2]
    # a full block skips the element mask, so with padding there are none
    blocks, masks, ids = _blocks(pattern, n, s, is_causal, query_offset, query.device, keep is None)
    blocks = copy.copy(blocks)
    per_head = ids.shape[0] > 1

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask = ids[h if per_head else 0, q // BLOCK, k // BLOCK]
        shown = masks[mask, q % BLOCK, k % BLOCK]
        return shown if keep is None else shown & keep[b, k]

    blocks.mask_mod = seen
    radius = 0 if bias is None else bias.shape[1] // 2

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * (score / softcap).tanh()
        return score if bias is None else score + bias[h, (k - q - query_offset).clamp(-radius, radius) + radius]

    call = flex_attention if torch.compiler.is_compiling() else _compiled()
    return call(
        query,
        key,
        value,
        score_mod=None if bias is None and softcap is None else changed,
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def refusal(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> str | None:
    """Why FlexAttention can't take these tensors, with the remedy; `None` if it can."""
    if query.dtype == torch.float64:
        return "FlexAttention has no float64; use implementation='torch'."
    if bias is not None and (bias.dim() != 2 or bias.shape[0] != query.shape[1] or bias.shape[1] % 2 == 0):
        return f"bias must be ({query.shape[1]}, 2R + 1), over offsets -R … R, got {tuple(bias.shape)}."
    if not torch.is_grad_enabled():
        return None
    if bias is not None and bias.requires_grad:
        return (
            "FlexAttention sums a bias's gradient in no fixed order, so it is not offered; use implementation='triton' or "
            "'torch', or a bias without gradient."
        )
    if query.device.type == "cpu" and any(x.requires_grad for x in (query, key, value)):
        return "FlexAttention has no gradients on the CPU; use implementation='torch', or torch.no_grad()."
    return None


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@lru_cache(maxsize=64)
def _blocks(
    pattern: Pattern, n: int, s: int, is_causal: bool, offset: int, device: torch.device, with_full: bool
) -> tuple[BlockMask, Tensor, Tensor]:
    """Block lists, (U + 2, 128, 128) bool element masks, and (heads, rows, columns) each tile's index among them.

    The last two masks show nothing and everything.
    """
    table = tile_table(pattern, n, s, BLOCK, BLOCK, query_offset=offset, is_causal=is_causal, device=device)
    nothing = torch.zeros(1, BLOCK, BLOCK, dtype=torch.bool, device=device)
    masks = torch.cat([table.masks.bool(), nothing, ~nothing])
    ids = torch.full((table.heads, -(-n // BLOCK), -(-s // BLOCK)), len(masks) - 2, dtype=torch.int32, device=device)
    per_head = (table.class_start[:, -1] - table.class_start[:, 0]).long()
    head = torch.arange(table.heads, device=device).repeat_interleave(per_head)
    everything = torch.where(table.class_mask < 0, len(masks) - 1, table.class_mask)
    ids[head, table.class_row.long(), table.class_column.long()] = everything.int()
    full = (ids == len(masks) - 1) & with_full
    partial = (ids != len(masks) - 2) & ~full
    whole = _ordered(full) if with_full else (None, None)
    blocks = BlockMask.from_kv_blocks(*_ordered(partial), *whole, BLOCK_SIZE=BLOCK, seq_lengths=(n, s))  # type: ignore[misc]
    return blocks, masks, ids


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(1, heads, rows) number of chosen columns of each row, and (1, heads, rows, columns) columns, chosen ones first."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None], order.int()[None]
