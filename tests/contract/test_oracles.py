"""Side by side with the truth: full attention under the pattern's mask, transformers' own models, dense formulas."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES
from formulas import HEADS, geometry
from masks import PATTERNS, bigbird_mask, pairs, random_blocks
from torch import Tensor, nn

import hf_efficient as he
from hf_efficient.attention.bigbird import BigBirdAttention, BigBirdAttentionConfig
from hf_efficient.families import family_of
from hf_efficient.ops.context import AttentionContext
from hf_efficient.patterns.tile_table import tile_table
from hf_efficient.testing import assert_close, inputs_for, tiny_model

LENGTH = 97


# ---- patterns: the unconverted model under a float mask ----------------------------------------------------------
# bool 4-D masks would be added as 0 and 1 by eager attention, so every mask here is float; what they show: masks.py


def test_every_pattern_has_its_mask() -> None:
    assert set(PATTERNS) == {name for name, case in CASES.items() if case.mask}


@contextmanager
def masked(stack: Any, masks: list[Tensor]) -> Iterator[None]:
    """Full attention in which layer l adds the float mask `masks[l]` (B, 1 or H, N, N)."""
    handles = []
    for layer, mask in zip(stack.layers, masks, strict=True):
        names = list(inspect.signature(type(layer.module).forward).parameters)[1:]
        position = names.index("mask" if "mask" in names else "attention_mask")

        def replace(
            module: nn.Module, args: Any, kwargs: Any, position: int = position, names: Any = names, mask: Any = mask
        ) -> Any:
            if position < len(args):
                return (*args[:position], mask, *args[position + 1 :]), kwargs
            return args, {**kwargs, names[position]: mask}

        handles.append(layer.module.register_forward_pre_hook(replace, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def additive(visible: Tensor, keep: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, 1 or H, N, N) float mask of a pattern and of padding."""
    visible = (visible if visible.dim() == 4 else visible[None, None]) & keep.bool()[:, None, None]
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def stack_outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Last hidden states by stack; a T5 decoder reads fixed random encoder states, so that it is judged alone."""
    mask = inputs["attention_mask"]
    if not model.config.is_encoder_decoder:
        return {"only": model.base_model(inputs["input_ids"], attention_mask=mask).last_hidden_state}
    torch.manual_seed(5)
    memory = torch.randn(*mask.shape, model.config.d_model, dtype=torch.float64)
    return {
        "encoder": model.encoder(inputs["input_ids"], attention_mask=mask).last_hidden_state,
        "decoder": model.decoder(
            inputs["decoder_input_ids"],
            attention_mask=inputs["decoder_attention_mask"],
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
        ).last_hidden_state,
    }


_MASKS: dict[Any, Tensor] = {}


def mask_of(mechanism: Any, keep: Tensor, is_causal: bool) -> Tensor:
    """What the mechanism's definition shows: for equal settings the same in every host, and slow to write down."""
    geometry = mechanism.geometry
    key = (mechanism.config, geometry.layer, geometry.num_heads, is_causal, tuple(keep.flatten().tolist()))
    if key not in _MASKS:
        _MASKS[key] = PATTERNS[mechanism.config.mechanism](mechanism, keep, is_causal)
    return _MASKS[key]


# hosts of equal options beside one another; a relative copies the attention layers of BERT
ORACLE_ROWS = [
    pytest.param(name, family, options, id=f"{name}-{family}-{number}")
    for name, case in CASES.items()
    if case.mask
    for number, options in enumerate((case.small, *case.variants))
    for family in ("bert", "roberta", "gpt2", "t5")
    if family != "roberta" or number == 0
]


@pytest.mark.parametrize("name, family, options", ORACLE_ROWS)
def test_pattern_equals_masked_full_attention(name: str, family: str, options: dict[str, Any]) -> None:
    """fp64, two layers, row 1 padded on the right and row 2 on the left, n ≫ window so that the sparse code runs."""
    model = tiny_model(family, positions=128).double()
    model.set_attn_implementation("eager")
    inputs = inputs_for(model, length=LENGTH)
    keep = inputs["attention_mask"].bool()
    with he.patch_attention(model, name, side="both" if family == "t5" else None, **options):
        actual = stack_outputs(model, inputs)
        masks = [
            [additive(mask_of(layer.module.efficient, keep, stack.side == "decoder"), keep) for layer in s.layers]
            for s in family_of(model).stacks(model)
            for stack in (s,)
        ]
    stacks = family_of(model).stacks(model)
    full = stack_outputs(model, inputs)
    with masked(stacks[0], masks[0]), masked(stacks[-1], masks[-1]):
        expected = stack_outputs(model, inputs)
    for side, output in actual.items():
        assert_close(output, expected[side], 1e-9, side, where=keep)
        change = (full[side] - expected[side])[keep].abs().max()
        assert change > 1e-3, f"{side}: the pattern leaves this model as it is, so nothing was compared"


