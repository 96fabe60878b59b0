"""What transformers calls: one registered attention function and one registered mask function.

Importing this module registers both under the name `hf_efficient`, together: an attention function without a mask function
would silently lose padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import causal_mask_function

from hf_efficient.attention.base import AttentionGeometry, EfficientAttention
from hf_efficient.cache.bounded import BoundedLayer
from hf_efficient.cache.recurrent import RecurrentLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.decoding import entries_at
from hf_efficient.ops.dense import exact_attention
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.ops.packing import PackedSequences
from hf_efficient.ops.padding import first_real_token, shift_rows
from hf_efficient.ops.pooling import PackedRows
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.hooks import state_of
from hf_efficient.patching.keywords import refuse_unknown, with_kept
from hf_efficient.patching.mask_facts import MaskFacts, mask_facts, padding_of
from hf_efficient.patching.names import IMPLEMENTATION, LAYER, MODULE_NAME
from hf_efficient.patching.packing import attend_packed_rows

# by (is_causal, has a window): the rank of a mask
RANKS = {(False, False): 2, (True, False): 3, (True, True): 4, (False, True): 5}
KINDS = {2: "bidirectional", 3: "causal", 4: "causal windowed", 5: "bidirectional windowed"}


def efficient_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface: a bool mask of real keys, never N×S, whose rank says what kind of mask was asked for.

    Returns:
        Bidirectional: (B, S), or `None` where every key is real. Causal: (B, 1, S); causal with a window: (B, 1, 1, S);
        a window to both sides: (B, 1, 1, 1, S). Of these the last size is 0 where every key is real.

    Raises:
        ValueError: the call needs a mask that is neither causal nor bidirectional, or a cache whose keys are longer than
            the tokens seen (static caches).
    """
    # for a graph transformers always assumes packing; `check_call` refuses it there, and elsewhere finds the segments
    facts = MaskFacts(mask_function is causal_mask_function) if is_captured() else mask_facts(mask_function)
    if facts.unknown:
        raise ValueError(
            f"efficient attention got a custom mask function ({', '.join(facts.unknown)}), which it can't honour: it keeps "
            "to causal masks, windows of the config and padding."
        )
    _require_window_of(kwargs.get("config"), facts)
    if isinstance(q_offset, Tensor) or (facts.is_causal and kv_offset + kv_length != q_offset + q_length):
        raise ValueError(
            "efficient attention got a cache whose keys are longer than the tokens seen so far; use the default dynamic "
            "cache (cache_implementation=None) instead of a static one."
        )
    rank = RANKS[facts.is_causal, facts.has_window]
    keep = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    if keep is None or (not is_captured() and bool(keep.all())):
        if rank == 2:
            return None
        return torch.ones(*[1] * (rank - 1), 0, dtype=torch.bool, device=kwargs.get("device"))
    return keep.view(keep.shape[0], *[1] * (rank - 2), keep.shape[1])


def _require_window_of(config: Any, facts: MaskFacts) -> None:
    """Raise ValueError for a window that is not the one of the config, which layers go by."""
    size = getattr(config, "sliding_window", None)
    if facts.has_window and facts.left != (size if size is None or not facts.is_causal else size - 1):
        raise ValueError(
            f"efficient attention got a mask that shows {facts.left} keys to the left, but the config has "
            f"sliding_window={size}: it keeps to the window of the config."
        )


