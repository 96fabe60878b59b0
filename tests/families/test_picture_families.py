"""Encoders of pictures: windows in two axes, class and register tokens in front, and pictures of other sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel

import hf_efficient as he
from hf_efficient.attention.base.registry import stored_attention
from hf_efficient.families import families
from hf_efficient.ops.block_sparse import torch_backend
from hf_efficient.testing import assert_close, tiny_model

PATCH = 8
# model type: tokens in front of the patches
PREFIX = {"vit": 1, "deit": 2, "dinov2_with_registers": 5, "dinov3_vit": 1, "siglip_vision_model": 0}
# options, and what they mean: (height, width) of a block and (rows, columns) around it
WINDOWS: dict[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "axial": ({}, ()),
    "image_local": (dict(block_size=(2, 3), memory_size=(1, 2)), ((2, 3), (1, 2))),
}


def pictures(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()


def dense(model: Any, seen: Tensor, pixels: Tensor, **call: Any) -> Tensor:
    """The output of the unconverted model with a mask of tokens × tokens in its softmax."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_window", attend)
    AttentionMaskInterface.register("dense_window", lambda *args, **kwargs: None)
    model.set_attn_implementation("dense_window")
    out: Tensor = model(pixels, **call)[0]
    model.set_attn_implementation("eager")
    return out


def seen(grid: tuple[int, int], prefix: int, window: tuple[tuple[int, int], ...]) -> Tensor:
    """Rows and columns of a picture (no window), or blocks and what is around them; all see the tokens in front."""
    rows, columns = grid
    mask = torch.ones(prefix + rows * columns, prefix + rows * columns, dtype=torch.bool)
    places = list(itertools.product(range(rows), range(columns)))
    for (i, (y, x)), (j, (v, u)) in itertools.product(enumerate(places), enumerate(places)):
        if window:
            (height, width), (above, beside) = window
            top, left = y - y % height, x - x % width
            near = top - above <= v < top + height + above and left - beside <= u < left + width + beside
        else:
            near = y == v or x == u
        mask[prefix + i, prefix + j] = near
    return mask


@pytest.mark.parametrize("mechanism", WINDOWS)
@pytest.mark.parametrize(
    "model_type", [name for name in PREFIX if name in families()]
)  # older transformers know fewer
def test_windows_lie_in_the_grid_of_each_call(model_type, mechanism, monkeypatch):
    """Of the size that the config names, and of another one; in one dense tile and by tables of tiles; with gradients."""
    model = tiny_model(model_type, layers=1).double()
    options, window = WINDOWS[mechanism]
    for size, share in (((64, 64), 0.4), ((48, 80), 0.4), ((48, 80), -1.0)):
        grid = (size[0] // PATCH, size[1] // PATCH)
        interpolates = size != (64, 64) and not model_type.startswith("dino")
        call = {"interpolate_pos_encoding": True} if interpolates else {}
        monkeypatch.setattr(torch_backend, "DENSE_SHARE", share)
        gradients = []
        for converted in (False, True):
            pixels = pictures(*size).requires_grad_()
            if converted:
                with he.patch_attention(model, mechanism, **options):
                    out = model(pixels, **call)[0]
            else:
                out = expected = dense(model, seen(grid, PREFIX[model_type], window), pixels, **call)
            gradients += torch.autograd.grad(out.cos().sum(), pixels)
        assert_close(out, expected, 1e-9, f"{size}")
        assert_close(gradients[1], gradients[0], 1e-9, f"{size}, gradients")


@torch.no_grad()
def test_a_config_with_pictures_that_are_not_square():
    model = tiny_model("vit", image_size=(32, 48)).double()
    pixels = pictures(32, 48)
    expected = dense(model, seen((4, 6), 1, ()), pixels)
    with he.patch_attention(model, "axial"):
        assert_close(model(pixels)[0], expected, 1e-9)
    with pytest.raises(ValueError, match="interpolates the positions of square pictures alone"):
        he.convert(model, "axial", max_positions=100)


@torch.no_grad()
def test_hidden_patches_leave_the_others_where_they_are():
    model = tiny_model("vit", layers=1).double()
    pixels, mask = pictures(64, 64), torch.ones(2, 65, dtype=torch.long)
    mask[1, :12] = 0
    visible = (seen((8, 8), 1, ()) & mask[:, None].bool())[:, None] | torch.eye(65, dtype=torch.bool)
    expected = dense(model, visible, pixels, attention_mask=mask)
    with he.patch_attention(model, "axial"):
        assert_close(model(pixels, attention_mask=mask)[0], expected, 1e-9, where=mask)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["vit", "dinov3_vit"])
