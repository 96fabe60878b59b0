"""Models of BERT-base width with random weights, and the peak memory of converted ones."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from hf_efficient.attention.base.registry import attention_configs, get_mechanism, list_mechanisms
from hf_efficient.evaluation.cost import _forward_peak
from hf_efficient.families import HostModel, family_of
from hf_efficient.models.in_place import convert_in_place
from hf_efficient.patching.install import plan
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.forward import random_inputs
from hf_efficient.profiling.memory import peaks

BASE_WIDTH = 768


def _wide_peak(model_type: str, attention: dict[str, Any], length: int, side: str) -> float:
    return _forward_peak(*wide_model(model_type, attention, length, side))


# ---- suites ------------------------------------------------------------------------------------------------------


def wide_model(
    model_type: str, attention: dict[str, Any] | None, length: int, side: str, layers: int = 2
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model of BERT-base width for `length` tokens, without a head, and its inputs.

    `side="decoder"` of T5 puts the long input on the decoder, with 16 encoder tokens.
    """
    transformers = importlib.import_module("transformers")
    family = family_of(model_type)
    torch.manual_seed(0)
    if model_type.endswith("t5"):
        stock = getattr(family.modeling, family.stack_classes[0].replace("Stack", "Model"))
        sizes: dict[str, Any] = dict(d_model=BASE_WIDTH, d_kv=64, d_ff=3072, num_layers=layers, num_heads=12)
    elif model_type == "gpt2":
        stock, sizes = transformers.GPT2Model, dict(n_layer=layers, n_positions=length)
    else:
        stock = getattr(family.modeling, family.stack_classes[0])
        offset = 0 if model_type == "bert" else 2
        sizes = dict(num_hidden_layers=layers, max_position_embeddings=length + offset)
    model = stock(stock.config_class(vocab_size=1000, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)).eval()
    if attention is not None:
        convert_in_place(HostModel.of(model), attention_configs([attention]))
    inputs = random_inputs(model.config, length)
    if side == "decoder" and model.config.is_encoder_decoder:
        inputs = {"input_ids": inputs["input_ids"][:, :16], "decoder_input_ids": inputs["input_ids"]}
    return model, inputs


def supported_pairs() -> list[tuple[str, str, str]]:
    """(mechanism, model type, side) of all that is not refused and not of n² memory, with the options of `memory_suite`."""
    pairs = []
    for model_type, side in (
        ("bert", "encoder"),
        ("roberta", "encoder"),
        ("gpt2", "decoder"),
        ("t5", "encoder"),
        ("t5", "decoder"),
    ):
        host = HostModel.of(wide_model(model_type, None, 16, side)[0])
        for mechanism in list_mechanisms():
            if get_mechanism(mechanism).facts.memory == "n²":
                continue  # by definition: nothing to be shown, and more than machines have
            config = get_mechanism(mechanism).Config.from_dict(_memory_options(mechanism, side, 16))
            try:
                plan(host, [config])
            except ValueError:
                continue
            pairs.append((mechanism, model_type, side))
    return pairs


def _memory_options(mechanism: str, side: str, length: int) -> dict[str, Any]:
    lengths = {"rank": min(256, length), "max_length": length} if mechanism == "linformer" else {}
    return {"side": side, **lengths}


def memory_suite(lengths: Sequence[int] = (8192, 16384), progress: bool = True) -> dict[str, Any]:
    """Peak memory of one forward pass of two layers of BERT-base width, for every supported pair, and its growth."""
    pairs = supported_pairs()
    entries = [
        (model_type, {"mechanism": mechanism, **_memory_options(mechanism, side, length)}, length, side)
        for mechanism, model_type, side in pairs
        for length in lengths
    ]
    found = iter(peaks(_wide_peak, entries, "memory" if progress else None))
    results = []
    for mechanism, model_type, side in pairs:
        row: dict[str, Any] = {"mechanism": mechanism, "model_type": model_type, "side": side}
        row |= {f"peak_mb_{length}": next(found) for length in lengths}
        row["growth"] = row[f"peak_mb_{lengths[-1]}"] / row[f"peak_mb_{lengths[0]}"]
        results.append(row)
    settings = {
        "layers": 2,
        "hidden_size": BASE_WIDTH,
        "batch": 1,
        "dtype": "float32",
        "lengths": list(lengths),
        "seed": 0,
    }
    return {
        "suite": "memory",
        "settings": settings,
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def memory_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people."""
    return rounded(document["results"])


def rounded(results: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The names of all values as headings, and rows of the values with three decimals."""
    return list(results[0]), [[round(v, 3) if isinstance(v, float) else v for v in row.values()] for row in results]
