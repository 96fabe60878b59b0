"""Calibration: constants from the unconverted model's own queries and keys, told in the report; all else untouched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import save_source, tiny_tokenizer, words
from torch import Tensor
from typer.testing import CliRunner

import hf_efficient as he
from hf_efficient.cli.app import app
from hf_efficient.conversion.calibrate import calibrate, occupancy
from hf_efficient.ops.cluster_attention import spherical_kmeans
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.testing import assert_close, inputs_for, tiny_model

OPTIONS: dict[str, Any] = dict(num_clusters=5, cluster_size=8, attention_window=4)
TEXTS = [words(30 + 3 * i, i) for i in range(6)]


def converted(family: str = "bert", **options: Any) -> Any:
    return he.convert(tiny_model(family), "routing_transformer", tokenizer=object(), **(OPTIONS | options)).model


def centroids(model: Any) -> dict[str, Tensor]:
    return {name: mechanism_of(layer).centroids.clone() for name, layer in converted_layers(model).items()}


def expected_centroids(
    family: str, side: str, batches: list[dict[str, Tensor]], count: int = 5, seed: int = 0
) -> list[Tensor]:
    """Of each layer: k-means over heads that the original's projections make of its own hidden states."""
    model = tiny_model(family)
    layers: list[list[Tensor]] = []
    for batch in batches:
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        prefix = {"t5": f"{side}_", "bert": "", "gpt2": ""}[family]
        states = getattr(out, f"{prefix}hidden_states")[:-1]
        mask = batch["decoder_attention_mask" if side == "decoder" and family == "t5" else "attention_mask"].bool()
        for index, hidden in enumerate(states):
            if len(layers) <= index:
                layers.append([])
            with torch.no_grad():
                query, key = (x.unflatten(-1, (4, -1)) for x in projected(model, family, side, index, hidden))
            routed = F.normalize(query, dim=-1)
            if family == "gpt2" or side == "decoder":
                routed = routed + F.normalize(key, dim=-1)
            layers[index].append(routed[mask])
    return [spherical_kmeans(torch.cat(parts).transpose(0, 1), count, seed=seed) for parts in layers]


def projected(model: Any, family: str, side: str, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    if family == "bert":
        attention = model.bert.encoder.layer[index].attention.self
        return attention.query(hidden), attention.key(hidden)
    if family == "gpt2":
        block = model.transformer.h[index]
        query, key, _ = block.attn.c_attn(block.ln_1(hidden)).chunk(3, dim=-1)
        return query, key
    layer = getattr(model, side).block[index].layer[0]
    normal = layer.layer_norm(hidden)
    return layer.SelfAttention.q(normal), layer.SelfAttention.k(normal)


@pytest.mark.parametrize(
    ("family", "side"), [("bert", "encoder"), ("gpt2", "decoder"), ("t5", "encoder"), ("t5", "decoder")]
)
def test_centroids_are_clusters_of_the_original_models_own_heads(family: str, side: str):
    """Padded batches; every layer sees the states that full attention in all layers before makes."""
    model = converted(family, side="both" if family == "t5" else None)
    batches = [inputs_for(model, length=41, seed=seed) for seed in range(2)]
    model.train()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    origins = calibrate(model, batches)
    assert model.training and all(mechanism_of(layer) is not None for layer in converted_layers(model).values())
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, state[name])}
    assert changed == set(origins) and len(origins) == (4 if family == "t5" else 2)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    own = {name: x for name, x in centroids(model).items() if family != "t5" or name.startswith(side)}
    for (name, actual), expected in zip(own.items(), expected_centroids(family, side, batches), strict=True):
        assert_close(actual, expected, 1e-3, name)
        what = "query-key sums" if side == "decoder" else "queries"
        assert origins[f"{name}.efficient.centroids"] == f"spherical k-means of the {what} of {real} tokens"
    first = centroids(model)
    calibrate(model, batches)
    assert all(torch.equal(x, first[name]) for name, x in centroids(model).items()), "calibrating twice differs"


