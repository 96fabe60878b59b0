"""What this package relies on in transformers, and what it refuses because transformers would not: what breaks first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_efficient as he
from hf_efficient.families import families, family_of
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.dispatch import efficient_attention_forward, efficient_mask
from hf_efficient.patching.hooks import attach, state_of
from hf_efficient.patching.names import IMPLEMENTATION, LAYER
from hf_efficient.profiling.counters import LargestTensor
from hf_efficient.testing import FAMILIES, TINY, assert_close, inputs_for, tiny_model

PROBE = "contract_probe"
ABSOLUTE = ("bert", "roberta", "gpt2")


class Probe:
    """An attention and a mask function that record what transformers hands to them; attention itself returns zeros."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        self.calls.append(dict(module=module, query=query, key=key, value=value, mask=attention_mask, kwargs=kwargs))
        return torch.zeros_like(query).transpose(1, 2), None

    def mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        assert not args, "mask functions are called with keywords"
        self.masks.append(kwargs)
        return kwargs["attention_mask"]


@pytest.fixture
def probe() -> Iterator[Probe]:
    probe = Probe()
    AttentionInterface.register(PROBE, probe.attention)
    AttentionMaskInterface.register(PROBE, probe.mask)
    yield probe
    # transformers has no public way to take a name back
    del AttentionInterface._global_mapping[PROBE]
    del AttentionMaskInterface._global_mapping[PROBE]


