"""The exact model inside a converted one, and the teacher that training does not change."""

from __future__ import annotations

import pytest
import torch
from pairs import MAIN, VARIANTS, Pair, each
from transfers import END_TO_END, linformer, pair_of, with_adapters

from hf_efficient.patching.exact import Teacher, exact_attention
from hf_efficient.testing import assert_close, inputs_for, tiny_model
from hf_efficient.training import AttentionTransfer, trainable


@each(MAIN + [pair for pair in VARIANTS if pair.mechanism == "etc"], of="attention")
def test_exact_attention_is_the_unconverted_model(pair: Pair):
    model = pair.model().double()
    inputs = inputs_for(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        with pair.patch(model):
            converted = model(**inputs).logits
            with exact_attention(model):
                actual = model(**inputs).logits
            again = model(**inputs).logits
            with pytest.raises(ZeroDivisionError), exact_attention(model):
                raise ZeroDivisionError
            after_error = model(**inputs).logits
    assert_close(actual, expected, 1e-9, where=inputs["attention_mask"])
    assert (converted - expected).abs().max() > 1e-3, "the mechanism changes nothing, so this shows nothing"
    assert torch.equal(again, converted) and torch.equal(after_error, converted)


@pytest.mark.parametrize("label", ["local-gpt2", "hedgehog-gpt2", "longformer-t5-decoder"])
def test_exact_generation(label: str, monkeypatch):
    """Far enough that bounded caches would have forgotten keys."""
    monkeypatch.setattr("hf_efficient.cache.bounded.SLACK", 8)
    pair = pair_of(label)
    model = pair.model(positions=256).double()
    inputs = {k: v for k, v in inputs_for(model, batch=2, length=40).items() if not k.startswith("decoder")}
    if not model.config.is_encoder_decoder:  # prompts end at the right edge
        inputs = {name: rows.flip(1) for name, rows in inputs.items()}
    options = dict(max_new_tokens=40, do_sample=False, min_new_tokens=40)
    expected = model.generate(**inputs, **options)
    with pair.patch(model):
        converted = model.generate(**inputs, **options)
        with exact_attention(model):
            actual = model.generate(**inputs, **options)
        again = model.generate(**inputs, **options)
    assert torch.equal(actual, expected)
    assert not torch.equal(converted, expected) and torch.equal(again, converted)


def test_exact_attention_of_an_unconverted_model_is_that_model():
    model = tiny_model("bert")
    inputs = inputs_for(model)
    expected = model(**inputs).logits
    with exact_attention(model):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("how", ["attention", "all", "lora"])
def test_the_teacher_stays_what_it_was(how: str):
    plain = tiny_model("bert").double()
    inputs = inputs_for(plain)
    expected = plain(**inputs).logits.detach()
    model = linformer().double()
    if how == "lora":
        model = with_adapters(model).double()
    else:
        trainable(model, how)
    transfer = AttentionTransfer(model, END_TO_END)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with transfer:
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(**inputs).loss.backward()
            optimizer.step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    changed = [name for name, p in plain.named_parameters() if how != "lora" and not torch.equal(trained[name], p)]
    assert changed or how == "lora"
    assert_close(transfer.teacher(**inputs).logits, expected, 1e-9, where=inputs["attention_mask"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), f"{name} was not put back"
    with exact_attention(model):
        now = model.eval()(**inputs).logits
    assert (now - expected).abs().max() > 1e-3, "training changed nothing, so this shows nothing"


def test_a_teacher_without_former_values_is_refused():
    model = linformer()
    trainable(model, "mechanism")
    teacher = Teacher(model)
    trainable(model, "attention")
    with pytest.raises(ValueError, match="before the transfer is made"):
        teacher(**inputs_for(model))
