"""Pictures of patterns: the shares, figures and colours against the pair-by-pair definitions, and the `show` command."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from cases import CASES
from command_line import document, error, run
from masks import PATTERNS
from paths import ROOT
from torch import Tensor
from typer.main import get_command

import hf_efficient as he
from hf_efficient.cli.app import app
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.visualize.render import as_figure, named_parts, shade
from hf_efficient.visualize.show import PatternPicture
from hf_efficient.visualize.visibility import BLOCK, drawable_mechanisms

HEADS, LAYERS = 4, 2
SETTINGS = [
    (name, number, causal)
    for name in sorted(PATTERNS)
    for number in range(1 + len(CASES[name].variants))
    for causal in (False, True)
]


@cache
def drawn(name: str, variant: int, causal: bool, length: int) -> PatternPicture:
    """In layer 1 of 2, so that options per layer count."""
    options = (CASES[name].small, *CASES[name].variants)[variant]
    return he.show(name, length=length, is_causal=causal, num_heads=HEADS, layer=1, num_layers=LAYERS, **options)


@cache
def pairs_of(config: he.EfficientAttentionConfig, geometry: he.AttentionGeometry, n: int) -> Tensor:
    """(H, n, n): what every head sees, by the definitions that use no pattern of the library."""
    mechanism = SimpleNamespace(config=config, geometry=geometry, pattern=config.visible_keys(geometry))  # type: ignore[attr-defined]
    mask = PATTERNS[config.mechanism](mechanism, torch.ones(1, n, dtype=torch.bool), geometry.is_causal)
    return mask.expand(1, geometry.num_heads, n, n)[0] if mask.dim() == 4 else mask.expand(geometry.num_heads, n, n)


def cells(mask: Tensor, height: int, width: int) -> Tensor:
    """The share of True in every cell."""
    return torch.stack(
        [
            torch.stack([cell.double().mean() for cell in rows.split(width, dim=1)])
            for rows in mask.split(height, dim=0)
        ]
    )


# ---- the picture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("name, variant, causal", SETTINGS)
def test_text_shows_what_the_definition_says(name, variant, causal, length):
    picture = drawn(name, variant, causal, length)
    mask = pairs_of(picture.config, picture.geometry, length)
    lines = str(picture).splitlines()
    boxes: list[list[str]] = []
    for line in lines:
        if line.startswith("┌"):
            current = [[] for _ in line.split("  ")]
            boxes += current
        elif line.startswith("│"):
            for box, row in zip(current, re.findall("│([^│]*)│", line), strict=True):
                box.append(row)
    assert len(boxes) == min(4, len(picture.panels))
    most = 64 if len(picture.panels) == 1 else 32
    width = next(size for size in (1, 2, 4, 8) if length <= size * most)
    for panel, box in zip(picture.panels, boxes, strict=False):
        repeat = len(box[0]) // -(-length // width)
        expected = cells(mask[panel.heads[0]], 2 * width // repeat, width)
        assert box == ["".join(shade(s) * repeat for s in row) for row in expected.tolist()]
        assert len(box[0]) <= most and abs(len(box[0]) - 2 * len(box)) <= 1


def test_shades():
    assert [shade(s) for s in (0, 1e-9, 0.333, 0.334, 0.666, 0.667, 1 - 1e-9, 1)] == list(" ░░▒▒▓▓█")


@pytest.mark.parametrize("name, variant, causal", SETTINGS)
def test_figures(name, variant, causal):
    length = 100
    picture = drawn(name, variant, causal, length)
    mask, facts = pairs_of(picture.config, picture.geometry, length), picture.facts
    count = torch.stack([cells(head, BLOCK, BLOCK) for head in mask])
    assert facts["pairs"] == int(mask.sum())
    assert facts["share"] == pytest.approx(mask.double().mean().item(), rel=1e-12)
    assert facts["tiles"] == int((count > 0).sum()) and facts["possible_tiles"] == 4
    # a tile at the end is never full: the kernels must look at its mask
    full = count[:, :1, :1] == 1
    assert facts["full_tiles"] == int(full.sum()) == facts["tiles"] - facts["masked_tiles"]
    masks = set()
    for head in torch.nn.functional.pad(mask, (0, 28, 0, 28)):
        for tile in head.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).reshape(-1, BLOCK, BLOCK):
            if tile.any() and not tile.all():
                masks.add(tile.numpy().tobytes())
    assert facts["distinct_masks"] == len(masks)

    # every head is in one panel, with all heads that see the same
    assert sorted(head for panel in picture.panels for head in panel.heads) == list(range(HEADS))
    for panel in picture.panels:
        assert [h for h in range(HEADS) if mask[h].equal(mask[panel.heads[0]])] == list(panel.heads)
        assert panel.pairs == int(mask[panel.heads[0]].sum())
    json.dumps(facts)


@pytest.mark.parametrize(
    "name, options, kept",
    [
        ("local", dict(attention_window=8), 7),
        ("local", dict(attention_window=6, dilation=3), 15),
        ("longformer", dict(attention_window=8, global_tokens=(0, 5)), 9),
        ("image_local", dict(block_size=8, memory_size=5), 3 + 5),
        ("bigbird", dict(block_size=4, num_random_blocks=0), 4 + 4 + 3),
        ("bigbird", dict(block_size=4, num_random_blocks=1), 35),
        ("axial", dict(row_length=6), 35),
        # later queries need only the summaries and the last block, but more and more of them
        ("sparse_transformer", dict(pattern="fixed", stride=10, summary_size=2), 35),
    ],
)
def test_keys_that_a_cache_keeps(name, options, kept):
    picture = he.show(name, length=35, is_causal=True, num_heads=2, **options)
    assert picture.facts["kept_keys"] == kept
    assert str(picture).endswith(f"keys that a cache keeps of 35: {kept}")
    if kept < 35:
        # none that a later query sees is missing, and none is too many: three times the length is enough to see
        later = pairs_of(picture.config, picture.geometry, 105)[:, 35:, :35].any(0).any(0)
        assert int(later.sum()) == kept
    assert he.show(name, length=35, num_heads=2, **options).kept_keys is None


@pytest.mark.parametrize("name", ["local", "longformer", "bigbird", "blockwise", "image_local", "axial"])
def test_long_rows_need_no_square_mask(name):
    n = 2**16
    with LargestTensor() as recorder:
        picture = he.show(name, length=n, num_heads=2)
        text = str(picture)
        as_figure(picture)
    assert recorder.numel < 2**21, f"{recorder.shape}"
    assert max(map(len, text.splitlines())) < 160
    if name == "local":
        # 256 on both sides, cut off at both ends
        assert picture.panels[0].pairs == n * 513 - 256 * 257


@pytest.mark.parametrize("causal", [False, True])
def test_cells_larger_than_tiles(causal):
    picture = he.show("sparse_transformer", stride=100, head_policy="split", length=2100, is_causal=causal)
    position = torch.arange(2100)
    for panel in picture.panels:
        mask = panel.pattern.visible(position[:, None], position)
        mask = mask.tril() if causal else mask
        assert torch.equal(picture.shares(panel.pattern, 256, 128), cells(mask, 256, 128))


def test_panels_are_named_and_limited():
    lines = str(he.show("blockwise", block_size=16, length=64)).splitlines()
    assert lines[1].split("  ")[0] == "heads 0–9: 25 %" and lines[1].endswith("heads 10–11: 25 %")
    lines = str(he.show("bigbird", block_size=4, length=128)).splitlines()
    assert sum(line.count("┌") for line in lines) == 4
    assert "8 more patterns, of other heads, are not drawn" in lines
    # with so few blocks all are seen, whatever was drawn
    assert len(he.show("bigbird", block_size=4, length=16).panels) == 1
    picture = he.show("combined", patterns=("local", "axial"), heads=(1, 1), length=512, num_heads=2)
    assert [panel.heads for panel in picture.panels] == [(0,), (1,)]


def test_extra_tokens_are_mentioned():
    picture = he.show("bigbird", form="etc", num_global_tokens=3, block_size=8, length=64)
    assert picture.facts["extra_tokens"] == 3
    assert "3 extra tokens, which see and are seen by all, are not drawn" in str(picture).splitlines()


# ---- PNG ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, variant, causal", SETTINGS)
def test_parts_are_the_whole(name, variant, causal):
    picture = drawn(name, variant, causal, 100)
    for panel in picture.panels:
        parts = [picture.shares(part, 1, 1) for part in named_parts(panel.pattern, 100).values()]
        assert torch.equal(torch.stack(parts).amax(0), picture.shares(panel.pattern, 1, 1))


def test_parts_that_share_a_name_are_numbered():
    config = he.attention_config("local", attention_window=4) | he.attention_config("local", attention_window=8)  # type: ignore[operator]
    (panel,) = he.show(config, length=40).panels
    assert list(named_parts(panel.pattern, 40)) == ["window", "window 2"]


def test_colours_name_the_part():
    picture = he.show("bigbird", block_size=8, num_random_blocks=1, length=96, num_heads=1)
    figure = as_figure(picture)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["neighbouring blocks", "global blocks", "random blocks"]
    legend = [torch.tensor(patch.get_facecolor()[:3]) for patch in figure.legends[0].get_patches()]
    image = torch.tensor(figure.axes[0].images[0].get_array())
    mask = pairs_of(picture.config, picture.geometry, 96)[0]
    blocks = torch.arange(96) // 8
    row, column = blocks[:, None], blocks
    ends = (row == 0) | (row == 11) | (column == 0) | (column == 11)
    near = ((row - column).abs() <= 1) & ~ends
    for where, colour in (
        (near, legend[0]),
        (ends, legend[1]),
        (mask & ~near & ~ends, legend[2]),
        (~mask, torch.ones(3)),
    ):
        assert where.any()
        assert torch.allclose(image[where], colour.double(), atol=1e-6)


def test_thin_lines_stay_visible():
    picture = he.show("longformer", attention_window=64, global_tokens="first", length=8192)
    image = torch.tensor(as_figure(picture).axes[0].images[0].get_array())
    assert image.shape == (256, 256, 3)
    assert (image[:, 0].amin(-1) < 0.7).all() and (image[0].amin(-1) < 0.7).all()
    assert (image[100, 10:90] == 1).all()


@pytest.mark.parametrize(
    "options, panels",
    [
        (dict(config="local"), 1),
        (dict(config="axial", form="split"), 2),
        (dict(config="bigbird", block_size=8, num_heads=6), 4),
    ],
)
def test_png(options, panels, tmp_path):
    from matplotlib.image import imread

    picture = he.show(**options, length=256)
    path = picture.save(tmp_path / "new" / "picture.png")
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]
    figure = as_figure(picture)
    assert len(figure.axes) == panels and len({axes.get_title() for axes in figure.axes}) == panels
    image = imread(path)
    height, width = (130 * size for size in reversed(figure.get_size_inches()))
    assert abs(image.shape[0] - height) <= 1 and abs(image.shape[1] - width) <= 1
    figure.draw_without_rendering()
    for axes in figure.axes:
        (left, bottom), (right, top) = axes.get_position().get_points()
        place = image[
            round(height * (1 - top)) : round(height * (1 - bottom)), round(width * left) : round(width * right)
        ]
        assert 0.01 < (place[..., :3].std(axis=-1) > 0.05).mean() < 1, "a panel without colours"


def test_files_are_overwritten_on_demand_only(tmp_path):
    picture, path = he.show("local", length=64), tmp_path / "picture.png"
    path.write_bytes(b"something else")
    with pytest.raises(FileExistsError, match="--overwrite"):
        picture.save(path)
    assert path.read_bytes() == b"something else"
    assert picture.save(path, overwrite=True).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = he.show("local", length=64)
    assert "█" in str(picture)
    with pytest.raises(ImportError, match=r"pip install hf-efficient\[demo\]"):
        picture.save(tmp_path / "picture.png")
    assert "[demo]" in error("show", "local", "--length", 64, "--out", tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


# ---- refusals ----------------------------------------------------------------------------------------------------


WINDOWED = ("etc", "hedgehog", "longt5", "reformer", "routing_transformer", "t2r")


@pytest.mark.parametrize("name", sorted(set(CASES) - set(PATTERNS)))
def test_mechanisms_without_a_pattern_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no picture") as refused:
        he.show(name)
    assert str(refused.value).endswith(f"have one: {', '.join(sorted(PATTERNS))}.")
    assert ("the one that local draws" in str(refused.value)) == (name in WINDOWED)
    assert sorted(PATTERNS) == drawable_mechanisms()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(config="local", length=0), r"length=0 is not possible"),
        (dict(config="local", num_heads=0), r"num_heads=0 is not possible"),
        (dict(config="local", num_layers=0), r"num_layers=0 is not possible"),
        (dict(config="local", layer=12), r"layer=12 does not exist among 12 layers"),
        (dict(config="local", layer=-1), r"layer=-1 does not exist"),
        (dict(config=["local", "axial"]), r"shows one mechanism, and here are 2"),
        (dict(config="local", rank=3), r"local has no option 'rank'"),
        (dict(config="flash"), r"unknown mechanism 'flash'"),
        (
            dict(config="axial", form="split", num_heads=1),
            r"axial can't be drawn like this: form='split' needs at least 2",
        ),
        (
            dict(config="longformer", global_tokens="question", separator_token_id=2),
            r"depends on the text: give positions",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        he.show(**options)


# ---- the command -------------------------------------------------------------------------------------------------


def test_command_prints_the_picture():
    options = ["--length", 300, "--attention-window", 64, "--global-tokens", "first", "--causal", "--num-heads", 3]
    picture = he.show(
        "longformer", length=300, is_causal=True, num_heads=3, attention_window=64, global_tokens="first"
    )
    assert run("show", "longformer", *options).stdout == f"{picture}\n"
    assert document("show", *options, "longformer") == {"out": None, **picture.facts}


def test_command_takes_layers_files_and_json(tmp_path):
    out = tmp_path / "picture.png"
    options = ["--length", 64, "--num-layers", 2, "--layer", 1, "--option", "attention_window=4,16"]
    given = document("show", "longformer", *options, "--out", out)
    assert given["out"] == str(out) and out.read_bytes().startswith(b"\x89PNG")
    expected = he.show("longformer", attention_window=(4, 16), length=64, num_layers=2, layer=1)
    assert given["pairs"] == expected.facts["pairs"] > 12 * 64 * 10
    assert "exists; choose another name" in error("show", "longformer", *options, "--out", out)
    assert f"written to {out}" in run("show", "longformer", *options, "--out", out, "--overwrite").stdout

    text = json.dumps({"mechanism": "combined", "patterns": ["local", "axial"], "heads": [1, 2]})
    alike = document("show", "combined", "--heads", "1,2", "--patterns", '["local", "axial"]')
    assert document("show", text) == alike
    assert [panel["heads"] for panel in alike["panels"]] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["linformer", "--rank", 3], "linformer has no picture"),
        (["flash"], "unknown mechanism 'flash'"),
        (
            ["local", "--bananas", 3],
            "no option --bananas; the options of local are --attention-window, --dilation, --sink-tokens.",
        ),
        (["--bananas", 3, "local"], "no option --bananas; the options of all mechanisms together are"),
        (
            ["local", "--layers", "0"],
            "no option --layers (did you mean '--layer' or '--num-layers'?); the options of local are --attention-window",
        ),
        (["local", "--row-length", 3], "local has no option --row-length"),
        (["local", "more"], "unexpected argument 'more'; show takes MECHANISM."),
        (["local", "--attention-window", 7], "attention_window=7 is not possible"),
        (["local", "--length", -5], "length=-5 is not possible"),
        (["local", "--out", "picture.jpg"], "give a name that ends in .png"),
        (["bigbird", "--form", "etc", "--causal"], "bigbird can't be drawn like this"),
    ],
)
def test_command_errors(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error("show", *arguments)
    assert not list(tmp_path.iterdir())


def test_every_option_of_every_pattern_has_its_name():
    command = get_command(app).commands["show"]  # type: ignore[attr-defined]
    flags = {flag for parameter in (*command.params, *command.mechanism_options()) for flag in parameter.opts}
    own = set(inspect.signature(he.show).parameters)
    for name in drawable_mechanisms():
        fields = {field.name for field in dataclasses.fields(he.get_mechanism(name).Config)}
        assert not {"--" + f.replace("_", "-") for f in fields - {"layers", "side", "implementation"}} - flags
        assert not own & fields, "these would mean two things"
    assert "--rank" not in flags and "--layers" not in flags


def test_names_of_the_package():
    import hf_efficient.ops.backend
    import hf_efficient.visualize.show

    # a module of the same name would take the place of the function
    assert he.show is hf_efficient.visualize.show.show
    assert he.set_implementation is hf_efficient.ops.backend.set_implementation


def test_documentation_shows_a_real_picture():
    readme = (ROOT / "docs" / "choosing.md").read_text()
    command = "hf-efficient show longformer --length 1024 --attention-window 256 --global-tokens first"
    assert command in readme
    assert f"```text\n{he.show('longformer', length=1024, attention_window=256, global_tokens='first')}\n```" in readme
