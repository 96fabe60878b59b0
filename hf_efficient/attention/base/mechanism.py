"""The abstraction: what a mechanism is, what it is told about a call, and the registry of all mechanisms.

A mechanism is a small module that mixes already projected heads. It knows nothing of transformers' models: the family
says where it sits (`AttentionGeometry`), the dispatcher says what one call is about (`AttentionContext`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .decoding import BoundedLayer
    from .ops.pooled_rows import Pooling, Rows
    from .ops.relative_bias import RelativeBias
    from .recurrent import RecurrentLayer

SIDES = ("encoder", "decoder", "both")


@dataclass(frozen=True, kw_only=True)
class EfficientAttentionConfig:
    """Options of one mechanism for one group of layers.

    Args:
        layers: indices of the layers to convert, counted per stack from 0; `None` converts all of them.
        side: `"encoder"`, `"decoder"` or `"both"`. `None` means the only stack of a BERT-like or GPT-like model, and
            the encoder of an encoder-decoder model.

    Raises:
        ValueError: an option has a value outside its range, or `from_dict` meets an unknown field.
    """

    mechanism: ClassVar[str] = ""
    attention_class: ClassVar[type[EfficientAttention]]

    layers: tuple[int, ...] | None = None
    side: str | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            layers = tuple(self.layers) if isinstance(self.layers, (list, tuple, range)) else ()
            if not layers or any(type(i) is not int or i < 0 for i in layers) or len(set(layers)) != len(layers):
                raise ValueError(
                    f"layers={self.layers!r}: give distinct layer indices from 0, or None for all layers."
                )
            object.__setattr__(self, "layers", layers)
        if self.side is not None:
            self._require("side", self.side in SIDES, f"one of {', '.join(SIDES)}, or None")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{self.mechanism}: {name}={getattr(self, name)!r} is not possible; it must be {rule}.")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, isinstance(value, int) and not isinstance(value, bool) and value > 0, "an integer ≥ 1")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: `{"mechanism": name, option: value, …}` with lists for tuples."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"mechanism": self.mechanism} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> EfficientAttentionConfig:
        """Build the config from keyword options; unknown names are refused with the list of known ones."""
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k != "mechanism"}
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(
                f"{cls.mechanism} has no option {', '.join(map(repr, unknown))}; its options are {', '.join(known)}."
            )
        return cls(**options)


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
        relative_bias_reach: offset from which on, in each direction, the relative bias is constant; 0 = there is none.
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


@dataclass
class AttentionContext:
    """Facts of one call.

    Attributes:
        key_padding_mask: (B, S) bool, True = real token; `None` = all real.
        is_causal: query i may only see keys j ≤ i + `query_offset`.
        query_offset: tokens before the first query; while decoding those in the cache, also forgotten ones, else 0.
        scaling: factor on q·k, as the host gives it (1.0 in T5).
        dropout: probability for attention weights; 0.0 in eval mode.
        relative_bias: lazy additive bias over key - query offsets, or `None`.
        global_attention_mask: (B, S) bool or 0/1, True = global token, or `None`; may be shorter while decoding.
        hidden_states: (B, N, hidden_size), only for mechanisms with `needs_hidden_states`.
        project: `project(hidden)` sends (B, G, hidden_size) through the host's own key and value projections and returns
            (key, value), each (B, H, G, D); only for mechanisms with `needs_project`.
        input_ids: (B, N), only for mechanisms with `needs_input_ids`.
        row_start: (B,) index of each row's first real key, where rows were *not* aligned to the left (decoding);
            `None` = every row starts at 0.
        key_positions: (B, S) index of each key among all tokens, -1 = no key (False in `key_padding_mask`), where the
            mechanism's `cache_layer` forgot keys; `None` = key j is token j, and `query_offset` is S - N. The last N
            keys are always those of the queries.
        rows: where the layer runs on slots (`pooling`): how the rows of the call lie in `query`, `key`, `value` and
            `hidden_states`, which then have one entry per slot: (B, H, slots, D) and (B, slots, hidden_size), or
            (1, H, all slots, D) for packed rows. `hidden_states` are those of the keys, if these have slots of their own.
        recurrent: the mechanism's `cache_layer` where that holds a state of the keys it forgot; the mechanism must `fold`
            into it what the last update forgot.
    """

    is_causal: bool
    scaling: float
    key_padding_mask: Tensor | None = None
    query_offset: int = 0
    dropout: float = 0.0
    relative_bias: RelativeBias | None = None
    global_attention_mask: Tensor | None = None
    hidden_states: Tensor | None = None
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    input_ids: Tensor | None = None
    row_start: Tensor | None = None
    key_positions: Tensor | None = None
    rows: Rows | None = None
    recurrent: RecurrentLayer | None = None


class LinearWeights(NamedTuple):
    """Weight (out, in) and bias (out,) or `None` of a projection, in `nn.Linear` layout."""

    weight: Tensor
    bias: Tensor | None


class SourceAttention(NamedTuple):
    """The host's pretrained q, k, v projections, read-only, for `EfficientAttention.initialise_from`.

    `relative_bias` is the bias of the stack (T5), whichever layer holds its table; `None` where there is none.
    """

    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    relative_bias: RelativeBias | None = None


class MechanismFacts(NamedTuple):
    """What the catalogue says of a mechanism: everything `he.list_mechanisms` and the support table print."""

    title: str
    paper: str
    time: str
    memory: str
    exact_when: str
    training: str


class EfficientAttention(nn.Module):
    """Base of all mechanisms: mixes projected heads of shape (B, H, N, D) into (B, H, N, D).

    A subclass supplies `Config`, `facts` and `forward`; where it needs them `initialise_from`, `unsupported`,
    `exact_config` and the class switches below. New parameters are created by `__init__` at a neutral start (so that
    training from scratch works) and set from pretrained weights by `initialise_from`.
    """

    Config: ClassVar[type[EfficientAttentionConfig]]
    facts: ClassVar[MechanismFacts]

    causal_refusal: ClassVar[str | None] = None
    """Why causal layers are refused and what to use instead; `None` = supported."""
    relative_bias_refusal: ClassVar[str | None] = None
    """Why a T5 relative bias is refused and what to use instead; `None` = honoured."""
    left_aligned: bool = False
    """Blocks or position-indexed parameters count from a row's first real token: the dispatcher shifts padded rows."""
    uses_global_attention_mask: ClassVar[bool] = False
    needs_hidden_states: bool = False
    needs_input_ids: bool = False
    needs_project: bool = False
    pooling: Pooling | None = None
    """The whole layer runs on means of neighbouring tokens, if these slots are larger than a token: see `length_change`."""
    transfer_learning_rate: ClassVar[float] = 1e-3
    host_projection: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None
    """Set at installation where `needs_project`: (attention module, hidden states) to keys and values."""

    def __init__(self, config: EfficientAttentionConfig, geometry: AttentionGeometry):
        super().__init__()
        self.config = config
        self.geometry = geometry

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """Mix (B, H, N, D) queries with (B, H, S, D) keys and values, S ≥ N, into (B, H, N, D)."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def attention_weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor | None:
        """(B, H, N, S) dense weights that `forward` gives the values, for training losses alone; `None` = it has none."""
        return None

    def reset_parameters(self) -> None:
        """(Re-)set every parameter and buffer of this mechanism to its neutral start."""

    @torch.no_grad()
    def initialise_from(self, source: SourceAttention) -> dict[str, str]:
        """Set new parameters from pretrained weights. Returns {parameter name: where its values came from}."""
        return {}

    def cache_layer(self) -> BoundedLayer | None:
        """A new cache layer that forgets keys no later query can see; `None` = no such keys, the ordinary layer serves.

        A mechanism with one must heed `AttentionContext.key_positions`.
        """
        return None

    def shared_parameters(self) -> tuple[str, ...]:
        """Names of parameters that all converted layers of a stack share (one tensor)."""
        return ()

    @classmethod
    def num_extra_tokens(cls, config: Any) -> int:
        """Learned tokens that stand in front of the input in the whole stack (ETC's global tokens).

        With g > 0 they are put there at the embeddings and taken away at the end, `forward` gets g + N queries and keys of
        which the first g are the extra ones (always real), and every layer of the stack must ask for the same number.
        """
        return 0

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        """All reasons why this mechanism can't work in this place, each with its remedy; empty = it can."""
        reasons = []
        if geometry.is_causal and cls.causal_refusal:
            reasons.append(f"{cls.Config.mechanism} can't be causal: {cls.causal_refusal}")
        if geometry.has_relative_bias and cls.relative_bias_refusal:
            reasons.append(f"{cls.Config.mechanism} can't carry a T5 relative bias: {cls.relative_bias_refusal}")
        return reasons

    @classmethod
    def exact_config(cls, config: Any, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig | None:
        """The options with which this mechanism equals full attention at `length`; `None` = no such setting."""
        return None

    @classmethod
    def control_config(cls, config: Any) -> EfficientAttentionConfig | None:
        """The mechanism without what it learns, which a trained one must be better than; `None` = no such thing."""
        return None

    def extra_repr(self) -> str:
        return json.dumps(self.config.to_dict())


_REGISTRY: dict[str, type[EfficientAttention]] = {}


def register_mechanism(cls: type[EfficientAttention]) -> type[EfficientAttention]:
    """Class decorator: make a mechanism known under `cls.Config.mechanism`.

    Raises:
        ValueError: the name is no lower-case identifier, or another class has it.
    """
    name = cls.Config.mechanism
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"mechanism name {name!r} of {cls.__name__} must be a lower-case identifier.")
    if _REGISTRY.get(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"mechanism {name!r} is already registered by {_REGISTRY[name].__qualname__}.")
    cls.Config.attention_class = cls
    _REGISTRY[name] = cls
    return cls


@cache
def _discover() -> None:
    from . import attention

    for module in pkgutil.iter_modules(attention.__path__):
        importlib.import_module(f"{attention.__name__}.{module.name}")


def _registry() -> dict[str, type[EfficientAttention]]:
    _discover()
    return _REGISTRY


def list_mechanisms() -> list[str]:
    """Names of all registered mechanisms, sorted."""
    return sorted(_registry())


def get_mechanism(name: str) -> type[EfficientAttention]:
    """The mechanism class registered under `name`; an unknown name raises a ValueError that lists the known ones."""
    try:
        return _registry()[name]
    except KeyError:
        raise ValueError(
            f"unknown mechanism {name!r}; the registered ones are {', '.join(list_mechanisms())}."
        ) from None


def describe(name: str) -> dict[str, Any]:
    """The card facts of a mechanism: title, paper, costs, exact limit, causal or not, T5 bias or not, options."""
    cls = get_mechanism(name)
    options = {f.name: f.default for f in dataclasses.fields(cls.Config)}
    return {
        "mechanism": name,
        **cls.facts._asdict(),
        "causal": cls.causal_refusal is None,
        "relative_bias": cls.relative_bias_refusal is None,
        "options": options,
    }


def attention_config(mechanism: str, **options: Any) -> EfficientAttentionConfig:
    """`attention_config("longformer", attention_window=512)`: the validated config of a mechanism by name."""
    return get_mechanism(mechanism).Config.from_dict(options)


ConfigLike = str | EfficientAttentionConfig | Mapping[str, Any] | Iterable[Any]


def attention_configs(spec: ConfigLike, **options: Any) -> list[EfficientAttentionConfig]:
    """Normalise any accepted form (name with options, config, JSON object or text, or a list of these) to a list.

    Raises:
        ValueError: unknown mechanism or option, options beside something that is no name, an empty list.
        TypeError: a form that is none of these.
    """
    if isinstance(spec, str):
        if spec.lstrip()[:1] in ("[", "{"):
            return attention_configs(json.loads(spec), **options)
        return [attention_config(spec, **options)]
    if options:
        raise ValueError(f"options {', '.join(map(repr, options))} go with a mechanism's name, not with {spec!r}.")
    if isinstance(spec, EfficientAttentionConfig):
        return [spec]
    if isinstance(spec, Mapping):
        if "mechanism" not in spec:
            raise ValueError(f"{dict(spec)!r} names no mechanism; add 'mechanism': one of {list_mechanisms()}.")
        return [attention_config(spec["mechanism"], **{k: v for k, v in spec.items() if k != "mechanism"})]
    if isinstance(spec, Iterable):
        configs = [config for item in spec for config in attention_configs(item)]
        if not configs:
            raise ValueError("an empty list converts nothing; name at least one mechanism.")
        return configs
    raise TypeError(f"{spec!r} is no mechanism: give a name, a config, its JSON form, or a list of these.")