def select(model: Any, implementation: str) -> Any:
    """Choose an implementation in every sub-model: not all releases go down into T5's two stacks by themselves."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.set_attn_implementation(implementation)
    return model


def probed(model_type: str, **overrides: Any) -> Any:
    return select(tiny_model(model_type, **overrides), PROBE)


def local(model: Any, window: int = 8, **options: Any) -> Any:
    """`model` with sliding windows in all of its self-attention."""
    side = "both" if model.config.is_encoder_decoder else None
    he.patch_attention(model, "local", attention_window=window, side=side, **options)
    return model


def model_sides(model: Any) -> list[str]:
    return [stack.side for stack in family_of(model).stacks(model)]


def cross_attending(model_type: str) -> Any:
    """A decoder with cross-attention of each family that has one."""
    if model_type == "gpt2":
        return tiny_model("gpt2", add_cross_attention=True)
    if model_type.endswith("t5"):
        return tiny_model(model_type)
    config_name, _, sizes, _ = TINY[model_type]
    config = getattr(transformers, config_name)(
        **sizes, num_hidden_layers=2, max_position_embeddings=130, is_decoder=True, add_cross_attention=True
    )
    torch.manual_seed(0)
    prefix = config_name.removesuffix("Config")
    name = "BertLMHeadModel" if prefix == "Bert" else f"{prefix}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def cross_inputs(model: Any) -> dict[str, Tensor]:
    """9 decoder tokens over 23 encoder tokens, of which row 1 has 15."""
    inputs = inputs_for(model, batch=2, length=9, padded=False)
    memory = torch.ones(2, 23, dtype=torch.long)
    memory[1, 15:] = 0
    if model.config.is_encoder_decoder:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, 99, (2, 23), generator=generator)
        return {"input_ids": ids, "attention_mask": memory, "decoder_input_ids": inputs["decoder_input_ids"]}
    states = torch.randn(2, 23, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return {**inputs, "encoder_hidden_states": states, "encoder_attention_mask": memory}


# ---- what transformers calls, and with what ----------------------------------------------------------------------


def test_one_neutral_name_is_registered_in_both_interfaces() -> None:
    """Without a mask function of the same name, transformers passes no mask at all, silently."""
    assert ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] is efficient_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION] is efficient_mask
    # only the class-wide mapping is looked up when masks are made
    assert AttentionMaskInterface._global_mapping[IMPLEMENTATION] is efficient_mask
    # names with these pieces mean Hub kernels, FlashAttention, paging, or start checks of other implementations
    assert not any(piece in IMPLEMENTATION for piece in ("/", "@", ":", "|", "flash", "sdpa", "flex", "paged"))


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_every_attention_layer_is_dispatched_once(model_type: str, probe: Probe) -> None:
    """Some architectures accept a registered name and never call it; none of the supported ones may."""
    assert set(TINY) <= set(families()), "a tiny model without a family"
    model = probed(model_type)
    model(**inputs_for(model, length=12))
    stacks = family_of(model).stacks(model)
    expected = {id(m) for stack in stacks for m in [layer.module for layer in stack.layers] + stack.cross_attention}
    called = [id(call["module"]) for call in probe.calls]
    assert len(called) == len(set(called)) == len(expected)
    assert set(called) == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attention_receives_heads_mask_scaling_and_every_keyword(model_type: str, probe: Probe) -> None:
    model, token = probed(model_type), object()
    inputs = inputs_for(model, length=12)
    model(**inputs, contract_keyword=token)
    assert probe.calls
    for call in probe.calls:
        assert call["query"].shape == call["key"].shape == call["value"].shape == (3, 4, 12, 8)
        assert call["kwargs"]["contract_keyword"] is token
        assert call["kwargs"]["scaling"] == (1.0 if model_type == "t5" else 8**-0.5)
        assert call["kwargs"]["dropout"] == 0.0
        assert torch.equal(call["mask"].bool(), inputs["attention_mask"].bool())


def test_scaling_follows_the_config(probe: Probe) -> None:
    """GPT-2 may scale by layer: the factor that arrives must be used, never one computed anew."""
    model = probed("gpt2", scale_attn_by_inverse_layer_idx=True)
    model(**inputs_for(model, length=5))
    assert [call["kwargs"]["scaling"] for call in probe.calls] == pytest.approx([8**-0.5, 8**-0.5 / 2])
    stock = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    inputs = inputs_for(stock, length=12)
    expected = stock(**inputs).logits
    assert_close(local(stock, 24)(**inputs).logits, expected, 1e-5, where=inputs["attention_mask"])


def test_gpt2_dispatches_even_with_upcast_attention(probe: Probe) -> None:
    """Under eager attention this option goes round the interface."""
    model = probed("gpt2", reorder_and_upcast_attn=True)
    model(**inputs_for(model, length=5))
    assert len(probe.calls) == 2


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert", "gpt2", "t5", "mt5", "umt5"])
def test_attention_modules_know_whether_they_are_causal(model_type: str) -> None:
    """While patched, that is: some releases leave it out of UMT5's decoder and rely on the mask alone."""
    models = [cross_attending(model_type)]
    if model_type in ("bert", "roberta", "xlm-roberta", "camembert"):
        models.append(tiny_model(model_type))
    for model in models:
        with he.patch_attention(model, "local", layers=[1], side=None if len(model_sides(model)) == 1 else "both"):
            for stack in family_of(model).stacks(model):
                causal = stack.side == "decoder"
                assert [bool(layer.module.is_causal) for layer in stack.layers] == [causal] * 2
                assert stack.layers[1].module.efficient.geometry.is_causal == causal
                assert len(stack.cross_attention) == (2 if model is models[0] and causal else 0)
                assert not any(module.is_causal for module in stack.cross_attention)
    assert model_sides(models[-1])[0] == ("decoder" if model_type == "gpt2" else "encoder")


