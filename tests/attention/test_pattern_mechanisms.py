"""What the pattern mechanisms accept, refuse and put together; what they compute is in the generic suites."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

import hf_efficient as he
from hf_efficient.attention.base.geometry import AttentionGeometry
from hf_efficient.attention.base.registry import attention_configs, stored_attention
from hf_efficient.cli.options import chosen_configs
from hf_efficient.patterns.kinds import BlockWindow, GlobalColumns, GlobalRows, ShiftedBlock, Strided, Window
from hf_efficient.patterns.sets import PerHead
from hf_efficient.testing import assert_close, inputs_for, tiny_model

BAD_OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("sparse_transformer", dict(pattern="random"), "one of strided, fixed"),
    ("sparse_transformer", dict(head_policy="all"), "one of merged, split, interleaved"),
    ("sparse_transformer", dict(stride=0), "stride=0"),
    ("sparse_transformer", dict(pattern="fixed", stride=4, summary_size=5), "at most stride=4"),
    ("axial", dict(row_length=2.5), "row_length=2.5"),
    ("axial", dict(form="sum"), "one of union, split, interleaved"),
    ("blockwise", dict(block_size=-1), "block_size=-1"),
    ("blockwise", dict(shifts=()), r"shifts=\(\)"),
    ("blockwise", dict(shifts=(0, -1)), "integers ≥ 0"),
    ("blockwise", dict(shifts=1), "integers ≥ 0"),
    ("image_local", dict(block_size=0), "block_size=0"),
    ("image_local", dict(memory_size=-1), "an integer ≥ 0"),
    ("image_local", dict(grid=(4, 4), block_size=(4, 4, 4)), "or a pair"),
    ("image_local", dict(grid=(4, 4), block_size=(2, 5)), r"at most grid=\(4, 4\)"),
    ("image_local", dict(grid=(4,), block_size=2), r"\(rows, columns\)"),
    ("image_local", dict(grid=4, block_size=2), r"\(rows, columns\)"),
    ("local", dict(implementation="cuda"), "one of auto, torch"),
    ("combined", dict(patterns=("local",)), "two or more"),
    ("combined", dict(patterns="local"), "two or more"),
    ("combined", dict(patterns=("local", "linformer")), "pattern 2: what linformer .* axial, bigbird"),
    ("combined", dict(patterns=("local", "lokal")), "pattern 2: unknown mechanism 'lokal'"),
    ("combined", dict(patterns=(["local"], "axial")), "pattern 1: .* is a list"),
    ("combined", dict(patterns=(dict(mechanism="axial", rows=3), "local")), "pattern 1: axial has no option 'rows'"),
    ("combined", dict(patterns=("local", dict(mechanism="axial", row_length=0))), "pattern 2: axial: row_length=0"),
    ("combined", dict(patterns=("local", dict(mechanism="axial", side="encoder"))), "side='encoder' of axial belongs"),
    ("combined", dict(patterns=("local", dict(row_length=3))), "pattern 2: .* names no mechanism"),
    ("combined", dict(heads=(1, 1, 1)), "2 integers ≥ 1"),
    ("combined", dict(heads=(1, 0)), "2 integers ≥ 1"),
]


@pytest.mark.parametrize(("mechanism", "options", "message"), BAD_OPTIONS)
def test_options_outside_their_range_are_refused(mechanism: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        he.attention_config(mechanism, **options)


def geometry(**facts: Any) -> AttentionGeometry:
    defaults: dict[str, Any] = dict(num_heads=12, head_dim=8, hidden_size=96, layer=0, num_layers=4, side="encoder")
    flags: dict[str, Any] = dict(is_causal=False, has_relative_bias=False, projection_bias=True, max_positions=None)
    return AttentionGeometry(**defaults | flags | facts)


BAD_PLACES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("sparse_transformer", dict(head_policy="split"), dict(num_heads=1), "head_policy='merged'"),
    ("sparse_transformer", dict(head_policy="interleaved"), dict(num_layers=1), "head_policy='merged'"),
    ("axial", dict(form="split"), dict(num_heads=1), "form='union'"),
    ("axial", dict(form="interleaved"), dict(num_layers=1), "form='union'"),
    ("image_local", dict(block_size=(4, 4)), {}, r"block_size=\(4, 4\) is possible with a grid alone"),
    ("image_local", dict(memory_size=(1, 1)), {}, r"memory_size=\(1, 1\) is possible with a grid alone"),
    ("blockwise", dict(shifts=(0, 0)), {}, "blocks never mix"),
    ("blockwise", dict(shifts=(1, 0)), dict(num_heads=1), "blocks never mix"),
    ("combined", dict(heads=(3, 2)), {}, "5 shares of 12 heads"),
    ("combined", dict(patterns=("local", dict(mechanism="blockwise", shifts=[0]))), {}, "blockwise: .* never mix"),
    (
        "combined",
        dict(patterns=("local", dict(mechanism="longformer", global_tokens="question", separator_token_id=3))),
        {},
        "name positions",
    ),
]


@pytest.mark.parametrize(("mechanism", "options", "place", "message"), BAD_PLACES)
def test_places_that_do_not_fit_are_refused(
    mechanism: str, options: dict[str, Any], place: dict[str, Any], message: str
):
    config = he.attention_config(mechanism, **options)
    (reason,) = config.attention_class.unsupported(config, geometry(**place))
    assert re.search(message, reason), reason


# ---- heads and layers --------------------------------------------------------------------------------------------


def test_shifts_are_shared_out_over_the_heads():
    default = he.attention_config("blockwise")
    assert default.head_shifts(12) == (0,) * 10 + (1,) * 2
    assert default.head_shifts(2) == (0, 1)
    assert default.head_shifts(1) == (1,)
    three = he.attention_config("blockwise", shifts=(0, 0, 0, 0, 1, 2))
    assert three.head_shifts(12) == (0,) * 8 + (1,) * 2 + (2,) * 2
    assert three.head_shifts(6) == three.shifts


def test_halves_of_heads_and_turns_of_layers():
    split = he.attention_config("axial", row_length=4, form="split")
    row, column = BlockWindow(block_size=4), Strided(stride=4)
    assert split.visible_keys(geometry(num_heads=5)) == PerHead(parts=(row, row, row, column, column))
    turns = he.attention_config("axial", row_length=4, form="interleaved")
    assert [turns.visible_keys(geometry(layer=layer)) for layer in range(3)] == [row, column, row]


# ---- combined ----------------------------------------------------------------------------------------------------


def test_configs_combine_with_a_bar():
    local = he.attention_config("local", attention_window=8, layers=(0, 2), side="encoder")
    sparse = he.attention_config("sparse_transformer", stride=4, layers=(0, 2), side="encoder")
    both = local | sparse
    assert both.mechanism == "combined"
    assert both == he.attention_config(
        "combined",
        patterns=(dict(mechanism="local", attention_window=8), dict(mechanism="sparse_transformer", stride=4)),
        layers=(0, 2),
        side="encoder",
    )
    window = Window(left=4, right=4)
    assert both.visible_keys(geometry()) == window | Window(left=3, right=3) | Strided(stride=4)
    three = both | he.attention_config("axial", layers=(0, 2), side="encoder")
    assert [part.mechanism for part in three.patterns] == ["local", "sparse_transformer", "axial"]
    with pytest.raises(ValueError, match=r"local \| axial: .* differ"):
        local | he.attention_config("axial")
    with pytest.raises(ValueError, match="linformer shows a query is no matter of positions"):
        he.attention_config("local") | he.attention_config("linformer")
    with pytest.raises(TypeError):
        local | "axial"


def test_longformer_in_a_combination_keeps_its_global_rows():
    both = he.attention_config("local", attention_window=8) | he.attention_config(
        "longformer", attention_window=4, global_tokens=(0, 3)
    )
    parts = Window(left=2, right=2) | GlobalColumns(positions=(0, 3)) | GlobalRows(positions=(0, 3))
    assert both.visible_keys(geometry()) == Window(left=4, right=4) | parts


def test_heads_get_their_share_and_count_for_themselves():
    patterns = (dict(mechanism="axial", row_length=4, form="split"), dict(mechanism="blockwise", block_size=5))
    config = he.attention_config("combined", patterns=patterns, heads=(2, 1))
    row, column = BlockWindow(block_size=4), Strided(stride=4)
    blocks = [ShiftedBlock(block_size=5, shift=shift) for shift in (0, 1)]
    expected = PerHead(parts=(row, row, column, column, *blocks))
    assert config.visible_keys(geometry(num_heads=6, is_causal=True, side="decoder")) == expected


def test_combinations_nest_and_travel_as_json():
    inner = dict(mechanism="combined", patterns=["local", dict(mechanism="blockwise", shifts=[0, 1])], heads=[1, 1])
    config = he.attention_config("combined", patterns=[inner, dict(mechanism="axial", row_length=7)], layers=[1])
    assert config.patterns[0].heads == (1, 1)
    text = json.dumps(config.to_dict())
    (again,) = attention_configs(text)
    assert again == config
    assert hash(again) == hash(config)
    assert "implementation" not in json.loads(text)["patterns"][0]
    union = he.attention_config("combined", patterns=[dict(mechanism="combined"), "bigbird"])
    assert [part.mechanism for part in union.patterns] == ["local", "axial", "bigbird"]


def test_combined_on_the_command_line():
    parts = [dict(mechanism="local", attention_window=8), "axial"]
    expected = he.attention_config("combined", patterns=parts, heads=(2, 1), side="encoder")
    given = {"patterns": json.dumps(parts), "heads": "2,1", "side": "encoder", "layers": None}
    assert chosen_configs("combined", None, given, []) == [expected]
    text = json.dumps(dict(mechanism="combined", patterns=parts, heads=[2, 1], side="encoder"))
    assert chosen_configs(text, None, {"side": None}, []) == [expected]
    with pytest.raises(ValueError, match="--side: options go into the JSON of --attention"):
        chosen_configs(text, None, {"side": "encoder"}, [])
    grid = chosen_configs("image_local", None, {"grid": "8,4", "block_size": "2,4"}, ["memory_size=1"])
    assert grid == [he.attention_config("image_local", grid=(8, 4), block_size=(2, 4), memory_size=1)]


def test_a_union_sees_what_its_parts_see():
    """With the parts' windows nested, the union is the wider one."""
    model = tiny_model("bert").double()
    inputs = inputs_for(model, length=90)
    wide = he.attention_config("local", attention_window=12)
    outputs = []
    for config in (wide, wide | he.attention_config("local", attention_window=4)):
        with he.patch_attention(model, config), torch.no_grad():
            outputs.append(model(**inputs).logits)
    assert_close(outputs[1], outputs[0], 1e-9, where=inputs["attention_mask"])


