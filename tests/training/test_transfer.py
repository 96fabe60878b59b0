"""Attention transfer: losses and gradients against their definitions, blocks, and training loops."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from cases import CASES
from pairs import MAIN, Pair, each, labelled
from torch import Tensor, nn
from transfers import END_TO_END, Inputs, gradients, heads, linformer, pair_of, relative, with_adapters

import hf_efficient as he
from hf_efficient.evaluation.controls import MeanOfValuesConfig
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.testing import assert_close, inputs_for, tiny_model
from hf_efficient.training import AttentionTransfer, TransferOutput, blocks, layer_errors, trainable

# extra tokens run through the whole stack, so that no layer can be converted alone; the funnel's layers have fewer tokens
ALONE = [pair for pair in MAIN if pair.mechanism not in ("etc", "funnel")]
LEARNING = [
    pair
    for pair in MAIN
    if CASES[pair.mechanism].parameters and (pair.mechanism != "longformer" or not pair.is_causal)
]


# ---- losses per layer --------------------------------------------------------------------------------------------


def alone(pair: Pair, config: Any, layer: int, inputs: Inputs) -> tuple[Any, Tensor, Tensor]:
    """A model with one converted layer, the heads there, and those of the unconverted model."""
    model = pair.model().double()
    with torch.no_grad():
        expected = heads(model, inputs, pair.side)[layer]
    handle = he.patch_attention(model, dataclasses.replace(config, layers=(layer,), side=pair.side))
    assert handle.active
    return model, heads(model, inputs, pair.side)[layer], expected


@each(
    [
        *ALONE,
        *(
            Pair("hedgehog", family, None, dict(attention_window=6, sink_tokens=2), "sinks")
            for family in ("bert", "gpt2")
        ),
    ],
    of="attention",
)
def test_layer_errors_against_models_with_one_converted_layer(pair: Pair):
    """Every layer sees the unconverted model's states, and only real tokens count; so do the controls."""
    model = pair.model().double()
    inputs = inputs_for(model)
    with pair.patch(model):
        errors = layer_errors(model, [inputs])
    control = pair.config.attention_class.control_config(pair.config)
    configs = {"mechanism": pair.config, "mean of values": MeanOfValuesConfig()}
    configs |= {} if control is None else {"window only": control}
    assert set(errors) == {"layers", *configs}
    for kind, config in configs.items():
        for layer in range(2):
            _, actual, expected = alone(pair, config, layer, inputs)
            error = relative(actual, expected, inputs["attention_mask"]).sqrt()
            assert errors[kind][layer] == pytest.approx(error.item(), rel=1e-9), (kind, layer)


@each([pair for pair in LEARNING if pair.mechanism != "etc"], of="attention")
def test_loss_and_gradients_per_layer_by_definition(pair: Pair):
    model = pair.model().double().train()
    inputs = inputs_for(model)
    with pair.patch(model), AttentionTransfer(model) as transfer:
        output = model(**inputs)
        assert isinstance(output, TransferOutput)
        output.loss.backward()
        names = transfer.layers
        actual = gradients(model)
    assert actual
    losses, wanted = [], dict.fromkeys(actual, 0.0)
    for layer in range(2):
        single, student, expected = alone(pair, pair.config, layer, inputs)
        loss = relative(student, expected, inputs["attention_mask"])
        (loss / 2).backward()
        losses.append(loss.detach())
        for own, gradient in gradients(single).items():
            if own.startswith(f"{names[layer]}.efficient."):
                # layers may share a parameter, which then has the first one's name
                wanted[own if own in wanted else own.replace(names[layer], names[0])] += gradient
    for own, gradient in actual.items():
        scale = torch.as_tensor(wanted[own]).abs().max()
        assert_close(gradient, wanted[own], 1e-7, own) if scale > 1e-12 else assert_close(
            gradient + 1, gradient * 0 + 1, 1e-12
        )
    assert_close(output.layer_loss, torch.stack(losses), 1e-9, "layer_loss")
    assert_close(output.loss.detach(), torch.stack(losses).mean(), 1e-9, "loss")


