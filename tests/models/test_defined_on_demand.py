"""Efficient classes are made when they are asked for, and found by every way of asking."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import subprocess
import sys

import fresh
import pytest
from paths import ROOT

import hf_efficient as he
from hf_efficient.models.registry import CONFIGS, MODELS
from hf_efficient.models.when_imported import when_imported
from hf_efficient.testing import tiny_model

LOOK = """
import json, sys
import transformers
had = set(sys.modules)
import hf_efficient as he
listed = dir(he)
new = sorted(name for name in set(sys.modules) - had if ".modeling_" in name and name.startswith("transformers.models."))
print(json.dumps([new, listed]))
"""


def test_importing_and_listing_imports_no_modeling_file():
    # the server of fresh processes has four of them already
    code = (
        "import sys\nfor n in [n for n in sys.modules if n.startswith('transformers.models.') and '.modeling_' in n\n"
    )
    code += "          and '.auto.' not in n]:\n    del sys.modules[n]\n"
    done = fresh.python("-c", code + LOOK)
    assert done.returncode == 0, done.stderr
    new, listed = json.loads(done.stdout.splitlines()[-1])
    assert new == []
    assert set(listed) == set(he.__all__) and len(listed) == len(set(listed))


# what loading models, attention and training need, each of them slow to import
LATER = (
    "torch._dynamo",
    "torch._inductor",
    "triton",
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.cache_utils",
    "accelerate",
    "peft",
    "datasets",
    "evaluate",
    "matplotlib",
    "sentence_transformers",
    "hf_efficient.attention",
    "hf_efficient.families",
    "hf_efficient.ops",
    "hf_efficient.patching",
)
IMPORT = f"""
import sys
from transformers import CONFIG_MAPPING
theirs = set(sys.modules)
import hf_efficient
print([name for name in {LATER!r} if name in sys.modules and name not in theirs])
print(sorted(name for name in set(sys.modules) - theirs if not name.startswith("hf_efficient")))
"""
# a stock model that asks for the registered function by its name, with padding
NAMED = """
import torch, transformers
sizes = dict(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
model = transformers.AutoModel.from_config(transformers.BertConfig(**sizes), attn_implementation="hf_efficient")
assert model.config._attn_implementation == "hf_efficient"
try:
    model(torch.tensor([[1, 2]]), attention_mask=torch.tensor([[1, 0]]))
except RuntimeError as error:
    print(error)
"""


def test_importing_imports_neither_models_nor_attention_and_both_are_found_afterwards(tmp_path):
    """In a process of its own, since that of the tests, and the server of fresh ones, have imported them all."""
    saved = he.convert(tiny_model("bert"), "local", attention_window=8).save(tmp_path / "bert")
    load = f"print(type(transformers.AutoModelForMaskedLM.from_pretrained({str(saved)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", IMPORT + NAMED + load], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    late, others, refusal, name = done.stdout.splitlines()
    assert (late, others, name) == ("[]", "[]", "EfficientBertForMaskedLM")
    assert "no mechanism is installed in BertSelfAttention" in refusal


def test_what_was_imported_before_is_told_at_once():
    done = fresh.python("-c", "import transformers.modeling_utils, transformers.masking_utils, hf_efficient" + NAMED)
    assert done.returncode == 0, done.stderr
    assert "no mechanism is installed in BertSelfAttention" in done.stdout


def test_looking_for_a_module_does_not_lose_what_is_added_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "looked_for.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    before, told = list(sys.meta_path), []
    when_imported("looked_for", told.append)
    assert importlib.util.find_spec("looked_for") is not None
    with pytest.raises(RuntimeError):
        importlib.import_module("looked_for")
    (tmp_path / "looked_for.py").write_text("")
    importlib.invalidate_caches()
    module = importlib.import_module("looked_for")
    assert told == [module] and sys.meta_path == before
    del sys.modules["looked_for"]


def test_what_is_listed_is_what_there_is():
    made = {cls.__name__ for cls in (*CONFIGS.values(), *MODELS.values())}
    assert made == {name for name in he.models.__all__ if name.startswith("Efficient")} - {"EfficientModelMixin"}
    for name in made:
        assert getattr(he, name).__name__ == name and pickle.loads(pickle.dumps(getattr(he, name))) is getattr(
            he, name
        )


@pytest.mark.parametrize("ask", ["class", "auto", "config", "name"])
def test_every_way_of_asking_finds_the_classes(ask, tmp_path):
    saved = he.convert(tiny_model("bert"), "local", attention_window=8).save(tmp_path / "bert")
    look = {
        "class": f"from hf_efficient import EfficientBertForMaskedLM as c; m = c.from_pretrained({str(saved)!r})",
        "auto": f"import hf_efficient; m = transformers.AutoModelForMaskedLM.from_pretrained({str(saved)!r})",
        "config": "import hf_efficient as he; m = transformers.AutoModelForMaskedLM.from_config("
        f"transformers.AutoConfig.from_pretrained({str(saved)!r}))",
        "name": "import hf_efficient as he; m = he.models.MODELS[transformers.BertForMaskedLM].from_pretrained("
        f"{str(saved)!r})",
    }[ask]
    done = fresh.python("-c", f"import transformers; {look}; print(type(m).__module__, type(m).__name__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hf_efficient.models", "EfficientBertForMaskedLM"]


THREADS = """
import time
from concurrent.futures import ThreadPoolExecutor
from transformers import CONFIG_MAPPING, AutoModel
import hf_efficient
from hf_efficient.models import classes
def waiting(call):
    def wait(*args, **kwargs):
        time.sleep(0.01)
        return call(*args, **kwargs)
    return wait
classes._class, classes._register = waiting(classes._class), waiting(classes._register)
def look(_):
    config = CONFIG_MAPPING["efficient_opt"]
    return config, AutoModel._model_mapping[config]
assert "opt" not in classes.made_configs
with ThreadPoolExecutor(4) as pool:
    print(len(set(pool.map(look, range(4)))))
"""


def test_threads_that_ask_at_once_get_one_class():
    done = fresh.python("-c", THREADS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


def test_a_model_type_without_a_family_is_found_too(tmp_path):
    """By `AutoConfig` alone, whose mapping does not list it."""
    from transformers import CONFIG_MAPPING

    assert "efficient_no_such_type" not in CONFIG_MAPPING and "efficient_opt" in CONFIG_MAPPING
    assert CONFIG_MAPPING["efficient_opt"].__name__ == "EfficientOPTConfig"
