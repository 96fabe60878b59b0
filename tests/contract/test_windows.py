"""Windows and sinks that the host's config brings: kept by what is converted and by what is left exact, or refused."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function

import hf_efficient as he
from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.registry import get_mechanism
from hf_efficient.evaluation.controls import MeanOfValues, MeanOfValuesConfig
from hf_efficient.families import HostModel
from hf_efficient.families.probe import probe_inputs, real_part, token_outputs
from hf_efficient.ops.block_sparse.attention import block_sparse_attention
from hf_efficient.ops.context import AttentionCall, AttentionContext
from hf_efficient.ops.softmax import with_sinks
from hf_efficient.patching.exact import converted_layers
from hf_efficient.patching.mask_facts import mask_facts
from hf_efficient.patterns.kinds import Window
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close, tiny_model
from hf_efficient.training.transfer.layer_errors import layer_errors

PATTERNS = ("axial", "bigbird", "etc", "longformer", "sparse_transformer")
ETC_FORMS: dict[str, dict[str, Any]] = {
    "etc": dict(attention_window=60),
    "bigbird": dict(block_size=20, num_random_blocks=1, form="etc"),
}
HOSTS = ("mistral", "gemma2", "gemma3_text", "gpt_oss", "modernbert", "modernbert-decoder")


def outputs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return real_part(token_outputs(model(**inputs)), inputs)


def first_geometry(model: Any) -> AttentionGeometry:
    host = HostModel.of(model)
    return host.family.geometry(host.stacks[0], host.stacks[0].layers[0])


@pytest.mark.parametrize("model_type", HOSTS)
def test_the_window_of_the_host_holds(model_type: str) -> None:
    """In the exact limit a converted layer is the source with its window, and so is a layer beside it; global columns and
    every other pattern stay inside, and extra tokens that weigh nothing change nothing."""
    model = tiny_model(model_type)
    geometry = first_geometry(model)
    exact = (get_mechanism(name).exact_config(he.attention_config(name), geometry, 60) for name in PATTERNS)
    whole = dict(attention_window=122)
    calls: list[Any] = [
        ("local", whole | more) for more in ({}, dict(layers=[0]), dict(layers=[1]), dict(sink_tokens=3))
    ]
    calls += [(config, {}) for config in exact if not config.attention_class.unsupported(config, geometry)]
    if geometry.is_causal:
        calls.append(("longformer", whole | dict(global_tokens=(0, 3, 50))))
    if model_type == "modernbert":
        extra: dict[str, Any] = dict(num_global_tokens=3)
        calls += [("etc", whole | extra), ("bigbird", dict(block_size=60, num_random_blocks=0, form="etc") | extra)]
        calls += [("longformer", dict(attention_window=2, global_tokens=tuple(range(60))))]
    assert len(calls) > 8, calls
    inputs = probe_inputs(model, 60)
    model.set_attn_implementation("eager")
    source = outputs(model, inputs)
    for padding in (inputs["attention_mask"], inputs["attention_mask"].flip(1)):
        inputs["attention_mask"] = padding
        model.set_attn_implementation("eager")
        source = outputs(model, inputs)
        for mechanism, options in calls:
            with he.patch_attention(model, mechanism, **options):
                for name, parameter in model.named_parameters():
                    if name.endswith("global_logits"):
                        parameter.data.fill_(-60.0)
                assert_close(outputs(model, inputs), source, 1e-5, f"{model_type} {mechanism} {options}")
    with he.patch_attention(model, "local", attention_window=4):
        assert (outputs(model, inputs) - source).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_decoding_far_beyond_the_window(model_type: str) -> None:
    """All caches forget, and rows are padded on the left: the same tokens as without a cache, and as the source."""
    model = tiny_model(model_type, positions=256)
    ids, mask = torch.randint(5, 99, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    call: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=80, min_new_tokens=80, do_sample=False)
    source = model.generate(ids, **call)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("local", dict(attention_window=300, layers=[1])),
        ("local", dict(attention_window=6)),
    ]
    if model_type == "gpt_oss":
        cases += [
            ("sparse_transformer", dict(stride=8)),
            ("longformer", dict(attention_window=6, global_tokens=(0, 3))),
        ]
    for mechanism, options in cases:
        with he.patch_attention(model, mechanism, **options):
            decoded = model.generate(ids, **call)
            if options.get("attention_window") == 300:
                assert torch.equal(decoded, source), options
            else:
                assert torch.equal(decoded, model.generate(ids, use_cache=False, **call)), options


def test_layers_with_a_window_hold_no_square_tensor() -> None:
    model = tiny_model("modernbert", positions=1024)
    inputs = {"input_ids": torch.randint(5, 99, (1, 1024))}
    with he.patch_attention(model, "local", attention_window=16, layers=[0]), LargestTensor() as largest:
        outputs(model, inputs)
    assert largest.numel < 1024 * 1024 / 2, "a layer that stayed exact computes all pairs"


def test_what_does_not_keep_to_a_window_or_sinks_is_refused() -> None:
    refused = []
    for model_type in ("mistral", "gpt_oss", "gemma2"):
        host = HostModel.of(tiny_model(model_type))
        geometry = host.family.geometry(host.stacks[0], host.stacks[0].layers[0])
        for name in set(he.list_mechanisms()) - {"combined"}:
            config = he.attention_config(name)
            reasons = " ".join(config.attention_class.unsupported(config, geometry))
            if "window of 24 tokens" in reasons or "sinks" in reasons or "softcap=50.0" in reasons:
                refused.append((model_type, name))
    assert not {name for _, name in refused} & ({*PATTERNS, "local", "blockwise"} - {"etc"})
    assert {name for host, name in refused if host == "mistral"} >= {
        "linformer",
        "performer",
        "sinkhorn",
        "reformer",
    }
    assert {("gpt_oss", "linformer"), ("gpt_oss", "etc"), ("gemma2", "etc"), ("gemma2", "t2r")} <= set(refused)


def test_what_a_kernel_lacks_is_refused_at_conversion() -> None:
    reason = "implementation='flex' gives no log-sum-exp, which sinks need: use 'auto'"
    with (
        pytest.raises(ValueError, match=reason),
        he.patch_attention(tiny_model("gpt_oss"), "local", implementation="flex"),
    ):
        pass


@pytest.mark.parametrize("name", ["bigbird", "etc"])
def test_the_window_of_the_host_does_not_bind_extra_tokens(name: str) -> None:
    """Three extra tokens see and are seen by all, tokens see each other inside it; BigBird's with a cap and sinks, too."""
    geometry, n = replace(first_geometry(tiny_model("modernbert")), sliding_window=(7, 7)), 40
    config = he.attention_config(name, num_global_tokens=3, **ETC_FORMS[name])
    facts: dict[str, Any] = {}
    if name == "bigbird":
        facts = dict(softcap=1.5, sinks=torch.randn(geometry.num_heads))
        geometry = replace(geometry, softcap=1.5, has_sinks=True)
    assert not config.attention_class.unsupported(config, geometry)
    mechanism = config.attention_class(config, geometry)
    mechanism.reset_parameters()
    query, key, value = torch.randn(3, 2, geometry.num_heads, 3 + n, 8)
    keep = torch.ones(2, 3 + n, dtype=torch.bool)
    keep[1, -9:] = False
    context = AttentionContext(is_causal=False, scaling=0.5, key_padding_mask=keep, **facts)
    logits = 0.5 * query @ key.mT
    logits = logits if name == "etc" else 1.5 * (logits / 1.5).tanh()
    logits[:, :, 3:, :3] -= 5 + math.log(3)
    offset = torch.arange(n) - torch.arange(n)[:, None]
    near = torch.ones(3 + n, 3 + n, dtype=torch.bool)
    near[3:, 3:] = offset.abs() <= 7
    logits = logits.masked_fill(~(near & keep[:, None, None]), -torch.inf)
    if facts:
        logits = torch.cat([logits, facts["sinks"][:, None, None].expand(2, -1, 3 + n, 1)], -1)
    expected = logits.softmax(-1)[..., : 3 + n] @ value
    assert_close(mechanism(query, key, value, context), expected, 1e-5)