def test_t5_hands_one_bias_from_layer_to_layer(probe: Probe) -> None:
    """The first layer of a stack makes it, all others get it; cross-attention gets none of it."""
    for model_type in ("t5", "mt5"):
        model = probed(model_type)
        model(**inputs_for(model, length=12))
        by_module = {call["module"]: call["kwargs"]["position_bias"] for call in probe.calls}
        for stack in family_of(model).stacks(model):
            biases = [by_module[layer.module] for layer in stack.layers]
            assert all(bias is biases[0] for bias in biases)
            assert all((by_module[module] == 0).all() for module in stack.cross_attention)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_patched_t5_hands_on_a_lazy_bias(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = local(tiny_model(model_type)), []

    def spy(module: nn.Module, *args: Any, position_bias: Any = None, **kwargs: Any) -> Any:
        seen.append((module._modules["efficient"] is not None, position_bias))
        return efficient_attention_forward(module, *args, position_bias=position_bias, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, spy)
    model(**inputs_for(model, length=12))
    assert sorted(converted for converted, _ in seen) == [False] * 2 + [True] * 4
    assert all(isinstance(bias, RelativeBias) if converted else bias is None for converted, bias in seen)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_dense_t5_bias_is_never_built_while_patched(model_type: str, side: str) -> None:
    long, short, num_heads = 512, 4, 4
    ids = {name: torch.randint(5, 99, (1, short)) for name in ("input_ids", "decoder_input_ids")}
    ids["input_ids" if side == "encoder" else "decoder_input_ids"] = torch.randint(5, 99, (1, long))
    model = tiny_model(model_type)
    with LargestTensor() as stock:
        model(**ids, use_cache=False)
    assert stock.numel >= num_heads * long * long, "the stock model builds no dense bias: nothing to compare with"
    with LargestTensor() as patched:
        local(model)(**ids, use_cache=False)
    assert patched.numel < num_heads * long * long / 4, patched.shape


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mask_functions_are_plain_in_ordinary_use(model_type: str, probe: Probe) -> None:
    """Anything but these two very objects means packing or a custom pattern, and is refused."""
    model = probed(model_type)
    inputs = inputs_for(model, length=12)
    model(**inputs)
    model(inputs["input_ids"], **{k: v for k, v in inputs.items() if k.startswith("decoder")})
    functions = [mask["mask_function"] for mask in probe.masks]
    plain = {"gpt2": {causal_mask_function}, "t5": {causal_mask_function, bidirectional_mask_function}}
    assert set(functions) == plain.get(model_type, {bidirectional_mask_function})
    for mask in probe.masks:
        assert mask["kv_length"] == mask["q_length"] == 12
        assert mask["q_offset"] == 0


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_mask_functions_are_plain_while_generating(model_type: str, probe: Probe) -> None:
    model = probed(model_type)
    inputs = {k: v for k, v in inputs_for(model, length=6).items() if not k.startswith("decoder")}
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    causal = [mask for mask in probe.masks if mask["mask_function"] is causal_mask_function]
    assert {mask["mask_function"] for mask in probe.masks} <= {causal_mask_function, bidirectional_mask_function}
    start = 6 if model_type == "gpt2" else 1
    assert [(m["q_offset"], m["kv_length"]) for m in causal] == [
        (0, start),
        (start, start + 1),
        (start + 1, start + 2),
    ]


def test_packed_positions_ask_for_another_mask_function(probe: Probe) -> None:
    """Only without attention_mask and cache: so a packed call gets a mask of ones, and its segments are found before."""
    ids = torch.randint(5, 99, (1, 8))
    packed, plain = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), torch.arange(8)[None]
    model = probed("gpt2")
    model(ids, position_ids=packed, use_cache=False)
    assert probe.masks[-1]["mask_function"] is not causal_mask_function
    model(ids, position_ids=packed, use_cache=False, attention_mask=torch.ones(1, 8, dtype=torch.long))
    assert probe.masks[-1]["mask_function"] is causal_mask_function
    model(ids, position_ids=packed, use_cache=True)
    assert probe.masks[-1]["mask_function"] is causal_mask_function
    model(ids, position_ids=plain, use_cache=False)
    assert probe.masks[-1]["mask_function"] is causal_mask_function


def test_bert_takes_no_notice_of_packed_positions(probe: Probe) -> None:
    """The stock encoder attends across the restart; a converted one keeps the sequences apart."""
    ids, packed = torch.randint(5, 99, (1, 8)), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    probed("bert")(ids, position_ids=packed)
    assert [mask["mask_function"] for mask in probe.masks] == [bidirectional_mask_function]
    patched = local(tiny_model("bert"))
    assert_close(patched(ids, position_ids=packed).logits[:, 3:], patched(ids[:, 3:]).logits, 1e-5)


