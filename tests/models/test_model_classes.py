"""Every Efficient head class: built from scratch, loaded from original and converted checkpoints, found by Auto classes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_source
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import hf_efficient as he
from hf_efficient.models.registry import CONFIGS, MODELS
from hf_efficient.testing import FAMILIES, TINY, assert_close

HEADS = [stock for stock in MODELS if stock.config_class.model_type in FAMILIES]
LONGFORMER: dict[str, Any] = {"mechanism": "longformer", "attention_window": 8, "global_tokens": "first"}
AUTOS = [
    auto
    for _, auto in inspect.getmembers(modeling_auto, inspect.isclass)
    if issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None
]

heads = pytest.mark.parametrize("stock", HEADS, ids=[stock.__name__ for stock in HEADS])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("sources")
    return {family: save_source(root / family, family, positions=64) for family in FAMILIES}


@pytest.fixture(scope="module")
def converted_sources(sources, tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("converted")
    return {
        family: he.convert(path, [LONGFORMER], max_positions=128).save(root / family)
        for family, path in sources.items()
    }


def overrides(stock: Any) -> dict[str, Any]:
    return {"is_decoder": True} if stock.__name__ in ("BertLMHeadModel", "RobertaForCausalLM") else {}


def sizes(family: str) -> dict[str, Any]:
    _, _, values, layers = TINY[family]
    return values | {layers: 2} | ({} if family == "t5" else {"n_positions": 64} if family == "gpt2" else {})


def head_inputs(model: Any, length: int = 40) -> dict[str, Any]:
    ids = torch.randint(5, 99, (2, length), generator=torch.Generator().manual_seed(0))
    # T5's sequence classification reads the state at the last end-of-sequence token
    ids[:, -1] = model.config.eos_token_id
    inputs: dict[str, Any] = {"input_ids": ids}
    name = type(model).__name__
    if name.endswith(("MultipleChoice", "DoubleHeadsModel")):
        inputs = {"input_ids": ids[:, None].expand(-1, 2, -1).contiguous()}
    elif name.endswith(("T5Model", "ConditionalGeneration")):
        inputs["decoder_input_ids"] = ids[:, :9]
    return inputs


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def assert_initialised(model: Any) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), f"{name} was never set"
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"


def assert_same_state(actual: Any, expected: Any) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{different} differ"


@heads
def test_from_scratch_is_initialised_like_the_stock_class(stock):
    family = stock.config_class.model_type
    options = sizes(family) | overrides(stock)
    torch.manual_seed(0)
    config = CONFIGS[family](**options, efficient_attention=[LONGFORMER])
    model = MODELS[stock](config)
    assert_initialised(model)
    expected = stock(stock.config_class(**options)).state_dict()
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max() if name in expected else torch.tensor(0.02 * 5)
        assert parameter.abs().max() <= 2 * scale + 1e-6, f"{name} is out of scale"
        if ".efficient." in name and name.endswith("weight"):
            assert 0.01 < parameter.std() < 0.04, f"{name}: std {parameter.std()}"
    assert [n for n in model.state_dict() if n not in expected] == [
        n for n in model.state_dict() if ".efficient." in n
    ]
    assert all(tensor.isfinite().all() for tensor in tensors_of(model.eval()(**head_inputs(model))).values())


@heads
def test_exact_limit_equals_the_stock_head(stock, tmp_path):
    torch.manual_seed(0)
    family = stock.config_class.model_type
    model = stock(stock.config_class(**sizes(family), **overrides(stock))).eval()
    model.save_pretrained(tmp_path)
    inputs = head_inputs(model)
    efficient = MODELS[stock].from_pretrained(
        tmp_path, efficient_attention={"mechanism": "local", "attention_window": 80}
    )
    assert type(efficient) is MODELS[stock] and not efficient.training
    with torch.no_grad():
        expected, actual = tensors_of(model(**inputs)), tensors_of(efficient(**inputs))
    assert expected.keys() == actual.keys() and expected
    for name in expected:
        assert_close(actual[name], expected[name], 1e-5, name)


@heads
def test_loads_an_original_checkpoint_of_another_head(stock, sources, tmp_path):
    family, cls = stock.config_class.model_type, MODELS[stock]
    model = cls.from_pretrained(
        sources[family], efficient_attention=[LONGFORMER], max_positions=128, **overrides(stock)
    )
    assert type(model) is cls
    assert_initialised(model)
    state, body = model.state_dict(), body_of(sources[family], model)
    assert len(body) > 15
    for name, tensor in body.items():
        if "position_embeddings" in name or "wpe" in name:
            offset = len(tensor) - 64
            assert len(state[name]) == offset + 128
            assert torch.equal(state[name][: len(tensor)], tensor), f"{name} lost its rows"
        else:
            assert torch.equal(state[name], tensor), f"{name} was not loaded"
    model.save_pretrained(tmp_path)
    assert_same_state(cls.from_pretrained(tmp_path), model)


@heads
def test_loads_a_converted_checkpoint_of_another_head(stock, converted_sources):
    family, cls = stock.config_class.model_type, MODELS[stock]
    path = converted_sources[family]
    if overrides(stock):
        # the checkpoint was converted as an encoder, and bidirectional windows are no causal ones
        with pytest.raises(ValueError, match="side='encoder'"):
            cls.from_pretrained(path, **overrides(stock))
        return
    model = cls.from_pretrained(path)
    assert_initialised(model)
    state, body = model.state_dict(), body_of(path, model)
    assert sum(".efficient." in name for name in body) == sum(".efficient." in name for name in state)
    assert (family == "gpt2") or any(".efficient." in name for name in body)
    for name, tensor in body.items():
        assert torch.equal(state[name], tensor), f"{name} was not loaded"


@pytest.mark.parametrize("groups", [[LONGFORMER | {"side": "both"}], [LONGFORMER, LONGFORMER | {"side": "decoder"}]])
@pytest.mark.parametrize("name", ["T5EncoderModel", "T5ForTokenClassification"])
def test_encoder_of_an_encoder_decoder_checkpoint(name, groups, sources, tmp_path):
    whole = he.convert(sources["t5"], groups)
    cls = getattr(he, f"Efficient{name}")
    model = cls.from_pretrained(whole.save(tmp_path / "whole"))
    assert_initialised(model)
    inputs = head_inputs(model)
    with torch.no_grad():
        encoders = (m.get_encoder() if hasattr(m, "get_encoder") else m.encoder for m in (model, whole.model))
        hidden, expected = (encoder(**inputs).last_hidden_state for encoder in encoders)
    assert torch.equal(hidden, expected)
    model.save_pretrained(tmp_path / "encoder")
    assert_same_state(cls.from_pretrained(tmp_path / "encoder"), model)


@heads
def test_is_found_by_every_auto_class_of_its_stock_form(stock, sources, tmp_path):
    family, cls = stock.config_class.model_type, MODELS[stock]
    found = []
    for auto in AUTOS:
        served = auto._model_mapping.get(stock.config_class, ())
        if stock in (served if isinstance(served, tuple) else (served,)):
            found.append(auto)
    if stock.__name__ in WITHOUT_AUTO:
        assert not found, f"transformers now serves {stock.__name__} through {found}"
        pytest.skip(f"transformers has no Auto class for {stock.__name__}")
    assert found, f"no Auto class serves {stock.__name__}"
    model = cls.from_pretrained(sources[family], efficient_attention=[LONGFORMER], **overrides(stock))
    model.save_pretrained(tmp_path)
    for auto in found:
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is cls, f"{auto.__name__} gives {type(loaded).__name__}"
        assert_same_state(loaded, model)
        assert type(auto.from_config(model.config)) is cls


WITHOUT_AUTO = {"GPT2DoubleHeadsModel"}


def body_of(path: Any, model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that `model` has a place for, by their names in the model."""
    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    places = {name: name for name in state} | {name.removeprefix(prefix): name for name in state}
    tensors = load_file(path / "model.safetensors")
    renamed = {places.get(name, places.get(name.removeprefix(prefix))): tensor for name, tensor in tensors.items()}
    renamed.pop(None, None)
    return {name: tensor for name, tensor in renamed.items() if name.split(".")[0] not in ("lm_head", "cls")}
