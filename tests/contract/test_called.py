"""Modules are called, and their weights read only where that is the same: adapters, quantised, offloaded, wrapped layers."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from pairs import MAIN, VARIANTS, Pair, each, labelled, logits
from paths import ROOT
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

import hf_efficient as he
from hf_efficient.testing import assert_close, inputs_for, tiny_model

LENGTH = 24
PAIRS = [pair for pair in MAIN if pair.side != "decoder"]
WITH_LAYERS = [
    pair
    for pair in [*PAIRS, *VARIANTS]
    if pair.mechanism in ("longformer", "etc") and (pair.family == "bert" or (pair in PAIRS and pair.family == "t5"))
]
LONGFORMER: dict[str, Any] = dict(attention_window=8)


def small_model(pair: Pair) -> Any:
    # the last layer of etc has no global rows, and some options are one number per layer
    needs_two = pair.mechanism == "etc" or isinstance(pair.options.get("attention_window"), tuple)
    return pair.model(layers=2 if needs_two else 1)


def few_and_many_global_tokens(pair: Pair, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls by the two ways that global rows are computed: fewer tokens than a head is wide, and more."""
    if pair.mechanism != "longformer" or pair.family == "gpt2":
        return [inputs]
    masks = [torch.arange(LENGTH).expand_as(inputs["input_ids"]) % every == 0 for every in (LENGTH, 2)]
    return [inputs | {"global_attention_mask": mask.long()} for mask in masks]


# ---- forward passes ----------------------------------------------------------------------------------------------


class Elsewhere(nn.Module):
    """Another layer's place in a model, as adapters and quantisers have it; what it shows is nothing to compute with."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.calls = layer, 0
        self.weight = nn.Parameter(torch.full((1,), float("nan")))
        self.bias = nn.Parameter(torch.full((1,), float("nan")))

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.layer(*args)


@each([*PAIRS, *(pair for pair in WITH_LAYERS if pair not in PAIRS)], of="attention")
def test_every_layer_is_called_and_none_is_read(pair: Pair):
    model = small_model(pair)
    pair.patch(model)
    calls = few_and_many_global_tokens(pair, inputs_for(model, length=LENGTH))
    expected = [logits(model, call) for call in calls]
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) or name.endswith("relative_attention_bias")
    }
    around = {name: Elsewhere(module) for name, module in linear.items()}
    for name, module in around.items():
        model.set_submodule(name, module)
    for number, (call, before) in enumerate(zip(calls, expected, strict=True), 1):
        assert_close(logits(model, call), before, 1e-5)
        assert not [name for name, module in around.items() if module.calls < number]


@each(PAIRS, of="attention")
def test_weights_may_be_there_only_in_the_call_of_their_module(pair: Pair):
    model = he.convert(small_model(pair), pair.config).model
    inputs = inputs_for(model, length=LENGTH)
    expected = logits(model, inputs)
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert_close(logits(model, inputs), expected, 1e-5)


@each(WITH_LAYERS, of="attention")
def test_a_live_adapter_is_the_merged_one_and_learns(pair: Pair):
    model = he.convert(small_model(pair), pair.config).model
    calls = few_and_many_global_tokens(pair, inputs_for(model, length=LENGTH))
    start = [logits(model, call) for call in calls]
    # with weights of its own from the first step
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights="pissa"))
    for call, before in zip(calls, start, strict=True):
        if "global_attention_mask" in call or pair.mechanism == "etc":
            adapted.train().zero_grad()
            adapted(**labelled(model, call)).loss.backward()
            assert not [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
        assert_close(logits(adapted.eval(), call), before, 1e-5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    live = [logits(adapted, call) for call in calls]
    merged = adapted.merge_and_unload()
    for call, one, before in zip(calls, live, start, strict=True):
        assert_close(logits(merged, call), one, 1e-5)
        assert (one - before).abs().max() > 1e-2


def _doubled(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: 2.0 * output)


def _normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2.0)


def _pruned(layer: Any) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():  # the masked weight is made in the next call
        layer.weight_orig.mul_(2.0)


@pytest.mark.parametrize("alter", [_doubled, _normed, _pruned])
@pytest.mark.parametrize("projection", ["key_global", "value_global"])
def test_what_is_done_to_a_global_projection_counts(projection: str, alter: Callable[[Any], None]):
    model = he.convert(tiny_model("bert", layers=1), "longformer", global_tokens="first", **LONGFORMER).model
    inputs = inputs_for(model, length=LENGTH)
    before = logits(model, inputs)
    mechanism = model.bert.encoder.layer[0].attention.self.efficient
    alter(getattr(mechanism, projection))
    altered = logits(model, inputs)
    assert (altered - before).abs().max() > 1e-2
    setattr(mechanism, projection, Elsewhere(getattr(mechanism, projection)))
    assert_close(logits(model, inputs), altered, 1e-5)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_quantised_layers_are_called(family: str):
    model = he.convert(tiny_model(family), "longformer", global_tokens="first", **LONGFORMER).model
    inputs = inputs_for(model, length=LENGTH)
    expected = logits(model, inputs)
    packed = torch.ao.quantization.quantize_dynamic(model)
    assert_close(logits(packed, inputs), expected, 0.2)


# ---- refusals ----------------------------------------------------------------------------------------------------


class OtherLinear(nn.Linear):
    """Computes with twice its weight."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(rows)


