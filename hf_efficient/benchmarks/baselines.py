"""What the attention benchmark times: our mechanisms and what users have without us, projected heads in, heads out.

Everything here is called as `method(query, key, value)` on (B, H, N, D) tensors and returns the same shape. Projections
are left out on all sides; what a mechanism makes of hidden states inside its attention (Longformer's global rows, LongT5's
slots) counts. transformers' classes run their own code, on the given heads in place of what their projections would give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.mechanism import EfficientAttention
from hf_efficient.attention.base.pattern import PatternAttention
from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patterns.kinds import Window
from hf_efficient.patterns.pattern import Pattern

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

WINDOW, BLOCK, RANDOM_BLOCKS, SLOT = 512, 64, 3, 16
# options where the defaults are not what another method computes
SETTINGS: dict[str, dict[str, Any]] = {
    "bigbird": dict(block_size=BLOCK, num_random_blocks=RANDOM_BLOCKS),
    "local": dict(attention_window=WINDOW),
    "longformer": dict(attention_window=WINDOW, global_tokens="first"),
    "longt5": dict(attention_window=WINDOW, global_block_size=SLOT, pooling="rms", log_count=False),
}
# mechanisms beside those that are patterns: a window, and keys of their own
BEYOND_PATTERNS = ("etc", "longt5")
TILE = 64


@dataclass(frozen=True)
class Point:
    """Where methods are compared: sizes, dtype by name, device."""

    length: int
    batch: int = 1
    heads: int = 12
    width: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def kind(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def tensors(self, count: int = 4) -> list[Tensor]:
        """(B, H, N, D) query, key, value and output gradient, in memory (B, N, H, D) as projections give them."""
        shape = (self.batch, self.length, self.heads, self.width)
        generator = torch.Generator(self.device).manual_seed(0)
        values = (torch.randn(shape, generator=generator, device=self.device) for _ in range(count))
        return [x.to(self.kind).transpose(1, 2) for x in values]


class Host(NamedTuple):
    """A layer's input and the projections that make keys and values of it."""

    hidden: Tensor
    key: nn.Linear
    value: nn.Linear


def host(point: Point) -> Host:
    """The same layer for everyone who asks with the same point."""
    inner = point.heads * point.width
    generator = torch.Generator(point.device).manual_seed(1)
    hidden = torch.randn(point.batch, point.length, inner, generator=generator, device=point.device)
    layers = [nn.Linear(inner, inner, bias=False, device=point.device) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=inner**-0.5, generator=generator)
    return Host(hidden.to(point.kind), *(layer.to(point.kind) for layer in layers))


# ---- mechanisms --------------------------------------------------------------------------------------------------------


def mechanism_names() -> list[str]:
    """The mechanisms that are patterns, ETC and LongT5."""
    names = list_mechanisms()
    return [n for n in names if n in BEYOND_PATTERNS or issubclass(get_mechanism(n), PatternAttention)]


def settings_of(name: str, implementation: str = "auto") -> dict[str, Any]:
    """The options a mechanism is measured with; what is not named here is its default."""
    cls, options = get_mechanism(name), dict(SETTINGS.get(name, {}))
    return options | ({"implementation": implementation} if issubclass(cls, PatternAttention) else {})


def geometry_of(point: Point) -> AttentionGeometry:
    """The first of two encoder layers."""
    return AttentionGeometry(
        num_heads=point.heads,
        head_dim=point.width,
        hidden_size=point.heads * point.width,
        layer=0,
        num_layers=2,
        side="encoder",
        is_causal=False,
        has_relative_bias=False,
        projection_bias=False,
        max_positions=point.length,
    )


class MechanismAttention:
    """One of our mechanisms, causal ones in a decoder; `bias` adds a relative one, constant beyond 128 tokens: `"fixed"`, or
    `"learned"`.

    Raises:
        ValueError: options, or a place, that the mechanism refuses.
    """

    def __init__(
        self,
        name: str,
        point: Point,
        implementation: str = "auto",
        bias: str | None = None,
        is_causal: bool = False,
        **options: Any,
    ):
        cls, geometry = get_mechanism(name), geometry_of(point)
        if is_causal:
            geometry = replace(geometry, is_causal=True, side="decoder")
        config = cls.Config.from_dict(settings_of(name, implementation) | options)
        if reasons := cls.unsupported(config, geometry):
            raise ValueError("; ".join(reasons))
        module: EfficientAttention = cls(config, geometry)
        module.reset_parameters()
        self.module = module.to(point.device, point.kind).eval()
        facts: dict[str, Any] = {}
        if bias is not None:
            table = torch.zeros(257, point.heads, device=point.device, requires_grad=bias == "learned")
            facts["relative_bias"] = RelativeBias(table, lambda offset: offset.clamp(-128, 128) + 128, 128)
        if module.needs_hidden_states or module.needs_project:
            layer, heads = host(point), (point.heads, point.width)

            def project(x: Tensor) -> tuple[Tensor, Tensor]:
                key, value = (f(x).unflatten(-1, heads).transpose(1, 2) for f in (layer.key, layer.value))
                return key, value

            facts |= dict(hidden_states=layer.hidden, project=project)
        self.context = AttentionContext(is_causal=is_causal, scaling=point.width**-0.5, **facts)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.module(query, key, value, self.context)