@each(LEARNING, of="attention")
def test_every_trained_parameter_has_a_gradient_and_no_other(pair: Pair):
    """As data-parallel training needs it; with accumulation over batches of other lengths, in training mode."""
    model = pair.model(**dict.fromkeys(_dropouts(pair.family), 0.1)).train()
    with pair.patch(model):
        own = {name for name, _ in model.named_parameters() if ".efficient." in name}
        with AttentionTransfer(model):
            first = model(**labelled(model, inputs_for(model)))
            second = model(**inputs_for(model, batch=2, length=41))
            again = model(**labelled(model, inputs_for(model)))
            assert torch.equal(first.layer_loss, again.layer_loss), "dropout is on"
            ((first.loss + second.loss) / 2).backward()
            assert {name for name, p in model.named_parameters() if p.requires_grad} == own
        assert {name for name in gradients(model)} == own
        assert all(g.isfinite().all() for g in gradients(model).values())
        assert all(p.requires_grad for p in model.parameters())
        assert all(module.training for module in model.modules())


def _dropouts(family: str) -> tuple[str, ...]:
    if family == "t5":
        return ("dropout_rate",)
    if family == "gpt2":
        return ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return ("hidden_dropout_prob", "attention_probs_dropout_prob")


# roberta counts positions by what is no padding token
@each([pair for pair in LEARNING if pair.family != "roberta"])
def test_what_stands_in_padding_does_not_matter(pair: Pair):
    model = pair.model().double()
    inputs = inputs_for(model)
    changed = dict(inputs)
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in inputs:
            changed[ids] = torch.where(inputs[mask].bool(), inputs[ids], 7)
    with pair.patch(model), AttentionTransfer(model):
        losses = [model(**batch).layer_loss for batch in (inputs, changed)]
        short = model(**{k: v[:1] for k, v in inputs.items()}).layer_loss
    assert_close(losses[1], losses[0], 1e-10)
    assert (short - losses[0]).abs().min() > 1e-6, "rows with padding have no part in the loss"


@each([pair_of("hedgehog-gpt2"), pair_of("linformer-bert"), pair_of("longt5-bert")])
def test_packed_rows_are_separate_rows(pair: Pair):
    """Positions that start again within a row: losses and gradients of all its sequences, each a row of its own."""
    model = pair.model().double()
    separate = inputs_for(model, batch=2, length=35)
    separate["input_ids"][1, 25:], separate["attention_mask"][1] = 1, 0
    separate["attention_mask"][1, :25] = 1
    packed = {
        "input_ids": torch.cat([separate["input_ids"][0], separate["input_ids"][1, :25]])[None],
        "position_ids": torch.cat([torch.arange(35), torch.arange(25)])[None],
    }
    with pair.patch(model):
        errors = [layer_errors(model, [batch])["mechanism"] for batch in (packed, separate)]
        for losses in ("attention_output", "hidden_states"):
            found = []
            for batch in (packed, separate):
                model.zero_grad()
                with AttentionTransfer(model, losses):
                    output = model(**batch)
                    output.loss.backward()
                found.append((output.layer_loss, gradients(model)))
            assert_close(found[0][0], found[1][0], 1e-9, losses)
            for name, gradient in found[1][1].items():
                if gradient.abs().max() > 1e-9:
                    assert_close(found[0][1][name], gradient, 1e-7, name)
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


@pytest.mark.parametrize("length", [1, 2, 63])
@each([pair_of("etc-bert"), pair_of("linformer-t5-encoder"), pair_of("hedgehog-gpt2")])
def test_odd_lengths(pair: Pair, length: int):
    model = pair.model().double()
    with pair.patch(model), AttentionTransfer(model):
        output = model(**inputs_for(model, batch=1, length=length))
    assert output.layer_loss.isfinite().all() and output.layer_loss.shape == (2,)


