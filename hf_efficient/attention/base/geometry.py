"""Where a mechanism sits: sizes and facts of its attention layer, and the pretrained projections it starts from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_efficient.ops.relative_bias import RelativeBias


@dataclass(frozen=True)
class Rotary:
    """How a layer's queries and keys were rotated by their positions before attention (Su et al. 2021, RoFormer, §3.4).

    Attributes:
        dim: rotated width, at most the width of a head (GPT-NeoX and Phi rotate a part).
        interleaved: entries (0, 1), (2, 3), … turn together (GPT-J, Cohere) instead of (i, i + dim / 2).
    """

    dim: int
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionGeometry:
    """Where one mechanism sits: sizes and facts of its attention layer.

    Attributes:
        num_heads, head_dim: heads and their width; `num_heads * head_dim` may differ from `hidden_size` (T5).
        hidden_size: width of the hidden states that enter the layer.
        layer, num_layers: index in its stack and the number of layers of that stack.
        side: `"encoder"` or `"decoder"`.
        is_causal: query i may only see keys j ≤ i.
        has_relative_bias: an additive bias that depends on j - i enters the logits (T5).
        projection_bias: the host's q, k, v projections have a bias vector.
        max_positions: rows of the position table that tokens can use, or `None` where there is no table.
        num_relative_buckets: rows of the host's table of relative biases; 0 = it has none.
        chunk_size_feed_forward: tokens that the host's feed-forward part takes at once, in equal parts; 0 = all of them.
        relative_bias_reach: offset from which on, in each direction, the relative bias is constant; 0 = there is none.
        num_key_value_heads: heads of keys and values, a divisor of `num_heads` (grouped queries); 0 = `num_heads`.
        value_dim: width of a head's values; 0 = `head_dim`.
        rotary: how queries and keys were rotated by their positions; `None` = they were not.
        has_key_norm: queries and keys were normalised after their projection.
        sliding_window: (left, right) keys beside the token itself that the host shows a query of this layer, by its config;
            `None` = all.
        softcap: logits become `c · tanh(logits / c)` before masks and biases; `None` = they stay.
        has_sinks: one learned logit per head stands in the denominator of the softmax, with no value.
        position_scheme: how positions enter: `"table"`, `"sinusoidal"`, `"rotary"`, `"relative"`, `"grid"` or `"none"`.
        grid: (rows, columns) of the patches of a picture, of the size that the host's config names, whose tokens come row by
            row behind `prefix_tokens` others (class and register tokens); `None` = tokens are no picture, or not in order.
        has_residual_module: a module of its own adds the residual of attention, so that the layer can run on fewer tokens.
    """

    num_heads: int
    head_dim: int
    hidden_size: int
    layer: int
    num_layers: int
    side: str
    is_causal: bool
    has_relative_bias: bool
    projection_bias: bool
    max_positions: int | None
    num_relative_buckets: int = 0
    relative_bias_reach: int = 0
    chunk_size_feed_forward: int = 0
    num_key_value_heads: int = 0
    value_dim: int = 0
    rotary: Rotary | None = None
    has_key_norm: bool = False
    sliding_window: tuple[int, int] | None = None
    softcap: float | None = None
    has_sinks: bool = False
    position_scheme: str = "table"
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    has_residual_module: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_heads)
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_heads} heads of queries can't share {self.num_key_value_heads} heads of keys and values evenly."
            )

    @property
    def chunking_refusal(self) -> str:
        """Why a layer that takes its tokens in equal parts can't have more or fewer of them than the call."""
        return (
            f"changes how many tokens a layer has, of which chunk_size_feed_forward={self.chunk_size_feed_forward} would "
            "take equal parts: set chunk_size_feed_forward=0 in the model's config"
        )

    def generator(self, seed: int, redraws: int = 0) -> torch.Generator:
        """Random numbers that seed, stack, layer and the number of redraws alone decide: the same in every process."""
        key = (seed, {"encoder": 0, "decoder": 1}[self.side], self.layer, redraws)
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little"))


class LinearWeights(NamedTuple):
    """Weight (out, in) and bias (out,) or `None` of a projection, in `nn.Linear` layout."""

    weight: Tensor
    bias: Tensor | None


class SourceAttention(NamedTuple):
    """The host's pretrained q, k, v projections, read-only, for `EfficientAttention.initialise_from`.

    `relative_bias` is the bias of the stack (T5), whichever layer holds its table; `None` where there is none. The host
    multiplies projected queries by `query_scale` before attention, whose own scaling is 1 then (OPT).
    """

    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    relative_bias: RelativeBias | None = None
    query_scale: float = 1.0

    def as_attention_gets(self, name: str) -> LinearWeights:
        """The projection of `"query"`, `"key"` or `"value"` with what the host multiplies its outputs by."""
        weight, bias = getattr(self, name)
        scale = self.query_scale if name == "query" else 1.0
        return LinearWeights(weight * scale, None if bias is None else bias * scale)
