"""Which tokens of each row are global, as positions with a static or a data-dependent count."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.ops.context import AttentionCall, AttentionContext, ExtraKeys
from hf_efficient.ops.decoding import entries_at
from hf_efficient.ops.graph import is_captured, is_tracing
from hf_efficient.ops.padding import first_real_token, real_tokens
from hf_efficient.ops.plain import is_plain_linear
from hf_efficient.ops.rotary import Rotation
from hf_efficient.ops.softmax import masked_attention


class GlobalTokens(NamedTuple):
    """`positions` (B, G) and `exists` (B, G): rows with fewer tokens have spare entries. Positions are distinct in each
    row; in graphs for other runtimes only those that exist are."""

    positions: Tensor
    exists: Tensor


def up_to_separator(
    input_ids: Tensor, separator_id: int | None, token_mask: Tensor | None = None, rule: Any = "question"
) -> Tensor:
    """(B, N) bool: all real tokens up to the first real separator.

    Args:
        rule: `"question"`: with the separator. `"before_separator"`: without.
        token_mask: (B, N) bool, True = real token; `None` = all real. Padding may hold the separator's id, too.

    Raises:
        ValueError: a row of real tokens has no separator.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if token_mask is None else token_mask
    separator = (input_ids == separator_id) & real
    if not is_captured() and bool((real.any(-1) & ~separator.any(-1)).any()):
        raise ValueError(
            f"global_tokens={rule!r}: a row has no separator (separator_token_id={separator_id}), so that its question "
            "ends nowhere: give question and context as a pair, or global_attention_mask."
        )
    own = separator.int() if rule == "question" else 0
    return (separator.cumsum(-1) - own == 0) & separator.any(-1, keepdim=True) & real


def masked_tokens(mask: Tensor) -> GlobalTokens | None:
    """The True positions of a (B, N) mask, in order; `None` if there are none. Reads the mask's values."""
    if is_tracing():
        raise ValueError(
            "which tokens are global is decided by the values of this call, which a traced or exported graph can't follow: "
            "convert with a rule that names positions, such as global_tokens='first', or run the model itself."
        )
    count = int(mask.sum(-1).max())
    if count == 0:
        return None
    # a stable sort puts the global tokens first and keeps their order
    index = (~mask).int().argsort(dim=-1, stable=True)[:, :count]
    return GlobalTokens(index, mask.gather(-1, index))


def listed_tokens(positions: list[int], key: Tensor, key_padding_mask: Tensor | None) -> GlobalTokens | None:
    """Positions counted from each row's first real token, for (B, H, S, D) keys; static count, so it compiles full-graph."""
    batch, length = key.shape[0], key.shape[2]
    if not is_tracing():  # in a graph their number can't depend on the length
        positions = [position for position in positions if position < length]
    if not positions:
        return None
    start = torch.zeros(batch, dtype=torch.long, device=key.device)
    if key_padding_mask is not None:
        start = first_real_token(key_padding_mask)
    index = start[:, None] + torch.tensor(positions, device=key.device)
    exists = index < length
    index = index.clamp(max=length - 1) if is_tracing() else index % length
    return GlobalTokens(index, exists if key_padding_mask is None else exists & key_padding_mask.gather(-1, index))


def chosen_tokens(
    mask: Tensor | None, listed: tuple[int, ...], key: Tensor, key_padding_mask: Tensor | None, is_causal: bool
) -> GlobalTokens | None:
    """The real tokens that a call's `global_attention_mask` marks, or without one those at the `listed` positions.

    Raises:
        ValueError: a mask of another shape than (B, S), in which a causal model's may be shorter.
    """
    if mask is None:
        return listed_tokens(list(listed), key, key_padding_mask)
    mask = _full_length(mask, len(key), key.shape[2], is_causal)
    return masked_tokens(mask if key_padding_mask is None else mask & key_padding_mask)


