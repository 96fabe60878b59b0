"""Training converted models: gradients, precision, checkpointing, compilation, and step-by-step agreement."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import CASES
from pairs import BASE, MAIN, SAMPLE, VARIANTS, Bench, Pair, Tokens, each, labelled, logits

import hf_efficient as he
from hf_efficient.ops.context import AttentionContext
from hf_efficient.testing import assert_close, inputs_for, tiny_model

ALL_PAIRS = MAIN + VARIANTS
# a bias on keys adds the same to all logits of a query: its true gradient is 0, whatever rounding leaves
NO_GRADIENT = ("key.bias", "key_global.bias")


def _gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# ---- gradients ---------------------------------------------------------------------------------------------------


@each(ALL_PAIRS, of="attention")
def test_every_parameter_gets_a_finite_gradient(pair: Pair):
    """Those of the host and of the mechanism alike, T5's table of relative biases included."""
    model = pair.model()
    inputs = labelled(model, inputs_for(model))
    with pair.patch(model):
        gradients = _gradients(model.train(), inputs)
    own = {name: gradient for name, gradient in gradients.items() if ".efficient." in name}
    case = CASES[pair.mechanism]
    is_variant = pair.options not in (case.small, case.small | case.t5_options)
    assert case.parameters or is_variant or not own
    assert own or is_variant or pair.is_causal or not case.parameters, "the mechanism's parameters are missing"
    # a variant that needs none of the mechanism's parameters leaves all of them alone
    idle = set(own) if is_variant and not any(g is not None and g.any() for g in own.values()) else set()
    for name, gradient in gradients.items():
        if name.endswith(NO_GRADIENT) or name in idle:
            continue
        assert gradient is not None, f"{name} takes no part"
        assert gradient.isfinite().all(), f"{name}: gradient is not finite"
        assert (gradient != 0).any() or name.endswith(case.unused), f"{name}: gradient is zero"
    if pair.family == "t5":
        assert any("relative_attention_bias" in name for name in gradients)


