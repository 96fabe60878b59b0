"""Efficient classes are made when they are asked for, and found by every way of asking."""

from __future__ import annotations

import json
import pickle

import fresh
import pytest

import hf_efficient as he
from hf_efficient.models.registry import CONFIGS, MODELS
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


def test_a_model_type_without_a_family_is_found_too(tmp_path):
    """By `AutoConfig` alone, whose mapping does not list it."""
    from transformers import CONFIG_MAPPING

    assert "efficient_no_such_type" not in CONFIG_MAPPING and "efficient_opt" in CONFIG_MAPPING
    assert CONFIG_MAPPING["efficient_opt"].__name__ == "EfficientOPTConfig"