@pytest.mark.parametrize("new", [60, 5])
def test_global_tokens_of_a_call_keep_to_the_window_of_the_host(new: int) -> None:
    """Longformer on a causal host with sinks: the whole row, and new tokens against a cache, by the formula."""
    geometry, n = first_geometry(tiny_model("gpt_oss")), 60
    assert geometry.sliding_window == (23, 0)
    config = he.attention_config("longformer", attention_window=6)
    query, key, value = torch.randn(3, 2, geometry.num_heads, n, 8)
    marked, keep = torch.zeros(2, n, dtype=torch.bool), torch.arange(n) >= torch.tensor([[0], [5]])
    marked[:, [7, 30, 50]] = True
    sinks, offset = torch.randn(geometry.num_heads), torch.arange(n) - torch.arange(n)[:, None]
    near = (offset > -6) | (marked[:, None] & (offset >= -23))
    logits = (0.5 * query @ key.mT).masked_fill(~(near & (offset <= 0) & keep[:, None])[:, None], -torch.inf)
    weights = torch.cat([logits, sinks[:, None, None].expand(2, -1, n, 1)], -1).softmax(-1)[..., :n]
    facts: dict[str, Any] = dict(
        key_padding_mask=keep, global_attention_mask=marked, sinks=sinks, query_offset=n - new
    )
    context = AttentionContext(is_causal=True, scaling=0.5, **facts)
    mechanism = config.attention_class(config, geometry)
    out = mechanism(query[:, :, -new:], key, value, context)
    assert_close(out, (weights @ value)[:, :, -new:], 1e-5)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_figures_of_a_layer_go_by_what_the_host_computes(model_type: str) -> None:
    """An exact layer has no error there, and the mean of values keeps to the host's window."""
    model = tiny_model(model_type)
    inputs = probe_inputs(model, 60)
    with he.patch_attention(model, "local", attention_window=122):
        found = layer_errors(model, [inputs])
    assert max(found["mechanism"]) < 1e-5 < 0.01 < min(found["mean of values"])
    geometry = first_geometry(model)
    value = torch.randn(1, geometry.num_heads, 60, 8)
    mean = MeanOfValues(MeanOfValuesConfig(), geometry)(
        value, value[:, ::2], value[:, ::2], AttentionContext(is_causal=True, scaling=1.0)
    )
    assert_close(mean[:, 1, 50], value[:, 0, 27:51].mean(1), 1e-6)