def test_the_oracle_reproduces_the_plain_model() -> None:
    """The mask substitution itself: causal and all-ones float masks change nothing."""
    for family in ("bert", "roberta", "gpt2", "t5"):
        model = tiny_model(family).double()
        model.set_attn_implementation("eager")
        inputs = inputs_for(model, length=20)
        keep, plain = inputs["attention_mask"], stack_outputs(model, inputs)
        stacks = family_of(model).stacks(model)
        full = [torch.ones(20, 20).tril().bool() if s.side == "decoder" else torch.ones(20, 20).bool() for s in stacks]
        masks = [[additive(f, keep)] * 2 for f in full]
        with masked(stacks[0], masks[0]), masked(stacks[-1], masks[-1]):
            again = stack_outputs(model, inputs)
        for side in plain:
            assert_close(again[side], plain[side], 1e-12, f"{family} {side}", where=keep)


# ---- BigBird's random blocks -------------------------------------------------------------------------------------


def bigbird(layer: int = 0, causal: bool = False, **options: Any) -> BigBirdAttention:
    settings = dict(block_size=4, num_random_blocks=3) | options
    return BigBirdAttention(
        BigBirdAttentionConfig(**settings), geometry(layer=layer, is_causal=causal, side="decoder" if causal else None)
    )


