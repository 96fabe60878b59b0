"""Sparse experts: the layer against its definition, and what training, padding and capacity do to a model that has them."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    RobertaForCausalLM,
    SwitchTransformersConfig,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP
from upcycled import KINDS, each_kind, labels_for, upcycled

import hf_efficient as he
from hf_efficient.experts.layer import ExpertLayer, ExpertsConfig, expert_layers
from hf_efficient.experts.loss import router_loss
from hf_efficient.families.feed_forward import Dense
from hf_efficient.testing import assert_close, inputs_for, tiny_model
from hf_efficient.training.callbacks import LogRouting

each_k = pytest.mark.parametrize("top_k", [1, 2])


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def dense(gated: bool = False, bias: bool = True, hidden: int = 12, inner: int = 20, **more: Any) -> Dense:
    width = 2 * inner if gated else inner
    biases = (weight(width), weight(hidden)) if bias else (None, None)
    return Dense(weight(hidden, width), weight(inner, hidden), *biases, nn.GELU(), gated, **more)


def layer(experts: int = 4, apart: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> ExpertLayer:
    """A layer in eval mode, whose experts are random and all different where `apart`."""
    shape = {name: options.pop(name) for name in ("gated", "bias", "hidden", "inner") if name in options}
    made = ExpertLayer(ExpertsConfig(num_experts=experts, **options), dense(**shape))
    with torch.no_grad():
        made.router.weight.normal_()
        for parameter in made.parameters(recurse=False):
            if apart:
                parameter.add_(torch.randn_like(parameter))
    return made.to(dtype).eval()


def feed(part: Dense, x: Tensor) -> Tensor:
    """One dense feed-forward part by its definition."""
    inner = x @ part.up + (0 if part.up_bias is None else part.up_bias)
    if part.is_gated:
        gate, linear = inner.chunk(2, -1)
        inner = part.activation(gate) * linear
    else:
        inner = part.activation(inner)
    return inner @ part.down + (0 if part.down_bias is None else part.down_bias)


def by_definition(made: ExpertLayer, x: Tensor) -> Tensor:
    """Every expert on every token, then the weighted sum of the chosen ones."""
    p = (x @ made.router.weight.T).softmax(-1)
    best = p.argsort(dim=-1, descending=True)[..., : made.config.top_k]
    chosen = torch.zeros_like(p).scatter(-1, best, 1.0)
    weights = chosen * p / (p.detach() if made.config.top_k == 1 else (chosen * p).sum(-1, keepdim=True))
    every = torch.stack([feed(made.dense(e), x) for e in range(made.config.num_experts)], -1)
    return (every * weights.unsqueeze(-2)).sum(-1)


def step(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    """One training call with labels, and its gradients."""
    model.train()
    model.zero_grad()
    output = model(**inputs, labels=labels_for(model, inputs), **more)
    output.loss.backward()
    return output


# ---- the layer ---------------------------------------------------------------------------------------------------


@each_k
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_layer_equals_its_definition_with_gradients(top_k: int, gated: bool, bias: bool, length: int):
    made = layer(top_k=top_k, gated=gated, bias=bias)
    x = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, length, 12, dtype=torch.float64)
    sources = [x, *made.parameters()]
    ours, truth = made(x), by_definition(made, x)
    assert_close(ours, truth, 1e-12)
    for actual, expected in zip(
        torch.autograd.grad((ours * direction).sum(), sources),
        torch.autograd.grad((truth * direction).sum(), sources),
        strict=True,
    ):
        assert_close(actual, expected, 1e-10, "gradient")


@each_k
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "inner"), [(16, 24), (13, 7)], ids=["aligned", "odd"])
def test_layer_in_lower_precision(top_k: int, dtype: torch.dtype, hidden: int, inner: int):
    made = layer(top_k=top_k, hidden=hidden, inner=inner, dtype=dtype)
    exact = copy.deepcopy(made).double()
    x = torch.randn(3, 33, hidden).to(dtype).requires_grad_()
    out = made(x)
    assert out.dtype == dtype
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *made.parameters()])
    given = x.detach().double()
    # experts that are as probable up to rounding are chosen by position
    least, next_ = (given @ exact.router.weight.T).softmax(-1).topk(top_k + 1)[0][..., -2:].unbind(-1)
    clear = (least - next_ > 1e-3) | (dtype != torch.float32)
    assert clear.sum() > 60
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert_close(out.double(), by_definition(exact, given), tolerance, where=clear)


def test_layer_under_autocast_computes_products_in_bf16_and_routes_in_fp32():
    made = layer(dtype=torch.float32, hidden=16, inner=24)
    x = torch.randn(2, 31, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
        assert made.router(x).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), made(x), 0.05)


def test_equal_experts_are_the_dense_layer_and_one_expert_is_too():
    x = torch.randn(2, 40, 16)
    for experts, top_k in ((1, 1), (8, 1), (8, 2)):
        made = layer(experts, apart=False, top_k=top_k, hidden=16, inner=24, dtype=torch.float32)
        for training in (False, True):
            made.train(training)
            assert_close(made(x), feed(made.dense(0), x), 1e-6)


@each_k
def test_unused_experts_have_a_gradient_of_zero(top_k: int):
    made = layer(8, top_k=top_k, dtype=torch.float32, hidden=16, inner=24).train()
    x = torch.randn(1, 1, 16)
    made(x).square().sum().backward()
    used = made(x).new_zeros(8)
    used[made.router(x[0]).topk(top_k).indices] = 1
    for parameter in made.parameters(recurse=False):
        assert torch.equal((parameter.grad.flatten(1).abs().amax(1) > 0).float(), used)


def test_router_gradient_of_one_expert_is_that_of_log_p():
    made = layer(5, apart=False)
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    direction = torch.randn(12, dtype=torch.float64)
    (made(x)[0, 0] @ direction).backward()
    weight = made.router.weight.detach().clone().requires_grad_()
    log_p = (x[0] @ weight.T).log_softmax(-1).max()
    (log_p * (feed(made.dense(0), x)[0, 0] @ direction).detach()).backward()
    assert weight.grad.abs().max() > 0
    assert_close(made.router.weight.grad, weight.grad, 1e-12)


def test_config_refuses():
    for bad in (
        {"num_experts": 0}, {"num_experts": 2.0}, {"top_k": 3}, {"top_k": 0}, {"num_experts": 1, "top_k": 2},
        {"capacity_factor": 0.0}, {"capacity_factor": math.nan}, {"capacity_factor": True}, {"layers": ()},
        {"layers": (-1,)}, {"layers": 3}, {"router_aux_loss_coef": -1.0}, {"router_z_loss_coef": math.inf}, {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(reversed(bad))):
            ExpertsConfig(**bad)
    with pytest.raises(ValueError, match="no option experts; their options are num_experts, top_k"):
        ExpertsConfig.from_dict({"experts": 3})
    config = ExpertsConfig(num_experts=4, top_k=2, capacity_factor=1.25, layers=[3, 1, 1])
    assert config.layers == (1, 3) and ExpertsConfig.from_dict(config.to_dict()) == config


# ---- capacity and statistics -------------------------------------------------------------------------------------


def test_capacity_drops_the_last_tokens_of_an_expert_in_the_order_of_the_batch():
    made = layer(2, capacity_factor=0.5, hidden=2).train()
    with torch.no_grad():
        made.router.weight.copy_(torch.eye(2))
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    x = torch.stack([torch.stack([first, first, second, first]), torch.stack([first, second, first, first])]).double()
    made.tokens = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    made.recording = True
    out, whole = made(x), by_definition(made, x)
    # 7 real tokens: capacity ceil(0.5 · 7 / 2) = 2 of each expert; padding is neither counted nor dropped
    kept = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    assert (out[~kept] == 0).all()
    assert_close(out, whole, 1e-12, where=kept)
    assert made.routing.dropped.item() == pytest.approx(3 / 7)
    assert torch.equal(made.eval()(x), made(x)) and (made(x) != 0).any(-1).all()


def test_second_choices_queue_after_all_first_ones():
    made = layer(2, capacity_factor=0.5, top_k=2, hidden=2).train()
    with torch.no_grad():
        made.router.weight.copy_(torch.eye(2))
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    kept = made._within_capacity(made.router(x[0]).topk(2).indices, torch.ones(3, dtype=torch.bool))
    # ceil(0.5 · 2 · 3 / 2) = 2 places in each: expert 0 is full with tokens 0 and 1, expert 1 with token 2 and then token 0
    assert kept.tolist() == [[True, True], [True, False], [True, False]]


@each_k
@pytest.mark.parametrize("experts", [2, 3, 8])
def test_an_even_load_fits_a_capacity_factor_of_one(top_k: int, experts: int):
    made = layer(experts, capacity_factor=1.0, top_k=top_k, hidden=2)
    chosen = torch.stack([(torch.arange(experts * 4) + choice) % experts for choice in range(top_k)], -1)
    real = torch.ones(len(chosen), dtype=torch.bool)
    assert made._within_capacity(chosen, real).all()
    chosen[0, 0] = chosen[1, 0]  # one too many for an expert, which is the last one that comes to it
    assert made._within_capacity(chosen, real).sum() == chosen.numel() - 1


@each_k
def test_statistics_equal_transformers(top_k: int):
    made = layer(6, top_k=top_k).train()
    made.recording = True
    x = torch.randn(3, 21, 12, dtype=torch.float64)
    made.tokens = torch.ones(3, 21)
    made.tokens[1, 15:] = 0
    made.tokens[2, :4] = 0
    made(x)
    logits = made.router(x.flatten(0, 1))
    theirs = load_balancing_loss_func((logits,), 6, top_k, made.tokens)
    assert made.routing.balance.item() == pytest.approx(theirs.item(), rel=1e-6)
    real = logits[made.tokens.flatten().bool()]
    assert made.routing.z.item() == pytest.approx(real.logsumexp(-1).square().mean().item(), rel=1e-12)
    counts = F.one_hot(real.topk(top_k).indices, 6).sum((0, 1))
    assert_close(made.routing.load, counts.double() / counts.sum(), 1e-12)


@pytest.mark.parametrize("capacity", [100, 3])
def test_switch_transformers_layer_side_by_side(capacity: int):
    config = SwitchTransformersConfig(
        d_model=12, d_ff=20, num_experts=4, expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=0.0
    )
    theirs = SwitchTransformersSparseMLP(config).double().train()
    theirs.router.dtype = torch.float64
    part = Dense(weight(12, 20), weight(20, 12), None, None, nn.ReLU())
    # their capacity is a number per sequence: one sequence of 16, and the factor that gives the same number
    factor = None if capacity == 100 else capacity * 4 / 16
    made = ExpertLayer(ExpertsConfig(num_experts=4, capacity_factor=factor), part).double().train()
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(made.router.weight.normal_())
        for e in range(4):
            expert = theirs.experts[f"expert_{e}"]
            made.up[e], made.down[e] = expert.wi.weight.T, expert.wo.weight.T
    x = torch.randn(1, 16, 12, dtype=torch.float64)
    p = theirs.router.classifier(x).softmax(-1).amax(-1, keepdim=True)
    # they shrink the output by p
    assert_close(made(x) * p, theirs(x), 1e-12)
    dropped = (made(x) == 0).all(-1)
    assert dropped.any() == (capacity == 3) and torch.equal(dropped, (theirs(x) == 0).all(-1))


# ---- models at their start ---------------------------------------------------------------------------------------


@each_kind
@each_k
def test_start_is_the_source_in_eval_and_in_training(family: str, options: dict[str, Any], top_k: int):
    model = tiny_model(family, layers=3, **options).double()
    inputs = inputs_for(model)
    before = step(model, inputs)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    result = he.upcycle(model.eval(), 4, top_k=top_k, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    assert len(result.report.layers) == (2 if family == "t5" else 1)
    with torch.no_grad():
        assert_close(result.model(**inputs).logits, before.logits, 1e-12)
    after = step(result.model, inputs)
    assert_close(after.logits, before.logits, 1e-12, "logits in training")
    assert after.loss.item() == pytest.approx(before.loss.item(), rel=1e-12)
    for name, parameter in result.model.named_parameters():
        if name in gradients:
            # the choice of an expert matters to nobody while all are equal, its gradient reaches the router alone,
            # and whatever feeds the router
            assert parameter.grad.isfinite().all(), name
    for name, part in expert_layers(result.model).items():
        assert part.router.weight.grad.abs().max() > 0, name
        assert all(p.grad.abs().max() > 0 for p in part.parameters(recurse=False)), name


@each_kind
def test_start_in_single_precision(family: str, options: dict[str, Any]):
    model = tiny_model(family, **options)
    inputs = inputs_for(model)
    expected = model(**inputs).logits
    assert_close(he.upcycle(model, 8).model(**inputs).logits, expected, 1e-6)


def test_gated_dropout_is_where_the_host_has_it():
    for family, sizes, inner, outer in (
        ("t5", {"dropout_rate": 0.3, "feed_forward_proj": "gated-gelu"}, 0.3, 0.0),
        ("gpt2", {"resid_pdrop": 0.3}, 0.0, 0.3),
        ("bert", {"hidden_dropout_prob": 0.3}, 0.0, 0.0),
    ):
        parts = expert_layers(upcycled(family, sizes=sizes)).values()
        assert all((part.inner_dropout, part.dropout) == (inner, outer) for part in parts)
        part = next(iter(parts)).train()
        x = torch.randn(1, 64, part.router.weight.shape[1])
        assert torch.equal(part(x), part(x)) == (family == "bert")


# ---- padding, batches, decoding ----------------------------------------------------------------------------------


@each_kind
@each_k
def test_padding_is_invisible_to_outputs_and_losses(family: str, options: dict[str, Any], top_k: int):
    torch.manual_seed(1)
    model = upcycled(family, top_k=top_k, apart=0.1, capacity_factor=0.75, sizes=options).double().train()
    inputs = inputs_for(model, batch=1, length=23)
    expected = step(model, inputs)
    figures = {name: part.routing for name, part in expert_layers(model).items()}
    assert any(r.dropped > 0 for r in figures.values())
    for left, right, filler in ((9, 0, 7), (0, 9, 7), (0, 9, 8)):
        padded = {
            name: F.pad(t, (left, right), value=0 if name.endswith("mask") else filler) for name, t in inputs.items()
        }
        if left and not model.config.is_encoder_decoder:
            padded["position_ids"] = F.pad(torch.arange(23)[None] + (2 if family == "roberta" else 0), (left, 0))
        actual = step(model, padded)
        keep = padded["attention_mask"][0].bool()
        assert_close(actual.logits[:, keep], expected.logits, 1e-9)
        for name, part in expert_layers(model).items():
            for actual_figure, figure in zip(part.routing, figures[name], strict=True):
                assert_close(actual_figure, figure, 1e-9, name)
        if family != "gpt2" or right:  # a causal loss has one more target where padding comes first
            assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-9)


@each_kind
def test_rows_without_a_mask_train_as_rows_without_padding(family: str, options: dict[str, Any]):
    model = upcycled(family, apart=0.1, capacity_factor=0.75, sizes=options).double()
    inputs = inputs_for(model, batch=2, length=13, padded=False)
    expected = step(model, inputs).loss
    labels = labels_for(model, inputs)
    plain = {name: tensor for name, tensor in inputs.items() if not name.endswith("mask")}
    assert model(**plain, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_decoder_padding_that_only_labels_tell_is_left_out():
    model = upcycled("t5", apart=0.1, capacity_factor=0.5).double()
    inputs = inputs_for(model, batch=1, length=12, padded=False)
    encoder = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    labels = torch.randint(5, 99, (1, 12))
    model.train()
    figures = []
    for count in (0, 5):
        model(**encoder, labels=F.pad(labels, (0, count), value=-100))
        figures.append({name: part.routing for name, part in expert_layers(model).items()})
    for name, routing in figures[0].items():
        for one, other in zip(routing, figures[1][name], strict=True):
            assert_close(one, other, 1e-9, name)


@each_kind
def test_rows_do_not_depend_on_their_batch_in_eval(family: str, options: dict[str, Any]):
    model = upcycled(family, apart=0.2, capacity_factor=0.1, sizes=options).double()
    inputs = inputs_for(model, batch=3, length=31)
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{name: t[row : row + 1] for name, t in inputs.items()}).logits
        assert_close(alone[0], together[row], 1e-10, where=inputs["attention_mask"][row])


def test_causal_models_stay_causal_and_decode_as_they_read():
    model = upcycled("gpt2", apart=0.2, capacity_factor=0.1, top_k=2).double()
    ids = torch.randint(5, 99, (2, 19))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[:, 8].square().sum().backward()
    assert (embedded.grad[:, 9:] == 0).all() and (embedded.grad[:, :9] != 0).any()
    full = model(ids).logits
    cache, steps = None, []
    for i in range(19):
        out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    assert_close(torch.cat(steps, 1), full, 1e-10)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


# ---- training ----------------------------------------------------------------------------------------------------


@each_kind
def test_training_loss_has_the_routers_part_and_eval_does_not(family: str, options: dict[str, Any]):
    model = upcycled(family, apart=0.1, router_aux_loss_coef=0.5, router_z_loss_coef=0.25, sizes=options)
    inputs = inputs_for(model)
    plain = model(**inputs, labels=labels_for(model, inputs)).loss
    trained = step(model, inputs).loss
    routings = [part.routing for part in expert_layers(model).values()]
    extra = sum(0.5 * r.balance + 0.25 * r.z for r in routings) / len(routings)
    assert extra > 0.5 and not extra.requires_grad
    assert trained.item() == pytest.approx((plain + extra).item(), rel=1e-5)
    with torch.no_grad():
        assert_close(router_loss(model), extra, 1e-6)
    with pytest.raises(ValueError, match="in the model's loss already"):
        router_loss(model)
    in_tuple = model(**inputs, labels=labels_for(model, inputs), return_dict=False)[0]
    assert in_tuple.item() == pytest.approx(trained.item(), rel=1e-6)
    with torch.no_grad():
        assert "loss" not in model(**inputs) or model(**inputs).loss is None


@each_kind
@each_k
def test_checkpointing_changes_nothing_and_counts_losses_once(family: str, options: dict[str, Any], top_k: int):
    sizes = options | ({"layers": 3} if family != "t5" else {})
    model = upcycled(family, apart=0.1, top_k=top_k, capacity_factor=0.75, sizes=sizes).double()
    inputs = inputs_for(model)
    expected = step(model, inputs).loss
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.activation_checkpointing_enable()
    # another call in between: what is computed again must not meet the mask of the other
    model.train()
    model.zero_grad()
    loss = model(**inputs, labels=labels_for(model, inputs)).loss
    model(**inputs_for(model, batch=2, length=11, seed=3))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-9, name)
    assert all(not part.recording for part in expert_layers(model).values())


def test_reentrant_checkpointing_is_refused():
    model = upcycled()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        step(model, inputs_for(model))


def test_calls_that_hide_the_mask_are_refused_in_training():
    model = upcycled().train()
    inputs = inputs_for(model, batch=2, length=9)
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.bert.forward(**inputs)
    with pytest.raises(ValueError, match="padding mask"):
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="no router loss"):
        router_loss(upcycled())


def test_loss_parts_of_one_step_sum_to_the_mean():
    model = upcycled("gpt2", router_aux_loss_coef=1.0).train()
    inputs = inputs_for(model, padded=False)
    labels = labels_for(model, inputs)
    extras = []
    for rows, items in ((slice(0, 1), 97), (slice(1, 3), 194)):
        part = {name: t[rows] for name, t in inputs.items()}
        whole = model(**part, labels=labels[rows], num_items_in_batch=torch.tensor(291)).loss
        with torch.no_grad():
            alone = model.eval()(**part, labels=labels[rows], num_items_in_batch=torch.tensor(291)).loss
            model.train()
            assert (whole - alone).item() == pytest.approx(items / 291 * router_loss(model).item(), rel=1e-4)
        extras.append((whole - alone).item())
    assert sum(extras) == pytest.approx(1.0, abs=0.3)


@each_kind
def test_training_lowers_the_loss_and_tells_experts_apart(family: str, options: dict[str, Any]):
    model = upcycled(family, sizes=options)
    inputs = inputs_for(model, batch=4, length=16, padded=False)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(step(model, inputs).loss.item())
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    for part in expert_layers(model).values():
        assert not torch.equal(part.up[0], part.up[1])


def _end(rank: int, folder: str, result: Any) -> None:
    """Ends a process of a data-parallel test, whose group cannot be taken down: that can wait for a thread of gloo which
    waits for Python.
    """
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


def _in_processes(count: int, one: Callable[[int, str], None], folder: Path) -> list[Any]:
    """What `one(rank, folder)` gave to `_end` in each of `count` new processes."""
    running = torch.multiprocessing.start_processes(
        one, (str(folder),), nprocs=count, join=False, start_method=fresh.SERVER.get_start_method()
    )
    try:
        deadline = time.monotonic() + 200
        while not running.join(timeout=10):
            assert time.monotonic() < deadline, f"{one.__name__} has not ended after 200 s"
    finally:
        for process in running.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _join(rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)


def _three_steps(rank: int, folder: str) -> None:
    """Smallest load of an expert, smallest and largest gradient, without and with checkpointing of activations."""
    _join(rank, folder, 1)
    figures = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = upcycled("bert", experts=16).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        inputs = inputs_for(model, batch=1, length=3)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            wrapped.zero_grad()
            wrapped(**inputs, labels=labels_for(model, inputs)).loss.backward()
        sparse = expert_layers(model)["bert.encoder.layer.1.intermediate"]
        loads, gradients = sparse.routing.load, sparse.up.grad.flatten(1).abs().amax(1)
        figures.append((loads.min(), gradients.min(), sparse.router.weight.grad.abs().max()))
    _end(rank, folder, figures)


def test_data_parallel_training_misses_no_parameter(tmp_path):
    # DDP stops at the second step if some parameter got no gradient in the first
    [figures] = _in_processes(1, _three_steps, tmp_path)
    assert len(figures) == 2
    for smallest_load, smallest_gradient, of_router in figures:
        assert smallest_load == 0 and smallest_gradient == 0 and of_router > 0


def _one_of_two(rank: int, folder: str) -> None:
    """A process of the test below: half of the batch, the whole of `num_items_in_batch`, gradients averaged by DDP."""
    _join(rank, folder, 2)
    model, inputs = _shared_batch()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for half in (0, 2):  # two accumulated calls of one row each
        part = {name: t[half + rank : half + rank + 1] for name, t in inputs.items()}
        with nullcontext() if half else wrapped.no_sync():
            # as the Trainer does: the mean over processes of losses that are divided by all items
            (2 * wrapped(**part, labels=part["input_ids"], num_items_in_batch=torch.tensor(4 * 16)).loss).backward()
    # the second call ran on other experts in each process
    gradients = {name: p.grad for name, p in model.named_parameters()}
    _end(rank, folder, (gradients, [part.routing.load for part in expert_layers(model).values()]))


def _shared_batch() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(2)
    # the z-loss is a mean over tokens, so parts of a batch add up; the load balance is of each process's own part
    model = upcycled("gpt2", 16, apart=0.1, router_aux_loss_coef=0.0, router_z_loss_coef=0.5).double().train()
    ids = torch.randint(5, 99, (4, 17))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_two_processes_make_the_gradient_of_one(tmp_path):
    (first, loads), (second, others) = _in_processes(2, _one_of_two, tmp_path)
    model, inputs = _shared_batch()
    model(**inputs, labels=inputs["input_ids"], num_items_in_batch=torch.tensor(4 * 16)).loss.backward()
    assert any((load == 0).any() and not torch.equal(load, other) for load, other in zip(loads, others, strict=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], parameter.grad, 1e-9, name)


def test_share_of_a_step_counts_labels_as_the_trainer_does(tmp_path):
    for family, options in (("gpt2", {}), ("roberta", {"is_decoder": True}), ("t5", {})):
        stock = RobertaForCausalLM(tiny_model(family, **options).config) if options else tiny_model(family)
        model = he.upcycle(stock, 2, router_aux_loss_coef=0.0, router_z_loss_coef=1.0).model.train()
        ids = torch.randint(5, 99, (3, 11))
        labels = ids.masked_fill(torch.arange(11) > 6, -100)
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
        more = {"labels": labels}, {"labels": labels, "shift_labels": F.pad(labels[:, 3:], (0, 3), value=-100)}
        for batch in more[: 1 if family == "t5" else 2]:
            items = Trainer(model, arguments)._get_num_items_in_batch([batch, batch], torch.device("cpu"))
            whole = model(ids, **batch, num_items_in_batch=items).loss
            share = (whole - model.eval()(ids, **batch, num_items_in_batch=items).loss) / router_z(model.train())
            # without a number the Trainer divides by the number of calls itself
            assert (items is None) == (family == "t5")
            assert share.item() == pytest.approx(0.5 if items else 1.0, rel=1e-3), (family, list(batch))


def router_z(model: Any) -> Tensor:
    return torch.stack([part.routing.z for part in expert_layers(model).values()]).mean()


def test_labels_of_classes_are_no_mask_of_tokens():
    config = tiny_model("t5").config
    config.problem_type, config.num_labels = "multi_label_classification", 30
    model = he.upcycle(T5ForSequenceClassification(config), 3).model.train()
    ids = torch.randint(5, 99, (2, 12))
    ids[:, -1] = config.eos_token_id
    masks = []
    layer = model.transformer.decoder.block[1].layer[2].DenseReluDense
    layer.register_forward_pre_hook(lambda module, args: masks.append(module.tokens))
    model(input_ids=ids, labels=torch.rand(2, 30)).loss.backward()
    assert masks == [None]


def test_balance_loss_spreads_the_load():
    torch.manual_seed(3)
    made = layer(4, apart=False, router_aux_loss_coef=1.0).train()
    with torch.no_grad():
        made.router.weight.mul_(0.3)
        made.router.weight[0] += 0.6
    x = torch.randn(4, 64, 12, dtype=torch.float64) + 0.5
    optimiser = torch.optim.Adam(made.router.parameters(), lr=0.02)
    made.recording = True
    made(x)
    before = made.routing.load.max().item()
    for _ in range(150):
        optimiser.zero_grad()
        made(x)
        router_loss(made).backward()
        optimiser.step()
    assert before > 0.8 and made.routing.load.max().item() < 0.5


def test_trainer_logs_what_the_routers_did(tmp_path):
    model = upcycled("bert", capacity_factor=0.5)
    ids = torch.randint(5, 99, (8, 16))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[LogRouting()])
    trainer.train()
    trainer.evaluate()
    first = trainer.state.log_history[0]
    assert first["router_balance"] >= 0.99 and 0 < first["expert_dropped"] < 1
    assert first["expert_load_max"] == pytest.approx(max(map(max, first["expert_load"])))
    assert len(first["expert_load"]) == 1 and sum(first["expert_load"][0]) == pytest.approx(1.0)
    assert "router_balance" not in trainer.state.log_history[-1]
    assert math.isfinite(first["loss"]) and "eval_loss" in trainer.state.log_history[-1]


# ---- compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "options"), [KINDS[0], KINDS[2], KINDS[4]], ids=["bert", "gpt2", "t5-gated"])
def test_compiles_as_one_graph(family: str, options: dict[str, Any]):
    torch.compiler.reset()
    model = upcycled(family, apart=0.1, top_k=2, layers=[0], sizes=options | {"layers": 1})
    inputs = inputs_for(model, length=16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(**inputs).logits, model(**inputs).logits, 1e-5)


def test_compiles_in_training_with_padding_and_losses():
    torch.compiler.reset()
    model = upcycled("bert", apart=0.1, capacity_factor=0.75, layers=[0], sizes={"layers": 1})
    inputs = inputs_for(model, length=16)
    expected = step(model, inputs).loss
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, labels=labels_for(model, inputs)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-4, name)