def test_larger_pictures_are_interpolated_by_the_host(model_type, tmp_path):
    model, small, large = tiny_model(model_type), pictures(64, 64).float(), pictures(96, 96).float()
    other = {} if model_type == "dinov3_vit" else {"interpolate_pos_encoding": True}
    expected = model(small)[0], model(large, **other)[0]
    result = he.convert(model, "local", attention_window=400, max_positions=145)
    assert (result.report.max_positions, result.report.short_inputs) == (145, "unchanged")
    loaded = AutoModel.from_pretrained(result.save(tmp_path / "saved")).eval()
    for one in (result.model, loaded):
        assert_close(one(small)[0], expected[0], 1e-5)
        assert_close(one(large)[0], expected[1], 1e-5)
        with pytest.raises(ValueError, match=r"13 × 13 patches are 170 tokens.*max_positions=170"):
            one(pictures(104, 104).float())
    he.revert(model)
    assert torch.equal(model(large, **other)[0], expected[1]) and "efficient_max_positions" not in vars(model.config)
    fixed = he.convert(model, "linformer", rank=8, max_positions=145).model
    assert fixed(large)[0].shape == expected[1].shape


REFUSED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str]] = {
    "other columns": ("vit", {}, "axial", dict(row_length=7), "row_length=7: this host has 8 patches per row"),
    "another grid": ("vit", {}, "image_local", dict(grid=(4, 4), block_size=2), "8 × 8 patches: leave it out"),
    "a large block": ("vit", {}, "image_local", {}, "block_size=256 does not fit into 8 × 8"),
    "no order": ("vit_mae", {}, "axial", {}, "do not lie in one grid"),
    "a grid for each picture": ("siglip2_vision_model", {}, "image_local", {}, "do not lie in one grid"),
    "a bias over both axes": (
        "beit",
        dict(use_relative_position_bias=True),
        "local",
        {},
        "use_relative_position_bias",
    ),
    "fewer positions": ("vit", {}, "local", dict(max_positions=64), "would drop positions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(case):
    model_type, fields, mechanism, options, message = REFUSED[case]
    model = tiny_model(model_type, layers=1, **fields)
    with pytest.raises(ValueError, match=message):
        he.convert(model, mechanism, **options)
    assert not type(model).__name__.startswith("Efficient")


@torch.no_grad()
def test_the_decoder_of_masked_pretraining_stays_exact(tmp_path):
    sizes = dict(image_size=64, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    decoder = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **decoder)).eval()
    pixels, noise = pictures(64, 64).float(), torch.rand(2, 64)
    expected = model(pixels, noise=noise).logits
    model = he.convert(model, "local", attention_window=200).model
    assert_close(model(pixels, noise=noise).logits, expected, 1e-5)


def test_a_stored_line_stays_a_line():
    line = dict(mechanism="image_local", block_size=4, memory_size=2, layers=None, side=None, implementation="auto")
    for stored in (line, line | {"grid": None}):
        assert stored_attention([stored])[0]["grid"] is None
    model, pixels = tiny_model("vit", layers=1).double(), pictures(64, 64)
    with he.patch_attention(model, "image_local", block_size=4, memory_size=2, grid=None), torch.no_grad():
        actual = model(pixels)[0]
    start = torch.arange(65)[:, None] // 4 * 4
    offset = torch.arange(65) - start
    assert_close(actual, dense(model, (offset >= -2) & (offset < 6), pixels), 1e-9)
