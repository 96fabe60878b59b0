"""The balance and z-loss of routers, added to the training loss of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_efficient.experts.install import KEYWORD
from hf_efficient.experts.layer import LOST, ExpertLayer, expert_layers

# ---- the loss ----------------------------------------------------------------------------------------------------


def with_router_loss(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward whose training loss, where there is one, has the routers' part in it."""

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not getattr(self.config, "efficient_experts", None):
            return stock_forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():  # a compiled call can't watch its gradients
            _refuse_unused(self)
        labels = kwargs.get("labels")
        if labels is not None and hasattr(self, "prepare_decoder_input_ids_from_labels"):
            # where labels are the decoder's tokens, collators mark its padding in them alone
            kwargs[KEYWORD] = labels.ne(-100)
        output = stock_forward(self, *args, **kwargs)
        in_tuple = isinstance(output, tuple)
        loss = output[0] if in_tuple else output.get("loss")
        if loss is None or loss.dim():
            return output  # no labels were given
        loss = loss + _share(self, kwargs) * router_loss(self).to(loss.dtype)
        if in_tuple:
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    return forward


def _refuse_unused(model: nn.Module) -> None:
    """Refuse a call where the routers' loss of the one before was made, and never used."""
    for layer in expert_layers(model).values():
        if layer.routing is not None and layer.routing.balance.requires_grad and layer.config.has_loss:
            _raise_lost(layer)


@torch.compiler.disable  # an exception that is raised inside a compiled call would be none of ours
def _raise_lost(layer: ExpertLayer) -> None:
    layer.routing = None  # said once, so that the next call can be a better one
    raise ValueError(LOST)


def _share(model: Any, kwargs: dict[str, Any]) -> Any:
    """This call's part of the optimiser step: the Trainer sums losses that were divided by `num_items_in_batch`."""
    total, labels, shifted = (kwargs.get(name) for name in ("num_items_in_batch", "labels", "shift_labels"))
    if total is None or labels is None or not model.accepts_loss_kwargs:
        return 1.0  # the rest of the loss is a mean over this call too
    if shifted is not None:
        return shifted.ne(-100).sum() / total
    # the Trainer's own rule, by which GPT-2's first labels count
    shifts = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss and not model.config.is_encoder_decoder
    return (labels[..., 1:] if shifts else labels).ne(-100).sum() / total


def router_loss(model: nn.Module) -> Tensor:
    """Load balance and z-loss of the last training call, each with its coefficient: means over the sparse layers.

    Heads add it to their `loss` automatically; this is for losses that are computed outside the model, such as those of the
    Trainer's `compute_loss_func` and label smoothing. Training routers without it raises in the backward pass, or where the
    model is compiled at its next call.

    Raises:
        ValueError: no sparse layer has been called in training, or there is no gradient: a loss of the model has it already,
            or this was called before, or it is lost.
    """
    layers = expert_layers(model).values()
    routings = [layer.routing for layer in layers if layer.routing is not None]
    if not routings:
        raise ValueError("there is no router loss: no sparse layer was called in training mode since the last one.")
    trained = any(layer.router.weight.requires_grad for layer in layers)
    if trained and torch.is_grad_enabled() and not all(r.balance.requires_grad for r in routings):
        raise ValueError(
            "the routers' loss has no gradient: it is in the model's loss already, or reentrant activation checkpointing "
            "computed the layers without one; enable that with use_reentrant=False."
        )
    config = next(iter(layers)).config
    balance, z = (torch.stack([getattr(r, name) for r in routings]).mean() for name in ("balance", "z"))
    for layer in layers:
        # what is left to report needs no gradient
        if layer.routing is not None and torch.is_grad_enabled():
            layer.routing = type(layer.routing)(*(figure.detach() for figure in layer.routing))
    return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