def test_other_mask_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="custom mask function"):
        efficient_mask(1, 8, 8, mask_function=lambda *index: True)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_four_dimensional_masks_are_refused(model_type: str) -> None:
    model = local(tiny_model(model_type))
    inputs = inputs_for(model, length=12)
    for name in [name for name in inputs if name.endswith("attention_mask")]:
        dense = torch.zeros(3, 1, 12, 12)
        with pytest.raises(ValueError, match=r"\(batch, tokens\) padding masks only"):
            model(**inputs | {name: dense})


def test_mask_must_cover_the_cache() -> None:
    model = local(tiny_model("gpt2"))
    ids = torch.randint(5, 99, (1, 6))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1\) must be \(1, 7\)"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1, dtype=torch.long))


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_static_cache_is_refused(model_type: str) -> None:
    model = local(tiny_model(model_type))
    inputs = {k: v for k, v in inputs_for(model, length=6).items() if not k.startswith("decoder")}
    with pytest.raises(ValueError, match="static"):
        model.generate(**inputs, max_new_tokens=3, cache_implementation="static")


# ---- cross-attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "t5", "umt5"])
def test_cross_attention_is_dispatched_too(model_type: str, probe: Probe) -> None:
    model = select(cross_attending(model_type), PROBE)
    model(**cross_inputs(model))
    decoder = family_of(model).stacks(model)[-1]
    across = [call for call in probe.calls if call["query"].shape[2] != call["key"].shape[2]]
    assert [call["module"] for call in across] == decoder.cross_attention
    for call in across:
        assert call["mask"].shape == (2, 23)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "t5", "umt5"])
def test_cross_attention_stays_exact(model_type: str) -> None:
    """Self-attention with windows over everything, so all that could differ from the stock model is cross-attention."""
    # eager, since UMT5's decoder is not causal under sdpa in some releases
    model = select(cross_attending(model_type), "eager")
    inputs = cross_inputs(model)
    expected = model(**inputs).logits
    with he.patch_attention(model, "local", attention_window=64, side="both" if len(model_sides(model)) > 1 else None):
        assert_close(model(**inputs).logits, expected, 2e-5)
    narrow = he.patch_attention(model, "local", attention_window=2, side="decoder")
    for stack in family_of(model).stacks(model):
        assert all(module.efficient is None for module in stack.cross_attention)
    changed = model(**inputs).logits
    assert (changed - expected).abs().max() > 1e-3, "the narrow window made no difference"
    narrow.undo()
    assert torch.equal(model(**inputs).logits, expected)


# ---- configs and checkpoints -------------------------------------------------------------------------------------


def test_t5_stacks_hold_configs_of_their_own() -> None:
    """All of them must name the implementation while patched, and none afterwards."""
    model = tiny_model("t5")
    configs = [model.config, model.encoder.config, model.decoder.config]
    assert len({id(config) for config in configs}) == 3
    before = [config._attn_implementation for config in configs]
    handle = he.patch_attention(model, "local", attention_window=8)
    assert [config._attn_implementation for config in configs] == [IMPLEMENTATION] * 3
    handle.undo()
    assert [config._attn_implementation for config in configs] == before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("contract") / "converted"
    return he.convert(tiny_model("bert"), "longformer", attention_window=8).save(path)


def test_implementation_in_config_json_is_honoured_on_load(checkpoint: Any) -> None:
    saved = json.loads((checkpoint / "config.json").read_text())
    assert saved["attn_implementation"] == IMPLEMENTATION
    assert transformers.AutoConfig.from_pretrained(checkpoint)._attn_implementation == IMPLEMENTATION
    model = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)
    assert type(model) is he.EfficientBertForMaskedLM


