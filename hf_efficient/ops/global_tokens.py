"""Which tokens of each row are global, as positions with a static or a data-dependent count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import first_real_token
from .decode_rows import entries_at
from .relative_bias import RelativeBias
from .windows import ExtraKeys


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


def chosen_tokens(
    mask: Tensor | None, listed: tuple[int, ...], key: Tensor, key_padding_mask: Tensor | None, is_causal: bool
) -> GlobalTokens | None:
    """The real tokens that a call's `global_attention_mask` marks, or without one those at the `listed` positions.

    Raises:
        ValueError: a mask of another shape than (B, S); a causal model's may be shorter.
    """
    if mask is None:
        return listed_tokens(list(listed), key, key_padding_mask)
    mask = _full_length(mask, key.shape[2], is_causal)
    return masked_tokens(mask if key_padding_mask is None else mask & key_padding_mask)


def without_tokens(key_padding_mask: Tensor | None, tokens: GlobalTokens, key: Tensor) -> Tensor:
    """The (B, S) keep-mask without the global tokens."""
    keep = key_padding_mask
    if keep is None:
        keep = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return keep.scatter(1, tokens.positions, keep.gather(1, tokens.positions) & ~tokens.exists)


def global_columns(
    tokens: GlobalTokens, key: Tensor, value: Tensor, relative_bias: RelativeBias | None, is_causal: bool
) -> ExtraKeys:
    """The global tokens as keys of every query; causal: of their own and every later query.

    Args:
        key, value: (B, H, N, D), one for each query.
    """
    index = tokens.positions
    gather = index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    offset = index[:, None, :] - torch.arange(key.shape[2], device=key.device)[:, None]  # (B, N, G)
    keep = tokens.exists[:, None]
    if is_causal:
        keep = keep & (offset <= 0)
    bias = None if relative_bias is None else relative_bias.at(offset).transpose(0, 1)
    return ExtraKeys(key.gather(2, gather), value.gather(2, gather), keep, bias)


def _full_length(mask: Tensor, length: int, is_causal: bool) -> Tensor:
    if mask.dim() != 2 or mask.shape[1] > length or (mask.shape[1] < length and not is_causal):
        raise ValueError(
            f"global_attention_mask of shape {tuple(mask.shape)} must be (batch, {length}), one entry per token; "
            "only a causal model takes a shorter one, whose missing tokens are not global."
        )
    return F.pad(mask.bool(), (0, length - mask.shape[1]))


def kept_tokens(mask: Tensor, key_positions: Tensor, length: int) -> Tensor:
    """(B, R) bool: which of the keys at `key_positions` (B, R) a (B, ≤ length) mask of all tokens marks.

    Raises:
        ValueError: it marks tokens without a key: the cache has forgotten them. Or it has another shape.
    """
    mask = _full_length(mask, length, is_causal=True)
    marked = entries_at(key_positions, mask)
    if bool((marked.sum(-1) < mask.sum(-1)).any()):
        raise ValueError(
            "global_attention_mask names tokens that were not global when the cache was filled and that it has forgotten: "
            "give the same mask with every call."
        )
    return marked