def test_extra_global_tokens_pass_on_as_their_own_layers_made_them():
    """In the first layer a token's heads are those of the unconverted model; global rows are the student's own."""
    pair = pair_of("etc-bert")
    model = pair.model().double()
    inputs = inputs_for(model)
    expected = heads(model, inputs, None)
    count = pair.options["num_global_tokens"]
    with pair.patch(model):
        student = heads(model, inputs, None)[0]
        with AttentionTransfer(model):
            seen = heads(model, inputs, None)
            losses = model(**inputs).layer_loss
    mask = inputs["attention_mask"]
    for layer in range(2):
        assert_close(seen[layer][:, count:], expected[layer], 1e-9, where=mask)
    assert_close(seen[0][:, :count], student[:, :count], 1e-12)
    assert_close(losses[0], relative(student[:, count:], expected[0], mask).detach(), 1e-9)


@pytest.mark.parametrize(
    "label", ["hedgehog-bert", "hedgehog-gpt2", "t2r-gpt2", "hedgehog-t5-encoder", "hedgehog-t5-decoder"]
)
def test_attention_weights_loss_by_definition(label: str):
    """The teacher's weights from transformers' eager attention, the student's as what its heads are made of."""
    pair = pair_of(label)
    model = pair.model().double()
    inputs = inputs_for(model)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    name = {None: "attentions", "encoder": "encoder_attentions", "decoder": "decoder_attentions"}[pair.side]
    teacher = plain(**inputs, output_attentions=True, use_cache=False)[name]
    real = inputs["attention_mask"].bool()[:, None].expand(-1, 4, -1)
    with pair.patch(model):
        with AttentionTransfer(model, "attention_weights"):
            output = model(**inputs)
        for layer, expected in enumerate(teacher):
            weights = _student_weights(pair, model, layer, inputs)
            loss = -(expected * weights.clamp(min=1e-12).log()).sum(-1)[real].mean()
            assert output.layer_loss[layer].item() == pytest.approx(loss.item(), rel=1e-8), layer


def _student_weights(pair: Pair, model: Any, layer: int, inputs: Inputs) -> Tensor:
    """(B, H, N, S): outputs of the mechanism for values that are unit vectors, one key at a time."""
    mechanism = mechanism_of(list(converted_layers(model).values())[layer])
    calls: list[Any] = []
    with AttentionTransfer(model):
        hook = mechanism.register_forward_pre_hook(lambda module, args: calls.append(args))
        model(**inputs)
        hook.remove()
    query, key, _, context = calls[0]
    size = key.shape[2]
    columns = []
    for first in range(0, size, query.shape[-1]):
        unit = torch.eye(size, size + query.shape[-1], dtype=key.dtype)[:, first : first + query.shape[-1]]
        columns.append(mechanism(query, key, unit.expand(*key.shape[:2], -1, -1), context))
    assert not mechanism.left_aligned
    return torch.cat(columns, dim=-1)[..., :size]


def test_attention_weights_of_a_mechanism_without_are_refused():
    model = linformer()
    with AttentionTransfer(model, "attention_weights"), pytest.raises(ValueError, match=r"linformer can't show"):
        model(**inputs_for(model))