def without_tokens(key_padding_mask: Tensor | None, tokens: GlobalTokens, key: Tensor) -> Tensor:
    """The (B, S) token mask without the global tokens."""
    mask = real_tokens(key_padding_mask, key).expand(key.shape[0], -1)
    if is_tracing():  # where spare entries may repeat a token
        same = tokens.positions[..., None] == torch.arange(key.shape[2], device=key.device)
        return mask & ~(same & tokens.exists[..., None]).any(1)
    return mask.scatter(1, tokens.positions, mask.gather(1, tokens.positions) & ~tokens.exists)


def with_rows(out: Tensor, rows: Tensor, tokens: GlobalTokens, may_be_spare: bool) -> Tensor:
    """(B, H, N, D) `out` with the (B, H, G, D) `rows` at the global tokens; `may_be_spare`: some of these may not exist."""
    rows = rows.to(out.dtype)
    if is_tracing():
        # what does not exist goes to a spare row, which is cut off
        index = torch.where(tokens.exists, tokens.positions, out.shape[2])
        target = index[:, None, :, None].expand(-1, *rows.shape[1:2], -1, rows.shape[3])
        every = torch.arange(out.shape[2], device=out.device)
        return F.pad(out, (0, 0, 0, 1)).scatter(2, target, rows).index_select(2, every)
    target = tokens.positions[:, None, :, None].expand(rows.shape)
    if may_be_spare:  # spare entries write back what is there
        rows = torch.where(tokens.exists[:, None, :, None], rows, out.gather(2, target))
    return out.scatter(2, target, rows)


def global_columns(
    tokens: GlobalTokens, key: Tensor, value: Tensor, call: AttentionCall, window: tuple[int, int] | None = None
) -> ExtraKeys:
    """The global tokens as keys of every query; causal: of their own and every later query.

    Args:
        key, value: (B, HK, N, D), one for each query.
        window: (left, right) keys beside the token itself, beyond which it sees none; `None` = all.
    """
    index = tokens.positions
    gather = index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    offset = index[:, None, :] - torch.arange(key.shape[2], device=key.device)[:, None]  # (B, N, G)
    visible = tokens.exists[:, None]
    if call.is_causal:
        visible = visible & (offset <= 0)
    if window is not None:
        visible = visible & (offset >= -window[0]) & (offset <= window[1])
    bias = None if call.relative_bias is None else call.relative_bias.at(offset).transpose(0, 1)
    return ExtraKeys(key.gather(2, gather), value.gather(2, gather), visible, bias)


def _full_length(mask: Tensor, rows: int, length: int, is_causal: bool) -> Tensor:
    if mask.dim() != 2 or len(mask) != rows or mask.shape[1] > length or (mask.shape[1] < length and not is_causal):
        raise ValueError(
            f"global_attention_mask of shape {tuple(mask.shape)} must be {(rows, length)}, one entry per token; only a "
            "causal model takes a shorter one, whose missing tokens are not global."
        )
    return F.pad(mask.bool(), (0, length - mask.shape[1]))


def kept_tokens(mask: Tensor, key_positions: Tensor, length: int) -> Tensor:
    """(B, R) bool: which of the keys at `key_positions` (B, R) a (B, ≤ length) mask of all tokens marks.

    Raises:
        ValueError: it marks tokens without a key: the cache has forgotten them. Or it has another shape.
    """
    mask = _full_length(mask, len(key_positions), length, is_causal=True)
    marked = entries_at(key_positions, mask)
    if bool((marked.sum(-1) < mask.sum(-1)).any()):
        raise ValueError(
            "global_attention_mask names tokens that were not global when the cache was filled and that it has forgotten: "
            "give the same mask with every call."
        )
    return marked


