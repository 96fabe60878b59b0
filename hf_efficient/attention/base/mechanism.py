"""The abstraction: what a mechanism is, what it is told about a call, and the registry of all mechanisms.

A mechanism is a small module that mixes already projected heads. It knows nothing of transformers' models: the family
says where it sits (`AttentionGeometry`), the dispatcher says what one call is about (`AttentionContext`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_efficient.attention.base.geometry import AttentionGeometry, SourceAttention
from hf_efficient.attention.base.suggestions import did_you_mean
from hf_efficient.ops.context import AttentionContext

if TYPE_CHECKING:
    from hf_efficient.cache.bounded import BoundedLayer
    from hf_efficient.ops.pooling import Pooling

logger = logging.getLogger(f"transformers.{__name__}")
SIDES = ("encoder", "decoder", "both")
# all extra tokens together start with e⁻⁵ of the weight of one key of equal logit
GATE = -5.0


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
    stored_defaults: ClassVar[Mapping[str, Any]] = {}
    """{option: what checkpoints saved before it existed compute}, where that is not its default."""
    shares: ClassVar[Mapping[str, float]] = {}
    """{option on which the cost depends: its share of the keys that a query is compared with}, see `of_size`."""
    sizes: ClassVar[Mapping[str, str]] = {}
    """{option whose default stands for a smaller share of longer inputs: the option that is its unit in tokens, "" = 1}."""

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

    def _as_tuples(self, *names: str) -> None:
        """Lists, which JSON has in their place, become tuples."""
        for name in names:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{self.mechanism}: {name}={getattr(self, name)!r} is not possible; it must be {rule}.")

    def _require_at_least(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= low, f"an integer ≥ {low}")

    def _require_positive(self, *names: str) -> None:
        self._require_at_least(1, *names)

    def _require_even(self, name: str) -> None:
        value = getattr(self, name)
        self._require(name, type(value) is int and value >= 0 and value % 2 == 0, "an even integer ≥ 0")

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
            named = ", ".join(f"{name!r}{did_you_mean(str(name), known)}" for name in unknown)
            raise ValueError(f"{cls.mechanism} has no option {named}; its options are {', '.join(known)}.")
        return cls(**options)

    def for_length(self, length: int | None) -> EfficientAttentionConfig:
        """With the options that follow the longest input of a model, in tokens; `None` = it is not known."""
        return self

    def reach(self, geometry: AttentionGeometry) -> int | None:
        """Distance from a query of the farthest key that it may see in such a layer; `None` = there is no bound."""
        return None

    def import_only(self) -> str | None:
        """Why `convert` refuses these options, which imported checkpoints have; `None` = it takes them."""
        return None

    def keys_per_query(self, geometry: AttentionGeometry, length: int) -> float | None:
        """Keys, or what stands for them, that a query of such a layer is compared with; `None` = it is not known.

        It is the number of multiply-adds for scores and values over `2 · length · heads · head_dim`, the mean over the
        queries of a row of `length` tokens and over the heads: of patterns the visible keys (causal: those before the
        query, too), of M features M, of pooled keys and landmarks their number, of choices by content the most that they
        can show. What is done to find, pool or map keys is not in it. Padding counts as tokens.
        """
        return None

    @classmethod
    def of_size(cls, size: int, geometry: AttentionGeometry, length: int) -> EfficientAttentionConfig:
        """Options for rows of `length` tokens with which `keys_per_query` grows with `size`, and is about as large.

        Raises:
            ValueError: there are no such options.
        """
        # what is no odd number suits every option
        options: dict[str, Any] = {n: max(2, 4 * round(size * share / 4)) for n, share in cls.shares.items()}
        return cls(**options)

    @classmethod
    def from_stored(cls, options: Mapping[str, Any]) -> EfficientAttentionConfig:
        """The config that a checkpoint holds: as `from_dict`, but options that it does not name keep its outputs."""
        return cls.from_dict({**cls.stored_defaults, **options} | dict.fromkeys(cls.without_effect(options)))

    @classmethod
    def without_effect(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Options that can't matter beside the others of a stored config; `None` is their default."""
        return ()


