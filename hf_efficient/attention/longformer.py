"""Longformer: a sliding window plus a few global tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttentionConfig,
    MechanismFacts,
    SourceAttention,
    register_mechanism,
)
from hf_efficient.attention.base.pattern import PatternAttention, PatternAttentionConfig
from hf_efficient.ops.block_sparse.windows import window_sides
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.decoding import with_key_positions
from hf_efficient.ops.global_tokens import (
    GlobalTokens,
    chosen_tokens,
    global_columns,
    global_rows,
    kept_tokens,
    up_to_separator,
    with_rows,
    without_tokens,
)
from hf_efficient.patterns.kinds import GlobalColumns, GlobalRows, Window
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.sets import PerHead

QUESTION_RULES = ("question", "before_separator")
GLOBAL_RULES = ("none", "first", *QUESTION_RULES)


@dataclass(frozen=True, kw_only=True)
class LongformerAttentionConfig(PatternAttentionConfig):
    """Options of Longformer attention.

    Args:
        attention_window: w, in tokens, even; one number, or one per layer of the stack. Encoder: w // 2 keys on each side
            plus the token itself. Causal: the last w keys, the token itself included.
        dilation: distance between neighbouring visible keys of the window; one number, or one per head.
        global_tokens: which tokens are global where the call gives no `global_attention_mask`: `"none"`, `"first"` (each
            row's first real token), `"question"` (all up to the first separator, with it), `"before_separator"` (without
            it), or positions counted from each row's first real token.
        separator_token_id: the separator of these two, `tokenizer.sep_token_id`; `None` with all other rules.
    """

    mechanism: ClassVar[str] = "longformer"
    shares: ClassVar[Mapping[str, float]] = {"attention_window": 1}

    attention_window: int | tuple[int, ...] = 512
    dilation: int | tuple[int, ...] = 1
    global_tokens: str | tuple[int, ...] = "none"
    separator_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._as_tuples("attention_window", "dilation", "global_tokens")
        windows = self.attention_window if isinstance(self.attention_window, tuple) else (self.attention_window,)
        self._require(
            "attention_window",
            bool(windows) and all(type(w) is int and w > 0 and w % 2 == 0 for w in windows),
            "even integers ≥ 2 (half of each lies on each side), one for all layers or one per layer",
        )
        steps = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)
        fits = bool(steps) and all(type(d) is int and d > 0 for d in steps)
        self._require("dilation", fits, "integers ≥ 1, one for all heads or one per head")
        rule, fits = self.global_tokens, self.global_tokens in GLOBAL_RULES
        if isinstance(rule, tuple):
            fits = bool(rule) and all(type(i) is int and i >= 0 for i in rule) and len(set(rule)) == len(rule)
        self._require("global_tokens", fits, f"one of {', '.join(GLOBAL_RULES)}, or distinct positions ≥ 0")
        fits = (type(self.separator_token_id) is int) if rule in QUESTION_RULES else self.separator_token_id is None
        self._require("separator_token_id", fits, "tokenizer.sep_token_id with a rule that looks for it, else None")

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return () if options.get("global_tokens") in QUESTION_RULES else ("separator_token_id",)

    @property
    def columns(self) -> tuple[int, ...]:
        """Global positions that the rule names without looking at the tokens."""
        rule = self.global_tokens
        return rule if isinstance(rule, tuple) else (0,) if rule == "first" else ()

    def neighbours(self, geometry: AttentionGeometry) -> Pattern:
        """The windows alone."""
        window = self.attention_window
        left, right = window_sides(window[geometry.layer] if isinstance(window, tuple) else window, geometry.is_causal)
        if isinstance(self.dilation, int):
            return Window(left=left, right=right, dilation=self.dilation)
        return PerHead(parts=tuple(Window(left=left, right=right, dilation=step) for step in self.dilation))

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        pattern = self.neighbours(geometry)
        if self.columns:
            pattern = pattern | GlobalColumns(positions=self.columns)
            pattern = pattern if geometry.is_causal else pattern | GlobalRows(positions=self.columns)
        return pattern


@register_mechanism
class LongformerAttention(PatternAttention):
    """Sliding window ∪ global tokens in one softmax; global tokens attend to everything with projections of their own.

    With G the global tokens of a row and W(i) the window of `local`, of each head's own dilation:

        i ∉ G:  y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j            over j ∈ W(i) ∪ G
        i ∈ G:  y_i = Σ_j softmax_j(s · qᵍ_i·kᵍ_j + b(j - i)) vᵍ_j         over all real j,  qᵍ = W_qᵍ h_i, …

    qᵍ, kᵍ, vᵍ start as copies of the pretrained projections. Causal layers have global *columns* only: W(i) ∪ G over j ≤ i,
    and no new projections, since a global row would need keys that a cache no longer has. The host's own window binds all.
    Under rotary positions qᵍ and kᵍ turn as the host's q and k do, and encoders have global rows by a rule alone.
    `global_attention_mask` (B, S) overrides `global_tokens`; S counts cached tokens too; those past its end are not global.

    O(N (w + |G|)) time and memory. Source: Beltagy et al. 2020 (arXiv 2004.05150), §3.1; projections as in transformers.
    """

    Config = LongformerAttentionConfig
    config: LongformerAttentionConfig
    facts = MechanismFacts(
        title="Longformer",
        paper="arXiv 2004.05150",
        kind="fixed pattern",
        time="n·(w + g)",
        memory="n·(w + g)",
        exact_when="attention_window ≥ 2n and no global tokens, or all tokens global",
        training="works without training; training restores long range",
    )

    def __init__(self, config: LongformerAttentionConfig, geometry: AttentionGeometry):
        super().__init__(config, geometry)
        self.neighbours = self.inside_window(config.neighbours(geometry))
        # not with dilated windows, whose tables of tiles would be nearly dense
        listed = config.columns if config.dilation == 1 else ()
        self.listed = self.inside_window(self.neighbours | GlobalColumns(positions=listed)) if listed else None
        # global tokens are found by each row's own start, and windows look the same everywhere
        self.left_aligned = False
        self.has_global_rows = self.needs_hidden_states = not self.keeps_to_host(config, geometry)
        self.needs_rotation = self.has_global_rows and geometry.rotary is not None
        self.uses_global_attention_mask = geometry.is_causal or self.has_global_rows
        self.needs_input_ids = config.global_tokens in QUESTION_RULES
        if self.has_global_rows:
            inner = geometry.num_heads * geometry.head_dim
            self.query_global, self.key_global, self.value_global = (
                nn.Linear(geometry.hidden_size, inner, bias=geometry.projection_bias) for _ in range(3)
            )

    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def initialise_from(self, source: SourceAttention) -> dict[str, str]:
        origins = {}
        for name in ("query", "key", "value") if self.has_global_rows else ():
            weights, target = source.as_attention_gets(name), getattr(self, f"{name}_global")
            for part in ("weight", "bias"):
                if (pretrained := getattr(weights, part)) is not None:
                    getattr(target, part).copy_(pretrained)
                    origins[f"{name}_global.{part}"] = f"copy of the {name} {part}"
        return origins

    @classmethod
    def keeps_to_host(cls, config: Any, geometry: AttentionGeometry) -> bool:
        # without global rows, which rotary encoders have by a rule of the config alone
        return geometry.is_causal or (geometry.rotary is not None and config.global_tokens == "none")

    @classmethod
    def honours_sliding_window(cls, config: Any, geometry: AttentionGeometry) -> bool:
        return True

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        windows = config.attention_window
        if isinstance(windows, tuple) and len(windows) != geometry.num_layers:
            lists = f"attention_window lists {len(windows)} windows, but the {geometry.side} has {geometry.num_layers}"
            reasons.append(f"{lists} layers: give one number, or one window per layer")
        if isinstance(config.dilation, tuple) and len(config.dilation) != geometry.num_heads:
            lists = f"dilation lists {len(config.dilation)} distances, but there are {geometry.num_heads} heads"
            reasons.append(f"{lists}: give one number, or one distance per head")
        if geometry.has_key_norm and not cls.keeps_to_host(config, geometry):
            reasons.append(
                "longformer's own projections of global tokens don't have the host's norms of queries and keys: use bigbird"
            )
        if geometry.is_causal and config.global_tokens in QUESTION_RULES:
            reasons.append(
                f"global_tokens={config.global_tokens!r} looks ahead for the separator, which a causal model must not: "
                "name positions, or give global_attention_mask in the call"
            )
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        return dataclasses.replace(
            config, attention_window=2 * length, dilation=1, global_tokens="none", separator_token_id=None
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        if query.shape[2] < key.shape[2]:
            return self._decode(query, key, value, context)
        tokens, token_mask, extra = self._global_tokens(key, context), context.key_padding_mask, None
        # listed positions are the same in every row without padding: they are part of the pattern
        is_listed = self.listed is not None and token_mask is None and context.global_attention_mask is None
        if tokens is not None and not is_listed:
            extra = global_columns(tokens, key, value, context, self.geometry.sliding_window)
            token_mask = without_tokens(token_mask, tokens, key)
        call = dataclasses.replace(context, key_padding_mask=token_mask, extra=extra)
        out = self.attend(query, key, value, call, self.listed if is_listed else self.neighbours)
        if tokens is not None and self.has_global_rows:
            out = with_rows(out, self._global_rows(tokens.positions, context), tokens, may_be_spare=not is_listed)
        return self.with_unused_parameters(out)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """New queries over the keys that the cache kept."""
        columns, given = None, context.global_attention_mask
        if given is not None or context.key_padding_mask is not None:
            context = with_key_positions(context, key)
        if given is not None and context.key_positions is not None:
            columns = kept_tokens(given, context.key_positions, context.query_offset + query.shape[2])
        pattern = self.pattern if given is None else self.neighbours
        return self.attend_kept(query, key, value, context, pattern, columns)

    def _global_tokens(self, key: Tensor, context: AttentionContext) -> GlobalTokens | None:
        """The call's mask if there is one, else what the config's rule says."""
        given, config = context.global_attention_mask, self.config
        if given is None and self.needs_input_ids and context.input_ids is not None:
            rule, separator_id = config.global_tokens, config.separator_token_id
            given = up_to_separator(context.input_ids, separator_id, context.key_padding_mask, rule)
        return chosen_tokens(given, config.columns, key, context.key_padding_mask, context.is_causal)

    def _global_rows(self, index: Tensor, context: AttentionContext) -> Tensor:
        """(B, H, G, D): what the global tokens see, through the projections of their own."""
        projections, rotary = (self.query_global, self.key_global, self.value_global), self.geometry.rotary
        pairs = None if rotary is None else rotary.interleaved
        return global_rows(index, projections, context, self.geometry.num_heads, pairs, self.geometry.sliding_window)
