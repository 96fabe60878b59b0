"""The routers' loss is part of whatever routers are trained on, or an error says that it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments
from upcycled import each_kind, labels_for, upcycled

from hf_efficient.experts.layer import expert_layers
from hf_efficient.experts.loss import router_loss
from hf_efficient.testing import FAMILIES, assert_close, inputs_for


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the routers."""
    return {name: layer.router.weight.grad.clone() for name, layer in expert_layers(model).items()}


@each_kind
def test_a_loss_that_leaves_the_routers_out_raises(family: str, options: dict[str, Any]):
    """However it is made outside the model, whether or not the model made one too, and with recomputed layers."""
    model = upcycled(family, apart=0.1, sizes=options).train()
    inputs = inputs_for(model)
    labels = labels_for(model, inputs)

    def own_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), labels)

    for checkpointing in (None, False, True):
        if checkpointing is not None:
            model.activation_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        for given in ({}, {"labels": labels}) if not checkpointing else ({},):
            with pytest.raises(ValueError, match="compute_loss_func"):
                own_loss(model(**inputs, **given).logits).backward()
    model = upcycled(family, apart=0.1, sizes=options).train()
    lost = model(**inputs).logits.sum()  # the first of two calls, whose router loss nobody takes
    with pytest.raises(ValueError, match="after each call"):
        (lost + own_loss(model(**inputs).logits) + router_loss(model)).backward()
    for layer in expert_layers(
        model
    ).values():  # nothing is owed by routers that do not learn, or without coefficients
        layer.router.requires_grad_(False)
    own_loss(model(**inputs).logits).backward()
    free = upcycled(family, router_aux_loss_coef=0, router_z_loss_coef=0, sizes=options).train()
    own_loss(free(**inputs).logits).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_the_trainer_train_routers_as_the_model_does_or_raise(family: str, tmp_path: Any):
    model = upcycled(family, apart=0.1, router_aux_loss_coef=0.5).train()
    inputs = inputs_for(model, padded=False) | {"labels": labels_for(model, inputs_for(model, padded=False))}
    model(**inputs).loss.backward()
    expected = gradients(model)

    def with_routers(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        shift = family == "gpt2"
        logits = outputs.logits[:, :-1] if shift else outputs.logits
        return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:] if shift else labels) + router_loss(model)

    def without(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs.logits.sum()

    def trained(smoothing: float = 0.0, compute_loss_func: Any = None) -> None:
        arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, label_smoothing_factor=smoothing)
        model.zero_grad()
        trainer = Trainer(model, arguments, compute_loss_func=compute_loss_func)
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(model, dict(inputs))

    for arguments in ({"smoothing": 0.1}, {"compute_loss_func": without}):
        with pytest.raises(ValueError, match="compute_loss_func"):
            trained(**arguments)
    trained(compute_loss_func=with_routers)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], 1e-4, name)


def test_a_compiled_model_raises_at_its_next_call():
    torch.compiler.reset()
    model = upcycled("bert", apart=0.1, layers=[0], sizes={"layers": 1}).train()
    inputs = inputs_for(model, length=16)
    compiled = torch.compile(model, backend="aot_eager")
    (compiled(**inputs).logits.sum() + router_loss(model)).backward()
    compiled(**inputs).logits.sum().backward()
    with pytest.raises(ValueError, match="compute_loss_func"):
        compiled(**inputs)
