"""Attention in segments that see themselves and a segment memory before them: rows at once, and new tokens with a cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.keys_shown import keys_shown
from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.cache.segments import SegmentLayer
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.graph import is_captured
from hf_efficient.ops.softmax import additive_mask, masked_attention
from hf_efficient.patterns.kinds import BlockWindow

# new tokens that are computed at once while decoding
CHUNK = 128


class Far(NamedTuple):
    """Keys in front of the tokens: (B, H, G, D) keys and values, (B, 1 or H, N, G) what is added to their logits."""

    keys: Tensor
    values: Tensor
    logits: Tensor


@dataclass(frozen=True, kw_only=True)
class SegmentAttentionConfig(EfficientAttentionConfig):
    """Options of attention in segments with a segment memory.

    Args:
        segment_length: T, tokens of a segment.
        memory_length: M, tokens before a segment that all of it sees.
        stop_gradient: keys and values of the memory take no gradient from the segments after them, as where each segment
            is a training step of its own; False = one long forward is differentiated through.
    """

    segment_length: int = 256
    memory_length: int = 256
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("segment_length", "memory_length")
        self._require("stop_gradient", isinstance(self.stop_gradient, bool), "True or False")

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        pattern = BlockWindow(block_size=self.segment_length, before=self.memory_length)
        return keys_shown(pattern, geometry, length)

    @classmethod
    def of_size(cls, size: int, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        names = [f.name for f in dataclasses.fields(cls) if f.name.endswith("_length")]
        # a token sees half of its segment, and all of each memory
        options: dict[str, Any] = dict.fromkeys(names, max(4, 4 * round(size / (4 * len(names) - 2))))
        return cls(**options)


class SegmentAttention(EfficientAttention):
    """What mechanisms with segments and a segment memory share: rows in segments, and new tokens against a cache.

    A subclass may put keys in front of each segment: `_far_of_rows`, `_far_of_cache`.
    """

    config: SegmentAttentionConfig
    left_aligned = True

    def cache_layer(self) -> SegmentLayer | None:
        pattern = BlockWindow(block_size=self.config.segment_length, before=self.config.memory_length)
        return SegmentLayer(pattern) if self.geometry.is_causal else None

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if not geometry.is_causal:
            name = cls.Config.mechanism
            reasons.append(
                f"{name} remembers the past alone, and an encoder also looks ahead: use image_local, whose blocks see both "
                "sides, or longformer"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        # in one segment gradients are exact, too
        return dataclasses.replace(config, segment_length=length)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if query.shape[2] < key.shape[2] or context.key_positions is not None:
            return self._continue(query, key, value, context)
        return self._whole_rows(query, key, value, context)

    def _far_of_rows(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Any:
        """A function of a segment's number and length that gives its `Far`; `None` = there are no such keys."""
        return None

    def _far_of_cache(
        self, query: Tensor, key: Tensor, value: Tensor, token: Tensor, context: AttentionContext
    ) -> Any:
        """A function of (B or 1, N) query rows that gives their `Far`, for keys at (B or 1, S) `token`."""
        return None

    def _offsets(self, length: int, like: Tensor) -> Tensor | None:
        """(H, length, D) vectors of the distances length - 1 … 0, which queries are multiplied with; `None` = none."""
        return None

    def _with_offsets(self, query: Tensor, logits: Tensor, offsets: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Queries, and (…, N, K) logits with what (H, K, D) `offsets` add to them."""
        raise NotImplementedError(f"{type(self).__name__} has no offsets")

    def _whole_rows(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """Attention of rows that start at their first token, one segment at a time."""
        size, n, token_mask = self.config.segment_length, query.shape[2], context.key_padding_mask
        count = -(-n // size)
        reach = min(self.config.memory_length, (count - 1) * size)
        tile = _tile(min(n, size), reach, query, context)
        offsets = self._offsets(tile.shape[-1], query)
        far_of = self._far_of_rows(query, key, value, context)
        # views of overlapping spans would have gradients as large as all of them
        parts = [x.split(size, dim=2) for x in (query, key, value)]
        old = [[x.detach() for x in part] if self.config.stop_gradient else part for part in parts[1:]]
        outputs = []
        for u, (q, k, v) in enumerate(zip(*parts, strict=True)):
            low, high = max(0, u * size - reach), u * size + q.shape[2]
            k, v = (torch.cat([*pieces(part, low, size, u), x], 2) for part, x in zip(old, (k, v), strict=True))
            logits = tile[..., : q.shape[2], reach - u * size + low : reach + q.shape[2]]
            if token_mask is not None:
                logits = torch.where(token_mask[:, None, None, low:high], logits, float("-inf"))
            outputs.append(self._attend(q, k, v, logits, offsets, far_of and far_of(u, q.shape[2]), context))
        return torch.cat(outputs, dim=2)

    def _continue(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """New queries over the keys that the cache kept: of every row a run of tokens, which ends with the newest."""
        size, (n, count) = self.config.segment_length, (query.shape[2], key.shape[2])
        positions, start = context.key_positions, context.row_start
        if positions is None:
            positions = torch.arange(count, device=key.device)[None]
        if start is None:
            start = torch.zeros(1, dtype=torch.long, device=key.device)
        token = positions - start[:, None]
        exists = positions >= 0 if context.key_padding_mask is None else (positions >= 0) & context.key_padding_mask
        far_of = self._far_of_cache(query, key, value, token, context)
        offsets = self._offsets(count, query)
        rows = torch.arange(n, device=key.device) + (context.query_offset - start)[:, None]
        is_cut = self.config.stop_gradient and torch.is_grad_enabled() and key.requires_grad
        if is_cut and _starts_a_segment(rows, size):
            # all keys before the new ones are memory, and none of these are
            key, value = (
                torch.cat([x[:, :, : count - n].detach(), x[:, :, count - n :]], dim=2) for x in (key, value)
            )
            is_cut = False
        outputs = []
        for first in range(0, n, CHUNK):
            here = slice(first, min(first + CHUNK, n))
            last, row = count - n + here.stop, rows[:, here, None]
            # nothing before the memory of the first one's segment
            keys = slice(max(0, count - n + first - size + 1 - self.config.memory_length), last)
            j = token[:, None, keys]
            segment = row // size * size
            seen = exists[:, None, keys] & (j <= row) & (j >= segment - self.config.memory_length)
            tile = _tile(here.stop - first, last - keys.start - here.stop + first, query, context)
            logits = torch.where(seen[:, None], tile, float("-inf"))
            k, v, own = key[:, :, keys], value[:, :, keys], (j >= segment)[:, None] if is_cut else None
            far = far_of and far_of(rows[:, here])
            outputs.append(self._attend(query[:, :, here], k, v, logits, offsets, far, context, own))
        return torch.cat(outputs, dim=2)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logits: Tensor,
        offsets: Tensor | None,
        far: Far | None,
        context: AttentionContext,
        own: Tensor | None = None,
    ) -> Tensor:
        """One softmax over all keys; those not in (B, 1, N, K) `own` take no gradient."""
        if offsets is not None:
            query, logits = self._with_offsets(query, logits, offsets[:, -key.shape[2] :], context.scaling)
        if own is not None:
            key, value = (torch.cat([x.detach(), x], dim=2) for x in (key, value))
            logits = torch.cat([logits.masked_fill(own, float("-inf")), logits.masked_fill(~own, float("-inf"))], -1)
        if far is not None:
            key, value = torch.cat([far.keys, key], dim=2), torch.cat([far.values, value], dim=2)
            shape = torch.broadcast_shapes(far.logits.shape[:3], logits.shape[:3])
            logits = torch.cat([far.logits.expand(*shape, -1), logits.expand(*shape, -1)], dim=-1)
        return masked_attention(
            query, key, value, attn_mask=logits.to(query.dtype), dropout_p=context.dropout, scale=context.scaling
        )


def _starts_a_segment(rows: Tensor, size: int) -> bool:
    """Whether the (B or 1, N) new tokens of every row are the first of one segment; rows without any yet are negative."""
    first = rows[:, 0]
    return not is_captured() and rows.shape[1] <= size and bool(((first % size == 0) | (first < 0)).all())


def _tile(n: int, before: int, query: Tensor, context: AttentionContext) -> Tensor:
    """(1, 1 or H, n, before + n) causal additive mask with the relative bias, the first key `before` tokens earlier."""
    past = torch.ones(n, before + n, dtype=torch.bool, device=query.device).tril(before)
    logits = additive_mask(past, query.dtype)[None, None]
    if context.relative_bias is not None:
        bias = context.relative_bias.toeplitz(n, before + n, -before, device=query.device)
        logits = logits + bias[None].to(query.dtype)
    return logits


def pieces(parts: Any, low: int, size: int, stop: int) -> list[Tensor]:
    """Entries from `low` on of (B, H, ·, D) `parts` of `size` entries each, before part `stop`."""
    first = low // size
    return [parts[first][:, :, low % size :], *parts[first + 1 : stop]] if first < stop else []