def _replaced(model: Any, make: Callable[[Any], Any]) -> Any:
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = make(attention.query)
    return model


def _other(layer: Any) -> Any:
    other = OtherLinear(layer.in_features, layer.out_features)
    other.load_state_dict(layer.state_dict())
    return other


def _eight_bits(layer: Any) -> Any:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


def _with_adapters(model: Any) -> Any:
    model.add_adapter(LoraConfig(target_modules=["query"]))
    return model


ALTERED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "peft": (lambda m: get_peft_model(m, LoraConfig(target_modules=["query"])), "merge .* first"),
    "inside": (
        lambda m: get_peft_model(m, LoraConfig(target_modules=["query"])).base_model.model,
        r"query.* merge (it|them) first",
    ),
    "own adapter": (_with_adapters, r"query.* merge (it|them) first"),
    "packed": (torch.ao.quantization.quantize_dynamic, "query is quantised: convert the original"),
    "8 bits": (lambda m: _replaced(m, _eight_bits), "query is quantised"),
    "offloaded": (lambda m: cpu_offload(m, execution_device="cpu"), "offloaded"),
    "pruned": (lambda m: _replaced(m, lambda q: prune.l1_unstructured(q, "weight", 0.5)), "query .*prune.remove"),
    "normed": (lambda m: _replaced(m, parametrizations.weight_norm), "query .*remove_parametrizations"),
    "another class": (lambda m: _replaced(m, _other), "query is a OtherLinear"),
    "wrapped": (lambda m: _replaced(m, Elsewhere), "query is a Elsewhere"),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_weights_that_are_not_what_they_seem_are_refused(kind: str):
    make, message = ALTERED[kind]
    model = make(tiny_model("bert"))
    before = {name: id(p) for name, p in model.named_parameters()}
    for verb, act in {
        "convert": lambda: he.convert(model, "local", **LONGFORMER),
        "upcycle": lambda: he.upcycle(model, 2),
        "patch": lambda: he.patch_attention(model, "longformer", **LONGFORMER),
    }.items():
        with pytest.raises(ValueError, match=f"(?s){message}") as caught:
            act()
        assert len(str(caught.value)) < 1200, verb
        assert {name: id(p) for name, p in model.named_parameters()} == before, verb
    # a window takes nothing from the weights, and runs with whatever the calls bring
    inputs = inputs_for(tiny_model("bert"), length=LENGTH)
    if kind != "8 bits":
        full = logits(model, inputs)
        with he.patch_attention(model, "local", attention_window=2 * LENGTH):
            assert_close(logits(model, inputs), full, 1e-5)


def test_converted_models_with_adapters_are_neither_reverted_nor_saved(tmp_path: Path):
    result = he.convert(tiny_model("bert"), "longformer", **LONGFORMER)
    adapted = get_peft_model(result.model, LoraConfig(target_modules=["query"]))
    for act in (
        lambda: he.revert(adapted),
        lambda: he.revert(result.model),
        lambda: result.save(tmp_path / "checkpoint"),
    ):
        with pytest.raises(ValueError, match=r"merge them first \(`merge_and_unload`\)"):
            act()
    assert not (tmp_path / "checkpoint").exists()
    he.revert(adapted.merge_and_unload())


def test_a_parametrisation_that_is_removed_is_no_obstacle():
    model = _replaced(tiny_model("bert"), parametrizations.weight_norm)
    parametrize.remove_parametrizations(model.bert.encoder.layer[0].attention.self.query, "weight")
    he.convert(model, "longformer", **LONGFORMER)


@pytest.mark.parametrize("around", [nn.DataParallel, nn.Identity])
def test_what_is_around_a_model_is_not_taken_for_a_name(around: Any):
    for verb in (he.upcycle, lambda model: he.convert(model, "local")):
        with pytest.raises(ValueError, match=f"{around.__name__} is no transformers model: .* the model inside it"):
            verb(around(tiny_model("bert")))


# ---- the code itself ---------------------------------------------------------------------------------------------

# where weights are set, or were found to be plain
READERS = {"__init__", "initialise_from", "reset_parameters", "_through_weights", "_length"}


def test_forward_passes_read_no_weight_of_a_module():
    found = []
    for path in [*(ROOT / "hf_efficient" / "attention").rglob("*.py"), *(ROOT / "hf_efficient" / "ops").rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in READERS:
                found += [
                    f"{path.relative_to(ROOT)}:{node.lineno}"
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute)
                    and node.attr in ("weight", "in_proj_weight")
                    and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "ctx"))
                ]
    assert not found, f"{found}: call the module instead, or it computes without adapters, quantisation and hooks"