@pytest.mark.parametrize("lengths", [(32, 32), (32, 19), (5, 1)])
@pytest.mark.parametrize("n", [32, 31, 24])
def test_few_blocks_are_one_dense_tile(n: int, lengths: tuple[int, int]) -> None:
    """Whole and broken blocks, padded rows: outputs and gradients against the mask."""
    mechanism = bigbird().double()
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lengths = tuple(min(n, length) for length in lengths)
    keep = torch.arange(n) < torch.tensor(lengths)[:, None]
    context = AttentionContext(is_causal=False, scaling=0.5, key_padding_mask=None if min(lengths) == n else keep)
    mask = bigbird_mask(mechanism, keep, False) & keep[:, None, None]
    expected = (0.5 * q @ k.mT).masked_fill(~mask, torch.finfo(torch.float64).min).softmax(-1) @ v
    actual = mechanism(q, k, v, context)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-12, where=keep)
    direction = torch.randn_like(actual) * keep[:, None, :, None]
    ours, theirs = (torch.autograd.grad((x * direction).sum(), (q, k, v)) for x in (actual, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two, 1e-12)


@pytest.mark.parametrize("count, end", [(1, 0), (2, 1), (4, 3), (6, 5), (30, 29), (30, 17), (30, None), (3, None)])
def test_random_blocks_are_distinct_eligible_and_complete(count: int, end: int | None) -> None:
    mechanism = bigbird(causal=end is None)
    for head in random_blocks(mechanism, count, end):
        for u, drawn in enumerate(head):
            if end is None:
                eligible = set(range(1, u - 1))
            else:
                eligible = {c for c in range(1, end) if abs(c - u) > 1}
            assert len(set(drawn)) == len(drawn) == min(3, len(eligible)), f"row {u}: {drawn}"
            assert set(drawn) <= eligible, f"row {u}: {drawn} are not all in {eligible}"


def test_causal_random_blocks_do_not_depend_on_the_length() -> None:
    mechanism = bigbird(causal=True)
    long = random_blocks(mechanism, 50, None)
    for count in (3, 10, 49):
        assert random_blocks(mechanism, count, None) == [head[:count] for head in long]


def test_encoder_random_blocks_change_only_where_the_end_forces_them() -> None:
    """They depend on the row's own last block alone: not on padding, on the batch, or on the padded length."""
    mechanism = bigbird()
    rows = torch.arange(40)[None]
    both = mechanism.pattern.random_blocks(rows, torch.tensor([39, 20]), 40)
    assert torch.equal(both[1:], mechanism.pattern.random_blocks(rows, torch.tensor([20]), 40))
    for row, end in ((0, 39), (1, 20)):
        assert [head[: end + 1] for head in random_blocks(mechanism, 40, end)] == [
            head[: end + 1] for head in random_blocks(mechanism, 60, end)
        ]
        drawn = [[{c for c in u if c >= 0} for u in head] for head in both[row].tolist()]
        assert drawn == [[set(u) for u in head] for head in random_blocks(mechanism, 40, end)]
    shorter, longer = random_blocks(mechanism, 40, 20), random_blocks(mechanism, 40, 21)
    for few, more in zip(shorter, longer, strict=True):
        for u in range(20):
            assert {c for c in more[u] if c < 20} <= set(few[u])


def test_random_blocks_differ_by_head_layer_seed_and_row_and_cover_evenly() -> None:
    first = random_blocks(bigbird(), 60, 59)
    assert len({str(head) for head in first}) == HEADS
    assert len({str(row) for row in first[0]}) > 50
    for other in (bigbird(layer=1), bigbird(seed=1)):
        shared = sum(
            set(a) == set(b)
            for x, y in zip(first, random_blocks(other, 60, 59), strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert shared < 0.02 * 60 * HEADS
    hits = torch.zeros(60)
    for layer in range(12):
        for head in random_blocks(bigbird(layer=layer), 60, 59):
            for row in head:
                hits[row] += 1
    # 12 layers · 4 heads · 60 rows · 3 blocks over 58 columns: 149 each, standard deviation 12
    assert hits[[0, 59]].max() == 0
    assert (hits[1:59] - hits[1:59].mean()).abs().max() < 5 * hits[1:59].mean().sqrt()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [5, 16, 48])
def test_random_blocks_as_tiles(size: int, causal: bool) -> None:
    """Blocks smaller and larger than tiles and of no common multiple; a head taken out stays that head."""
    pattern = bigbird(causal=causal, block_size=size, num_random_blocks=2).pattern.at_length(150)
    positions = torch.arange(150)
    for head in range(HEADS):
        single = pattern.head(head)
        assert single.head(0) == single
        seen = pattern.visible_per_head(positions[:, None], positions)[head]
        table = tile_table(single, 150, 150, 32, 16, is_causal=causal)
        assert torch.equal(table.to_dense()[0], seen.tril() if causal else seen)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_the_same_in_training_and_inference(name: str) -> None:
    model = tiny_model("bert")
    inputs = inputs_for(model, length=LENGTH)
    with he.patch_attention(model, name, **CASES[name].small):
        inference = model(**inputs).logits
        assert torch.equal(model.train()(**inputs).logits, inference)


# ---- transformers' own efficient models --------------------------------------------------------------------------


@pytest.mark.parametrize("num_global", [0, 3, 20], ids="{} global".format)
@pytest.mark.parametrize("windows", [(4, 12), (16, 16)])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_longformer_equals_transformers_longformer(family: str, windows: tuple[int, int], num_global: int) -> None:
    """The same weights, global projections of their own. 20 global tokens exceed the head width, as other code runs."""
    from transformers import LongformerConfig, LongformerModel

    model = tiny_model(family, positions=128).double().base_model
    config = model.config
    inputs = inputs_for(model, length=LENGTH)
    keep = inputs["attention_mask"].bool()
    # LongformerModel counts positions from padding_idx + 1 whatever the model, so they are given
    positions = torch.arange(LENGTH).expand_as(keep) + family_of(model).positions.offset(config)
    generator = torch.Generator().manual_seed(4)
    chosen = torch.zeros_like(keep, dtype=torch.long)
    for row in range(len(keep)):
        real = keep[row].nonzero().flatten()
        count = max(num_global - row, 0)  # a different number in each row
        chosen[row, real[torch.randperm(len(real), generator=generator)[:count]]] = 1
    he.patch_attention(model, "longformer", attention_window=windows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".efficient." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    other = LongformerModel(
        LongformerConfig(
            **{
                k: getattr(config, k)
                for k in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
            },
            **{k: getattr(config, k) for k in ("intermediate_size", "hidden_act", "layer_norm_eps", "pad_token_id")},
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            attention_window=list(windows),
        ),
        add_pooling_layer=False,
    )
    weights = {name.replace(".efficient.", "."): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    other = other.double().eval()
    call = dict(inputs, position_ids=positions, global_attention_mask=chosen)
    actual, expected = model(**call).last_hidden_state, other(**call).last_hidden_state
    assert_close(actual, expected, 1e-5, where=keep)
    if num_global:
        without = model(**call | {"global_attention_mask": torch.zeros_like(chosen)}).last_hidden_state
        assert (without - expected)[keep].abs().max() > 1e-2, "the global tokens made no difference"


LED_NAMES = {
    ".self_attn.q_proj": ".self_attn.longformer_self_attn.query",
    ".self_attn.k_proj": ".self_attn.longformer_self_attn.key",
    ".self_attn.v_proj": ".self_attn.longformer_self_attn.value",
    ".self_attn.out_proj": ".self_attn.output",
    ".self_attn.efficient": ".self_attn.longformer_self_attn",
}


@pytest.mark.parametrize("num_global", [0, 3], ids="{} global".format)
def test_bart_with_longformer_equals_transformers_led(num_global: int) -> None:
    """Encoder and decoder with the same weights; LED's tables have no rows in front."""
    from transformers import LEDConfig, LEDModel

    model = tiny_model("bart").double().model
    config, inputs = model.config, inputs_for(model, length=LENGTH)
    he.patch_attention(model, "longformer", attention_window=(4, 12))
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".efficient." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
        if name.startswith("encoder."):
            for own, led in LED_NAMES.items():
                name = name.replace(own, led)
        weights[name] = tensor[2:] if "embed_positions" in name else tensor
    same = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim")
    same += ("encoder_attention_heads", "decoder_attention_heads", "pad_token_id", "activation_function")
    positions = dict.fromkeys((f"max_{s}_position_embeddings" for s in ("encoder", "decoder")), 132)
    sizes = {name: getattr(config, name) for name in same} | positions
    other = LEDModel(LEDConfig(**sizes, attention_window=[4, 12])).double().eval()
    other.load_state_dict(weights)
    chosen = torch.zeros_like(inputs["attention_mask"])
    chosen[0, :num_global] = chosen[1, 10 : 10 + num_global] = 1
    with torch.no_grad():
        actual, expected = (
            m(**inputs, global_attention_mask=chosen if num_global or m is other else None) for m in (model, other)
        )
    keep = inputs["attention_mask"].bool()
    assert_close(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state, 1e-5, where=keep)
    targets = inputs["decoder_attention_mask"].bool()
    assert_close(actual.last_hidden_state, expected.last_hidden_state, 1e-5, where=targets)


@pytest.mark.parametrize("num_random_blocks", [1, 2, 3])
@pytest.mark.parametrize("length", [64, 88])
def test_bigbird_against_transformers_bigbird(length: int, num_random_blocks: int) -> None:
    """transformers' inference draws block 0 for every random block: no random blocks, but `log(1 + r)` on block 0.

    So its output is the dense oracle with that logarithm, and ours without random blocks is the oracle without it.
    """
    from transformers import BigBirdConfig, BigBirdModel

    size = 4
    model = tiny_model("bert", positions=128).base_model
    config = model.config
    other = BigBirdModel(
        BigBirdConfig(
            **{
                k: getattr(config, k)
                for k in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
            },
            **{k: getattr(config, k) for k in ("intermediate_size", "hidden_act", "layer_norm_eps", "pad_token_id")},
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            attention_type="block_sparse",
            block_size=size,
            num_random_blocks=num_random_blocks,
        ),
        add_pooling_layer=False,
    )
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    other.eval()
    inputs = inputs_for(model, batch=2, length=length, padded=False)
    expected = other(**inputs).last_hidden_state
    assert other.config.attention_type == "block_sparse", "the input is too short: transformers ran full attention"

    end = length // size - 1
    visible = pairs(
        length,
        lambda i, j: i // size in (0, end) or j // size in (0, end) or abs(i // size - j // size) <= 1,
    )
    repeated = pairs(length, lambda i, j: i // size not in (0, end) and j < size)
    mask = additive(visible, inputs["attention_mask"], torch.float32)
    model.set_attn_implementation("eager")
    stack = family_of(model).stacks(model)[0]
    with masked(stack, [mask + repeated * math.log(1 + num_random_blocks)] * 2):
        assert_close(model(**inputs).last_hidden_state, expected, 1e-5, "transformers against the oracle")
    with masked(stack, [mask] * 2):
        plain = model(**inputs).last_hidden_state
    assert (plain - expected).abs().max() > 1e-3, "the logarithm made no difference"
    with he.patch_attention(model, "bigbird", block_size=size, num_random_blocks=0):
        assert_close(model(**inputs).last_hidden_state, plain, 1e-5, "ours against the oracle")
