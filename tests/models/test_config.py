"""Configs of converted models: every form that options have, and what saved ones say where the package is not imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fresh
import pytest
import transformers
from cases import CASES
from tiny import converted

import hf_efficient as he
from hf_efficient.experts.layer import ExpertsConfig
from hf_efficient.models.registry import CONFIGS
from hf_efficient.testing import FAMILIES, tiny_model


def saved_and_loaded(config: Any, path: Path) -> Any:
    config.save_pretrained(path)
    loaded = transformers.AutoConfig.from_pretrained(path)
    assert type(loaded) is type(config)
    return loaded


@pytest.mark.parametrize("mechanism", he.list_mechanisms())
def test_every_form_of_a_mechanism_is_held_as_json_and_saved(mechanism, tmp_path):
    options = CASES[mechanism].small
    chosen = he.attention_config(mechanism, **options)
    stored = [chosen.to_dict()]
    forms: list[Any] = [chosen, stored[0], {"mechanism": mechanism, **options}, json.dumps(stored), stored]
    model_type = list(CONFIGS)[he.list_mechanisms().index(mechanism) % len(CONFIGS)]
    for form in [*forms, [forms[0]]]:
        config = CONFIGS[model_type](efficient_attention=form)
        assert config.efficient_attention == json.loads(json.dumps(stored)) == stored
        config.efficient_attention = None
        config.efficient_attention = form
        assert config.efficient_attention == stored
    assert saved_and_loaded(config, tmp_path).efficient_attention == stored


def test_names_hybrids_and_experts_are_held_as_json(tmp_path):
    config = he.EfficientGPT2Config(
        efficient_attention=[he.attention_config("local", layers=(0,)), "bigbird"],
        efficient_experts=ExpertsConfig(num_experts=2),
    )
    names = [group["mechanism"] for group in config.efficient_attention]
    assert names == ["local", "bigbird"] and config.efficient_experts["num_experts"] == 2
    loaded = saved_and_loaded(config, tmp_path)
    assert loaded.efficient_attention == config.efficient_attention
    assert loaded.efficient_experts == config.efficient_experts == ExpertsConfig(num_experts=2).to_dict()


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    "part, value, message",
    [
        ("attention", "longfomer", "unknown mechanism 'longfomer'"),
        ("attention", [{"mechanism": "local", "windw": 8}], "local has no option 'windw'"),
        ("attention", [{"mechanism": "local", "attention_window": 7}], "attention_window=7 is not possible"),
        ("attention", {"attention_window": 8}, "names no mechanism"),
        ("experts", {"num_experts": 0}, "num_experts=0 is not possible"),
        ("experts", {"experts": 2}, "no option experts"),
    ],
)
def test_what_is_not_possible_is_refused_when_a_config_is_made_or_changed(model_type, part, value, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS[model_type](**{f"efficient_{part}": value})
    config = CONFIGS[model_type]()
    with pytest.raises(ValueError, match=message):
        setattr(config, f"efficient_{part}", value)


# ---- efficient_attention= in calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_options_beside_a_name_are_the_mechanisms(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    cls = getattr(he, f"Efficient{type(tiny_model(family)).__name__}")
    model = cls.from_pretrained(
        tmp_path, efficient_attention="local", attention_window=6, layers=(1,), use_cache=False
    )
    (group,) = model.config.efficient_attention
    assert (group["attention_window"], group["layers"]) == (6, [1]) and model.config.use_cache is False
    assert not model.config.to_dict().keys() & {"attention_window", "layers"}
    with pytest.raises(ValueError, match="options 'attention_window' go with a mechanism's name"):
        cls.from_pretrained(tmp_path, efficient_attention={"mechanism": "local"}, attention_window=6)
    with pytest.raises(ValueError, match="variant='dense' means weight files in from_pretrained"):
        cls.from_pretrained(tmp_path, efficient_attention="synthesizer", variant="dense")
    with pytest.raises(TypeError, match="attention_windw"):
        cls.from_pretrained(tmp_path, efficient_attention="local", attention_windw=6)
    with pytest.raises(TypeError, match="efficient_attention"):
        transformers.AutoModel.from_pretrained(tmp_path, efficient_attention="local")


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_checkpoints_keep_their_attention(family, tmp_path):
    path = converted(tmp_path / "model", family)
    config = transformers.AutoConfig.from_pretrained(path)
    for auto in (transformers.AutoModel, transformers.AutoConfig):
        with pytest.raises(ValueError, match=r"efficient_attention can't be changed .*\(it has longformer\)"):
            auto.from_pretrained(path, efficient_attention="local")
        with pytest.raises(ValueError, match="unknown mechanism 'lokal'"):
            auto.from_pretrained(path, efficient_attention="lokal")
        kept = auto.from_pretrained(path, efficient_attention=config.efficient_attention)
        assert getattr(kept, "config", kept).efficient_attention == config.efficient_attention
    with pytest.raises(ValueError, match="already converted, to longformer; revert it"):
        getattr(he, config.architectures[0]).from_pretrained(path, efficient_attention="local")
    with pytest.raises(ValueError, match="whose attention is longformer; leave the argument out"):
        transformers.AutoModel.from_pretrained(path, attn_implementation="eager")


# ---- without the package -------------------------------------------------------------------------------------------

LOAD = """
import json, sys
import transformers