def test_an_input_longer_than_its_grid_continues_with_further_rows():
    """(2, 10) and (9, 10) are the same grid for 90 tokens, another width is another grid."""
    model = tiny_model("gpt2").double()
    inputs = inputs_for(model, length=90)
    outputs = []
    for grid in ((2, 10), (9, 10), (9, 11)):
        with he.patch_attention(model, "image_local", grid=grid, block_size=(2, 5), memory_size=1), torch.no_grad():
            outputs.append(model(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3


def test_a_summary_that_nobody_sees_is_refused_and_dropped_from_stored_configs():
    with pytest.raises(ValueError, match=r"summary_size=4 .* None with pattern='strided'"):
        he.attention_config("sparse_transformer", stride=16, summary_size=4)
    config = he.attention_config("sparse_transformer", stride=16)
    assert stored_attention([config.to_dict() | {"summary_size": 8}]) == [config.to_dict()]
    fixed = he.attention_config("sparse_transformer", pattern="fixed", stride=16, summary_size=8)
    assert stored_attention([fixed.to_dict()]) == [fixed.to_dict()]
    parts = he.attention_config(
        "combined", patterns=("local", dict(mechanism="sparse_transformer", stride=16))
    ).to_dict()
    old = [one | ({"summary_size": 8} if "summary_size" in one else {}) for one in parts["patterns"]]
    assert stored_attention([parts | {"patterns": old}]) == [parts]