@with_kept
def efficient_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: RelativeBias | None = None,
    global_attention_mask: Tensor | None = None,
    efficient_hidden_states: Tensor | None = None,
    efficient_cos_sin: Tensor | None = None,
    efficient_input_ids: Tensor | None = None,
    efficient_cache: Cache | None = None,
    efficient_sequences: PackedSequences | None = None,
    efficient_rows: PackedRows | None = None,
    efficient_grid: tuple[int, int] | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: forwards to the child module `efficient`, or computes exact attention.

    Whether the layer is causal, and has a window or sinks, is said by its family; the mask and keywords are witnesses,
    which must agree.

    Args:
        query: (B, H, N, D); key, value: (B, H or fewer, S, D). attention_mask: from `efficient_mask`.
        efficient_sequences: the sequences of packed rows, each of which attends to itself alone.
        efficient_rows: the layer runs on pooled tokens, in these rows. s_aux: (H,) logits of the sinks.
        efficient_grid: (rows, columns) of the pictures' patches, where they are not those of the config.
        softcap: c where logits become `c · tanh(logits / c)`.

    Returns:
        (B, N, H, D) and `None`: there are no attention weights to show.

    Raises:
        ValueError: a keyword that is neither honoured nor harmless; a mask or a keyword of another kind than the layer.
    """
    _require_installed(module)
    mechanism = cast("EfficientAttention | None", module._modules[MODULE_NAME])
    attention_mask = padding_of(attention_mask)
    geometry: AttentionGeometry | None = state_of(module, LAYER)  # cross-attention has none
    _require_known(module, geometry, s_aux, softcap, kwargs)
    if efficient_rows is None:
        _require_agreement(module, geometry, attention_mask, is_causal)
    if mechanism is not None and not mechanism.grouped_heads:
        key, value = expand_heads(query, key, value)
    # cross-attention has the number of its layer, but a cache of its own
    own = None if geometry is None else efficient_cache
    layer: Any = None if own is None else own.layers[module.layer_idx]  # type: ignore[index]
    keep = None if attention_mask is None or not attention_mask.shape[-1] else attention_mask.flatten(0, -2)
    facts: dict[str, Any] = dict(key_padding_mask=keep, query_offset=key.shape[2] - query.shape[2])
    if isinstance(layer, BoundedLayer) and layer.key_positions is not None:
        facts = _facts_of_kept(layer, keep, query.shape[2])
    attend: Callable[..., Tensor]
    if mechanism is None:
        rows = attend = partial(exact_attention, window=None if geometry is None else geometry.sliding_window)
    else:
        # every packed sequence starts at the left edge of a row of its own
        rows, attend = partial(aligned_call, mechanism), mechanism
        facts |= dict(
            global_attention_mask=global_attention_mask,
            hidden_states=efficient_hidden_states,
            cos_sin=efficient_cos_sin,
            project=mechanism.host_projection and partial(mechanism.host_projection, module),
            input_ids=efficient_input_ids,
            rows=efficient_rows,
            grid=efficient_grid,
            recurrent=layer if isinstance(layer, RecurrentLayer) else None,
        )
    context = AttentionContext(
        is_causal=geometry is not None and geometry.is_causal,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        relative_bias=position_bias,
        sinks=s_aux,
        softcap=softcap,
        **facts,
    )
    if efficient_sequences is not None:
        return attend_packed_rows(attend, query, key, value, context, efficient_sequences).transpose(1, 2), None
    return rows(query, key, value, context).transpose(1, 2), None


def _require_installed(module: nn.Module) -> None:
    if MODULE_NAME not in module._modules:
        raise RuntimeError(
            f"attn_implementation={IMPLEMENTATION!r} was selected, but no mechanism is installed in "
            f"{type(module).__name__}: this would silently be another model. Load the checkpoint with an Auto class after "
            "`import hf_efficient`, or install a mechanism with hf_efficient.patch_attention."
        )


def _require_known(
    module: nn.Module,
    geometry: AttentionGeometry | None,
    sinks: Tensor | None,
    softcap: float | None,
    others: dict[str, Any],
) -> None:
    """Raise ValueError for a keyword of the host that is not honoured, or not what its family says of the layer."""
    refuse_unknown(module, others)
    if (sinks is not None) != (geometry is not None and geometry.has_sinks):
        raise ValueError(f"{type(module).__name__} got s_aux, or none, against what is known of its sinks.")
    if softcap != (None if geometry is None else geometry.softcap):
        raise ValueError(
            f"{type(module).__name__} got softcap={softcap}, against what is known of its logits: leave it out where it "
            "comes from the call; else this layer can't be converted."
        )


def _require_agreement(
    module: nn.Module, geometry: AttentionGeometry | None, mask: Tensor | None, keyword: bool | None
) -> None:
    """Raise ValueError where the mask or the keyword `is_causal` of a call says something else than the layer's family."""
    if mask is not None and not (mask.dtype == torch.bool and mask.dim() in KINDS):
        raise ValueError(
            f"{type(module).__name__} got an attention mask of {mask.dtype} {tuple(mask.shape)}, which its model made "
            "itself: efficient attention takes padding masks of (batch, tokens) only, and never a mask of N × N."
        )
    if is_captured():
        return  # transformers' masks of graphs do not tell
    is_causal, has_window = geometry is not None and geometry.is_causal, bool(geometry and geometry.sliding_window)
    rank, asked = RANKS[is_causal, has_window], 2 if mask is None else mask.dim()
    if rank != asked or (keyword is not None and bool(keyword) != is_causal):
        said = KINDS[asked] if rank != asked else f"is_causal={keyword}"
        raise ValueError(
            f"{type(module).__name__} was converted as {KINDS[rank]} attention, but its model asks for {said} attention "
            "in this call: this layer can't be converted."
        )


def _facts_of_kept(layer: BoundedLayer, keep: Tensor | None, n: int) -> dict[str, Any]:
    """What the context says of keys that stand elsewhere than at 0 … S - 1."""
    positions = layer.key_positions
    assert positions is not None
    there: Tensor | None = None
    if keep is not None:
        there = entries_at(positions, keep)
    elif layer.has_spares:
        there = positions >= 0
    return dict(
        key_padding_mask=there,
        key_positions=positions,
        query_offset=layer.seen - n,
        row_start=None if keep is None else layer.row_start,
    )


def aligned_call(
    mechanism: EfficientAttention, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
) -> Tensor:
    """Call the mechanism, on rows aligned to the left where it needs that, with the context of these rows."""
    n, keep = query.shape[2], context.key_padding_mask
    if context.query_offset and not context.is_causal:
        raise ValueError(
            f"an encoder layer got {key.shape[2]} keys for {n} tokens (prefix tuning?); efficient attention needs as many "
            "keys as tokens. Use LoRA or prompt tuning instead of prefixes."
        )
    if keep is None or not mechanism.left_aligned or context.key_positions is not None:
        return mechanism(query, key, value, context)
    extra = mechanism.num_extra_tokens(mechanism.config)  # these stay at the front
    start = first_real_token(keep[:, extra:])
    if n < key.shape[2]:
        return mechanism(query, key, value, replace(context, row_start=start))
    query, key, value = (shift_rows(x, start, 2, extra) for x in (query, key, value))
    names = ("key_padding_mask", "global_attention_mask", "hidden_states", "cos_sin", "input_ids")
    given = {name: getattr(context, name) for name in names}
    moved: dict[str, Any] = {k: shift_rows(x, start, 1, extra) for k, x in given.items() if x is not None}
    context = replace(context, **moved)
    out = shift_rows(mechanism(query, key, value, context), -start, 2, extra)
    # queries before a row's first real token have no past, but the shift put them behind all its keys
    started = torch.arange(n, device=start.device) >= start[:, None]
    return out.where(started[:, None, :, None], 0.0) if context.is_causal else out


AttentionInterface.register(IMPLEMENTATION, efficient_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, efficient_mask)