def test_padding_and_batch_size_do_not_matter():
    whole, single = converted(), converted()
    batch = inputs_for(whole, length=40)
    calibrate(whole, [batch])
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        rows.append({"input_ids": ids[mask][None], "position_ids": torch.arange(40)[mask][None]})
    calibrate(single, rows)
    for name, expected in centroids(whole).items():
        assert_close(centroids(single)[name], expected, 1e-3, name)


def test_no_more_tokens_are_read_than_are_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["hf_efficient.conversion.calibrate"], "TOKENS", 50)
    model, read = converted(), []

    def batches() -> Any:
        for seed in range(9):
            read.append(seed)
            yield inputs_for(model, batch=1, length=20, seed=seed)

    origins = calibrate(model, batches())
    assert read == [0, 1, 2] and all(origin.endswith("of 50 tokens") for origin in origins.values())


def test_a_hybrid_is_calibrated_where_it_can_be_and_patched_models_are():
    model = tiny_model("bert")
    configs = [
        he.attention_config("local", attention_window=8, layers=(0,)),
        he.attention_config("routing_transformer", layers=(1,), **OPTIONS),
    ]
    with he.patch_attention(model, configs):
        (name,) = calibrate(model, [inputs_for(model)])
        assert name == "bert.encoder.layer.1.attention.self.efficient.centroids"


def test_occupancy_shows_collapse():
    model = converted()
    batches = [inputs_for(model)]
    calibrate(model, batches)
    for name, shares in occupancy(model, batches).items():
        assert shares.shape == (4, 5) and (shares > 0).all(), name
        assert_close(shares.sum(-1), torch.ones(4), 1e-6)
    layer = mechanism_of(next(iter(converted_layers(model).values())))
    with torch.no_grad():
        layer.centroids[1] = -layer.centroids[1, :1]
        layer.centroids[1, 2] *= -1
    shares = next(iter(occupancy(model, batches).values()))[1]
    assert (shares[[1, 3, 4]] == 0).all() and shares[2] > 0


# ---- convert -----------------------------------------------------------------------------------------------------


def test_convert_calibrates_and_the_report_says_so(tmp_path: Path):
    source = save_source(tmp_path / "source", "bert")
    plain = he.convert(source, "routing_transformer", **OPTIONS)
    result = he.convert(source, "routing_transformer", calibration=TEXTS, max_positions=256, **OPTIONS)
    origins = [
        {facts["from"] for name, facts in report.tensors.items() if name.endswith("centroids")}
        for report in (plain.report, result.report)
    ]
    assert all("needs calibration" in origin for origin in origins[0])
    (told,) = origins[1]
    tokens = sum(len(result.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert told == f"spherical k-means of the queries of {tokens} tokens"
    plain_tokens = tokens - 2 * len(TEXTS)
    read = {"texts": 6, "texts_used": 6, "tokens": plain_tokens, "tokens_used": plain_tokens}
    assert plain.report.calibration is None and result.report.calibration == read
    by_hand = plain.model
    calibrate(by_hand, [dict(result.tokenizer(text, return_tensors="pt")) for text in TEXTS])
    for name, expected in centroids(by_hand).items():
        assert_close(centroids(result.model)[name], expected, 1e-3, name)
    result.save(tmp_path / "saved")
    report = json.loads((tmp_path / "saved" / "conversion_report.json").read_text())
    assert told in {facts["from"] for facts in report["tensors"].values()}
    loaded = type(result.model).from_pretrained(tmp_path / "saved")
    for name, expected in centroids(result.model).items():
        assert torch.equal(centroids(loaded)[name], expected)


def test_texts_are_cut_at_the_length_the_model_knows():
    """Longer positions are there after the conversion, but nothing was trained on them."""
    tokenizer = tiny_tokenizer("bert")
    result = he.convert(
        tiny_model("bert"),
        "routing_transformer",
        tokenizer=tokenizer,
        max_positions=512,
        calibration=[words(400)],
        **OPTIONS,
    )
    (told,) = {facts["from"] for name, facts in result.report.tensors.items() if name.endswith("centroids")}
    assert told.endswith("of 128 tokens")


@pytest.mark.parametrize(
    ("given", "tokenizer", "message"),
    [
        ([], True, "calibration is a list of texts"),
        ([3], True, "calibration is a list of texts"),
        (["a", {"input_ids": torch.ones(1, 3).long()}], True, "calibration is a list of texts"),
        (["a text"], False, "calibration texts need a tokenizer"),
        (["w9 w8"], True, "4 tokens can't be put into 5 clusters: give more text"),
    ],
)
def test_calibration_that_can_not_be_is_refused_and_nothing_is_converted(given: Any, tokenizer: bool, message: str):
    model = tiny_model("bert")
    inputs, kind = inputs_for(model), type(model)
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match=message):
        he.convert(
            model,
            "routing_transformer",
            tokenizer=tiny_tokenizer("bert") if tokenizer else None,
            calibration=given,
            **OPTIONS,
        )
    assert type(model) is kind and not he.patching.is_installed(model)
    assert torch.equal(model(**inputs).logits, expected)


def test_calibration_that_nothing_needs_is_refused():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="has a mechanism that starts from data: leave the calibration out"):
        he.convert(model, "local", tokenizer=tiny_tokenizer("bert"), attention_window=8, calibration=TEXTS)
    assert not he.patching.is_installed(model)
    with pytest.raises(ValueError, match="without a single batch"):
        calibrate(converted(), [])


