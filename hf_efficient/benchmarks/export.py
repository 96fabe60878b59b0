"""How far exported models are from their sources: tiny models of every target and family, and a real BERT of 12 layers."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_efficient.attention.base.registry import get_mechanism
from hf_efficient.conversion.convert import convert
from hf_efficient.exporting.export import export
from hf_efficient.exporting.import_checkpoint import import_checkpoint
from hf_efficient.models.in_place import revert
from hf_efficient.patching.names import MODULE_NAME
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.testing.tiny import tiny_model

FIRST = dict(attention_window=16, global_tokens="first")
BLOCKS = dict(attention_window=16, global_block_size=8, pooling="rms", log_count=False)
# stock class, model type, mechanism, its options, target
TINY: list[tuple[str, str, str, dict[str, Any], str]] = [
    *(
        (f"{prefix}{head}", kind, "longformer", FIRST, "longformer")
        for prefix, kind in (("Bert", "bert"), ("Roberta", "roberta"))
        for head in ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    ),
    ("XLMRobertaForMaskedLM", "xlm-roberta", "longformer", FIRST, "longformer"),
    ("CamembertForMaskedLM", "camembert", "longformer", FIRST, "longformer"),
    ("BertForMaskedLM", "bert", "local", dict(attention_window=16), "longformer"),
    *(
        ("T5ForConditionalGeneration", "t5", mechanism, options, "longt5")
        for mechanism, options in (("local", dict(attention_window=16)), ("longt5", BLOCKS))
    ),
    ("MT5ForConditionalGeneration", "mt5", "longt5", BLOCKS, "longt5"),
    *(
        ("BartForConditionalGeneration", "bart", mechanism, options, "led")
        for mechanism, options in (("longformer", FIRST), ("local", dict(attention_window=16)))
    ),
    *(
        (
            f"Bert{head}",
            "bert",
            "bigbird",
            dict(block_size=4, num_random_blocks=0, first_block_weight=1.0 + r),
            "bigbird",
        )
        for head, r in (("ForMaskedLM", 1), ("ForTokenClassification", 3))
    ),
    ("BertForMaskedLM", "bert", "nystromformer", dict(num_landmarks=16, conv_kernel_size=7), "nystromformer"),
    *(
        (name, kind, "local", dict(attention_window=16), "stock")
        for name, kind in (
            ("BertForMaskedLM", "bert"),
            ("RobertaForMaskedLM", "roberta"),
            ("GPT2LMHeadModel", "gpt2"),
            ("T5ForConditionalGeneration", "t5"),
        )
    ),
]
LENGTHS, POSITIONS = (64, 201), 256
OWN_LENGTHS = ("bigbird", "nystromformer")
"""Targets that take no other lengths than their own."""
REAL, REAL_INSTALL = "rxnfp", "pip install --no-deps rxnfp==0.1.0"
REAL_LENGTHS = (512, 1500, 2048)
REAL_OPTIONS: dict[str, Any] = dict(attention_window=64, global_tokens="first")


def export_suite(progress: bool = True) -> dict[str, Any]:
    """Every row of `TINY` with random parameters of the mechanism, exported and, where that is possible, imported again
    and reverted; and rxnfp's masked language model (12 layers, 512 positions lengthened to 2048), where it is installed."""
    rows = [
        row
        for case in tqdm(TINY, desc="export", disable=not progress, file=sys.stderr)
        for row in _rows(*_tiny(case), None if case[-1] in OWN_LENGTHS else LENGTHS)
    ]
    settings: dict[str, Any] = {"lengths": LENGTHS, "dtype": "float32", "seed": 0}
    real = _real_checkpoint()
    if real is None:
        settings["left out"] = f"{REAL}: {REAL_INSTALL}"
    rows += [] if real is None else list(_real_rows(real))
    return {
        "suite": "export",
        "settings": settings,
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    }