def test_plain_class_can_not_run_a_converted_checkpoint(checkpoint: Any) -> None:
    """It would be another model: stock attention under the converted model's name."""
    with pytest.raises(ValueError, match="pip install hf_efficient; import hf_efficient"):
        transformers.BertForMaskedLM.from_pretrained(checkpoint)
    model = tiny_model("bert")
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(RuntimeError, match="no mechanism is installed"):
        model(torch.randint(5, 99, (1, 8)))


def test_another_implementation_can_not_be_asked_for(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa' contradicts"):
        transformers.AutoModelForMaskedLM.from_pretrained(checkpoint, attn_implementation="sdpa")
    model = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="would silently switch efficient attention off"):
        model.set_attn_implementation("sdpa")
    model.set_attn_implementation(IMPLEMENTATION)  # what it is already


@pytest.mark.parametrize("model_type", FAMILIES)
def test_switching_a_patched_model_stops_its_next_call(model_type: str) -> None:
    model = local(tiny_model(model_type))
    inputs = inputs_for(model, length=12)
    select(model, "sdpa")
    with pytest.raises(RuntimeError, match="attn_implementation was changed to 'sdpa'"):
        model(**inputs)


def test_trainer_does_not_rescale_the_loss(checkpoint: Any, tmp_path: Any) -> None:
    """The Trainer reads this attribute of the model's class; transformers' own reading of the signature says True."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert transformers.Trainer(tiny_model("bert"), arguments).model_accepts_loss_kwargs is True
    assert transformers.Trainer(model, arguments).model_accepts_loss_kwargs is False
    # only the heads whose loss divides by num_items_in_batch may be given it
    honouring = {stock.__name__ for stock, cls in he.models.MODELS.items() if cls.accepts_loss_kwargs}
    assert {"GPT2LMHeadModel", "BertLMHeadModel", "RobertaForCausalLM"} <= honouring
    assert "LlamaForCausalLM" in honouring
    heads = {name for name in honouring if not name.endswith(("LMHeadModel", "ForCausalLM"))}
    heads -= {"BertGenerationDecoder", "EuroBertForMaskedLM", "ModernBertForMaskedLM"}
    # Llama's share their heads: those for classes leave the number out, the one for answers takes it
    assert all(name.endswith("ForQuestionAnswering") for name in heads), heads


# ---- calls that can't be honoured --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_output_attentions_is_refused(model_type: str) -> None:
    """The host would return an empty tuple."""
    model = local(tiny_model(model_type))
    inputs = inputs_for(model, length=12)
    with pytest.raises(ValueError, match="never builds the attention weights"):
        model(**inputs, output_attentions=True)
    assert model(**inputs, output_attentions=False, output_hidden_states=True)[-1] is not None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_output_attentions_of_the_config_is_refused(model_type: str) -> None:
    model = tiny_model(model_type, attn_implementation="eager", output_attentions=True)
    inputs = inputs_for(model, length=12)
    assert len(model(**inputs).attentions if model_type != "t5" else model(**inputs).decoder_attentions) == 2
    with pytest.raises(ValueError, match="never builds the attention weights"):
        local(model)(**inputs)


@pytest.mark.parametrize("model_type", ABSOLUTE)
def test_input_longer_than_the_position_table_is_refused(model_type: str) -> None:
    model = local(tiny_model(model_type, positions=20))
    model(**inputs_for(model, length=20))
    with pytest.raises(ValueError, match="input of 21 tokens, but the model has 20 positions"):
        model(**inputs_for(model, length=21))
    embeds = torch.randn(1, 21, 32)
    with pytest.raises(ValueError, match="input of 21 tokens"):
        model(inputs_embeds=embeds)


def test_cache_counts_towards_the_position_table() -> None:
    model = local(tiny_model("gpt2", positions=20))
    cache = model(torch.randint(5, 99, (1, 20)), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="input of 21 tokens"):
        model(torch.randint(5, 99, (1, 1)), past_key_values=cache)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_keyword_that_changes_attention_or_is_misspelt_is_refused(model_type: str) -> None:
    """Any keyword reaches attention: those of other hosts (a cap of the logits) and misspelt ones as well."""
    model = local(tiny_model(model_type))
    inputs = inputs_for(model, length=12)
    model(**inputs, num_items_in_batch=3, output_hidden_states=True, golbal_attention_mask=None)
    for keyword in (
        dict(softcap=2.0),
        dict(golbal_attention_mask=inputs["attention_mask"]),
        dict(block_indices=False),
    ):
        with pytest.raises(ValueError, match=f"Attention got {next(iter(keyword))}="):
            model(**inputs, **keyword)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_a_mask_of_another_kind_than_the_layer_is_refused(model_type: str) -> None:
    """The rank of the mask says what the model asks for; what the family says of the layer must agree."""
    model = local(tiny_model(model_type))
    inputs = inputs_for(model, length=12)
    for module in model.modules():
        if (geometry := state_of(module, LAYER)) is not None:
            attach(module, LAYER, dataclasses.replace(geometry, is_causal=not geometry.is_causal))
    for masked in (inputs, {name: x for name, x in inputs.items() if "mask" not in name}):
        with pytest.raises(ValueError, match=r"converted as \w+ attention, but its model asks for \w+ attention"):
            model(**masked)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_global_attention_mask_without_global_tokens_is_refused(model_type: str) -> None:
    model = local(tiny_model(model_type))
    inputs = inputs_for(model, length=12)
    with pytest.raises(ValueError, match="no converted layer of this model has global tokens"):
        model(**inputs, global_attention_mask=inputs["attention_mask"])


# ---- conversions that make no sense ------------------------------------------------------------------------------


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to convert"):
        he.patch_attention(tiny_model("bert", layers=0), "local")
    with pytest.raises(ValueError, match="empty list"):
        he.patch_attention(tiny_model("bert"), [])


def test_overlapping_layers_are_an_error() -> None:
    model = tiny_model("bert", layers=3)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="encoder layer 1 is named by more than one config"):
        he.patch_attention(
            model, [{"mechanism": "local", "layers": [0, 1]}, {"mechanism": "bigbird", "layers": [1, 2]}]
        )
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation != IMPLEMENTATION


def test_all_reasons_are_given_at_once() -> None:
    model = tiny_model("t5")
    with pytest.raises(ValueError) as caught:
        he.patch_attention(
            model,
            [
                {"mechanism": "performer", "side": "encoder"},
                {"mechanism": "linformer", "side": "decoder"},
                {"mechanism": "local", "side": "encoder", "layers": [1, 7]},
            ],
        )
    reasons = str(caught.value)
    for reason in (
        "performer can't carry a T5 relative bias",
        "linformer can't be causal",
        "give max_length",
        "layers [7] do not exist",
        "encoder layer 1 is named by more than one config",
    ):
        assert reasons.count(reason) == 1, reasons


def test_side_that_does_not_exist_is_an_error() -> None:
    for model_type, side in (("bert", "decoder"), ("gpt2", "encoder"), ("roberta", "both")):
        with pytest.raises(ValueError, match=f"side='{side}'"):
            he.patch_attention(tiny_model(model_type), "local", side=side)


def test_decoder_made_bidirectional_by_config_is_refused() -> None:
    """transformers then builds bidirectional masks, but the layers still call themselves causal."""
    model = tiny_model("gpt2", is_causal=False)
    with pytest.raises(ValueError, match="is_causal=False makes this decoder bidirectional"):
        he.patch_attention(model, "local")


def test_patching_twice_is_refused() -> None:
    model = local(tiny_model("bert"))
    with pytest.raises(ValueError, match="already installed"):
        he.patch_attention(model, "bigbird")


def test_an_architecture_that_transformers_does_not_know_is_named() -> None:
    config = transformers.PreTrainedConfig()
    config.model_type = "unknown"
    model = torch.nn.Module()
    model.config = config
    with pytest.raises(ValueError, match=r"no model family for model_type 'unknown'; supported are .*bert"):
        he.patch_attention(model, "local")  # type: ignore[arg-type]
