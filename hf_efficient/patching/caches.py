"""The cache layers of the mechanisms, put into transformers' own caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from hf_efficient.cache.bounded import BoundedLayer
from hf_efficient.ops.graph import is_captured
from hf_efficient.patterns.kinds import Window

if TYPE_CHECKING:
    from hf_efficient.attention.base.geometry import AttentionGeometry
    from hf_efficient.attention.base.mechanism import EfficientAttention


class HostWindow(NamedTuple):
    """The cache of an unconverted layer whose host has a window: ours as well, so that masks count all layers alike."""

    left: int

    @classmethod
    def of(cls, geometry: AttentionGeometry | None) -> HostWindow | None:
        return None if geometry is None or geometry.sliding_window is None else cls(geometry.sliding_window[0])

    def cache_layer(self) -> BoundedLayer:
        return BoundedLayer(Window(left=self.left, right=0))


def bounded_cache(
    cache: Cache | None,
    mechanisms: Mapping[int, EfficientAttention | HostWindow],
    config: Any,
    has_cross_attention: bool,
) -> tuple[Cache, Cache]:
    """A cache whose layers at the indices of `mechanisms` are the mechanisms' own; all others stay what they are.

    Args:
        cache: the call's; `None` makes the one that the host would make. Only an empty dynamic cache gets other layers.

    Returns:
        The cache for the host, and the part of it that serves self-attention.
    """
    if cache is None:
        cache = DynamicCache(config=config)
        if has_cross_attention:
            cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    plain = isinstance(own, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or isinstance(layer, BoundedLayer)
        for layer in own.layers
    )
    if plain and own.get_seq_length() == 0 and not is_captured():
        own.layers.extend(DynamicLayer() for _ in range(max(mechanisms) + 1 - len(own.layers)))
        for index, mechanism in mechanisms.items():
            layer = mechanism.cache_layer()
            assert layer is not None
            if getattr(own.layers[index], "record_past", False):
                layer.activate_past_recording()
            own.layers[index] = layer
    return cache, own


def prepare_layers(
    cache: Cache,
    mechanisms: Mapping[int, EfficientAttention | HostWindow],
    rows: int,
    device: torch.device,
    mask: Tensor | None,
    marked: Tensor | None,
) -> bool:
    """Tell the bounded layers of `cache` about a call; False if it has none.

    Args:
        rows, device: B of the call, and where its tokens are. mask: (B, S) its `attention_mask`.
        marked: (B, ≤ S) its `global_attention_mask`.

    Raises:
        ValueError: rows start elsewhere than when keys were forgotten.
    """
    layers = {index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, BoundedLayer)}
    start = _row_starts(mask, next((layer.row_start for layer in layers.values()), None), rows, device)
    anchored = [x for x in layers.values() if x.has_forgotten and x.is_anchored]
    for layer in anchored[:1]:  # all layers of a stack have had the same masks
        before = layer.row_start
        if before is not None and bool(((start != before) & (torch.minimum(start, before) < layer.seen)).any()):
            raise ValueError(
                "attention_mask says that rows start at other tokens than when the cache was filled: give the mask of all "
                "tokens seen so far with every call."
            )
    for index, layer in layers.items():
        takes_marks = getattr(mechanisms.get(index), "uses_global_attention_mask", False)
        layer.prepare(start, marked if takes_marks else None)
    return bool(layers)


def _row_starts(mask: Tensor | None, before: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """(B,) number of leading zeros of each row, also of a row of zeros.

    Where rows start as in the call `before`, on the CPU, that is seen without reading the whole mask.
    """
    if mask is None:
        return torch.zeros(rows, dtype=torch.long, device=device)
    if before is not None and before.shape == mask.shape[:1] and mask.device.type == "cpu" and not is_captured():
        at = before.to(mask.device)[:, None]
        if int(at.max()) < mask.shape[1]:
            starts_there = mask.gather(1, at).bool() & ~(mask.gather(1, (at - 1).clamp(min=0)).bool() & (at > 0))
            if bool(starts_there.all()):
                return at[:, 0]
    return (mask.bool().cumsum(-1) == 0).sum(-1)
