"""Which tokens of each row are global, as positions with a static or a data-dependent count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .alignment import first_real_token


class GlobalTokens(NamedTuple):
    """`positions` (B, G), distinct in each row, and `exists` (B, G): rows with fewer tokens have spare entries."""

    positions: Tensor
    exists: Tensor


def up_to_separator(input_ids: Tensor, separator_id: int) -> Tensor:
    """(B, N) bool: all tokens up to and including the first separator; none in a row without a separator."""
    separator = input_ids == separator_id
    return (separator.cumsum(-1) - separator.int() == 0) & separator.any(-1, keepdim=True)


def masked_tokens(mask: Tensor) -> GlobalTokens | None:
    """The True positions of a (B, N) mask, in order; `None` if there are none. Reads the mask's values."""
    count = int(mask.sum(-1).max())
    if count == 0:
        return None
    # a stable sort puts the global tokens first and keeps their order
    index = (~mask).int().argsort(dim=-1, stable=True)[:, :count]
    return GlobalTokens(index, mask.gather(-1, index))


def listed_tokens(positions: list[int], key: Tensor, key_padding_mask: Tensor | None) -> GlobalTokens | None:
    """Positions counted from each row's first real token, for (B, H, S, D) keys; static count, so it compiles full-graph."""
    batch, length = key.shape[0], key.shape[2]
    positions = [position for position in positions if position < length]
    if not positions:
        return None
    start = torch.zeros(batch, dtype=torch.long, device=key.device)
    if key_padding_mask is not None:
        start = first_real_token(key_padding_mask)
    index = start[:, None] + torch.tensor(positions, device=key.device)
    exists, index = index < length, index % length
    return GlobalTokens(index, exists if key_padding_mask is None else exists & key_padding_mask.gather(-1, index))


def without_tokens(key_padding_mask: Tensor | None, tokens: GlobalTokens, key: Tensor) -> Tensor:
    """The (B, S) keep-mask without the global tokens."""
    keep = key_padding_mask
    if keep is None:
        keep = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return keep.scatter(1, tokens.positions, keep.gather(1, tokens.positions) & ~tokens.exists)
