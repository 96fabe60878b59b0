"""The stock class with the longer position table and full attention: what serves anywhere."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.exporting.target import Converted, Target, TensorReport
from hf_efficient.families import HostModel
from hf_efficient.models.config import names_of
from hf_efficient.models.in_place import convert_in_place, revert
from hf_efficient.models.provenance import Provenance, runs
from hf_efficient.patching.exact import exact_attention
from hf_efficient.patching.extra_tokens import PART
from hf_efficient.patching.hooks import state_of
from hf_efficient.patching.names import MODULE_NAME


class StockTarget(Target):
    """The class that was converted, on the positions that the converted model has, without its mechanisms."""

    name = "stock"
    has_distance = True

    def __init__(self, accept_loss: bool = False):
        self.accept_loss = accept_loss

    def refusals(self, source: Converted) -> list[str]:
        reasons = []
        trained = [] if self.accept_loss else trained_parameters(source)
        if trained:
            reasons.append(
                f"{len(trained)} parameters of its attention were trained, e.g. {trained[0]}, and the stock class has no "
                "place for them: accept the loss with accept_loss=True (--accept-loss), which measures it, or export to a "
                "class that has them"
            )
        return reasons + self._extra_tokens(source)

    def _extra_tokens(self, source: Converted) -> list[str]:
        with_tokens = [stack.side for stack in source.host.stacks if state_of(stack.module, PART)]
        return [
            f"the {side} has learned tokens in front of its input, which no stock class has: convert with "
            "num_global_tokens=0"
            for side in with_tokens
        ]

    def build(self, source: Converted) -> tuple[PreTrainedModel, TensorReport]:
        model = stock_model(source)
        ours, extended = source.model.state_dict(), _as_long_as_the_longest(model)
        report = {
            name: {"status": "extended" if name in extended else "copied", "from": name, "shape": list(tensor.shape)}
            for name, tensor in model.state_dict().items()
        }
        changed = [
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor[: len(ours[name])] if name in extended else tensor, ours[name])
        ]
        if changed:
            raise ValueError(f"{changed[0]} would differ from the converted model's: nothing was exported.")
        return model.eval(), report

    def expected(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return exact_attention(model)

    def conditions(self, source: Converted) -> list[str]:
        mechanisms = names_of(source.config.efficient_attention)
        return [
            f"Full attention with the weights of the converted model. It equals that model only where {mechanisms} is exact "
            "(a window of at least twice the text, for example); the distance elsewhere is in the table."
        ]

    def cautions(self, source: Converted) -> list[str]:
        if not runs(Provenance.of(source.model).history):
            return []
        return [
            f"The weights were trained with {names_of(source.config.efficient_attention)}, not with full attention."
        ]


def stock_model(source: Converted) -> PreTrainedModel:
    """A copy of the model without its mechanisms, on the positions that it has."""
    model = copy.deepcopy(source.model)
    before = getattr(model.config, "efficient_source", {})
    stored = {name: value for name, value in before.items() if name != "import"}
    model.config.efficient_source = stored | {"lengthened": []}
    return revert(model)


def _as_long_as_the_longest(model: PreTrainedModel) -> list[str]:
    """Give both stacks the longest input of either, as a stock config has one number for them; the tensors that changed."""
    host = HostModel.of(model)
    lengths = {side: length for side, length in host.lengths.items() if length is not None}
    shorter = [side for side, length in lengths.items() if length < max(lengths.values())]
    return host.lengthen(max(lengths.values()), sides=shorter) if shorter else []


def trained_parameters(source: Converted) -> list[str]:
    """Parameters of mechanisms that are not as they start from these weights, which is always the same."""
    own = {name: p for name, p in source.model.named_parameters() if f".{MODULE_NAME}." in name}
    if not own:
        return []
    model = stock_model(source)
    convert_in_place(HostModel.of(model), attention_configs(source.config.efficient_attention))
    start = dict(model.named_parameters())
    return [name for name, parameter in own.items() if not torch.equal(parameter, start[name].to(parameter.device))]
