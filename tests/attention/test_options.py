"""Options that can't matter beside the others: refused when given, dropped from stored configs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES

import hf_efficient as he
from hf_efficient.attention.base.pattern import PatternAttentionConfig
from hf_efficient.attention.base.registry import describe, stored_attention
from hf_efficient.cards.sizes import sizes_table
from hf_efficient.testing import tiny_model

# mechanism, an option and a value, options beside which it is dead, others beside which it matters
DEAD: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("synthesizer", dict(mixture_of="dense"), dict(variant="random"), dict()),
    ("synthesizer", dict(rank=5), dict(variant="dense"), dict(variant="factorized_random")),
    ("synthesizer", dict(rank=5), dict(mixture_of="random"), dict(mixture_of="factorized_random")),
    ("linformer", dict(sharing="headwise"), dict(projection="mean"), dict()),
    ("linformer", dict(sharing="kv"), dict(projection="max"), dict(projection="conv")),
    ("longformer", dict(separator_token_id=3), dict(global_tokens="first"), dict(global_tokens="question")),
    ("longformer", dict(separator_token_id=3), dict(global_tokens=(0, 4)), dict(global_tokens="question")),
    ("bigbird", dict(seed=0), dict(num_random_blocks=0), dict()),
    ("reformer", dict(seed=0), dict(num_buckets=1), dict()),
    ("reformer", dict(num_hashes=4), dict(num_buckets=1), dict()),
    ("etc", dict(sharing="qkv"), dict(num_global_tokens=0), dict()),
    ("funnel", dict(separate_cls=True), dict(pool_size=1), dict()),
    ("clustered", dict(iterations=3), dict(num_clusters=1), dict()),
    ("nystromformer", dict(pinv_iterations=6), dict(num_landmarks=1), dict()),
]


@pytest.mark.parametrize(("mechanism", "option", "beside", "elsewhere"), DEAD)
def test_an_option_that_cannot_matter_is_refused_and_dropped_from_stored_configs(
    mechanism: str, option: dict[str, Any], beside: dict[str, Any], elsewhere: dict[str, Any]
):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{mechanism}: {name}={value!r} is not possible; .*None"):
        he.attention_config(mechanism, **option, **beside)
    config = he.attention_config(mechanism, **beside).to_dict()
    assert stored_attention([config | option]) == [config]
    kept = he.attention_config(mechanism, **option, **elsewhere).to_dict()
    assert kept[name] == value and stored_attention([kept]) == [kept]


# ---- generated from the fields of every config -------------------------------------------------------------------

SHARED = {field.name for field in dataclasses.fields(PatternAttentionConfig)}
# matters for inputs that are longer than the model's positions alone
LONGER_INPUTS = {("linformer", "interpolate")}
# beside which all keys are seen, whatever the option says
FULL = {("sparse_transformer", "pattern"): {"stride": 1}}


def values_of(start: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """{option: values to try}: of all options, and of those that others may depend on: choices, switches, least numbers."""
    tried: dict[str, list[Any]] = {}
    choices: dict[str, list[Any]] = {}
    for field in dataclasses.fields(start):
        name, value, kind = field.name, getattr(start, field.name), str(field.type)
        if name in SHARED or kind.startswith("tuple"):
            continue
        tried[name] = (
            [value, 0.5] if kind == "float" else [value, 1, 3, 2 * (value or 5)] if "int" in kind else [value]
        )
        if kind.startswith("bool"):
            tried[name] = choices[name] = list(dict.fromkeys([value, False, True]))
        elif kind.startswith("int"):
            choices[name] = [0, 1]
        elif kind.startswith("str"):
            with pytest.raises(ValueError) as refusal:
                dataclasses.replace(start, **{name: "?"})
            named = re.search(r"one of ([a-z_, ]+)", str(refusal.value))
            tried[name] = choices[name] = list(dict.fromkeys([value, *(named[1].split(", ") if named else ())]))
    return tried, choices


def trace(model: Any, config: Any) -> list[Any]:
    """Output, gradients and buffers of one training step, parameters away from their start; nothing where it is refused."""
    inputs = torch.randint(5, 99, (2, 48), generator=torch.Generator().manual_seed(0))
    inputs[:, 5:9] = torch.tensor([0, 1, 3, 10])  # separators
    try:
        handle = he.patch_attention(model, config)
    except ValueError:
        return []
    with handle:
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if ".efficient." in name:
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        torch.manual_seed(0)
        model.zero_grad()
        out = model.train()(input_ids=inputs)[0]
        out.square().sum().backward()
        for module in model.modules():
            if hasattr(module, "after_optimizer_step"):
                module.after_optimizer_step(1)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [out.detach(), *gradients, *(b.clone() for n, b in model.named_buffers() if ".efficient." in n)]


@pytest.mark.parametrize("mechanism", sorted(set(CASES) - {"combined"}))
def test_every_option_matters_or_is_refused(mechanism: str):
    case = CASES[mechanism]
    model = tiny_model("bert" if "E" in case.sides else "gpt2", positions=48)
    start = he.attention_config(mechanism, **case.small)
    tried, choices = values_of(start)
    traces: dict[Any, list[Any]] = {}

    def traced(**options: Any) -> list[Any]:
        try:
            config = dataclasses.replace(start, **options)
        except ValueError:
            return []
        if config not in traces:
            traces[config] = trace(model, config)
        return traces[config]

    for name, values in tried.items():
        besides = [{sibling: value} for sibling, all_ in choices.items() if sibling != name for value in all_]
        besides = [beside for beside in besides if beside != FULL.get((mechanism, name))]
        for beside in [{}, *besides] if (mechanism, name) not in LONGER_INPUTS else ():
            seen = [found for value in values if (found := traced(**beside, **{name: value}))]
            first = seen[0] if seen else []
            same = [
                len(one) == len(first) and all(torch.equal(x, y) for x, y in zip(one, first, strict=True))
                for one in seen
            ]
            assert len(seen) < 2 or not all(same), f"{mechanism}: {name} changes nothing beside {beside}"


@pytest.mark.parametrize("mechanism", sorted(set(CASES) - {"combined"}))
def test_sizes_that_do_not_follow_the_length_are_options_and_stand_in_the_card(mechanism: str):
    """What stands for a share of the input: numbers by default, in units that are options too."""
    config: Any = he.attention_config(mechanism).attention_class.Config
    numbers = {field.name for field in dataclasses.fields(config) if type(field.default) is int}
    units = {unit for unit in config.sizes.values() if unit}
    assert config.sizes.keys() | units <= numbers
    card = (Path(he.__file__).parents[1] / "model_cards" / f"{mechanism}.md").read_text()
    assert bool(config.sizes) == (f"<!-- generated: sizes {mechanism} -->" in card)
    text = sizes_table(mechanism)
    for option, unit in config.sizes.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{option}` |"))
        default = describe(mechanism)["options"]
        share = 100 * default[option] * (default[unit] if unit else 1) / 4096
        assert f" {share:.3g} % " in row and f"`{32 * default[option]}`" in row