def _tiny(case: tuple[str, str, str, dict[str, Any], str]) -> tuple[Any, dict[str, Tensor], str]:
    name, kind, mechanism, options, target = case
    torch.manual_seed(0)
    stock = getattr(transformers, name)(tiny_model(kind).config).eval()
    for parameter_name, parameter in stock.named_parameters():
        if parameter.dim() > 1:
            # T5 does not scale its logits
            nn.init.normal_(parameter, std=0.1 if parameter_name.endswith((".q.weight", ".k.weight")) else 0.25)
    before = {parameter_name: tensor.clone() for parameter_name, tensor in stock.state_dict().items()}
    longer: dict[str, Any] = {} if "T5" in name else {"max_positions": POSITIONS}
    model = convert(stock, mechanism, **longer, **options).model
    if target != "stock":
        _randomise(model)
    return model, before, target


def _real_rows(checkpoint: str) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = dict(max_positions=max(REAL_LENGTHS), model_class="BertForMaskedLM")
    before = transformers.BertForMaskedLM.from_pretrained(checkpoint).state_dict()
    for target in ("longformer", "stock"):
        model = convert(checkpoint, "longformer", **options, **REAL_OPTIONS).model
        if target == "longformer":  # of what the stock class has no place for, nothing was trained
            _randomise(model)
        yield from (row | {"checkpoint": REAL} for row in _rows(model, before, target, REAL_LENGTHS))


def _randomise(model: Any) -> None:
    """Parameters of the mechanism as if they were trained: unlike those that they start from."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if f".{MODULE_NAME}." in name:
            scale = parameter.detach().std().nan_to_num(0.1).clamp(min=0.05).item()
            nn.init.normal_(parameter, mean=1.0 if name.endswith("slot_weight") else 0.0, std=scale)


def _rows(
    model: Any, before: dict[str, Tensor], target: str, lengths: tuple[int, ...] | None
) -> Iterator[dict[str, Any]]:
    """The figures of one export as its report has them, of the folder loaded by transformers, and of the way back.

    Args:
        before: the tensors of the original, which a revert is to give back.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = export(model, target, lengths)
        path = result.save(Path(folder) / "exported")
        loaded, info = getattr(transformers, result.report.result_class).from_pretrained(
            path, output_loading_info=True
        )
        keys = {name: len(info[f"{name}_keys"]) for name in ("missing", "unexpected")}
        back: dict[str, Any] = {"import_error": None, "unlike_original": None}
        if target != "stock":
            imported = import_checkpoint(loaded, lengths)
            back["import_error"] = max(row["error"] for row in imported.report.history[-1]["checks"])
            reverted = revert(imported.model).state_dict()
            unlike = [name for name, tensor in before.items() if not tensor.equal(reverted.pop(name, tensor[:0]))]
            back["unlike_original"] = len(unlike) + len(reverted)
    group = model.config.efficient_attention[0]
    usual = get_mechanism(group["mechanism"]).Config().to_dict()
    options = {k: v for k, v in group.items() if k == "mechanism" or (v != usual[k] and k != "side")}
    described: dict[str, Any] = {"target": target, "model_class": result.report.model_class.removeprefix("Efficient")}
    described |= {"result_class": result.report.result_class, "attention": options}
    yield from (described | row | keys | back for row in result.report.checks)


def _real_checkpoint() -> str | None:
    # found without being imported: only its data files are used
    spec = importlib.util.find_spec(REAL)
    if spec is None or not spec.submodule_search_locations:
        return None
    return str(Path(spec.submodule_search_locations[0], "models", "transformers", "bert_pretrained"))


def export_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people."""
    head = [
        "target",
        "from",
        "attention",
        "tokens",
        "padded",
        "error",
        "same argmax",
        "missing, unexpected",
        "imported again",
        "unlike the original",
    ]
    rows = []
    for row in document["rows"]:
        name = row["model_class"] + (f" ({row['checkpoint']})" if "checkpoint" in row else "")
        figures = [row["length"], row["padded"], row["error"], row["argmax_agreement"]]
        keys = f"{row['missing']}, {row['unexpected']}"
        rows.append(
            [
                row["target"],
                name,
                json.dumps(row["attention"]),
                *figures,
                keys,
                row["import_error"],
                row["unlike_original"],
            ]
        )
    return head, rows
