"""Funnel-Transformer: later layers run on fewer and fewer states, each of them the mean of neighbouring tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttention,
    EfficientAttentionConfig,
    MechanismFacts,
    register_mechanism,
)
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.grouped_heads import expand_heads
from hf_efficient.ops.pooled_keys import log_count
from hf_efficient.ops.pooling import Pooling, PoolingWindow, pooled_bias
from hf_efficient.ops.softmax import masked_attention

NUM_BLOCKS = 3
DECODER_SHARE = 6


@dataclass(frozen=True, kw_only=True)
class FunnelAttentionConfig(EfficientAttentionConfig):
    """Options of the funnel.

    Args:
        pool_size: p: the layers of block e run on means of pᵉ tokens; 1 = no pooling.
        blocks: number of layers in block 0 (which may be 0), 1, …, counted from the first layer of the stack. The layers
            after the last block are the decoder: they run on all tokens. `None` = the last sixth of the layers, rounded
            down, is the decoder, and the others are three blocks as equal as can be, longer ones first.
        separate_cls: the first token of a row is not pooled. `None` = true; without pooling only `None`.
    """

    mechanism: ClassVar[str] = "funnel"

    pool_size: int = 2
    blocks: tuple[int, ...] | None = None
    separate_cls: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("pool_size")
        fits = self.separate_cls is None or (self.pool_size > 1 and isinstance(self.separate_cls, bool))
        self._require("separate_cls", fits, "true or false; None with pool_size=1")
        self._as_tuples("blocks")
        if self.blocks is not None:
            given = self.blocks if isinstance(self.blocks, tuple) else ()
            fits = all(type(count) is int and count >= (block > 0) for block, count in enumerate(given))
            self._require("blocks", bool(given) and fits, "integers ≥ 1, of which the first may be 0, or None")

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("separate_cls",) if options.get("pool_size") == 1 else ()

    def layer_blocks(self, num_layers: int) -> tuple[int, ...]:
        """Layers per block in a stack of `num_layers`."""
        if self.blocks is not None:
            return self.blocks
        layers = num_layers - num_layers // DECODER_SHARE
        count = min(NUM_BLOCKS, layers)
        return tuple(layers // count + (block < layers % count) for block in range(count))

    def pooling(self, layer: int, num_layers: int) -> Pooling:
        """How the queries and the keys of a layer are pooled."""
        start = 0
        for block, count in enumerate(self.layer_blocks(num_layers)):
            if layer < start + count:
                finer = block - 1 if block and layer == start else block
                sizes = self.pool_size**block, self.pool_size**finer
                return Pooling(*(PoolingWindow(size, self.separate_cls is not False) for size in sizes))
            start += count
        return Pooling(PoolingWindow(1), PoolingWindow(1))

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float:
        queries, keys = self.pooling(geometry.layer, geometry.num_layers)
        return queries.number(length) * keys.number(length) / length


@register_mechanism
class FunnelAttention(EfficientAttention):
    """Full attention over pooled tokens, in layers that run on these as a whole.

    P_e takes the mean of the real tokens of each window of pᵉ tokens, counted from a row's first real token, which has a
    window of its own with `separate_cls`; c is the number of real tokens in a window, U_e repeats its entry for each token.
    A layer F of block e, attention and feed-forward, works on h = P_e x, and each token gets what changes in its window:

        x ← x + U_e (F(P_e x) - P_e x)
        y_i = Σ_j softmax_j(s · q_i·k_j + b_ij + log c_j) v_j       q from P_e x;  k, v from P_e x,
                                                                    in the first layer of the block from P_(e-1) x

    b_ij is the relative bias, if the host has one, from the middle of window i to window j, the mean over it. By log c
    every key counts for as many tokens as it is made of, so that where neighbours are equal this is full attention.

    A token thus keeps its difference from the mean of its window, and the decoder's layers, which run on all
    tokens, start from that; heads that read single tokens need them. There are no parameters of its own. Called for heads
    alone, without the layer around it (to compare layers with full attention), the mechanism takes means of q, k, v and
    repeats the result.

    Exact: pool_size = 1. A layer of block e costs 1/pᵉ in its products with weights, and O((N/pᵉ)²) time in attention, p
    times that in the first layer of the block. Source: Dai et al. 2020 (arXiv 2006.03236), §2 (pooling of queries only, a
    first token apart). Departures: the host's positions in place of relative attention with its own weights; means over
    real tokens, of which one is enough (transformers' `FunnelModel` averages padding in, and drops a window with
    padding as a key); log c; tokens left over make a smaller window; the decoder starts from x + U (…) with differences at
    every block, not from the sum of the short states and those of block 0, which would double their size.
    """

    Config = FunnelAttentionConfig
    config: FunnelAttentionConfig
    facts = MechanismFacts(
        title="Funnel-Transformer",
        paper="arXiv 2006.03236",
        kind="downsampling",
        time="n²/p²ᵉ in block e",
        memory="n²/p²ᵉ in block e",
        exact_when="pool_size = 1",
        training="needed: later layers see means of tokens",
    )
    causal_refusal = "pooled keys have later tokens in them; use local or longformer, or convert only the encoder"
    left_aligned = True
    needs_project = True
    pooling: Pooling

    def __init__(self, config: FunnelAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.pooling = config.pooling(geometry.layer, geometry.num_layers)

    @classmethod
    def unsupported(cls, config: FunnelAttentionConfig, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if sum(config.blocks or ()) > geometry.num_layers:
            reasons.append(
                f"funnel: blocks={config.blocks} are {sum(config.blocks or ())} layers, but the {geometry.side} has "
                f"{geometry.num_layers}: give fewer, or None"
            )
        queries, keys = config.pooling(geometry.layer, geometry.num_layers)
        is_pooled = queries.size > 1
        if geometry.rotary is not None and max(queries.size, keys.size) > 1:
            reasons.append(
                "funnel can't carry rotary positions: pooled tokens would be rotated as if they were neighbours; use "
                "linformer or local, or pool_size=1"
            )
        if geometry.chunk_size_feed_forward and is_pooled:
            reasons.append(f"funnel {geometry.chunking_refusal}")
        if not geometry.has_residual_module and is_pooled:
            reasons.append(
                "funnel runs layers on fewer tokens, which can't be where the layer itself adds the residual of its "
                "attention: use linformer or longt5"
            )
        chosen = range(geometry.num_layers) if config.layers is None else config.layers
        sizes = [config.pooling(layer, geometry.num_layers).queries.size for layer in chosen]
        if config.pool_size > 1 and max(sizes) == 1:
            reasons.append(
                f"funnel: with blocks={config.blocks} and layers={config.layers} no layer of the {geometry.side} is pooled: "
                "give blocks of which the second begins at a chosen layer, e.g. blocks=(0, 1), or pool_size=1"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return replace(config, pool_size=1, separate_cls=None)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        (queries, keys), rows = self.pooling, context.rows
        if rows is None:
            token_mask, n = context.key_padding_mask, query.shape[2]
            q, k, v = (window.means(x, token_mask) for window, x in ((queries, query), (keys, key), (keys, value)))
            return queries.repeat(self._attend(q, k, v, n, token_mask, context), n)
        if keys != queries:
            assert context.project is not None and context.hidden_states is not None
            key, value = expand_heads(query, *context.project(context.hidden_states))
        parts = zip(
            rows.split(query, queries), rows.split(key, keys), rows.split(value, keys), rows.groups, strict=True
        )
        return rows.join([self._attend(q, k, v, group.tokens, group.token_mask, context) for q, k, v, group in parts])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, n: int, token_mask: Tensor | None, context: AttentionContext
    ) -> Tensor:
        """(B, H, query windows, D) full attention in rows of n tokens, of which `token_mask` (B, n) are real."""
        queries, keys = self.pooling
        counts = keys.counts(n, token_mask, key.device)
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = None if counts is None else log_count(counts, wide).to(query.dtype)[:, None, None]
        if context.relative_bias is not None:
            bias = pooled_bias(context.relative_bias, queries, keys, n, query.device).to(query.dtype)
            logits = bias if logits is None else bias + logits
        return masked_attention(query, key, value, attn_mask=logits, dropout_p=context.dropout, scale=context.scaling)
