"""Model types without a family of their own: converted after a proof on the very model, or refused with what was found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import hf_efficient as he
from hf_efficient.attention.base import plugins
from hf_efficient.attention.base import registry as mechanisms
from hf_efficient.attention.local import LocalAttention, LocalAttentionConfig
from hf_efficient.families import GenericFamily, families, family_of, registry
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.testing import assert_close, tiny_model

SIZES: dict[str, Any] = dict(vocab_size=99, num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
VISION: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48)


@pytest.fixture(autouse=True)
def unwritten(monkeypatch):
    """The registry without the families of the models here, as it is for most model types."""
    written = {name: family for name, family in registry._own().items() if name not in ("helium", "yolos")}
    monkeypatch.setattr(registry, "_own", lambda: written)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    registry._found.cache_clear()
    yield
    registry._found.cache_clear()


def helium(**options: Any) -> Any:
    """A causal model with grouped heads that has no family of its own here."""
    torch.manual_seed(0)
    config = transformers.HeliumConfig(
        **SIZES, head_dim=8, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=160, **options
    )
    model = transformers.HeliumForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def test_converts_saves_and_reverts(tmp_path):
    model = helium()
    assert type(family_of(model)) is GenericFamily
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(5, 99, (2, 50), generator=torch.Generator().manual_seed(0))
    source = model(ids).logits
    for window in (200, 8):
        model.train()
        state = torch.get_rng_state()
        result = he.convert(model, "local", attention_window=window)
        assert result.model.training and torch.equal(torch.get_rng_state(), state)
        result.model.eval()
        converted = result.model(ids).logits
        if window == 200:
            assert_close(converted, source, 1e-5)
        else:
            assert (converted - source).abs().max() > 1e-2
            loaded = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "saved")).eval()
            assert type(loaded) is he.EfficientHeliumForCausalLM and loaded.config.model_type == "efficient_helium"
            assert torch.equal(loaded(ids).logits, converted)
            options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
            with_cache, without = (loaded.generate(ids[:, :20], use_cache=c, **options) for c in (True, False))
            assert torch.equal(with_cache, without)
        he.revert(result.model)
        assert type(model) is transformers.HeliumForCausalLM
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "its own attention code": (
        lambda: transformers.BloomModel(transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)),
        {},
        "'bloom'.*its attention does not go through AttentionInterface",
    ),
    "positions": (helium, {"max_positions": 400}, "nothing is known about the positions of helium"),
    "projections": (
        lambda: transformers.YolosModel(
            transformers.YolosConfig(**VISION, image_size=[16, 16], patch_size=8, num_detection_tokens=3)
        ).eval(),
        {"attention": "longformer", "global_tokens": "first", "attention_window": 8},
        "yolos has no model family of its own, so nothing is known about the projections",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused(case):
    make, options, message = REFUSED[case]
    model = make()
    options = {"attention": "local"} | options
    with pytest.raises(ValueError, match=message):
        he.convert(model, **options)
    assert not he.patching.is_installed(model)


@pytest.mark.parametrize(
    "fault", ["differs from its eager form", "small windows changed nothing", "could not be proved: ZeroDiv"]
)
def test_a_proof_that_fails_refuses_and_leaves_the_model_as_it_was(fault, monkeypatch):
    """Hosts whose layers do something that the generic family can't see."""
    model = helium()
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def strange(self, hidden_states, *args, **kwargs):
        installed = self._modules.get("efficient")
        if installed is not None and fault.startswith("differs"):
            hidden_states = hidden_states * 1.01
        if installed is not None and fault.startswith("could"):
            raise ZeroDivisionError("in the host")
        return forward(self, hidden_states, *args, **kwargs)

    ids = torch.randint(5, 99, (2, 50), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    monkeypatch.setattr(attention, "forward", strange)
    if fault.startswith("small"):  # as if attention went on seeing all tokens
        monkeypatch.setattr("hf_efficient.patching.proof.NARROW", 2**14)
    monkeypatch.setattr("hf_efficient.families.generic.dispatches", lambda cls: cls is attention)
    for verb in (he.convert, he.patch_attention):
        with pytest.raises(ValueError, match=r"2 decoder layers in model.*" + fault.rpartition(": ")[2]):
            verb(model, "local", attention_window=8)
        assert torch.equal(model(ids).logits, before) and not he.patching.is_installed(model)
        assert model.config._attn_implementation == "sdpa" and type(model) is transformers.HeliumForCausalLM


def entry(name: str, load: Any) -> Any:
    return SimpleNamespace(name=name, value=f"{name}:X", dist=SimpleNamespace(name="theirs", version="1.2"), load=load)


def test_families_of_other_distributions(monkeypatch, caplog, tmp_path):
    theirs = GenericFamily(model_type="helium")

    def broken() -> Any:
        raise ImportError("no such module")

    found = [entry("broken", broken), entry("good", lambda: (theirs,))]
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: found if group.endswith("families") else [])
    with caplog.at_level("WARNING", logger="transformers"):
        monkeypatch.setattr(plugins.logger, "propagate", True)
        assert family_of("helium") is theirs
        families()
    assert registry.ORIGINS["helium"] == {"name": "theirs", "version": "1.2"}
    with pytest.raises(ValueError, match="'helium' has a family already"):
        he.register_family(theirs)
    with pytest.raises(TypeError, match="is no ModelFamily"):
        he.register_family("helium")  # type: ignore[arg-type]
    saved = he.convert(helium(), "local", attention_window=8).save(tmp_path / "theirs")
    report = json.loads((saved / "conversion_report.json").read_text())
    assert report["family"] == {"name": "theirs", "version": "1.2"}
    config = saved / "config.json"
    config.write_text(config.read_text().replace("efficient_helium", "efficient_of_theirs"))
    with pytest.raises(ValueError, match=r"whose model family is not installed: it came from theirs 1\.2"):
        he.convert(saved, "local")


@dataclass(frozen=True, kw_only=True)
class TheirConfig(LocalAttentionConfig):
    mechanism: ClassVar[str] = "theirs"


class TheirAttention(LocalAttention):
    Config = TheirConfig


def test_mechanisms_of_other_distributions(monkeypatch, caplog):
    def broken() -> Any:
        raise ImportError("no such module")

    found = [entry("broken", broken), entry("good", lambda: TheirAttention)]
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: found if group.endswith("mechanisms") else [])
    monkeypatch.setattr(mechanisms, "_REGISTRY", dict(mechanisms._REGISTRY))
    monkeypatch.setattr(plugins.logger, "propagate", True)
    mechanisms._discover.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="transformers"):
            assert "theirs" in he.list_mechanisms()
        assert "broken = broken:X of theirs 1.2 can't be imported and is left out: ImportError" in caplog.text
        model = he.convert(tiny_model("bert"), "theirs", attention_window=8).model
        assert model.config.efficient_attention[0]["mechanism"] == "theirs"
        assert type(mechanism_of(next(iter(converted_layers(model).values())))) is TheirAttention
    finally:
        mechanisms._discover.cache_clear()