def _gradients_in_parts(model: Any, embeds: torch.Tensor, ends: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Of all parameters and of the inputs, where each call sees the cache that those before it have filled."""
    model.zero_grad()
    embeds = embeds.clone().requires_grad_()
    outputs, cache, start = [], None, 0
    for end in ends:
        inputs = {"inputs_embeds": embeds[:, start:end]}
        if model.config.is_encoder_decoder:
            inputs = {"decoder_inputs_embeds": inputs["inputs_embeds"], "input_ids": torch.arange(5, 12)[None]}
        out = model(**inputs, past_key_values=cache, use_cache=True)
        outputs.append(out.logits)
        cache, start = out.past_key_values, end
    torch.cat(outputs, dim=1)[:, ::9].logsumexp(-1).sum().backward()
    assert embeds.grad is not None
    return {"inputs": embeds.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@each([p for p in MAIN + VARIANTS if p.is_causal and p.side != "both" and (p in MAIN or p.options.get("gate"))])
def test_gradients_go_through_a_filled_cache(pair: Pair):
    """And through what a bounded cache keeps of tokens that it forgot, here all but the last 64."""
    model = pair.model().double().eval()
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, 99, model.get_input_embeddings().embedding_dim, generator=generator, dtype=torch.float64)
    with pair.patch(model):
        whole, parts = (_gradients_in_parts(model, embeds, ends) for ends in ((99,), (85, 91, 99)))
    assert whole.keys() == parts.keys()
    for name, expected in whole.items():
        assert_close(parts[name], expected, 1e-9, name)


@each([pair for pair in MAIN if pair.family == "t5"])
def test_relative_bias_gradient_equals_the_unconverted_one(pair: Pair):
    model = pair.model().double()
    inputs = labelled(model, inputs_for(model))
    config = pair.exact_config(model, 97)
    expected = _gradients(model, inputs)
    with pair.patch(model, config):
        actual = _gradients(model, inputs)
    tables = [name for name in expected if "relative_attention_bias" in name]
    assert len(tables) == 2
    for name in tables:
        assert_close(actual[name], expected[name], 1e-9, name)


@each(ALL_PAIRS, of="mechanism")
def test_gradcheck(pair: Pair):
    """Analytic against numeric gradients in fp64: inputs, own parameters and the bias table, rows padded on both sides."""
    bench = Bench(pair)
    tokens = bench.tokens(2, 37)
    keep = torch.ones(2, 37, dtype=torch.bool)
    keep[0, 33:] = keep[1, :5] = False
    used = tokens if bench.mechanism.needs_hidden_states else tokens[:3]
    with torch.no_grad():
        for parameter in bench.mechanism.parameters():
            # away from zeros, where absolute weights have no derivative
            parameter.add_(0.1 * torch.randn_like(parameter))
    extra = list(bench.mechanism.parameters()) + ([] if bench.table is None else [bench.table])

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        heads = leaves[: len(used)]
        return bench(Tokens(*heads, *tokens[len(used) :]), keep)

    leaves = [tensor.requires_grad_() for tensor in used] + [p for p in extra if p.requires_grad]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# ---- precision ---------------------------------------------------------------------------------------------------


@each([pair for pair in MAIN if not CASES[pair.mechanism].by_content], of="mechanism")
def test_bf16_is_as_close_to_fp32_as_for_the_unconverted_model(pair: Pair):
    """Error ≤ 3 × the unconverted model's own bf16 error, as a model in bf16 and under autocast."""
    model = pair.model()
    inputs = inputs_for(model)
    real = inputs["attention_mask"].bool()

    def errors() -> tuple[torch.Tensor, torch.Tensor]:
        reference = logits(model, inputs)[real]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = logits(model, inputs)[real].float()
        lower = logits(model.bfloat16(), inputs)[real].float()
        assert mixed.isfinite().all() and lower.isfinite().all()
        return (mixed - reference).square().mean().sqrt(), (lower - reference).square().mean().sqrt()

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = errors()
    model.float().load_state_dict(state)
    with pair.patch(model):
        for name, own, stock in zip(("autocast", "bf16"), errors(), plain, strict=True):
            assert own <= 3 * stock, f"{name}: error {own:.2e}, unconverted {stock:.2e}"


@each([pair for pair in MAIN if CASES[pair.mechanism].by_content], of="mechanism")
def test_what_is_chosen_does_not_depend_on_the_precision_of_attention(pair: Pair):
    """Heads that bf16 holds exactly: error ≤ 3 × that of full attention, also under autocast. Ties are as good as any."""
    bench = Bench(pair)
    heads = [x.bfloat16() for x in bench.tokens(2, 97)[:3]]
    mechanism = bench.mechanism.bfloat16()
    bias = bench.relative_bias()
    context = dict(is_causal=bench.is_causal, scaling=bench.WIDTH**-0.5, relative_bias=bias)

    def attend(*heads: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return mechanism(*heads, AttentionContext(**context)).float()

    def full(*heads: torch.Tensor) -> torch.Tensor:
        offsets = bias.dense(97, 97, 0).to(heads[0].dtype) if bias else torch.zeros(97, 97, dtype=heads[0].dtype)
        if bench.is_causal:
            offsets = offsets.masked_fill(torch.ones(97, 97).triu(1).bool(), float("-inf"))
        options = dict(attn_mask=offsets.detach(), scale=bench.WIDTH**-0.5)
        return torch.nn.functional.scaled_dot_product_attention(*heads, **options).float()

    def error(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).square().mean().sqrt() / other.square().mean().sqrt()

    lower, stock = attend(*heads), error(full(*heads), full(*(x.float() for x in heads)))
    mechanism.float()
    reference = attend(*(x.float() for x in heads))
    assert error(lower, reference) <= 3 * stock
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(attend(*heads), reference) <= 3 * stock


@each(MAIN, of="attention")
def test_training_under_autocast(pair: Pair):
    model = pair.model()
    inputs = labelled(model, inputs_for(model))
    with pair.patch(model), torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = _gradients(model.train(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    assert any(gradient is not None and (gradient != 0).any() for gradient in gradients.values())


# ---- checkpointing and compilation -------------------------------------------------------------------------------


@each(MAIN, of="attention")
def test_gradient_checkpointing_gives_the_same_gradients(pair: Pair):
    model = pair.model().double()  # sums are taken in another order
    inputs = labelled(model, inputs_for(model))
    with pair.patch(model):
        expected = _gradients(model.train(), inputs)
        model.gradient_checkpointing_enable()
        actual = _gradients(model, inputs)
    compared = 0
    for name, gradient in expected.items():
        if gradient is None or name.endswith(NO_GRADIENT):
            assert (actual[name] is None) == (gradient is None), name
            continue
        assert_close(actual[name], gradient, 1e-12, name)
        compared += 1
    assert compared > 10


def _methods(pair: Pair) -> tuple[Any, ...]:
    """All functions of the mechanism's class but those that run once, before any call."""
    cls = pair.config.attention_class
    once = ("__init__", "initialise_from", "reset_parameters")
    owners = [owner for owner in cls.__mro__ if issubclass(owner, he.EfficientAttention)]
    names = {name for owner in owners for name, value in vars(owner).items() if inspect.isfunction(value)}
    return tuple(getattr(cls, name) for name in sorted(names.difference(once)))


def _compiled_pairs() -> list[Pair]:
    """Every mechanism in its first family; in the others one of those that share all their code, as patterns do."""
    first = {pair.mechanism: pair for pair in reversed(MAIN)}
    # a T5 decoder is causal as GPT-2 is, with the bias of T5's encoder
    others = [pair for pair in MAIN if pair.side != "decoder" and pair != first[pair.mechanism]]
    by_code = {(_methods(pair), pair.family): pair for pair in others}
    return [pair for pair in MAIN if pair in first.values() or pair in by_code.values()]


COMPILED = _compiled_pairs()
# one of those that share all their code
OF_ITS_CODE = {_methods(pair): pair for pair in reversed(COMPILED)}


@pytest.mark.slow
@each(COMPILED, of="mechanism")
def test_a_mechanism_compiles_as_one_graph(pair: Pair):
    """Forward and backward, a row padded. AOT autograd follows the operations of one form of all code, and what no host has
    to do with is traced without one.
    """
    bench = Bench(pair)
    tokens = bench.tokens(2, 41)
    keep = torch.arange(41) >= torch.tensor([[0], [9]])
    leaves = {name: x.requires_grad_() for name, x in tokens._asdict().items()} | dict(
        bench.mechanism.named_parameters()
    )
    if bench.table is not None:
        leaves["bias"] = bench.table

    def run(function: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        out = function(tokens, keep)
        loss = (out * torch.linspace(-1, 1, out.shape[2], dtype=out.dtype)[:, None]).square().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return out.detach(), dict(zip(leaves, gradients, strict=True))

    backend = "aot_eager" if pair == OF_ITS_CODE[_methods(pair)] else "eager"
    _assert_same(run(torch.compile(bench.__call__, fullgraph=True, backend=backend, dynamic=False)), run(bench), 1e-9)


def _assert_same(actual: Any, expected: Any, rtol: float, where: torch.Tensor | None = None) -> None:
    """Outputs, and gradients by name."""
    torch.compiler.reset()
    assert_close(actual[0], expected[0], rtol, where=where)
    assert any(gradient is not None for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        if gradient is None:
            assert actual[1][name] is None or not actual[1][name].any(), name
        else:
            assert_close(actual[1][name], gradient, 10 * rtol, name)


def _hosts() -> list[Pair]:
    """Each kind of mechanism in one of the places that differ, in turn."""
    places = [[pair for pair in MAIN if pair.mechanism == name and pair.family in BASE] for name in SAMPLE]
    return [fitting[turn % len(fitting)] for turn, fitting in enumerate(places)]


@pytest.mark.slow
@pytest.mark.parametrize("pair", _hosts(), ids=lambda pair: pair.label)
def test_a_converted_model_compiles_as_one_graph(pair: Pair):
    """What is around a mechanism: masks, checks of the call, extra tokens, the dispatcher. Padded rows, forward and
    backward, of T5 the converted stack.
    """
    whole = pair.model(layers=1)
    model = whole if pair.side is None else getattr(whole, f"get_{pair.side}")()
    inputs = {name: inputs_for(whole)[name] for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()

    def run(function: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        model.zero_grad()
        out = function(**inputs)[0]
        # the host's own loss is no part of the graph: it logs, which tracing refuses; squares alone are the same for all
        # that T5 has normalised, and their gradient is rounding
        (out[real] * torch.linspace(-1, 1, out.shape[-1])).square().mean().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters() if not name.endswith(NO_GRADIENT)}

    with pair.patch(whole):
        expected = run(model)
        actual = run(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False))
    assert sum(gradient is not None for gradient in expected[1].values()) > 10
    _assert_same(actual, expected, 1e-5, where=inputs["attention_mask"])


# ---- convergence -------------------------------------------------------------------------------------------------


def _losses(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    # only what both models have; the exact limit holds while the mechanism's own parameters rest
    own = [parameter for name, parameter in model.named_parameters() if ".efficient." not in name]
    optimizer = torch.optim.SGD(own, lr=0.02, momentum=0.9)
    losses = []
    for inputs in batches:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each(MAIN, of="attention")
def test_training_in_the_exact_limit_tracks_the_unconverted_model(pair: Pair):
    model = pair.model().train()
    config = pair.exact_config(model, 41)
    batches = [labelled(model, inputs_for(model, length=41, seed=seed % 4)) for seed in range(10)]
    expected = _losses(model, batches)
    model = pair.model().train()
    with pair.patch(model, config):
        actual = _losses(model, batches)
    assert expected[-1] < expected[0] - 0.1, f"nothing was learnt: {expected}"
    assert_close(torch.tensor(actual), torch.tensor(expected), 1e-4, "losses")


@each(ALL_PAIRS, of="mechanism")
def test_parameters_without_a_part_have_a_gradient_only_among_several_processes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
):
    """Data-parallel training waits for every parameter's gradient; else a gradient of 0 lets weight decay shrink them."""
    model = pair.model().train()
    # a token, so that neither windows nor blocks leave room for global keys or rows
    inputs = {name: x[:, :1] for name, x in labelled(model, inputs_for(model, padded=False)).items()}
    found = []
    with pair.patch(model):
        for processes in (1, 2):
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda count=processes: count)
            model.zero_grad()
            gradients = _gradients(model, inputs)
            found.append({name: gradient for name, gradient in gradients.items() if ".efficient." in name})
    alone, among_others = found
    # a variant, and a causal form, may do without the parameters that its mechanism has elsewhere
    assert among_others or pair.is_causal or pair not in MAIN or not CASES[pair.mechanism].parameters
    assert not [name for name, gradient in among_others.items() if gradient is None]
    for name, gradient in among_others.items():
        if alone[name] is None:
            assert not gradient.any(), name
        else:
            assert torch.equal(alone[name], gradient), name


@pytest.mark.parametrize("mechanism", ["longformer", "longt5"])
def test_weight_decay_leaves_parameters_without_a_part_alone(mechanism: str):
    model = tiny_model("bert").train()
    inputs = labelled(model, inputs_for(model, length=7, padded=False))
    he.patch_attention(model, mechanism, attention_window=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".efficient." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    model(**inputs).loss.backward()
    optimizer.step()
    assert before
    assert not [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]


@each(ALL_PAIRS, of="attention")
def test_gradients_of_a_short_row_do_not_depend_on_its_batch_mates(pair: Pair):
    """A row of three tokens beside one of 97, so that every first block, window and slot of it is also the last."""
    model = pair.model().double()
    batch = labelled(model, inputs_for(model, batch=2, padded=False))
    short = {k: v[1:, :3] for k, v in batch.items()}
    for key in batch:
        if key.endswith("attention_mask"):
            batch[key] = batch[key].clone()
            batch[key][1, 3:] = 0

    def gradients(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        model(**inputs).logits[row, :3].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with pair.patch(model):
        together, alone = gradients(batch, 1), gradients(short, 0)
    for parameter, expected in alone.items():
        if expected.abs().max() > 1e-9:
            assert_close(together[parameter], expected, 1e-8, parameter)
