"""LongT5: the slots against a plain formula, transformers' own LongT5, and what a start from other weights must keep."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pairs import Bench, Pair, Tokens
from torch import Tensor

import hf_efficient as he
from hf_efficient.testing import assert_close, inputs_for, tiny_model

SETTINGS = [
    dict(attention_window=window, global_block_size=size, pooling=pooling, log_count=log_count)
    for window, size in ((8, 6), (2, 5), (24, 16))
    for pooling, log_count in itertools.product(("mean", "rms"), (True, False))
]


def bench(family: str = "t5", **options: Any) -> Bench:
    result = Bench(Pair("longt5", family, "encoder" if family == "t5" else None, options, "longt5"))
    with torch.no_grad():
        result.mechanism.slot_weight.copy_(1 + 0.3 * result.normal(Bench.HIDDEN))
        if result.mechanism.slot_bias is not None:
            result.mechanism.slot_bias.copy_(result.normal(*result.mechanism.slot_bias.shape))
    return result


def dense(bench: Bench, tokens: Tokens, keep: Tensor) -> Tensor:
    """The definition, row by row and query by query."""
    mechanism, config = bench.mechanism, bench.mechanism.config
    g, reach = config.global_block_size, config.attention_window // 2
    out = torch.zeros_like(tokens.query)
    for b, row in enumerate(keep.tolist()):
        if not any(row):
            continue
        first, stop = row.index(True), len(row) - row[::-1].index(True)
        count = (stop - first) // g
        blocks: list[list[int]] = [[] for _ in range(count)]
        for j in range(first, stop):
            if row[j] and count:
                blocks[min((j - first) // g, count - 1)].append(j)
        slots = []
        for block in blocks:
            total = tokens.hidden[b, block].sum(0)
            size = len(block) if config.pooling == "mean" else (total.square().mean() + 1e-6).sqrt()
            slots.append(mechanism.slot_weight * total / size)
        if slots:
            slot_keys, slot_values = (x[0] for x in bench.project(torch.stack(slots)[None]))
        for i in range(first, stop):
            near = [j for j in range(max(0, i - reach), min(stop, i + reach + 1)) if row[j]]
            for h in range(bench.HEADS):
                logits = bench.WIDTH**-0.5 * tokens.key[b, h, near] @ tokens.query[b, h, i]
                values = tokens.value[b, h, near]
                bias = bench.relative_bias()
                if bias is not None:
                    logits = logits + bias.at(torch.tensor([j - i for j in near], dtype=torch.long))[h]
                for t, block in enumerate(blocks):
                    unseen = len(set(block) - set(near))
                    if not block or (config.log_count and not unseen):
                        continue
                    logit = bench.WIDTH**-0.5 * slot_keys[h, t] @ tokens.query[b, h, i]
                    if config.log_count:
                        logit = logit + torch.tensor(float(unseen), dtype=torch.float64).log()
                    if bias is not None:
                        offset = torch.tensor(t - min((i - first) // g, count - 1))
                        logit = logit + mechanism.slot_bias[bias.bucket(offset), h]
                    logits = torch.cat([logits, logit[None]])
                    values = torch.cat([values, slot_values[h, t][None]])
                out[b, h, i] = logits.softmax(-1) @ values
    return out


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_equals_the_formula(family: str, options: dict[str, Any]) -> None:
    """Rows full, padded left, right and on both sides, shorter than a block, and with a hole."""
    one = bench(family, **options)
    tokens = one.tokens(6, 41)
    keep = torch.ones(6, 41, dtype=torch.bool)
    keep[1, :7] = keep[2, 33:] = keep[3, :3] = keep[3, 30:] = keep[4, 4:] = keep[5, 11:19] = False
    with torch.no_grad():
        actual, expected = one(tokens, keep), dense(one, tokens, keep)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-9, where=keep)


def test_without_a_mask_the_formula_holds_too() -> None:
    one = bench(attention_window=8, global_block_size=6)
    tokens = one.tokens(2, 100)
    with torch.no_grad():
        assert_close(one(tokens), dense(one, tokens, torch.ones(2, 100, dtype=torch.bool)), 1e-9)


# ---- transformers' LongT5 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [97, 96, 11, 3])
@pytest.mark.parametrize("radius, size", [(3, 5), (7, 4), (2, 16)])
@pytest.mark.parametrize("kind", ["transient-global", "local"])
def test_equals_transformers_longt5(kind: str, radius: int, size: int, length: int) -> None:
    """All weights of a random LongT5 encoder, slots included, in a T5 encoder with this mechanism."""
    from transformers import LongT5Config, LongT5EncoderModel, T5EncoderModel

    plain = tiny_model("t5")
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_max_distance")
    shared = {name: getattr(plain.config, name) for name in (*sizes, "relative_attention_num_buckets")}
    torch.manual_seed(3)
    theirs = LongT5EncoderModel(
        LongT5Config(
            **shared, local_radius=radius, global_block_size=size, encoder_attention_type=kind, dropout_rate=0.0
        )
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    theirs = theirs.eval().double()
    ours = T5EncoderModel(plain.config).eval().double()
    has_slots = kind != "local"
    he.patch_attention(
        ours,
        "longt5",
        attention_window=2 * radius,
        global_block_size=size if has_slots else 2 * length,
        pooling="rms",
        log_count=False,
    )
    renamed = {
        name.replace("TransientGlobalSelfAttention", "SelfAttention")
        .replace("LocalSelfAttention", "SelfAttention")
        .replace("global_relative_attention_bias.weight", "efficient.slot_bias")
        .replace("global_input_layer_norm.weight", "efficient.slot_weight"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    missing, unexpected = ours.load_state_dict(renamed, strict=False)
    # the table that layers share is loaded through the first of them
    assert not unexpected and all(name.endswith("slot_bias") or not has_slots for name in missing), missing
    inputs = inputs_for(plain, length=length, batch=2)
    keep = inputs["attention_mask"]
    with torch.no_grad():
        expected = theirs(inputs["input_ids"], attention_mask=keep).last_hidden_state
        actual = ours(inputs["input_ids"], attention_mask=keep).last_hidden_state
    assert_close(actual, expected, 1e-6, where=keep)  # theirs takes its softmax in fp32


# ---- the start ---------------------------------------------------------------------------------------------------


def test_constant_blocks_give_full_attention() -> None:
    """Keys and values that repeat within blocks lose nothing, whatever the window shows of them, ragged tail included."""
    size = 6
    one = Bench(Pair("longt5", "bert", None, dict(attention_window=8, global_block_size=size), "longt5"))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 9, Bench.HIDDEN, generator=generator, dtype=torch.float64).repeat_interleave(size, dim=1)
    hidden = torch.cat([hidden, hidden[:, -1:].expand(-1, 4, -1)], dim=1)  # four tokens left over
    key, value = one.project(hidden)
    query = one.normal(*key.shape)
    with torch.no_grad():
        actual = one(Tokens(query, key, value, hidden))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert_close(actual, expected, 1e-12)


def test_blocks_of_one_token_give_full_attention() -> None:
    model = tiny_model("bert")
    inputs = inputs_for(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        with he.patch_attention(model, "longt5", attention_window=4, global_block_size=1):
            actual = model(**inputs).logits
    assert_close(actual, expected, 1e-5, where=inputs["attention_mask"])


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_slots_bring_the_start_closer_than_the_window_alone(family: str) -> None:
    """Neighbours that resemble each other, as in text: the log-count start beats no slots and slots without count."""
    errors = {}
    for name, options in {
        "local": dict(global_block_size=1000),
        "uncounted": dict(global_block_size=8, log_count=False),
        "start": dict(global_block_size=8),
    }.items():
        pair = Pair("longt5", family, None if family == "bert" else "encoder", dict(attention_window=8), "longt5")
        one, whole = Bench(pair, options), Bench(pair, dict(attention_window=1000, global_block_size=1000))
        smooth = one.normal(4, 16, Bench.HIDDEN).repeat_interleave(8, dim=1) + 0.3 * one.normal(4, 128, Bench.HIDDEN)
        key, value = one.project(smooth)
        tokens = Tokens(one.normal(*key.shape), key, value, smooth)
        with torch.no_grad():
            errors[name] = (one(tokens) - whole(tokens)).norm().item()
    assert errors["start"] < 0.5 * min(errors["local"], errors["uncounted"]), errors


def test_table_starts_as_the_mean_bias_between_blocks() -> None:
    """Against a plain double loop over the tokens of two blocks, for a bucket of one offset and for the far ones."""
    size = 4
    model = tiny_model("t5")
    attention = model.encoder.block[0].layer[0].SelfAttention
    with he.patch_attention(model, "longt5", global_block_size=size):
        table = attention.efficient.slot_bias
        assert model.encoder.block[1].layer[0].SelfAttention.efficient.slot_bias is table, "one table for the stack"
        weight, bucket = attention.relative_attention_bias.weight, attention._bucket_of_offsets
        far = attention.relative_attention_max_distance
        for offset in (0, 1, -1, 2, -2, 10 * far, -10 * far):
            pairs = torch.tensor([offset * size + j - i for i in range(size) for j in range(size)])
            expected = weight[bucket(pairs)].mean(0)
            at = bucket(torch.tensor([offset]))[0]
            if abs(offset) <= 2:
                assert torch.allclose(table[at], expected, atol=1e-6), offset
            else:  # the mean of a bucket whose offsets all are far away, or nearly so
                assert (table[at] - expected).abs().max() < 0.1 * weight.std(), offset


def test_a_layer_without_the_hosts_table_starts_from_it_too() -> None:
    model = tiny_model("t5", layers=3)
    with he.patch_attention(model, "longt5", global_block_size=4):
        whole = model.encoder.block[0].layer[0].SelfAttention.efficient.slot_bias.detach().clone()
    with he.patch_attention(model, "longt5", global_block_size=4, layers=(2,)):
        part = model.encoder.block[2].layer[0].SelfAttention.efficient.slot_bias
        assert torch.equal(part, whole)


@pytest.mark.parametrize(
    "options",
    [dict(attention_window=7), dict(global_block_size=0), dict(pooling="max"), dict(log_count=1)],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        he.attention_config("longt5", **options)
