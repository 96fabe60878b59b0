"""Programs that have never heard of this package load its checkpoints when they are told to trust them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from tiny import converted, tiny_tokenizer, words

import hf_efficient as he

TEXT = words(40, start=10)
# prints the class of the model that it loaded, and a figure of its outputs
PIPELINE = """
import sys
from transformers import pipeline
from transformers.utils import logging
logging.disable_progress_bar()
fill = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)
print(type(fill.model).__name__, fill(["[MASK] " + sys.argv[2]] * 3, batch_size=2)[2][0]["score"])
"""
ADAPTER = """
import sys
from transformers import AutoTokenizer
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
batch = AutoTokenizer.from_pretrained(sys.argv[3])(sys.argv[2], return_tensors="pt")
print(type(model.base_model.model).__name__, model(**batch).logits.abs().max().item())
"""
SENTENCES = """
import sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
print(type(model[0].auto_model).__name__, abs(model.encode([sys.argv[2]])).max().item())
"""
TASK = """
task: few_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
"""


def _said(folder: Path, *arguments: Any) -> tuple[str, float]:
    """The words that a program prints last. It starts without this package, and with no code trusted so far."""
    done = fresh.python(*arguments, env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")})
    assert done.returncode == 0, done.stderr
    name, figure = done.stdout.splitlines()[-1].split()
    return name, float(figure)


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def test_a_pipeline_loads_what_it_trusts(tmp_path):
    path = converted(tmp_path / "model", "bert")
    name, score = _said(tmp_path, "-c", PIPELINE, path, TEXT)
    model, tokenizer = he.EfficientBertForMaskedLM.from_pretrained(path), tiny_tokenizer("bert")
    batch = tokenizer(f"[MASK] {TEXT}", return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits[0, 1].softmax(-1).max().item()
    assert (name, score) == ("EfficientBertForMaskedLM", pytest.approx(expected, rel=1e-4))


def test_an_auto_class_of_peft_loads_adapter_and_model(tmp_path):
    _needs("peft")
    from peft import LoraConfig, get_peft_model

    path = converted(tmp_path / "model", "gpt2", mechanism="local")
    # the targets of GPT-2 are found by peft itself
    options: dict[str, Any] = dict(task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(he.EfficientGPT2LMHeadModel.from_pretrained(path), LoraConfig(**options)).eval()
    model.save_pretrained(tmp_path / "adapter")
    name, figure = _said(tmp_path, "-c", ADAPTER, tmp_path / "adapter", TEXT, path)
    batch = tiny_tokenizer("gpt2")(TEXT, return_tensors="pt")
    with torch.no_grad(), model.disable_adapter():
        without = model(**batch).logits.abs().max().item()
    with torch.no_grad():
        expected = model(**batch).logits.abs().max().item()
    assert (name, figure) == ("EfficientGPT2LMHeadModel", pytest.approx(expected, rel=1e-4)) and without != figure


def test_sentence_transformers_load_what_they_trust(tmp_path):
    _needs("sentence_transformers")
    path = converted(tmp_path / "model", "bert")
    name, figure = _said(tmp_path, "-c", SENTENCES, path, TEXT)
    model = he.EfficientBertModel.from_pretrained(path)
    with torch.no_grad():
        states = model(**tiny_tokenizer("bert")(TEXT, return_tensors="pt")).last_hidden_state
    assert (name, figure) == ("EfficientBertModel", pytest.approx(states.mean(1).abs().max().item(), rel=1e-4))


def test_lm_eval_loads_what_it_trusts(tmp_path):
    _needs("lm_eval")
    path = converted(tmp_path / "model", "gpt2", mechanism="local")
    rows = [{"text": words(30, start=10 + i), "choices": ["w11", "w12"], "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "few_words.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    options = [
        "--tasks",
        "few_words",
        "--include_path",
        tmp_path,
        "--device",
        "cpu",
        "--output_path",
        tmp_path / "out",
    ]
    given = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={path},trust_remote_code=True"]
    program = f"import runpy, sys; sys.argv = {[str(word) for word in given[1:] + options]!r}; " + (
        "runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"
    )
    done = fresh.python("-c", program, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert 0 <= json.loads(file.read_text())["results"]["few_words"]["acc,none"] <= 1