class NotInstalled:
    def find_spec(self, name, path, target=None):
        if name == "hf_efficient":
            raise ModuleNotFoundError("No module named 'hf_efficient'", name=name)

path, stock, installed = sys.argv[1:]
if installed == "no":
    sys.meta_path.insert(0, NotInstalled())
calls = {
    "stock": (getattr(transformers, stock), {}),
    "eager": (getattr(transformers, stock), {"attn_implementation": "eager"}),
    "auto": (transformers.AutoModel, {}),
    "distrusted": (transformers.AutoModel, {"trust_remote_code": False}),
    "trusted": (transformers.AutoModel, {"trust_remote_code": True}),
}
said = {}
for name, (cls, options) in calls.items():
    try:
        said[name] = type(cls.from_pretrained(path, **options)).__name__
    except (ValueError, ImportError) as error:
        said[name] = f"{type(error).__name__}: {error}"
    said[name] += " (imported)" if "hf_efficient" in sys.modules else ""
print("\\n" + json.dumps(said))
"""


@pytest.mark.parametrize("installed", ["yes", "no"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_package_nothing_loads_but_what_is_trusted(family, installed, tmp_path):
    path = converted(tmp_path / "model", family)
    stock = type(tiny_model(family)).__name__
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = fresh.python("-c", LOAD, path, stock, installed, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert 'attn_implementation="hf_efficient"' in said["stock"]
    assert "pip install hf_efficient; import hf_efficient" in said["eager"]
    for name in ("auto", "distrusted"):
        assert "contains custom code" in said[name] and "(imported)" not in said[name]
    if installed == "yes":
        assert said["trusted"].startswith("Efficient") and said["trusted"].endswith("(imported)")
    else:
        assert "ImportError" in said["trusted"] and "pip install hf_efficient" in said["trusted"]


def test_a_checkpoint_loaded_by_trust_is_saved_like_others(tmp_path):
    path = converted(tmp_path / "model", "bert")
    model = transformers.AutoModel.from_pretrained(path, trust_remote_code=True)
    type(model.config).register_for_auto_class()
    model.save_pretrained(tmp_path / "again")
    names = {file.name for file in (tmp_path / "again").iterdir()}
    files = {
        "config.json",
        "configuration_hf_efficient.py",
        "conversion_report.json",
        "model.safetensors",
        "README.md",
    }
    assert names == files
    reverted = he.revert(model)
    reverted.save_pretrained(tmp_path / "reverted")
    stored = json.loads((tmp_path / "reverted" / "config.json").read_text())
    assert not stored.keys() & {"auto_map", "experts_implementation", "attn_implementation"}
    assert transformers.AutoModel.from_pretrained(tmp_path / "reverted").config.model_type == "bert"
