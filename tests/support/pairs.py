"""Mechanism × family: which pairs the generic suites run, and how a pair is built, patched and called.

Mechanism × options × family × property is not run in full. A mechanism depends on its host through a few facts, and a host
works with a mechanism in a few ways; so every mechanism runs in the families that differ in these facts, `BASE`, and every
other family with the mechanisms that differ in these ways, `SAMPLE`. What a test says it is a property `of` tells how far:

| `each(pairs, of=…)` | in `BASE` | variants | other families | `RELATIVES` |
|---|---|---|---|---|
| `"mechanism"`: arithmetic, alone (`Bench`) or in a model | all | all | none | none |
| `"attention"`: how it goes through a host's layers | all, of T5 one side | each in one place | one mechanism | none |
| `"model"`: also what is around these layers | all, of T5 one side | each in one place | one mechanism | one mechanism |
| `"both"`: what the two compute together | all | all | all of `SAMPLE` | one mechanism |

"One" is another one in every test of a file, so that over all properties each mechanism has met each family, and each
variant each kind of place. A relative copies the attention layers of an enrolled family and differs around them, as in
positions. A new family is a row in `PLACES`, and in `RELATIVES` if it is one; nothing else says where it runs. Where a fault
was seen in one crossing, or can be argued, that crossing has a test of its own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest
import torch
from cases import CASES, Case
from torch import Tensor

import hf_efficient as he
from hf_efficient.attention.base.geometry import AttentionGeometry, LinearWeights, SourceAttention
from hf_efficient.families import family_of
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.testing import tiny_model

Of = Literal["mechanism", "attention", "model", "both"]
MAX_POSITIONS = 128
ODD_LENGTHS = (1, 2, 63, 97)
# what a place asks of a mechanism, in the letters of `Case.sides`
PLACES = {
    ("bert", None): {"E"},
    ("roberta", None): {"E"},
    ("gpt2", None): {"C"},
    ("t5", "encoder"): {"E", "T5"},
    ("t5", "decoder"): {"C", "T5"},
    ("t5", "both"): {"E", "C", "T5"},
}
# a table of positions, a cache of earlier tokens, a relative bias
BASE = ("bert", "gpt2", "t5")
RELATIVES = ("roberta",)
SAMPLE = (
    "longformer",  # a pattern; beside it, projections of its own that read hidden states
    "linformer",  # pooled keys, as many as there are positions
    "performer",  # a kernel
    "etc",  # extra tokens
    "memory_compressed",  # pooled keys, also in causal models
    "longt5",  # the host's projections of other states than the layer's
    "hedgehog",  # a kernel beside a window, also with a relative bias
)


@dataclass(frozen=True)
class Pair:
    """One mechanism with its options in one place of one model family."""

    mechanism: str
    family: str
    side: str | None
    options: dict[str, Any]
    label: str
    variant: int = 0

    @property
    def config(self) -> he.EfficientAttentionConfig:
        return he.attention_config(self.mechanism, side=self.side, **self.options)

    @property
    def is_causal(self) -> bool:
        return "C" in PLACES[self.family, self.side]

    def model(self, **overrides: Any) -> Any:
        """A tiny unconverted model of the family."""
        return tiny_model(self.family, **({"positions": MAX_POSITIONS} | overrides))

    def patch(self, model: Any, config: Any = None) -> he.patching.PatchHandle:
        return he.patch_attention(model, config or self.config)

    def geometry(self, model: Any) -> AttentionGeometry:
        """Of the first layer that the pair converts."""
        family = family_of(model)
        side = "encoder" if self.side == "both" else self.side
        stack = next(stack for stack in family.stacks(model) if side in (None, stack.side))
        return family.geometry(stack, stack.layers[0])

    def exact_config(self, model: Any, length: int) -> Any:
        """The exact limit at `length`; skips where the mechanism has none."""
        case = CASES[self.mechanism]
        if not case.exact:
            pytest.skip(f"{self.mechanism} has no exact limit: {case.error_law}")
        config = self.config.attention_class.exact_config(self.config, self.geometry(model), length)
        assert config is not None, f"{self.mechanism} claims an exact limit, but exact_config gives none"
        return config


def _pair(mechanism: str, place: tuple[str, str | None], options: dict[str, Any], variant: int = 0) -> Pair:
    family, side = place
    options = options | (CASES[mechanism].t5_options if "T5" in PLACES[place] else {})
    label = "-".join([mechanism, family, *([side] if side else []), *([f"variant{variant}"] if variant else [])])
    return Pair(mechanism, family, side, options, label, variant)


def _fits(mechanism: str, place: tuple[str, str | None]) -> bool:
    return PLACES[place] <= CASES[mechanism].sides


def _runs(mechanism: str, place: tuple[str, str | None]) -> bool:
    """Both stacks at once are left to the variants; what works in one family of `BASE` alone runs in all others too."""
    hosts = {family for family, side in PLACES if family in BASE and _fits(mechanism, (family, side))}
    wanted = place[0] in BASE or mechanism in SAMPLE or len(hosts) < 2
    return place[1] != "both" and _fits(mechanism, place) and wanted


def _variants(name: str, case: Case) -> list[tuple[dict[str, Any], list[tuple[str, str | None]]]]:
    """Options and where they run: once per kind of place, an encoder, a causal model, as much of T5 as is supported."""
    t5 = [("t5", side) for side in ("both", "encoder", "decoder") if _fits(name, ("t5", side))]
    places = [place for place in (("bert", None), ("gpt2", None)) if _fits(name, place)] + t5[:1]
    encoders: list[tuple[str, str | None]] = [("bert", None), ("t5", "encoder")]
    return [
        *((options, places) for options in case.variants),
        *((options, encoders) for options in case.encoder_variants),
        *((options, [("gpt2", None)]) for options in case.causal_variants),
    ]


MAIN = [_pair(name, place, case.small) for name, case in CASES.items() for place in PLACES if _runs(name, place)]
VARIANTS = [
    _pair(name, place, options, number)
    for name, case in CASES.items()
    for number, (options, places) in enumerate(_variants(name, case), 1)
    for place in places
]
REFUSED = [
    _pair(name, place, case.small)
    for name, case in CASES.items()
    for place in PLACES
    if not _fits(name, place) and (place[0] in BASE or name in SAMPLE)
]


def _alternatives(pair: Pair, of: Of) -> Hashable:
    """What `pair` has in common with those of which one is enough; None where it need not run."""
    if (pair.family not in BASE and of == "mechanism") or (pair.family in RELATIVES and of == "attention"):
        return None
    if pair.family in RELATIVES:
        return pair.family
    if of in ("mechanism", "both"):
        return pair.label
    if pair.family not in BASE:
        return pair.family
    return (pair.mechanism, pair.variant or pair.family)


def chosen(pairs: list[Pair], of: Of, turn: int) -> list[Pair]:
    """Those of `pairs` that the `turn`-th test of a file runs for, whose property is one `of` what is said above."""
    groups: dict[Hashable, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[_alternatives(pair, of)].append(pair)
    groups.pop(None, None)
    return [group[(turn + number) % len(group)] for number, group in enumerate(groups.values())]


_turns: Counter[str] = Counter()


def each(pairs: list[Pair], of: Of = "model") -> Callable[[Any], Any]:
    """Parametrise a test by `pair`; what its property is one `of` says which of `pairs` it runs for."""

    def parametrised(test: Any) -> Any:
        turn = _turns[test.__module__]
        _turns[test.__module__] += 1
        return pytest.mark.parametrize("pair", chosen(pairs, of, turn), ids=lambda pair: pair.label)(test)

    return parametrised


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def labelled(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with labels at real positions, so that the model returns a loss."""
    tokens = inputs["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
    return inputs | {"labels": torch.where(inputs["attention_mask"].bool(), tokens.flip(1), -100)}


def positions_of(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Explicit position_ids, counted from each row's first real token, for models that have a position table."""
    if model.config.model_type == "t5":
        return {}
    offset = family_of(model).positions.offset(model.config)
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0) + offset}


