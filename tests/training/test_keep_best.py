"""The guard against divergence: no layer ends worse than it began."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transfers import END_TO_END, linformer

from hf_efficient.testing import inputs_for
from hf_efficient.training import AttentionTransfer, KeepBest, trainable


@pytest.mark.parametrize("options", [{}, {"sharing": "layerwise"}])
def test_no_layer_ends_worse_than_it_began(options: dict[str, Any]):
    model = linformer(**options)
    inputs, others = inputs_for(model), inputs_for(model, seed=5)
    with AttentionTransfer(model) as transfer:
        guard = KeepBest(transfer, [others])
        before = guard.measure()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=300.0)
        for _ in range(5):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        diverged = guard.update()
        guard.restore()
        after = guard.measure()
    assert any(diverged[name] > before[name] for name in before), "nothing diverged, so this shows nothing"
    if options:
        # one set of parameters serves all layers, so their mean is what counts
        before, after = ({"mean": sum(x.values()) / len(x)} for x in (before, after))
    assert all(after[name] <= before[name] for name in before)


def test_the_guard_keeps_each_layers_own_best():
    model = linformer("bert")
    inputs = inputs_for(model)
    with AttentionTransfer(model) as transfer:
        guard = KeepBest(transfer, [inputs])
        first, second = transfer.layers
        start = {name: [p.detach().clone() for p in transfer.parameters(name)] for name in (first, second)}
        optimizer = torch.optim.Adam(transfer.parameters(first), lr=1e-3)
        model(**inputs).loss.backward()
        optimizer.step()
        with torch.no_grad():
            transfer.parameters(second)[0].fill_(float("nan"))
        good = [p.detach().clone() for p in transfer.parameters(first)]
        before = list(guard.best)
        assert guard.update()[first] < before[0]
        state = guard.state_dict()
        with torch.no_grad():
            transfer.parameters(first)[0].zero_()
        other = KeepBest(transfer, [inputs])
        other.load_state_dict(state)
        other.restore()
        assert all(torch.equal(p, q) for p, q in zip(transfer.parameters(first), good, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(transfer.parameters(second), start[second], strict=True))
    with pytest.raises(ValueError, match="not active"):
        guard.measure()


def test_the_guard_end_to_end_is_one_for_the_whole_model():
    model = linformer()
    trainable(model, "attention")
    inputs = inputs_for(model)
    with AttentionTransfer(model, END_TO_END) as transfer:
        guard = KeepBest(transfer, [inputs])
        before = guard.measure()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
        assert guard.update()["model"] > before["model"]
        guard.restore()
        assert guard.measure() == before
