"""`from_pretrained` of Efficient and Auto classes takes what that of the stock class takes, with the same effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import converted
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertForMaskedLM
from transformers import BertForSequenceClassification as Stock

import hf_efficient as he
from hf_efficient.testing import tiny_model

LOCAL: dict[str, Any] = dict(efficient_attention="local", attention_window=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    model = tiny_model("bert")
    for folder in (root / "original", root / "original" / "inside"):
        model.save_pretrained(folder)
        model.save_pretrained(folder, variant="half")
    converted(root / "converted", "bert")
    loaded = AutoModelForMaskedLM.from_pretrained(root / "converted")
    loaded.save_pretrained(root / "converted" / "inside")
    loaded.save_pretrained(root / "converted", variant="half")
    return {name: root / name for name in ("original", "converted")}


def loaders(folders: dict[str, Path], classifier: bool = False) -> dict[str, Any]:
    """The stock class, and the ways to an Efficient model, each with its own arguments given."""
    stock, auto = (
        (Stock, AutoModelForSequenceClassification) if classifier else (BertForMaskedLM, AutoModelForMaskedLM)
    )
    efficient: Any = getattr(he, f"Efficient{stock.__name__}")
    return {
        "stock": lambda **options: stock.from_pretrained(folders["original"], **options),
        "original": lambda **options: efficient.from_pretrained(folders["original"], **LOCAL, **options),
        "converted": lambda **options: efficient.from_pretrained(folders["converted"], **options),
        "auto": lambda **options: auto.from_pretrained(folders["converted"], **options),
    }


def facts(loaded: Any) -> dict[str, Any]:
    """What the keywords below can change of a model, or that it was not given."""
    model, info = loaded if isinstance(loaded, tuple) else (loaded, None)
    return {
        "info": None if info is None else sorted(info),
        "dtype": model.dtype,
        "device_map": getattr(model, "hf_device_map", None),
        "labels": model.config.num_labels,
        "cache": model.config.use_cache,
        "hidden": model.config.output_hidden_states,
        "decoder": model.config.is_decoder,
        "training": model.training,
    }


KEYWORDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "dtype": {"dtype": torch.float64},
    "dtype by name": {"dtype": "bfloat16"},
    "dtype of the file": {"dtype": "auto"},
    "device_map": {"device_map": "cpu"},
    "device_map by module": {"device_map": {"": "cpu"}},
    "max_memory": {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "output_loading_info": {"output_loading_info": True},
    "ignore_mismatched_sizes": {"ignore_mismatched_sizes": True},
    "revision": {"revision": "main"},
    "local_files_only": {"local_files_only": True},
    "force_download": {"force_download": True},
    "token": {"token": False},
    "cache_dir": {"cache_dir": "/nowhere"},
    "subfolder": {"subfolder": "inside"},
    "missing subfolder": {"subfolder": "nowhere"},
    "variant": {"variant": "half"},
    "missing variant": {"variant": "third"},
    "use_safetensors": {"use_safetensors": True},
    "weights_only": {"weights_only": True},
    "key_mapping": {"key_mapping": {"^nothing": "something"}},
    "use_cache": {"use_cache": False},
    "output_hidden_states": {"output_hidden_states": True},
    "experts_implementation": {"experts_implementation": "eager"},
    "unknown keyword": {"bananas": 3},
    "unknown attention": {"attn_implementation": "bananas"},
    "missing gguf_file": {"gguf_file": "nowhere.gguf"},
}


def outcome(load: Any, options: dict[str, Any]) -> Any:
    try:
        return facts(load(**options))
    except (OSError, ValueError, TypeError, ImportError):
        return "refused"


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_keywords_have_the_effect_that_they_have_on_the_stock_class(keyword, folders):
    expected, *found = (outcome(load, KEYWORDS[keyword]) for load in loaders(folders).values())
    assert (expected == "refused") == keyword.startswith(("unknown", "missing")), expected
    assert found == [expected] * 3


@pytest.mark.parametrize(
    "options", [{"num_labels": 5}, {"id2label": {0: "a", 1: "b", 2: "c"}}, {"problem_type": "regression"}], ids=str
)
def test_keywords_of_heads(options, folders):
    expected, *found = (outcome(load, options) for load in loaders(folders, classifier=True).values())
    assert expected != "refused" and found == [expected] * 3