# ---- what users have without us ----------------------------------------------------------------------------------


def full(point: Point) -> Attention:
    """Full attention: PyTorch's fused kernel without a mask."""
    return F.scaled_dot_product_attention


def masked(point: Point, pattern: Pattern | None = None) -> Attention:
    """Full attention under the dense additive mask of a pattern, by default the window.

    Its time does not depend on what the mask hides, so the one (N, N) mask stands for every pattern.
    """
    half = WINDOW // 2
    pattern = (pattern or Window(left=half, right=half)).at_length(point.length)
    position = torch.arange(point.length, device=point.device)
    mask = torch.full(
        (pattern.num_heads, point.length, point.length), float("-inf"), dtype=point.kind, device=point.device
    )
    # a few rows at a time, since positions are wide integers
    for rows in position.split(256):
        mask[:, rows[0] : rows[-1] + 1].masked_fill_(pattern.visible_per_head(rows[:, None], position), 0.0)
    # with three dimensions the CPU would not use its fused kernel
    whole = mask[0] if len(mask) == 1 else mask[None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=whole)


class _Given(nn.Module):
    """In place of a projection: the given heads for the layer's input, `other` for anything else."""

    def __init__(self, other: nn.Linear | None = None, factor: float = 1.0, copies: bool = False):
        super().__init__()
        self.other, self.factor, self.copies = other, factor, copies
        self.heads: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        if self.other is not None and self.heads[0].shape[2] not in hidden.shape[:2]:
            return self.other(hidden)
        given = self.heads[0].transpose(1, 2).flatten(2)
        given = given if self.factor == 1.0 else given * self.factor
        given = given.transpose(0, 1) if hidden.shape[0] != given.shape[0] else given
        return given.clone() if self.copies else given


class _WithHeads:
    """A module of transformers whose three projections are replaced by `_Given`."""

    def __init__(self, module: nn.Module, names: tuple[str, str, str], given: list[_Given], point: Point):
        self.module, self.given = module.to(point.device, point.kind).eval(), given
        self.shape = (point.batch, point.length, point.heads, point.width)
        for name, projection in zip(names, given, strict=True):
            setattr(module, name, projection)

    def run(self, *heads: Tensor, **options: Any) -> Any:
        # in a list, so that tensors are no attributes of a module
        for projection, x in zip(self.given, heads, strict=True):
            projection.heads = [x]
        return self.module(**options)


