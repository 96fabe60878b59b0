"""What others put around a converted model, or in the place of its parts, changes nothing: models with this one as a part,
configs of their own, copies, replicas of data-parallel training, frozen weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CASES
from pairs import MAIN, Pair, each, labelled, logits
from torch import nn
from transformers import BertConfig, BertLMHeadModel, EncoderDecoderModel, PreTrainedModel
from transformers import initialization as init

import hf_efficient as he
from hf_efficient.families import HostModel
from hf_efficient.patching.exact import host_parameters
from hf_efficient.patching.install import implementations
from hf_efficient.testing import assert_close, inputs_for, tiny_model

LENGTH = 24
PAIRS = [pair for pair in MAIN if pair.side != "decoder"]
TRAINED = [pair for pair in PAIRS if CASES[pair.mechanism].parameters]


class Around(PreTrainedModel):
    """Someone's model with a converted one as a part, which initialises every weight that is not marked."""

    config_class = BertConfig

    def __init__(self, inner: Any):
        super().__init__(BertConfig())
        self.inner = inner
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        for parameter in module.parameters():
            init.normal_(parameter)


def part_configs(model: Any) -> None:
    """Give every stack and head a config of its own, equal to that of its layers, as wrappers do."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config = copy.deepcopy(module.config)


def changed(model: Any, before: dict[str, torch.Tensor]) -> list[str]:
    after = model.state_dict()
    assert after.keys() == before.keys()
    return [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@each(PAIRS)
def test_a_model_around_it_draws_nothing_anew(pair: Pair):
    model = pair.model()
    model = he.convert(model, pair.config, max_positions=160).model
    inputs = inputs_for(model, length=LENGTH)
    expected, before = logits(model, inputs), snapshot(model)
    for inner in (model, copy.deepcopy(model)):
        Around(inner)
        inner.init_weights()
        inner.tie_weights()
        assert not changed(inner, before)
        assert torch.equal(logits(inner, inputs), expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_model_around_experts_draws_nothing_anew(family: str):
    model = tiny_model(family)
    he.upcycle(model, 2)
    before = snapshot(model)
    Around(model)
    assert not changed(model, before)
    he.revert(model)
    before = snapshot(model)
    Around(model)
    assert not changed(model, before), "the dense layers that are back"


@each(PAIRS, of="attention")
def test_layers_with_another_config_than_their_stack_are_converted_too(pair: Pair):
    model = pair.model(layers=1)
    inputs = inputs_for(model, length=LENGTH)
    full = logits(model, inputs)
    with pair.patch(model):
        expected = logits(model, inputs)
    part_configs(model)
    model.config._attn_implementation = "eager"
    before = implementations(model)
    with pair.patch(model):
        assert torch.equal(logits(model, inputs), expected)
    assert implementations(model) == before
    model.config._attn_implementation = "sdpa"
    with pair.patch(model):
        # configs that are equal to those in use may take their places
        part_configs(model)
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), full)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_config_that_was_switched_stops_the_next_call(family: str):
    model = tiny_model(family)
    inputs = inputs_for(model, length=12)
    layer = HostModel.of(model).stacks[0].layers[-1].module
    layer.config = copy.deepcopy(layer.config)
    he.patch_attention(model, "local", attention_window=8)
    layer.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="attn_implementation was changed to 'sdpa'"):
        model(**inputs)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_converted_inside_an_encoder_decoder_model(family: str, tmp_path: Any):
    encoder = tiny_model(family).base_model
    config = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    decoder = BertLMHeadModel(BertConfig(**config, is_decoder=True, add_cross_attention=True)).eval()
    whole = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    inputs = inputs_for(encoder, length=LENGTH)
    with torch.no_grad():
        full = whole.encoder(**inputs)[0]
        with he.patch_attention(copy.deepcopy(encoder), "longformer", attention_window=4) as alone:
            expected = alone(**inputs)[0]
        he.convert(whole.encoder, "longformer", attention_window=4)
        assert torch.equal(whole.encoder(**inputs)[0], expected)
        whole.save_pretrained(tmp_path)
        assert torch.equal(EncoderDecoderModel.from_pretrained(tmp_path).encoder(**inputs)[0], expected)
        he.revert(whole.encoder)
        assert type(whole.config.encoder) is type(tiny_model(family).config)
        assert torch.equal(whole.encoder(**inputs)[0], full)


# ---- training ----------------------------------------------------------------------------------------------------


def replica(model: nn.Module) -> Any:
    """What `nn.DataParallel` runs on a device: modules whose weights are plain tensors."""
    copies: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, one in copies.items():
        for name, child in module._modules.items():
            one._modules[name] = None if child is None else copies[child]
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            one.__dict__.pop(name, None)
            if tensor is None:
                one._parameters[name] = None
            else:
                setattr(one, name, tensor.view_as(tensor))
    return copies[model]


@each(TRAINED, of="attention")
def test_training_with_frozen_parts_and_in_replicas(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Also where several processes wait for gradients of whatever is trained."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    # the last layer of etc has no global rows
    model = pair.model(layers=2 if pair.mechanism == "etc" else 1).train()
    inputs = labelled(model, inputs_for(model, length=12))
    with pair.patch(model):
        host = {id(p) for p in host_parameters(model).values()}
        expected = model(**inputs).loss.detach()
        for trains in (lambda p: False, lambda p: id(p) in host, lambda p: id(p) not in host):
            for parameter in model.parameters():
                parameter.requires_grad_(trains(parameter))
            for one in (model, replica(model)):
                loss = one(**inputs).loss
                assert_close(loss.detach(), expected, 1e-6)
                if loss.requires_grad:
                    loss.backward()
            for name, parameter in model.named_parameters():
                assert (parameter.grad is not None) <= trains(parameter), name
            model.zero_grad()


def test_experts_are_not_trained_in_replicas():
    model = tiny_model("bert")
    he.upcycle(model, 2)
    inputs = inputs_for(model, length=12)
    with torch.no_grad():
        assert torch.equal(replica(model)(**inputs).logits, model(**inputs).logits)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(model.train())(**inputs)


# ---- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, 0, 7])
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
def test_positions_count_from_what_the_embeddings_hold(family: str, pad: int | None):
    """A padding id that is set after loading changes no position."""
    full, short = (inputs_for(tiny_model(family), length=n) for n in (128, 150))
    expected = he.convert(tiny_model(family), "etc", attention_window=8, num_global_tokens=2, max_positions=150)
    model = tiny_model(family)
    model.config.pad_token_id = pad
    with he.patch_attention(model, "local", attention_window=8):
        assert logits(model, full).isfinite().all()
        with pytest.raises(ValueError, match="150 tokens, but the model has 128 positions"):
            model(**short)
    result = he.convert(model, "etc", attention_window=8, num_global_tokens=2, max_positions=150)
    assert result.report.max_positions == 150
    assert torch.equal(logits(model, short), logits(expected.model, short))
    he.revert(model)
    assert model.config.max_position_embeddings == model.base_model.embeddings.position_embeddings.num_embeddings
    assert torch.equal(logits(model, full), logits(tiny_model(family), full))
