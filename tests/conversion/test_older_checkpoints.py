"""Checkpoints and pooling heads that an earlier version saved: they load, compute what they did, and revert bit for bit.

`tests/data/*.tar.xz` were written by 0.1.0.dev0 when all of its modules were files at the root of the package. Each has a
converted and verified checkpoint, the logits that it had on some tokens, and the SHA-256 of every tensor of its source.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paths import ROOT
from safetensors.torch import load_file
from tiny import save_source, words

import hf_efficient as he
from hf_efficient.cards.checkpoint import checkpoint_card
from hf_efficient.conversion import revert_checkpoint
from hf_efficient.conversion.inspect import inspect_checkpoint
from hf_efficient.testing import assert_close

AUTO: dict[str, Any] = {
    "bert-longformer": transformers.AutoModelForMaskedLM,
    "gpt2-compressive": transformers.AutoModelForCausalLM,
}


@pytest.fixture(params=sorted(AUTO))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(ROOT / "tests" / "data" / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param


def test_it_computes_what_it_computed(checkpoint: Path) -> None:
    model = AUTO[checkpoint.name].from_pretrained(checkpoint).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.model_max_length == 256
    inputs = load_file(checkpoint / "expected_logits.safetensors")
    expected, real = inputs.pop("logits"), inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits
    assert_close(logits[real], expected[real], 1e-6)  # machines sum in other orders


def test_its_report_is_read(checkpoint: Path) -> None:
    source, mechanism = checkpoint.name.split("-")[0] + "-source", checkpoint.name.split("-")[1]
    report = json.loads((checkpoint / "conversion_report.json").read_text())
    assert he.ConversionReport(**report).counts()["random"] == 0
    facts = inspect_checkpoint(str(checkpoint))
    assert facts["source"] == source
    assert {layer["mechanism"] for layer in facts["layers"]} == {mechanism}
    card = str(checkpoint_card(checkpoint))
    assert source in card and mechanism in card
    assert "| fresh process | passed |" in card, "the outcome of its verification"


def test_it_reverts_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    revert_checkpoint(str(checkpoint), tmp_path / "reverted")
    actual = load_file(tmp_path / "reverted" / "model.safetensors")
    sums = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in actual.items()}
    assert sums == json.loads((checkpoint / "source_sha256.json").read_text())
    config = json.loads((tmp_path / "reverted" / "config.json").read_text())
    assert config["architectures"] == [json.loads((checkpoint / "conversion_report.json").read_text())["model_class"]]


def test_saved_pooling_heads_keep_the_name_of_their_class(tmp_path: Path) -> None:
    import sentence_transformers

    from hf_efficient.training.pooling import pool_by_attention

    save_source(tmp_path / "source", "bert")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "source"), device="cpu")
    pool_by_attention(encoder, num_heads=4)
    expected = encoder.encode(words(9), convert_to_tensor=True)
    encoder.save(str(tmp_path / "encoder"))
    saved = json.loads((tmp_path / "encoder" / "modules.json").read_text())
    assert saved[1]["type"] == "hf_efficient.training.pooling.AttentionPooling"
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu", trust_remote_code=True)
    assert_close(again.encode(words(9), convert_to_tensor=True), expected, 1e-6)