class TransformersLongformer(_WithHeads):
    """`LongformerSelfAttention`: sliding chunks, the same pattern as `local`; with `is_global` as `longformer` here."""

    def __init__(self, point: Point, is_global: bool = False):
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        config = LongformerConfig(
            hidden_size=point.heads * point.width,
            num_attention_heads=point.heads,
            attention_window=[WINDOW],
            attention_probs_dropout_prob=0.0,
        )
        # it scales queries in place, which its own projection may bear and ours must not
        given = [_Given(copies=True), _Given(), _Given()]
        super().__init__(LongformerSelfAttention(config, 0), ("query", "key", "value"), given, point)
        rows = torch.zeros(point.batch, point.length, device=point.device)
        chosen = rows.bool()
        chosen[:, 0] = is_global
        self.options = dict(
            hidden_states=host(point).hidden,
            attention_mask=rows.to(point.kind).masked_fill(chosen, 10000.0),
            is_index_masked=rows.bool(),
            is_index_global_attn=chosen,
            is_global_attn=is_global,
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.run(query, key, value, **self.options)[0].unflatten(-1, self.shape[2:]).transpose(1, 2)


class TransformersBigBird:
    """`BigBirdBlockSparseAttention`. It draws random blocks anew in every training call; without gradients it runs as in
    inference, where all random blocks are block 0."""

    def __init__(self, point: Point):
        from transformers import BigBirdConfig, BigBirdModel
        from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

        config = BigBirdConfig(
            hidden_size=point.heads * point.width,
            num_attention_heads=point.heads,
            block_size=BLOCK,
            num_random_blocks=RANDOM_BLOCKS,
            max_position_embeddings=4096,
        )
        self.module, self.point = BigBirdBlockSparseAttention(config, seed=0), point
        real = torch.ones(point.batch, point.length, dtype=point.kind, device=point.device)
        self.masks = BigBirdModel.create_masks_for_block_sparse_attn(real, BLOCK)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        point, (blocked, band, from_mask, to_mask) = self.point, self.masks
        sizes = dict(
            n_heads=point.heads, n_rand_blocks=RANDOM_BLOCKS, attention_head_size=point.width, from_block_size=BLOCK,
            to_block_size=BLOCK, batch_size=point.batch, from_seq_len=point.length, to_seq_len=point.length,
        )  # fmt: skip
        self.module.train(torch.is_grad_enabled())
        out, _ = self.module.bigbird_block_sparse_attention(
            query, key, value, band, from_mask, to_mask, blocked, blocked, **sizes,
            seed=0, plan_from_length=None, plan_num_rand_blocks=None,
        )  # fmt: skip
        return out.reshape(point.batch, point.length, point.heads, point.width).transpose(1, 2)


class TransformersLongT5(_WithHeads):
    """`LongT5LocalAttention`, the pattern of `local`, or `LongT5TransientGlobalAttention`, which `longt5` computes.

    As in its stack, the bias is made once, by the first layer; here it is 0 where a key may be seen.
    """

    def __init__(self, point: Point, has_slots: bool = False):
        from transformers import LongT5Config
        from transformers.models.longt5 import modeling_longt5 as theirs

        inner, layer = point.heads * point.width, host(point)
        config = LongT5Config(
            d_model=inner, d_kv=point.width, num_heads=point.heads, local_radius=WINDOW // 2,
            global_block_size=SLOT, dropout_rate=0.0,
        )  # fmt: skip
        kind = theirs.LongT5TransientGlobalAttention if has_slots else theirs.LongT5LocalAttention
        module = kind(config, has_relative_attention_bias=has_slots)
        for table in (m for m in module.modules() if isinstance(m, nn.Embedding)):
            nn.init.zeros_(table.weight)
        module.o = nn.Identity()  # type: ignore[assignment]
        # it does not divide by √D
        given = [_Given(factor=point.width**-0.5), _Given(layer.key), _Given(layer.value)]
        super().__init__(module, ("q", "k", "v"), given, point)
        mask = torch.ones(point.batch, point.length, dtype=torch.long, device=point.device)
        if not has_slots:
            mask = theirs._get_local_attention_mask(mask, WINDOW // 2 + 1, mask.device)
        self.options: dict[str, Any] = dict(hidden_states=layer.hidden, mask=mask)
        with torch.no_grad():
            bias = self.run(*point.tensors(3), **self.options)[1]
        self.options["position_bias"] = bias.clamp(min=torch.finfo(point.kind).min).to(point.kind)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = self.run(query, key, value, **self.options)[0]
        return out.unflatten(-1, self.shape[2:]).transpose(1, 2)


BASELINES: dict[str, Callable[[Point], Attention]] = {
    "full (SDPA)": full,
    "full, masked (SDPA)": masked,
    "transformers Longformer": TransformersLongformer,
    "transformers Longformer, first token global": lambda point: TransformersLongformer(point, is_global=True),
    "transformers BigBird": TransformersBigBird,
    "transformers LongT5 local": TransformersLongT5,
    "transformers LongT5 transient-global": lambda point: TransformersLongT5(point, has_slots=True),
    "FlexAttention, local": lambda point: MechanismAttention("local", point, "flex"),
    "FlexAttention, bigbird": lambda point: MechanismAttention("bigbird", point, "flex"),
}
# our window with a relative bias of T5's reach, without and with a gradient
BIASED = {"local, fixed bias": "fixed", "local, learned bias": "learned"}
# who computes the same as whom; full attention is compared with everyone
SAME = {
    "local": ("transformers Longformer", "transformers LongT5 local", "FlexAttention, local"),
    "longformer": ("transformers Longformer, first token global",),
    "bigbird": ("transformers BigBird", "FlexAttention, bigbird"),
    "longt5": ("transformers LongT5 transient-global",),
}
FULL, MASKED = DENSE = ("full (SDPA)", "full, masked (SDPA)")


def build(name: str, point: Point) -> Attention:
    """A method by name; ours run on the fused kernels where the point lies on a GPU."""
    if name in BASELINES:
        return BASELINES[name](point)
    implementation = "triton" if point.device.startswith("cuda") else "torch"
    return MechanismAttention("local" if name in BIASED else name, point, implementation, bias=BIASED.get(name))


# ---- the least there is to do ------------------------------------------------------------------------------------