# ---- losses end to end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label", ["linformer-bert", "etc-roberta", "hedgehog-gpt2", "linformer-t5-encoder", "performer-bert"]
)
def test_end_to_end_losses_by_definition(label: str):
    pair = pair_of(label)
    model = pair.model().double()
    inputs = inputs_for(model)
    mask = inputs["attention_mask"]

    def outputs() -> tuple[list[Tensor], Tensor, Tensor]:
        out = model(**inputs, output_hidden_states=True)
        if pair.family != "t5":
            return list(out.hidden_states[1:]), out.logits, out.hidden_states[-1]
        states = [*out.encoder_hidden_states[1:], *out.decoder_hidden_states[1:]]
        return states, out.logits, out.encoder_last_hidden_state

    with torch.no_grad():
        expected, logits, last = outputs()
        with pair.patch(model):
            actual, own_logits, own_last = outputs()
            by_name = {}
            for name in END_TO_END:
                with AttentionTransfer(model, name):
                    by_name[name] = model(**inputs)
            with AttentionTransfer(model, END_TO_END):
                total = model(**inputs).loss
    states = torch.stack([relative(a, b, mask) for a, b in zip(actual, expected, strict=True)])
    assert_close(by_name["hidden_states"].layer_loss, states, 1e-9)
    assert_close(by_name["hidden_states"].loss, states.mean(), 1e-9)
    p, q = logits.log_softmax(-1)[mask.bool()], own_logits.log_softmax(-1)[mask.bool()]
    assert_close(by_name["logits"].loss, (p.exp() * (p - q)).sum(-1).mean(), 1e-9)
    pooled = [(x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for x in (own_last, last)]
    assert_close(by_name["embedding"].loss, 1 - torch.cosine_similarity(*pooled, dim=-1).mean(), 1e-9)
    weighted = sum(weight * by_name[name].loss for name, weight in END_TO_END.items())
    assert_close(total, torch.as_tensor(weighted), 1e-9)


@pytest.mark.parametrize("label", ["linformer-bert", "hedgehog-gpt2", "linformer-t5-encoder"])
def test_end_to_end_gradients_with_checkpointing_and_without(label: str):
    pair = pair_of(label)
    model = pair.model().double().train()
    inputs = inputs_for(model)
    with pair.patch(model):
        trainable(model, "attention")
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            with AttentionTransfer(model, END_TO_END):
                model(**inputs).loss.backward()
            found.append(gradients(model))
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == set(found[0]) == set(found[1]) and any(".efficient." not in name for name in wanted)
    for name, gradient in found[0].items():
        if gradient.abs().max() > 1e-9:
            assert_close(found[1][name], gradient, 1e-7, name)


def test_classifiers_and_bare_encoders():
    from transformers import BertForSequenceClassification, BertModel

    config = tiny_model("bert", initializer_range=0.25).config
    for cls, losses in (
        (BertForSequenceClassification, ("logits", "hidden_states")),
        (BertModel, ("hidden_states", "embedding")),
    ):
        for mechanism in ("linformer", "etc"):
            model = cls(copy.deepcopy(config)).eval()
            inputs = inputs_for(model)
            with he.patch_attention(model, mechanism, **CASES[mechanism].small), AttentionTransfer(model, losses):
                assert model(**inputs).loss > 0
            with he.patch_attention(model, mechanism, **CASES[mechanism].small), AttentionTransfer(model):
                assert (model(**inputs).layer_loss > 0).all()
    with (
        pytest.raises(ValueError, match="no logits"),
        he.patch_attention(model, "local"),
        AttentionTransfer(model, "logits"),
    ):
        model(**inputs)


# ---- precision ---------------------------------------------------------------------------------------------------


@each(LEARNING)
def test_autocast_gives_nearly_the_same_gradients(pair: Pair):
    if pair.mechanism == "t2r":
        # a query whose few features are all 0 divides by ε alone: there the function itself is steep
        pair = dataclasses.replace(pair, options=pair.options | dict(feature_dim=64))
    model = pair.model()
    inputs = inputs_for(model)
    found, losses = [], []
    with pair.patch(model), AttentionTransfer(model):
        with torch.no_grad():
            for parameter in model.parameters():  # copies of the host's own projections need not learn anything
                parameter.add_(parameter.requires_grad * 0.02 * torch.randn_like(parameter))
        for enabled in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                output = model(**inputs)
            assert output.loss.dtype == torch.float32
            output.loss.backward()
            losses.append(output.loss.detach())
            found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert_close(losses[1], losses[0], 0.03)
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99


def test_autocast_keeps_no_weights_of_the_other_model():
    """One autocast block around several calls: casts of weights must not pass from student to teacher or back."""
    model = linformer()
    trainable(model, "attention")
    inputs = inputs_for(model)
    transfer = AttentionTransfer(model, "hidden_states")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    found, losses = [], []
    for enabled in (False, True):
        model.zero_grad()
        with transfer, torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(**inputs)
            output = model(**inputs)
            output.loss.backward()
        losses.append(output.loss.detach())
        found.append(gradients(model))
    assert set(found[0]) == set(found[1])
    assert_close(losses[1], losses[0], 0.02)
    actual, expected = (torch.cat([g[name].flatten() for name in found[0]]) for g in (found[1], found[0]))
    assert torch.cosine_similarity(actual, expected, dim=0) > 0.99


# ---- blocks of layers --------------------------------------------------------------------------------------------


def _descend(model: Any, inputs: Inputs, layers: list[str] | None, steps: int = 3, lr: float = 0.05) -> None:
    with AttentionTransfer(model, layers=layers):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, eps=1e-30)
        for _ in range(steps):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()