class Bench:
    """One mechanism alone in fp64, outside any model, with random pretrained projections and relative bias."""

    HEADS, WIDTH, HIDDEN, REACH = 4, 2, 6, 5

    def __init__(self, pair: Pair, options: dict[str, Any] | None = None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

        is_t5 = pair.family == "t5"
        is_causal = pair.is_causal
        inner = self.HEADS * self.WIDTH
        geometry = AttentionGeometry(
            num_heads=self.HEADS,
            head_dim=self.WIDTH,
            hidden_size=self.HIDDEN,
            layer=0,
            num_layers=2,
            side="decoder" if is_causal else "encoder",
            is_causal=is_causal,
            has_relative_bias=is_t5,
            projection_bias=not is_t5,
            max_positions=None if is_t5 else MAX_POSITIONS,
            num_relative_buckets=2 * self.REACH + 1 if is_t5 else 0,
            relative_bias_reach=self.REACH if is_t5 else 0,
        )
        config = he.attention_config(pair.mechanism, **(pair.options | (options or {})))
        assert not config.attention_class.unsupported(config, geometry)
        self.normal, self.is_causal = normal, is_causal
        self.mechanism = config.attention_class(config, geometry).double()
        self.mechanism.reset_parameters()
        bias = None if is_t5 else normal(inner)
        weights = [LinearWeights(normal(inner, self.HIDDEN, scale=0.4), bias) for _ in range(3)]
        self.table = normal(2 * self.REACH + 1, self.HEADS).requires_grad_() if is_t5 else None
        self.source = SourceAttention(*weights, relative_bias=self.relative_bias())
        self.mechanism.initialise_from(self.source)

    def relative_bias(self) -> RelativeBias | None:
        if self.table is None:
            return None
        reach = self.REACH
        return RelativeBias(self.table, lambda offsets: offsets.clamp(-reach, reach) + reach, reach)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (
            torch.nn.functional.linear(hidden, *weights).unflatten(-1, (self.HEADS, self.WIDTH)).transpose(1, 2)
            for weights in (self.source.key, self.source.value)
        )
        return key, value

    def tokens(self, batch: int, length: int) -> Tokens:
        shape = (batch, self.HEADS, length, self.WIDTH)
        q, k, v = (self.normal(*shape) for _ in range(3))
        return Tokens(q, k, v, self.normal(batch, length, self.HIDDEN))

    def __call__(self, tokens: Tokens, keep: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """What the dispatcher does with projected heads."""
        context = he.AttentionContext(
            is_causal=self.is_causal,
            scaling=self.WIDTH**-0.5,
            key_padding_mask=keep,
            dropout=dropout,
            relative_bias=self.relative_bias(),
            hidden_states=tokens.hidden if self.mechanism.needs_hidden_states else None,
            project=self.project if self.mechanism.needs_project else None,
        )
        return aligned_call(self.mechanism, tokens.query, tokens.key, tokens.value, context)


class Tokens(NamedTuple):
    """(B, H, N, D) heads and the (B, N, hidden) states that they came from."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor


def mostly_skipped(outcomes: list[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """{mechanism: (skipped, total)} where more than half of the cases of a mechanism were skipped."""
    total: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for nodeid, outcome in outcomes:
        found = re.search(r"\[([a-z0-9_]+)", nodeid)
        if found and found[1] in CASES:
            total[found[1]] += 1
            skipped[found[1]] += outcome == "skipped"
    # a handful is someone running a selection by hand
    return {name: (skipped[name], n) for name, n in total.items() if n >= 10 and 2 * skipped[name] > n}