@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss"])
def test_no_head_of_keys_is_repeated(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for patterns, whose mechanisms take grouped heads, nor in layers that stay exact."""
    model = tiny_model(model_type)
    inputs = probe_inputs(model, 60)

    def repeated(*_: Any) -> None:
        raise AssertionError("keys are repeated")

    for module in ("patching.dispatch", "ops.softmax"):
        monkeypatch.setattr(f"hf_efficient.{module}.expand_heads", repeated)
    with he.patch_attention(model, "bigbird", block_size=4, layers=[0]):
        outputs(model, inputs)


def test_mask_facts_agree_with_the_masks() -> None:
    functions = (
        causal_mask_function,
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_causal_mask_function(5),
        masking_utils.sliding_window_bidirectional_mask_function(5),
    )
    q, k = torch.arange(20)[:, None], torch.arange(20)[None]
    for function in functions:
        facts = mask_facts(function)
        seen = torch.tensor([[bool(function(0, 0, i, j)) for j in k[0]] for i in q[:, 0]])
        told = torch.ones(20, 20, dtype=torch.bool)
        for holds in (
            (k <= q) if facts.is_causal else None,
            None if facts.left is None else k >= q - facts.left,
            None if facts.right is None else k <= q + facts.right,
        ):
            told = told if holds is None else told & holds
        assert torch.equal(seen, told) and not facts.unknown, facts
    packed = masking_utils.packed_sequence_mask_function(torch.zeros(1, 20))
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    for unknown in (and_masks(causal_mask_function, packed), chunked, lambda b, h, i, j: True):
        assert mask_facts(unknown).unknown


def test_a_mask_whose_window_is_not_that_of_the_config_is_refused() -> None:
    model = tiny_model("mistral")
    with he.patch_attention(model, "local", attention_window=8):
        model.config.sliding_window = None  # now the host asks for a plain causal mask
        with pytest.raises(ValueError, match="converted as causal windowed attention, but its model asks for causal"):
            model(torch.randint(5, 99, (1, 12)))


def test_sinks_are_one_more_logit() -> None:
    logits = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 2, 7, 3, dtype=torch.float64)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    all_logits = torch.cat([logits, sinks[:, None, None].expand(1, 2, 5, 1)], dim=-1)
    expected = all_logits.softmax(-1)[..., :-1] @ value
    actual = with_sinks(logits.softmax(-1) @ value, logits.logsumexp(-1), sinks)
    assert_close(actual, expected, 1e-12, "sinks")
    for grown, truth in zip(
        torch.autograd.grad(actual.pow(2).sum(), [logits, sinks]),
        torch.autograd.grad(expected.pow(2).sum(), [logits, sinks]),
        strict=True,
    ):
        assert_close(grown, truth, 1e-10, "gradient")
    nothing = with_sinks(torch.zeros(1, 2, 1, 3), torch.full((1, 2, 1), float("-inf")), sinks.float())
    assert not nothing.any()


@pytest.mark.parametrize("left, right, n", [(5, 0, 90), (5, 5, 90), (200, 200, 30)])
def test_capped_logits(left: int, right: int, n: int) -> None:
    """A window with a cap, in one tile and in blocks, forward and backward, is what the formula says."""
    query, key, value = (torch.randn(2, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, : n // 3] = False
    call = AttentionCall(is_causal=right == 0, scaling=2.0, key_padding_mask=keep, softcap=3.0)
    position = torch.arange(n)
    seen = Window(left=left, right=right).visible(position[:, None], position) & keep[:, None, None]
    seen = seen & (position <= position[:, None]) if right == 0 else seen
    logits = 3.0 * (2.0 * query @ key.transpose(-1, -2) / 3.0).tanh()
    weights = logits.masked_fill(~seen, -1e30).softmax(-1) * seen.any(-1, keepdim=True)
    out = block_sparse_attention(query, key, value, Window(left=left, right=right), call)
    assert_close(out, weights @ value, 1e-12, "capped")
    grown, truth = (torch.autograd.grad(x.pow(2).sum(), [query, key]) for x in (out, weights @ value))
    for a, b in zip(grown, truth, strict=True):
        assert_close(a, b, 1e-10, "gradient")


@pytest.mark.parametrize(
    "model_type, options, layers",
    [
        ("gemma2", dict(attention_window=64), [1]),
        ("gemma2", dict(attention_window=24, sink_tokens=2), [1]),
        ("gemma2", dict(attention_window=22), [0, 1]),
        ("gemma2", dict(attention_window=64, dilation=2), [0, 1]),
        ("gemma2", dict(attention_window=64, layers=[0]), [0]),
        ("mistral", dict(attention_window=64), [0, 1]),
    ],
)
def test_layers_that_gain_nothing_stay_exact_and_are_named(
    model_type: str, options: dict[str, Any], layers: list[int], monkeypatch, caplog
) -> None:
    model = tiny_model(model_type, layers=2)
    windows = [first_geometry(model).sliding_window]
    assert windows == [(23, 0)]
    inputs = probe_inputs(model, 40)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers"):
        result = he.convert(model, "local" if "dilation" not in options else "longformer", **options)
    assert [int(name.split(".")[2]) for name in converted_layers(result.model)] == layers
    assert ("gains nothing in decoder layers [0]" in caplog.text) == (layers == [1])
    assert ("gains nothing in decoder layers [0, 1]" in caplog.text) == (model_type == "mistral")
    assert outputs(result.model, inputs).isfinite().all()
