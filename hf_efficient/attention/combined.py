"""Combined patterns: several mechanisms in one softmax, or different ones in different heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, ClassVar

from hf_efficient.attention.base import (
    AttentionGeometry,
    EfficientAttentionConfig,
    MechanismFacts,
    attention_configs,
    get_mechanism,
    list_mechanisms,
    register_mechanism,
)
from hf_efficient.attention.base.pattern import SHARED_OPTIONS, PatternAttention, PatternAttentionConfig
from hf_efficient.attention.base.registry import stored_attention
from hf_efficient.patterns.pattern import Pattern
from hf_efficient.patterns.sets import PerHead


@dataclass(frozen=True, kw_only=True)
class CombinedAttentionConfig(PatternAttentionConfig):
    """Options of combined attention; `config | config` makes one too.

    Args:
        patterns: two or more mechanisms that are patterns: configs, their JSON form, or names (default options). `layers`,
            `side` and `implementation` belong to the whole.
        heads: `None` = every head sees what any of the patterns shows it; else for each pattern its share of the heads, in
            order: (2, 1) gives the first 8 of 12 heads the first pattern, and 4 the second. Each pattern counts its own
            heads.
    """

    mechanism: ClassVar[str] = "combined"

    patterns: tuple[Any, ...] = ("local", "axial")
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._as_tuples("patterns", "heads")
        fits = isinstance(self.patterns, tuple) and len(self.patterns) > 1
        self._require("patterns", fits, "two or more mechanisms that are patterns")
        parts = [_part(given, number) for number, given in enumerate(self.patterns, 1)]
        if self.heads is None:
            # a union of unions is one union
            inner = [p.patterns if isinstance(p, CombinedAttentionConfig) and p.heads is None else (p,) for p in parts]
            parts = [part for several in inner for part in several]
        object.__setattr__(self, "patterns", tuple(parts))
        given = self.heads if isinstance(self.heads, tuple) else ()
        fits = len(given) == len(parts) and all(type(count) is int and count > 0 for count in given)
        self._require("heads", fits or self.heads is None, f"None, or {len(parts)} integers ≥ 1, one per pattern")

    @classmethod
    def from_stored(cls, options: Mapping[str, Any]) -> EfficientAttentionConfig:
        return super().from_stored({**options, "patterns": stored_attention(list(options["patterns"]))})

    def to_dict(self) -> dict[str, Any]:
        plain = [{k: v for k, v in part.to_dict().items() if k not in SHARED_OPTIONS} for part in self.patterns]
        return super().to_dict() | {"patterns": plain}

    def geometries(self, geometry: AttentionGeometry) -> Iterator[tuple[PatternAttentionConfig, AttentionGeometry]]:
        """Each pattern with the geometry of its heads: all of them, or its share."""
        for number, part in enumerate(self.patterns):
            heads = geometry.num_heads
            if self.heads is not None:
                heads = heads // sum(self.heads) * self.heads[number]
            yield part, dataclasses.replace(geometry, num_heads=heads, num_key_value_heads=heads)

    def visible_keys(self, geometry: AttentionGeometry) -> Pattern:
        found = [(part.visible_keys(own), own.num_heads) for part, own in self.geometries(geometry)]
        if self.heads is None:
            return reduce(or_, (pattern for pattern, _ in found))
        return PerHead(parts=tuple(pattern.head(head) for pattern, heads in found for head in range(heads)))


def _part(given: Any, number: int) -> PatternAttentionConfig:
    """A pattern's config from any of its forms."""
    try:
        if isinstance(given, (list, tuple)):
            raise ValueError(f"{given!r} is a list; each pattern is one mechanism.")
        (config,) = attention_configs(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"combined, pattern {number}: {error}") from error
    if not isinstance(config, PatternAttentionConfig):
        kinds = [name for name in list_mechanisms() if issubclass(get_mechanism(name).Config, PatternAttentionConfig)]
        raise ValueError(
            f"combined, pattern {number}: what {config.mechanism} shows a query is no matter of positions alone; the "
            f"mechanisms that are patterns: {', '.join(kinds)}."
        )
    for name, default in SHARED_OPTIONS.items():
        if getattr(config, name) != default:
            raise ValueError(
                f"combined, pattern {number}: {name}={getattr(config, name)!r} of {config.mechanism} belongs to the whole: "
                "give it to combined."
            )
    return config


@register_mechanism
class CombinedAttention(PatternAttention):
    """Fixed patterns put together: a pattern is data.

        y_i = Σ_j softmax_j(s · q_i·k_j + b(j - i)) v_j

    Query i sees key j in a head iff one of the patterns of that head shows it (causal: and j ≤ i). What several patterns
    show counts once. `heads=None` gives every head all patterns, in one softmax.

    A mechanism brings its visible keys only: no parameters, and no `global_attention_mask`. So the global rows of Longformer
    use the host's own projections here.

    Time and memory are at most the sums of those of the patterns. No new parameters. While decoding, keys are forgotten as
    soon as no pattern needs them. Patterns that depend on a row's number of real tokens (`bigbird`, `blockwise` in encoders)
    are computed per number where they are part of a union; give them heads of their own for padded batches under
    `torch.compile`. Sources: unions as in Zaheer et al. 2020 (arXiv 2007.14062), §2; heads as in Child et al. 2019
    (arXiv 1904.10509), §4.2.
    """

    Config = CombinedAttentionConfig
    config: CombinedAttentionConfig
    facts = MechanismFacts(
        title="Combined patterns",
        paper="arXiv 2007.14062, 1904.10509",
        kind="fixed pattern",
        time="sum of the patterns",
        memory="sum of the patterns",
        exact_when="one pattern of a union is exact, or all patterns of heads are",
        training="as its patterns",
    )

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        reasons = super().unsupported(config, geometry)
        if config.heads is not None and geometry.num_heads % sum(config.heads):
            return [
                *reasons,
                f"heads={config.heads!r} are {sum(config.heads)} shares of {geometry.num_heads} heads: their sum must "
                "divide the number of heads",
            ]
        for part, own in config.geometries(geometry):
            if getattr(part, "separator_token_id", None) is not None:
                reasons.append(
                    f"{part.mechanism}: global_tokens={part.global_tokens!r} looks at the tokens, a combination at "
                    "positions only: name positions"
                )
            if (option := part.beyond_pattern()) is not None:
                reasons.append(
                    f"{part.mechanism}: {option} is no pattern, and a combination has patterns alone: leave it out"
                )
            own = dataclasses.replace(own, rotary=None)  # patterns alone mix what is rotated already
            reasons += [f"{part.mechanism}: {reason}" for reason in part.attention_class.unsupported(part, own)]
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig | None:
        exact = [part.attention_class.exact_config(part, own, length) for part, own in config.geometries(geometry)]
        possible = [new is not None for new in exact]
        if not (any(possible) if config.heads is None else all(possible)):
            return None
        patterns = tuple(new or part for new, part in zip(exact, config.patterns, strict=True))
        return dataclasses.replace(config, patterns=patterns)