@pytest.mark.parametrize("texts", ["texts.txt", "corpus"])
def test_command_line(tmp_path: Path, texts: str):
    source, out = save_source(tmp_path / "source", "bert"), tmp_path / "out"
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = texts if texts == "corpus" else str(tmp_path / texts)
    command = [
        "convert",
        str(source),
        str(out),
        "--attention",
        "routing_transformer",
        "--calibration",
        given,
        "--json",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert any("k-means" in tensor["from"] for tensor in document["tensors"].values())
    read = document["calibration"]
    assert 0 < read["tokens_used"] <= min(read["tokens"], 8192) and 0 < read["texts_used"] <= read["texts"]
    assert (read["tokens_used"] < read["tokens"]) == (texts == "corpus")


# ---- sizes that follow the length --------------------------------------------------------------------------------


def test_clusters_follow_the_length_and_take_most_queries(logged: list[str]):
    """By default at every length, in a model with a position table and in one without; few and small ones are told of."""
    told: Any = SimpleNamespace(model_max_length=10**30)
    batches = [{"input_ids": torch.randint(5, 99, (8, 128), generator=torch.Generator().manual_seed(0))}]

    def said(family: str, length: int | None, **options: Any) -> tuple[str, Any]:
        logged.clear()
        result = he.convert(tiny_model(family), "routing_transformer", max_positions=length, tokenizer=told, **options)
        return "\n".join(logged), result.report

    for family, length in (("bert", None), ("bert", 1024), ("bert", 4096), ("t5", 512)):
        text, report = said(family, length, **({} if family == "t5" else {"calibration": batches}))
        assert "of the queries" not in text
        stored, longest = report.efficient_attention[0], report.max_positions
        assert abs(stored["num_clusters"] - longest**0.5 / 2) <= 1
        assert stored["num_clusters"] * stored["cluster_size"] >= 1.5 * longest
    few = dict(num_clusters=8, cluster_size=8)
    assert "take at most 0.12 of the queries" in (text := said("bert", 512, **few)[0])
    assert "cluster_size=52 reaches 0.8" in text
    text = said("bert", 512, calibration=batches, **few)[0]
    assert text.count("clusters take 0.1") == 1
    few["cluster_size"] = int(text.partition("cluster_size=")[2].partition(" ")[0])
    assert "of the queries" not in said("bert", 512, calibration=batches, **few)[0]
    with pytest.raises(ValueError, match="follow max_positions, of which this model has none"):
        he.convert(tiny_model("t5"), "routing_transformer", tokenizer=SimpleNamespace(model_max_length=10**30))