def global_rows(
    index: Tensor,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    context: AttentionContext,
    num_heads: int,
    interleaved: bool | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """(B, H, G, D): what the tokens `index` (B, G) of `context.hidden_states` see in all of them: see `projected_rows`.

    Queries and keys are rotated by `context.cos_sin` where the pairs of that are said to be `interleaved` or not. With
    `window` the tokens see no more than (left, right) others beside themselves.
    """
    hidden = context.hidden_states
    assert hidden is not None
    mask = None if context.key_padding_mask is None else context.key_padding_mask[:, None, None, :]
    offset = torch.arange(hidden.shape[1], device=index.device) - index[..., None]  # (B, G, n)
    if window is not None:
        near = ((offset >= -window[0]) & (offset <= window[1]))[:, None]
        mask = near if mask is None else mask & near
    if context.relative_bias is not None:
        bias = context.relative_bias.at(offset).transpose(0, 1).to(hidden.dtype)  # (B, H, G, n)
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    rows = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    options: dict[str, Any] = dict(num_heads=num_heads, scaling=context.scaling, dropout=context.dropout)
    rotations = None
    if interleaved is not None:
        assert context.cos_sin is not None
        rotation = Rotation(context.cos_sin, interleaved)
        rotations = rotation.at(index), rotation
    return projected_rows(rows, hidden, projections, mask=mask, rotations=rotations, **options)


def projected_rows(
    rows: Tensor,
    hidden: Tensor,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    *,
    num_heads: int,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    rotations: tuple[Rotation, Rotation] | None = None,
) -> Tensor:
    """Softmax attention of `rows` over `hidden` through (query, key, value) projections.

    Few rows do not need keys and values of all tokens: `q·(W_k h + c) = (W_kᵀ q)·h + q·c`, and the last term is the same for
    all keys; likewise `Σ p (W_v h + c) = W_v Σ p h + c`. That costs n·C per head and row against n·C² once (C the width of
    `hidden`), so it pays up to head_dim rows. It takes weights in place of calls, so both modules must be nothing but a
    product with a weight; adapters, quantised or offloaded layers and whatever has hooks are called, with the same result.

    Args:
        rows: (B, G, C) states of the queries. hidden: (B, n, C) states of all tokens.
        mask: bool or additive, broadcastable to (B, H, G, n), or `None`.
        rotations: of the queries and of the keys, by their positions. Keys of all tokens are then projected in any case, as
            each of them turns by angles of its own.

    Returns:
        (B, H, G, D). O(min(G · H, C) · n · C) time, O(G · H · n) memory; with rotations O(n · C²) and O((C + G · H) · n).
    """
    query, key, value = projections

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    options: dict[str, Any] = dict(attn_mask=mask, dropout_p=dropout, scale=scaling)
    q = heads(query(rows))  # (B, H, G, D)
    if rotations is not None:
        q, k = (rotate(x) for rotate, x in zip(rotations, (q, heads(key(hidden))), strict=True))
        return masked_attention(q, k, heads(value(hidden)), **options)
    if rows.shape[1] > q.shape[-1] or not (is_plain_linear(key) and is_plain_linear(value)):
        return masked_attention(q, heads(key(hidden)), heads(value(hidden)), **options)
    return _through_weights(q, hidden, key, value, options)


def _through_weights(query: Tensor, hidden: Tensor, key: Any, value: Any, options: dict[str, Any]) -> Tensor:
    """`projected_rows` without keys and values, from (B, H, G, D) queries and plain linear layers."""
    num_heads = query.shape[1]
    key_weight, value_weight = (p.weight.unflatten(0, (num_heads, -1)) for p in (key, value))
    probe = torch.einsum("bhgd,hdc->bhgc", query, key_weight.to(query.dtype))
    # all heads see the same states: their rows are queries of one head, or gradients of the states would exist once per head
    if (mask := options["attn_mask"]) is not None:
        mask = mask.expand(query.shape[0], num_heads, query.shape[2], -1).flatten(1, 2)[:, None]
    shared = hidden[:, None]
    mixed = masked_attention(probe.flatten(1, 2)[:, None], shared, shared, **options | {"attn_mask": mask})[:, 0]
    mixed = mixed.unflatten(1, (num_heads, -1))
    out = torch.einsum("bhgc,hdc->bhgd", mixed, value_weight.to(mixed.dtype))
    return out if value.bias is None else out + value.bias.view(num_heads, 1, -1).to(out.dtype)
