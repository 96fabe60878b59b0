"""Hooks with state beside them: each part is detached alone, without a trace, on copies too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hf_efficient.patching.hooks import HOOK_STATE, attach, detach, state_of, without_mechanisms


class Factor:
    def __init__(self, factor: float):
        self.factor = factor

    def without_mechanism(self) -> Factor:
        return Factor(1.0)


def scale_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (args[0] * state_of(module, "scale").factor,), kwargs


def add_one(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return output + 1


def users_own(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output * 10


def traces(model: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [(sorted(vars(m)), [len(vars(m)[name]) for name in names]) for m in model.modules()]


@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle"])
def test_parts_come_off_one_by_one(way: str) -> None:
    model: Any = nn.Sequential(nn.Identity())
    model[0].register_forward_hook(users_own)
    x, before = torch.ones(2), traces(model)
    attach(model[0], "scale", Factor(3.0), before=scale_input)
    attach(model[0], "shift", after=add_one, after_first=True)
    if way != "itself":
        model = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(model(x), 10 * (3 * x + 1))
    with without_mechanisms(model):
        assert torch.equal(model(x), 10 * (x + 1))
    assert torch.equal(model(x), 10 * (3 * x + 1))
    detach(model, "scale", "never attached")
    assert state_of(model[0], "scale") is None
    assert torch.equal(model(x), 10 * (x + 1))
    detach(model, "shift")
    assert torch.equal(model(x), 10 * x), "the user's own hook stays"
    assert traces(model) == before
    assert HOOK_STATE not in vars(model[0])


def test_state_is_back_after_an_exception() -> None:
    model = nn.Identity()
    state = Factor(2.0)
    attach(model, "scale", state, before=scale_input)
    with pytest.raises(KeyError), without_mechanisms(model):
        assert state_of(model, "scale").factor == 1.0
        raise KeyError
    assert state_of(model, "scale") is state
