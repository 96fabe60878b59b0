"""Reversible layers against the same layers with stored activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_efficient.testing import assert_close
from hf_efficient.training.reversible import ReversibleSequence

WIDTH = 6


class Mixing(nn.Module):
    """A layer with attention over tokens and dropout."""

    def __init__(self, dropout: float):
        super().__init__()
        self.norm, self.project, self.dropout = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.dropout((y @ y.mT).softmax(-1) @ self.project(y))


def layers_of(depth: int, dropout: float = 0.0) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    return [
        (Mixing(dropout), nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, WIDTH)))
        for _ in range(depth)
    ]


def stored(pairs: list[tuple[nn.Module, nn.Module]], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    for f, g in pairs:
        first = first + f(second)
        second = second + g(first)
    return first, second


def streams() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def results(run: Any, parameters: list[Tensor]) -> list[Tensor]:
    """Outputs and every gradient; both streams count, unequally."""
    inputs = streams()
    torch.manual_seed(5)
    first, second = run(*inputs)
    torch.rand(3)  # whoever draws numbers in between must not matter
    loss = first.square().sum() + (second * torch.arange(WIDTH)).sum()
    return [first, second, *torch.autograd.grad(loss, [*inputs, *parameters])]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("depth", [1, 2, 12])
def test_gradients_equal_those_of_stored_layers(depth: int, dropout: float):
    """With dropout, masks are drawn again from the same states, and the generator goes on as if they had not been."""
    pairs = layers_of(depth, dropout)
    model = ReversibleSequence(pairs).double()
    parameters = list(model.parameters())
    expected = results(lambda *x: stored(pairs, *x), parameters)
    following = torch.rand(1)
    actual = results(model, parameters)
    assert torch.equal(torch.rand(1), following)
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one, other, 1e-12, f"result {number}")


def test_frozen_and_unused_parameters_and_streams():
    """A frozen module, a parameter that takes no part, and a stream without gradient, all as autograd has them."""
    pairs = layers_of(3)
    model = ReversibleSequence(pairs).double()
    pairs[1][0].requires_grad_(False)
    model.pairs[2][0].register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    first, second = streams()
    found = []
    for run in (lambda *x: stored(pairs, *x), model):
        model.zero_grad()
        first.grad = None
        sum(x.square().sum() for x in run(first, second.detach())).backward()
        found.append([first.grad.clone(), *(p.grad if p.grad is None else p.grad.clone() for p in model.parameters())])
    for other, one in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, 1e-12)


def test_one_module_in_two_places():
    f, g = layers_of(1)[0]
    pairs = [(f, g), (f, f)]
    model = ReversibleSequence(pairs).double()
    parameters = list(model.parameters())
    assert len(parameters) == len({*f.parameters(), *g.parameters()})
    for one, other in zip(results(model, parameters), results(lambda *x: stored(pairs, *x), parameters), strict=True):
        assert_close(one, other, 1e-12)


def held(run: Any) -> int:
    """Elements that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = run(*streams())
        del outputs
    return sum(kept.values())


def test_activations_do_not_grow_with_depth():
    few, many = (ReversibleSequence(layers_of(depth)).double() for depth in (2, 16))
    assert held(few) == held(many) == 2 * streams()[0].numel()
    shallow, deep = (held(lambda *x, d=depth: stored([(f.double(), g.double()) for f, g in layers_of(d)], *x))
                     for depth in (2, 16))  # fmt: skip
    assert deep > 4 * shallow


def test_autocast_is_the_same_the_second_time():
    """Backward runs outside the context; the recomputation must be in bf16 as well."""
    pairs = layers_of(2)
    model = ReversibleSequence(pairs)
    parameters = list(model.parameters())
    found = []
    for run in (model, lambda *x: stored(pairs, *x)):
        inputs = [x.detach().float().requires_grad_() for x in streams()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(*inputs)
        assert out[0].dtype == torch.float32
        found.append(torch.autograd.grad(sum(x.square().sum() for x in out), [*inputs, *parameters]))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 2e-2)


def test_impossible_calls_are_refused():
    with pytest.raises(ValueError, match="no layers"):
        ReversibleSequence([])
    model = ReversibleSequence([(nn.Linear(4, 1), nn.Identity())])
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\)"):
        model(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"Linear made \(2, 1\) of \(2, 4\)"):
        model(torch.zeros(2, 4), torch.zeros(2, 4))
