"""Affine log-features in both directions: the quadratic formula with every gradient, and nothing of tokens × features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import HEADS, WIDTH, heads, mechanism_of
from torch import Tensor

from hf_efficient.ops.affine_features import AffineFeatures, affine_attention
from hf_efficient.ops.context import AttentionContext
from hf_efficient.ops.linear_attention import linear_attention
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import assert_close


def inputs(batch: int, n: int, s: int, features: int, narrower: int = 0, shared: bool = False) -> list[Tensor]:
    """Vectors of queries and keys, values, directions of both, offsets of keys."""
    generator = torch.Generator().manual_seed(n + s)
    rows = (1, 1) if shared else (batch, HEADS)
    shapes = [(batch, HEADS, n, WIDTH), (batch, HEADS, s, WIDTH), (batch, HEADS, s, WIDTH - narrower)]
    shapes += [(*rows, features, WIDTH), (*rows, features, WIDTH), (batch, HEADS, s)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def attend(tensors: list[Tensor], keep: Tensor | None = None) -> Tensor:
    query, key, value, of_query, of_key, offset = tensors
    return affine_attention(AffineFeatures(query, of_query), AffineFeatures(key, of_key, offset), value, keep)


def by_definition(tensors: list[Tensor], keep: Tensor | None = None) -> Tensor:
    """The sum over features of each pair, not of any softmax; 0 in a row without keys."""
    query, key, value, of_query, of_key, offset = tensors
    phi_q = (query @ of_query.mT).exp()
    phi_k = (key @ of_key.mT + offset[..., None]).exp()
    weights = phi_q @ phi_k.mT
    if keep is not None:
        weights = weights * keep[:, None, None]
    total = weights.sum(-1, keepdim=True)
    return weights @ value / torch.where(total > 0, total, 1.0)


@pytest.mark.parametrize(
    ("n", "s", "features", "options"),
    [(1, 1, 1, {}), (29, 29, 37, {}), (70, 333, 300, dict(shared=True)), (63, 40, 5, dict(narrower=3))],
)
def test_output_and_every_gradient_equal_the_definition(n: int, s: int, features: int, options: dict[str, Any]):
    """Padding on both sides and inside, and a row of nothing else."""
    tensors = inputs(4, n, s, features, **options)
    keep = torch.ones(4, s, dtype=torch.bool)
    keep[0, s // 2 + 1 :] = keep[1, : s // 3] = keep[1, s // 2 : s // 2 + 3] = keep[2] = False
    for mask in (None, keep):
        actual, expected = attend(tensors, mask), by_definition(tensors, mask)
        assert_close(actual, expected, 1e-11)
        direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(0), dtype=actual.dtype)
        ours, theirs = (torch.autograd.grad((out * direction).sum(), tensors) for out in (actual, expected))
        for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            assert (one - two).abs().max() <= 1e-10 * two.abs().max().clamp(min=1), f"gradient {number}"
    assert actual[2].eq(0).all()


def test_gradients_equal_finite_differences():
    tensors = inputs(1, 2, 3, 2)
    assert torch.autograd.gradcheck(lambda *x: attend(list(x), torch.tensor([[True, False, True]])), tensors)


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0])
def test_fp32_is_as_exact_as_the_form_with_dense_features(scale: float):
    tensors = inputs(1, 100, 100, 64)
    with torch.no_grad():
        tensors = [scale * x if number < 2 else x for number, x in enumerate(tensors)]
        query, key, value, of_query, of_key, offset = (x.float() for x in tensors)
        expected = linear_attention(*_dense(tensors), tensors[2], is_causal=False)
        dense = linear_attention(*_dense([query, key, value, of_query, of_key, offset]), value, is_causal=False)
        ours = attend([query, key, value, of_query, of_key, offset])
    errors = [(x.double() - expected).abs().max() / expected.abs().max() for x in (ours, dense)]
    assert errors[0] <= 1.5 * errors[1] + 2e-7, errors


def _dense(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    query, key, _, of_query, of_key, offset = tensors
    return AffineFeatures(query, of_query).dense(), AffineFeatures(key, of_key, offset).dense()


@pytest.mark.parametrize(
    ("name", "options"), [("performer", dict(num_features=256)), ("random_feature", dict(num_features=256))]
)
def test_mechanisms_hold_nothing_of_tokens_times_features(name: str, options: dict[str, Any]):
    n = 1024
    mechanism, tensors = mechanism_of(name, **options), [x.requires_grad_() for x in heads(1, HEADS, n, WIDTH)]
    keep = torch.arange(n)[None] < n - 50
    context = AttentionContext(is_causal=False, scaling=0.3, key_padding_mask=keep)
    with LargestTensor() as recorder:
        mechanism(*tensors, context).sum().backward()
    assert recorder.numel <= HEADS * n * (WIDTH + 16), recorder.shape


def test_compiles_to_one_graph_for_any_length():
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9):
        tensors, found = inputs(2, n, n, 3), []
        for function in (attend, compiled):
            out = function(tensors, torch.arange(n).expand(2, -1) > 0)
            found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
        for one, two in zip(*found, strict=True):
            assert_close(one, two, 1e-12)


def test_odd_strides():
    """Heads whose last axis is not dense, and a gradient that comes back broadcast: the kernel would read elsewhere."""
    tensors = inputs(2, 20, 20, 6)
    transposed = [x.detach().mT.contiguous().mT.requires_grad_() if x.dim() == 4 else x for x in tensors]
    found = []
    for given in (tensors, transposed):
        out = attend(given)
        found.append((out, *torch.autograd.grad(out.sum(), given)))
    for one, two in zip(*found, strict=True):
        assert_close(one, two, 1e-12)


class Encoder(torch.nn.Module):
    def __init__(self, mechanism: Any):
        super().__init__()
        self.mechanism = mechanism

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        context = AttentionContext(is_causal=False, scaling=0.3, key_padding_mask=keep)
        out: Tensor = self.mechanism(query, key, value, context)
        return out


@pytest.mark.parametrize("name", ["performer", "random_feature", "linear_transformer"])
@torch.no_grad()
def test_mechanisms_export_for_any_batch_and_length(name: str):
    """As graphs for other runtimes, without PyTorch's own kernel."""
    module = Encoder(mechanism_of(name))
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("length", min=2, max=5000)}
    axes = (sizes, sizes, sizes, {0: sizes[0], 1: sizes[2]})
    example = (*heads(3, HEADS, 20, WIDTH), torch.ones(3, 20, dtype=torch.bool))
    program = torch.export.export(module, example, dynamic_shapes=axes)
    assert "flash_attention" not in str(program.graph)
    for batch, n in ((2, 7), (5, 1030)):
        keep = torch.arange(n) < torch.tensor([n - 5, 0, *[n] * (batch - 2)])[:, None]
        given = (*heads(batch, HEADS, n, WIDTH), keep)
        assert_close(program.module()(*given), module(*given), 1e-11)