class MechanismFacts(NamedTuple):
    """What the catalogue says of a mechanism: everything `he.describe` and the support table print.

    `kind` is its group in the survey of Tay et al. (arXiv 2009.06732, §3).
    """

    title: str
    paper: str
    kind: str
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
    rotary_refusal: ClassVar[str | None] = None
    """Why queries and keys with rotary positions are refused and what to use instead; `None` = honoured."""
    left_aligned: bool = False
    """Blocks or position-indexed parameters count from a row's first real token: the dispatcher shifts padded rows."""
    by_position: bool = True
    """Which keys a query sees, or with which weight, depends on where tokens stand: padding in between would count."""
    by_rotation: bool = True
    """Under rotary positions its result depends on where a row starts, not on distances alone."""
    grouped_heads: ClassVar[bool] = False
    """Takes keys and values as the host has them, of fewer heads than the queries; else each is repeated for its queries."""
    uses_global_attention_mask: bool = False
    needs_hidden_states: bool = False
    needs_rotation: bool = False
    needs_input_ids: bool = False
    needs_project: bool = False
    pooling: Pooling | None = None
    """The whole layer runs on means of neighbouring tokens, of windows with more than one: see `patching.downsampling`."""
    traceable: ClassVar[bool] = False
    """Encoders of it can be made into graphs whose length stays open: see `graph_refusal`."""
    transfer_learning_rate: ClassVar[float] = 1e-3
    global_tokens: Tensor
    """Of the first layer alone, where `num_extra_tokens`: (g, hidden_size), registered at installation."""
    host_projection: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None
    """Set at installation where `needs_project`: (attention module, hidden states) to keys and values."""

    is_told_of_steps: bool = False
    """Whether somebody calls `after_optimizer_step`."""
    _training_calls: int = 0

    def __init__(self, config: EfficientAttentionConfig, geometry: AttentionGeometry):
        super().__init__()
        self.config = config
        self.geometry = geometry

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """Mix (B, H, N, D) queries with (B, H, S, D) keys and values, S ≥ N, into (B, H, N, D).

        With `grouped_heads`, keys and values are (B, num_key_value_heads, S, D).
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def with_unused_parameters(self, out: Tensor) -> Tensor:
        """`out`, for calls in which some parameters of this module have no part.

        Data-parallel training waits for a gradient of every parameter, so while several processes train, each gets one of 0.
        Elsewhere it has none, and an optimiser leaves it alone, weight decay included.
        """
        if self.training and torch.is_grad_enabled() and _several_processes():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    out = out + 0.0 * parameter.flatten()[:1].sum().to(out.dtype)
        return out

    def attention_weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor | None:
        """(B, H, N, S) dense weights that `forward` gives the values, for training losses alone; `None` = it has none."""
        return None

    def reset_parameters(self) -> None:
        """(Re-)set every parameter and buffer of this mechanism to its neutral start."""

    @torch.no_grad()
    def initialise_from(self, source: SourceAttention) -> dict[str, str]:
        """Set new parameters from pretrained weights. Returns {parameter name: where its values came from}."""
        return {}

    def after_optimizer_step(self, step: int) -> None:
        """What changes between optimiser steps, other than by gradients: new draws, moving averages.

        `hf_efficient.training.MechanismCallback` calls it in every process after optimiser step `step`, counted from 1.
        """

    def expect_steps(self, interval: int) -> None:
        """Called in every forward by what moves after each `interval` optimiser steps (0 = never): warns once, in the first
        training call after that number of calls, where nobody told it of a step."""
        if not interval or self.is_told_of_steps or not (self.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            return
        self._training_calls += 1
        if self._training_calls == interval + 1:
            logger.warning(
                f"{self.config.mechanism}, {self.geometry.side} layer {self.geometry.layer}: {interval} training calls, and "
                "nothing has moved: add hf_efficient.training.MechanismCallback() to the Trainer, or call its "
                "step(model, step) after every optimiser step."
            )

    def training_logs(self) -> dict[str, Tensor]:
        """Scalars of the last training step for the Trainer's log, by name; those of several layers are summed."""
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
        which the first g are the extra ones (always real), and every layer of the stack must ask for the same number. They
        are its parameter `global_tokens` in the first layer, which is called with (B, N, hidden_size) embeddings alone
        where only a call brings its weights in: `prepend` then does all.
        """
        return 0

    @classmethod
    def unsupported(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        """All reasons why this mechanism can't work in this layer, each with its remedy; empty = it can."""
        reasons = []
        if geometry.is_causal and cls.causal_refusal:
            reasons.append(f"{cls.Config.mechanism} can't be causal: {cls.causal_refusal}")
        if geometry.has_relative_bias and cls.relative_bias_refusal:
            reasons.append(f"{cls.Config.mechanism} can't carry a T5 relative bias: {cls.relative_bias_refusal}")
        if geometry.rotary is not None and cls.rotary_refusal:
            reasons.append(f"{cls.Config.mechanism} can't carry rotary positions: {cls.rotary_refusal}")
        if geometry.chunk_size_feed_forward and cls.num_extra_tokens(config):
            reasons.append(f"{cls.Config.mechanism} {geometry.chunking_refusal}")
        return reasons + cls._unhonoured(config, geometry)

    @classmethod
    def graph_refusal(cls, config: Any, geometry: AttentionGeometry) -> str | None:
        """Why no graph for inputs of every length can be made of it (`torch.export`, ONNX); `None` = one can."""
        if cls.traceable and not geometry.is_causal:
            return None
        kind = f"{'causal ' if geometry.is_causal else ''}{cls.Config.mechanism}"
        return f"{kind} has no form whose length stays open"

    @classmethod
    def _unhonoured(cls, config: Any, geometry: AttentionGeometry) -> list[str]:
        """What the host does to logits and keys that this mechanism would leave out."""
        name, reasons = cls.Config.mechanism, []
        if geometry.sliding_window is not None and not cls.honours_sliding_window(config, geometry):
            reasons.append(
                f"{name} can't keep to the host's own window of {sum(geometry.sliding_window) + 1} tokens: convert only the "
                "layers without one, with layers=…, or use local"
            )
        if geometry.has_sinks and not cls.honours_sinks(config, geometry):
            reasons.append(f"{name} can't have the learned sinks of the host's softmax: use local")
        if geometry.softcap is not None and not cls.honours_softcap(config, geometry):
            reasons.append(f"{name} can't compute softcap={geometry.softcap} of the host's logits: use local")
        if geometry.value_dim != geometry.head_dim:
            reasons.append(
                f"values of {geometry.value_dim} beside keys of {geometry.head_dim} entries (latent attention) are not "
                "possible, with any mechanism: leave these layers out, with layers=…"
            )
        return reasons

    @classmethod
    def honours_sliding_window(cls, config: Any, geometry: AttentionGeometry) -> bool:
        """Whether a token sees no other outside the host's own window of the layer (`geometry.sliding_window`)."""
        return False

    @classmethod
    def repeats_window(cls, config: Any, geometry: AttentionGeometry) -> bool:
        """Whether it shows every key of the host's own window, so that a layer that stays exact computes the same."""
        return False

    @classmethod
    def honours_softcap(cls, config: Any, geometry: AttentionGeometry) -> bool:
        """Whether logits are capped as `context.softcap` says."""
        return False

    @classmethod
    def honours_sinks(cls, config: Any, geometry: AttentionGeometry) -> bool:
        """Whether `context.sinks` stand in the denominator of its softmax."""
        return False

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


def prepend(tokens: Tensor, states: Tensor) -> Tensor:
    """(B, g + N, C) from (g, C) tokens and (B, N, C) states."""
    tokens = tokens.to(states.device, states.dtype).expand(states.shape[0], -1, -1)
    return torch.cat([tokens, states], dim=1)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