@pytest.mark.parametrize("label", ["linformer-bert", "hedgehog-gpt2", "linformer-t5-encoder", "etc-bert"])
def test_block_after_block_is_each_layer_alone(label: str):
    pair = pair_of(label)
    start = pair.model(layers=3).double()
    inputs = inputs_for(start)
    he.patch_attention(start, pair.config)
    groups = blocks(start, 2)
    names = list(converted_layers(start))
    assert groups == [names[:2], names[2:]]
    in_blocks = copy.deepcopy(start)
    for group in groups:
        _descend(in_blocks, inputs, group)
    for name in names:
        single = copy.deepcopy(start)
        _descend(single, inputs, [name])
        expected = dict(single.named_parameters())
        for own, parameter in in_blocks.named_parameters():
            if own.startswith(f"{name}.efficient."):
                assert_close(parameter.detach(), expected[own].detach(), 1e-7, own)
            elif ".efficient." in own:
                assert torch.equal(expected[own], dict(start.named_parameters())[own]), f"{own} changed with {name}"


def test_gradients_exist_for_the_block_alone():
    model = linformer("bert")
    first, second = converted_layers(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    calls: list[str] = []
    for name in (first, second):
        mechanism_of(converted_layers(model)[name]).register_forward_hook(lambda *_, name=name: calls.append(name))
    with AttentionTransfer(model, layers=[second]):
        output = model(**inputs_for(model))
        output.loss.backward()
        assert all(p.requires_grad == name.startswith(f"{second}.efficient.") for name, p in model.named_parameters())
    assert output.layer_loss.shape == (1,) and calls == [second], "the layer outside the block ran its mechanism"
    assert all(name.startswith(second) for name in gradients(model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_layers_outside_the_block_may_lie_on_disk(family: str, tmp_path: Any):
    """accelerate fetches them from disk for their turn: the same result, and their weights hold no memory here."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    pair = pair_of(f"hedgehog-{family}")
    model = pair.model(layers=3)
    inputs = inputs_for(model)
    he.patch_attention(model, pair.config)
    names = list(converted_layers(model))
    expected = copy.deepcopy(model)
    _descend(expected, inputs, names[1:2])
    layer = names[0].partition(".0.")[0]
    device_map = {name: "cpu" for name, _ in model.named_children() if not layer.startswith(f"{name}.")}
    for parent in ("bert", "bert.encoder", "transformer"):
        if layer.startswith(f"{parent}."):
            children = model.get_submodule(parent).named_children()
            device_map |= {f"{parent}.{n}": "cpu" for n, _ in children if not layer.startswith(f"{parent}.{n}")}
    device_map |= {f"{layer}.0": "disk", f"{layer}.1": "cpu", f"{layer}.2": "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert all(p.is_meta == (".1." not in n) for n, p in model.get_submodule(layer).named_parameters(prefix=layer))
    _descend(model, inputs, names[1:2])
    assert all(p.is_meta == (".1." not in n) for n, p in model.get_submodule(layer).named_parameters(prefix=layer))
    for name, parameter in model.named_parameters():
        if name.startswith(f"{names[1]}.efficient."):
            assert_close(parameter.detach(), dict(expected.named_parameters())[name].detach(), 1e-5, name)
    remove_hook_from_submodules(model)


# ---- training loops ----------------------------------------------------------------------------------------------


def _rows(count: int = 12) -> list[dict[str, Tensor]]:
    inputs = inputs_for(tiny_model("bert"), batch=count, length=33)
    return [{name: tensor[row] for name, tensor in inputs.items()} for row in range(count)]


@pytest.mark.parametrize("losses", ["attention_output", END_TO_END], ids=["local", "end-to-end"])
def test_trainer_and_accelerate_loop_give_the_same_parameters(losses: Any, tmp_path: Any):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    steps, size, accumulation = 3, 2, 2
    models = [linformer(), linformer()]
    for model in models:
        trainable(model, "attention")
    optimizers = [lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)] * 2
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        save_strategy="no",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        label_names=["input_ids"],
    )
    with AttentionTransfer(models[0], losses):
        trainer = Trainer(models[0], arguments, train_dataset=_rows(), optimizers=(optimizers[0](models[0]), None))
        trainer.train()
        evaluated = trainer.evaluate(_rows())["eval_loss"]
        with torch.no_grad():
            loader = DataLoader(_rows(), batch_size=8)
            means = [(models[0].eval()(**batch).loss.item(), len(batch["input_ids"])) for batch in loader]
        assert evaluated == pytest.approx(sum(loss * rows for loss, rows in means) / 12, rel=1e-5)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    with AttentionTransfer(models[1], losses):
        optimizer = optimizers[1](models[1])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        model, optimizer, loader = accelerator.prepare(models[1], optimizer, DataLoader(_rows(), batch_size=size))
        logged = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if accelerator.sync_gradients:
                    schedule.step()
                optimizer.zero_grad()
            logged.append(loss.item())
    start = dict(linformer().named_parameters())
    theirs = dict(models[1].named_parameters())
    changed = 0
    for name, parameter in models[0].named_parameters():
        assert_close(parameter.detach(), theirs[name].detach(), 1e-5, name)
        changed += not torch.equal(parameter, start[name])
    assert changed >= 4
    losses_logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    means = [(a + b) / 2 for a, b in zip(logged[::2], logged[1::2], strict=True)]
    assert [float(loss) for loss in losses_logged] == pytest.approx(means, rel=1e-3)


def test_transfer_of_a_model_with_adapters():
    model = with_adapters(linformer())
    inputs = inputs_for(model)
    own = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    with AttentionTransfer(model):
        model(**inputs).loss.backward()
    assert set(gradients(model)) == own, "the trained copies of the mechanisms learn, and nothing else"
    model.zero_grad()
    with AttentionTransfer(model, END_TO_END):
        model(**inputs).loss.backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(layer_errors(model, [inputs])["mechanism"]) == 2


# ---- leaving no trace, and refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", ["attention_output", END_TO_END], ids=["local", "end-to-end"])
@pytest.mark.parametrize("mechanism", ["linformer", "etc"])
def test_a_transfer_leaves_no_trace(losses: Any, mechanism: str):
    model = tiny_model("bert")
    he.patch_attention(model, mechanism, **CASES[mechanism].small)
    inputs = inputs_for(model)
    expected = model(**inputs, output_hidden_states=True).logits  # transformers leaves its own traces
    traces = _traces(model)
    names = list(model.state_dict())
    with AttentionTransfer(model, losses):
        model(**inputs).loss.backward()
        assert list(model.state_dict()) == names
        with pytest.raises((ValueError, RuntimeError), match=r"97.*5|5.*97"):
            model(**inputs | {"attention_mask": inputs["attention_mask"][:, :5]})
        assert torch.is_grad_enabled()
        model(**inputs).loss.backward()
    assert _traces(model) == traces
    assert torch.equal(model(**inputs).logits, expected)
    copy.deepcopy(model)


def _traces(model: nn.Module) -> list[Any]:
    kept = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return [
        (
            name,
            module.training,
            sorted(module.__dict__),
            [len(getattr(module, k)) for k in kept],
            list(module._modules),
        )
        for name, module in model.named_modules()
    ] + [(name, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(losses="output"), "they are attention_output"),
        (dict(losses={}), "they are attention_output"),
        (dict(losses=("attention_output", "logits")), "mixes losses"),
        (dict(layers=["encoder.layer.0"]), "are not all converted layers"),
        (dict(layers=[]), "are not all converted layers"),
        (dict(losses="logits", layers=["bert.encoder.layer.0.attention.self"]), "leave `layers` out"),
    ],
)
def test_impossible_transfers_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        AttentionTransfer(linformer(), **arguments)


def test_more_refusals():
    with pytest.raises(ValueError, match="no converted layer"):
        AttentionTransfer(tiny_model("bert"))
    with pytest.raises(ValueError, match="no converted layer"):
        layer_errors(tiny_model("bert"), [])
    model = linformer(sharing="layerwise")
    with pytest.raises(ValueError, match="share parameters"):
        AttentionTransfer(model, layers=blocks(model, 1)[0])
    with pytest.raises(ValueError, match="at least 1"):
        blocks(model, 0)
    inputs = inputs_for(model)
    with AttentionTransfer(model):
        for arguments, message in (((inputs["input_ids"],), "keywords"), ((), "inside the")):
            with pytest.raises(ValueError, match=message):
                model(*arguments, **({} if arguments else inputs | {"num_items_in_batch": 3}))
        with pytest.raises(ValueError, match="already active"), AttentionTransfer(model):
            pass
        with pytest.raises(ValueError, match="leave it before"):
            layer_errors(model, [inputs])
    local = tiny_model("bert")
    with he.patch_attention(local, "local"):
        with pytest.raises(ValueError, match="trainable"), AttentionTransfer(local):
            pass
        with pytest.raises(ValueError, match="'attention' or 'all'"):
            trainable(local, "mechanism")
        with pytest.raises(ValueError, match="one of mechanism"):
            trainable(local, "everything")


@pytest.mark.parametrize(
    ("family", "projections"),
    [
        ("bert", ("self.query", "self.key", "self.value", "attention.output.dense")),
        ("roberta", ("self.query", "self.key", "self.value", "attention.output.dense")),
        ("gpt2", ("attn.c_attn", "attn.c_proj")),
        ("t5", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o")),
    ],
)
def test_trainable(family: str, projections: tuple[str, ...]):
    pair = next(p for p in MAIN if p.family == family and p.mechanism == "hedgehog")
    model = pair.model()
    with pair.patch(model):

        def chosen(what: str) -> set[str]:
            count = trainable(model, what)
            names = {name for name, p in model.named_parameters() if p.requires_grad}
            assert count == sum(p.numel() for name, p in model.named_parameters() if name in names)
            return names

        own = {name for name, _ in model.named_parameters() if ".efficient." in name}
        assert chosen("mechanism") == own and own
        stacks = ("decoder.",) if pair.side == "decoder" else ("encoder.",) if pair.side else ("",)
        host = {
            name
            for name, _ in model.named_parameters()
            if name.rpartition(".")[0].endswith(projections) and name.startswith(stacks)
        }
        assert chosen("attention") == own | host and len(host) >= 8
        assert chosen("all") == {name for name, _ in model.named_parameters()}
