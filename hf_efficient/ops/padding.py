"""Rows that start late: where a padded row's real tokens begin, and shifting them to the left edge and back."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.ops.graph import is_tracing


def real_tokens(key_padding_mask: Tensor | None, key: Tensor) -> Tensor:
    """(B or 1, S) bool: which of (B, H, S, D) keys are real, where `None` = all."""
    return key.new_ones(1, key.shape[2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask


def first_real_token(key_padding_mask: Tensor) -> Tensor:
    """(B,) index of each row's first True of a (B, S) token mask; 0 for a row without any."""
    return key_padding_mask.int().argmax(dim=-1)


def real_length(key_padding_mask: Tensor) -> Tensor:
    """(B,) one past the index of each row's last True of a (B, S) token mask; 0 for a row without any."""
    positions = torch.arange(1, key_padding_mask.shape[-1] + 1, device=key_padding_mask.device)
    return (positions * key_padding_mask).amax(dim=-1)


def shift_rows(tensor: Tensor, shift: Tensor, dim: int, skip: int = 0) -> Tensor:
    """Roll each batch row of `tensor` by `-shift[b]` along `dim`: entry j of the result is entry j + shift[b] (mod n).

    Args:
        tensor: (B, …).
        shift: (B,) integers; negative values roll to the right, which undoes a former shift.
        dim: the axis of tokens.
        skip: entries at the front that stay where they are (extra tokens); the others roll among themselves.

    Static shapes and no look at values, so it compiles full-graph. O(elements) time and memory.
    """
    n = tensor.shape[dim] - skip
    index = torch.arange(n, device=tensor.device)[None, :] + shift[:, None]
    if is_tracing():  # shifts are less than n there, and not all runtimes know remainders by an open length
        index = torch.where(index < 0, index + n, torch.where(index < n, index, index - n))
    else:
        index = index % n
    if skip:
        index = torch.cat([torch.arange(skip, device=index.device).expand(index.shape[0], -1), index + skip], dim=1)
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = index.shape
    return tensor.gather(dim, index.view(shape).expand_as(tensor))
