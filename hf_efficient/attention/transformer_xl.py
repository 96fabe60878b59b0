"""Transformer-XL: segments that see themselves and a segment memory, the tokens before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.attention.base import AttentionGeometry, MechanismFacts, register_mechanism
from hf_efficient.attention.base.segment import SegmentAttention, SegmentAttentionConfig


@dataclass(frozen=True, kw_only=True)
class TransformerXLAttentionConfig(SegmentAttentionConfig):
    """Options of Transformer-XL: those of every attention in segments, and

    Args:
        relative: learn how far away keys are by a term of its own, in addition to the positions of the model.
    """

    mechanism: ClassVar[str] = "transformer_xl"

    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("relative", isinstance(self.relative, bool), "True or False")


@register_mechanism
class TransformerXLAttention(SegmentAttention):
    """A token sees its own segment up to itself, and the M tokens before the segment.

    Query i sees key j iff `⌊i / T⌋ T - M ≤ j ≤ i`, segments counted from a row's first real token:

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    With `relative` the logit is `s ((q_i + u)·k_j + (q_i + v)·W r_{i-j}) + b(j - i)`, r_o = (sin(o f_c), cos(o f_c))_c with
    f_c = 10000^(-2c / hidden size). `W` (hidden size, H · D) and u, v (H, D) are 0 at the start, where the term vanishes.

    The model's own positions go on from segment to segment, also through a cache; inputs beyond its table are refused, so
    convert with `max_positions`. Keys and values of the memory take no gradient (`stop_gradient`). O(N (T + M)) time and
    memory. While decoding, T + M keys are kept. Source: Dai et al. 2019 (arXiv 1901.02860), §3.2 and §3.3. Departures: the
    memory holds keys and values in place of layer inputs, which is the same while the weights rest, and the model's
    positions stay.
    """

    Config = TransformerXLAttentionConfig
    config: TransformerXLAttentionConfig
    facts = MechanismFacts(
        title="Transformer-XL (segments with a memory)",
        paper="arXiv 1901.02860",
        kind="recurrence",
        time="n·(T + M)",
        memory="n·(T + M)",
        exact_when="memory_length ≥ n or segment_length ≥ n",
        training="works without training; training restores long range",
    )

    def __init__(self, config: TransformerXLAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        if config.relative:
            heads, width = geometry.num_heads, geometry.head_dim
            self.relative_projection = nn.Parameter(torch.empty(geometry.hidden_size, heads * width))
            self.content_bias = nn.Parameter(torch.empty(heads, width))
            self.position_bias = nn.Parameter(torch.empty(heads, width))

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def initialise_from(self, source: object) -> dict[str, str]:
        return {name: "zero: the relative term vanishes" for name, _ in self.named_parameters(recurse=False)}

    def _offsets(self, length: int, like: Tensor) -> Tensor | None:
        if not self.config.relative:
            return None
        width = self.geometry.hidden_size
        distance = torch.arange(length - 1, -1, -1, device=like.device)[:, None]
        wide = torch.promote_types(like.dtype, torch.float32)
        angle = distance * 10000.0 ** (-torch.arange(0, width, 2, device=like.device, dtype=wide) / width)
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width].to(like.dtype)
        return (
            (waves @ self.relative_projection.to(like.dtype))
            .unflatten(-1, (self.geometry.num_heads, -1))
            .movedim(1, 0)
        )

    def _with_offsets(self, query: Tensor, logits: Tensor, offsets: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        content, position = (bias[:, None].to(query.dtype) for bias in (self.content_bias, self.position_bias))
        scores = scaling * (query + position) @ offsets.transpose(-1, -2)
        # row i must start n - 1 - i entries further: one spare entry per row does that, and what wraps around is masked
        n, count = scores.shape[2:]
        shifted = F.pad(scores, (1, 0)).flatten(2).unflatten(2, (count + 1, n))[:, :, 1:].reshape(scores.shape)
        return query + content, logits + shifted
