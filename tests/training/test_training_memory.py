"""Training with memory: texts in streams, what is carried from batch to batch, and runs that are stopped and go on."""

from __future__ import annotations

import json
import math
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from pretraining import RECIPES, arguments, dataset, losses, recipe, result, source
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import hf_efficient as he
from hf_efficient.cache.bounded import SLACK
from hf_efficient.testing import assert_close, tiny_model
from hf_efficient.training.data.collators import IGNORED
from hf_efficient.training.data.segments import SegmentCollator, SegmentMemory, segment_rows
from hf_efficient.training.data.texts import load_texts, token_blocks

T = 4
XL: dict[str, Any] = dict(mechanism="transformer_xl", segment_length=T, memory_length=6)
COMPRESSIVE: dict[str, Any] = dict(
    mechanism="compressive", segment_length=T, memory_length=6, compressed_memory_length=5, compression_rate=2
)
MECHANISMS = {
    "transformer_xl": XL,
    "relative": XL | dict(relative=True),
    "compressive": COMPRESSIVE,
    "most_used": COMPRESSIVE | dict(compression="most_used"),
}


def texts_of(*lengths: int, seed: int = 0) -> Dataset:
    """Rows as of `token_blocks`, of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_list(
        [
            {
                "input_ids": torch.randint(5, 99, (length,), generator=generator).tolist(),
                "special_tokens_mask": [0] * (length - 1) + [1],
                "characters": 3 * length,
            }
            for length in lengths
        ]
    )


def batches(rows: Dataset, size: int, tokenizer: Any = None) -> list[dict[str, Tensor]]:
    collate = SegmentCollator(tokenizer or tiny_tokenizer("gpt2"), T)
    return [collate([rows[i + b] for b in range(size)]) for i in range(0, len(rows), size)]


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
def test_streams_hold_every_text_once_and_in_order(seed: int | None):
    lengths = (9, 4, 1, 17, 5, 8, 3)
    texts = texts_of(*lengths)
    rows = segment_rows(texts, T, 3, seed)
    assert len(rows) % 3 == 0
    found = []
    for b in range(3):
        stream = [rows[i] for i in range(b, len(rows), 3)]
        assert stream[0]["begins"]
        for row in stream:
            assert len(row["input_ids"]) == len(row["labels"]) <= T
            if row["begins"]:
                found.append([])
            found[-1].append(row)
    found = [segments for segments in found if segments[0]["input_ids"]]
    whole = [[i for row in segments for i in row["input_ids"]] for segments in found]
    assert sorted(whole) == sorted(texts["input_ids"])
    for ids, segments in zip(whole, found, strict=True):
        assert [i for row in segments for i in row["labels"]] == [*ids[1:], IGNORED]
        assert all(len(row["input_ids"]) == T for row in segments[:-1])
    assert sum(rows["characters"]) == 3 * sum(lengths)
    again = segment_rows(texts, T, 3, None if seed is None else seed + 1)
    assert (again["input_ids"] == rows["input_ids"]) == (seed is None)


def test_too_few_texts_are_refused():
    with pytest.raises(ValueError, match="2 texts can't fill 3 streams: lower the batch size"):
        segment_rows(texts_of(5, 6), T, 3)


# ---- what is carried ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MECHANISMS)
def test_segments_in_batches_equal_each_text_alone(name: str):
    """Texts of many lengths that begin in different steps; in training mode, and longer altogether than all positions."""
    lengths = (61, 30, 1, 17, 5, 88, 3, 64, 90, 22, 41, 70)
    texts = texts_of(*lengths)
    model = tiny_model("gpt2", positions=92).double().train()
    rows = segment_rows(texts, T, 3)
    answers: dict[tuple[int, ...], Tensor] = {}
    with he.patch_attention(model, MECHANISMS[name]):
        for parameter in (p for n, p in model.named_parameters() if ".efficient." in n):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        with torch.no_grad():
            for text in texts["input_ids"]:
                answers[tuple(text)] = model(torch.tensor([text])).logits[0]
        memory = SegmentMemory(model)
        parts: list[list[Tensor]] = [[] for _ in range(3)]
        most = 0
        for batch in batches(rows, 3):
            assert batch["input_ids"].shape == (3, T)
            output = model(**batch)
            output.loss.backward()
            expected = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
            assert_close(output.loss.double(), expected, 1e-6, "loss")  # the host takes it in fp32
            held = memory.held[True]
            assert held is not None
            for layer in held.cache.layers:
                assert not layer.keys.requires_grad and layer.seen <= 92
                most = max(most, layer.keys.shape[2])
            for b in range(3):
                real = batch["attention_mask"][b].bool()
                if batch["begins"][b]:
                    parts[b].append(output.logits[b, real].detach())
                else:
                    parts[b][-1] = torch.cat([parts[b][-1], output.logits[b, real].detach()])
        memory.remove()
    assert most <= T + 6 + T + 2 * SLACK
    actual = [part for stream in parts for part in stream if len(part)]
    starts = [
        tuple(text) for b in range(3) for text in _texts_of_stream([rows[i] for i in range(b, len(rows), 3)]) if text
    ]
    assert len(actual) == len(lengths)
    for text, logits in zip(starts, actual, strict=True):
        assert_close(logits, answers[text], 1e-9, f"text of {len(text)} tokens")


def _texts_of_stream(rows: list[Any]) -> list[list[int]]:
    found: list[list[int]] = []
    for row in rows:
        if row["begins"]:
            found.append([])
        found[-1] += row["input_ids"]
    return found


def test_a_step_takes_the_gradient_of_one_forward_over_the_text():
    """Σ over segments of the gradients of their losses = that of one forward with its memory cut off."""
    texts = texts_of(23)
    model = tiny_model("gpt2").double().train()
    with he.patch_attention(model, COMPRESSIVE):
        ids = torch.tensor(texts["input_ids"])
        model(ids, labels=ids).loss.mul(22).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        memory = SegmentMemory(model)
        for batch in batches(segment_rows(texts, T, 1), 1):
            if (batch["labels"] != IGNORED).any():
                model(**batch, num_items_in_batch=torch.tensor(1)).loss.backward()
        memory.remove()
        for name, parameter in model.named_parameters():
            if not name.endswith("c_attn.bias"):  # that of keys is 0
                assert_close(parameter.grad, expected[name], 1e-5, name)  # losses are taken in fp32


def test_a_segment_that_predicts_nothing_has_no_loss():
    """A text's last token alone in its segment, whose label is no token: not the mean of nothing."""
    model = tiny_model("gpt2").train()
    with he.patch_attention(model, XL):
        memory = SegmentMemory(model)
        for given in ({}, {"num_items_in_batch": torch.tensor(0)}):
            *_, last = batches(segment_rows(texts_of(2 * T + 1), T, 1), 1)
            assert (last["labels"] == IGNORED).all()
            loss = model(**last, **given).loss
            loss.backward()
            assert loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
        memory.remove()


def test_evaluation_has_a_memory_of_its_own_and_other_calls_none():
    model = tiny_model("gpt2").double().train()
    rows = segment_rows(texts_of(40, 40), T, 2)
    with he.patch_attention(model, XL), torch.no_grad():
        memory = SegmentMemory(model)
        plain = [model(**batch).logits for batch in batches(rows, 2)]
        mixed = []
        for batch in batches(rows, 2):
            mixed.append(model(**batch).logits)
            model.eval()
            model(**(batch | {"input_ids": batch["input_ids"].flip(0)}))
            model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
            model.train()
        assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
        memory.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks


# ---- the Trainer -------------------------------------------------------------------------------------------------

STEPS, POSITIONS = 8, 240
# so long that slots are there at step 6
LONGER = dict(segment_length=24, memory_length=24)
SEGMENTS = {
    "transformer_xl": json.dumps(XL | LONGER),
    "compressive": json.dumps(COMPRESSIVE | LONGER | dict(reconstruction_weight=0.5)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A source, long texts, and an uninterrupted run with each mechanism, evaluated on the way."""
    root = tmp_path_factory.mktemp("memory")
    found: dict[str, Any] = {"data": dataset(root / "data", train=6, validation=3, length=220)}
    found["model"] = source(root / "gpt2", "gpt2", positions=POSITIONS)
    for name in SEGMENTS:
        recipe("segments").main(command(found, name, root / name, eval_strategy="steps", eval_steps=2))
        found[name] = root / name
    return found


def command(runs: dict[str, Any], name: str, output: Path, **more: Any) -> list[str]:
    settings = dict(
        attention=SEGMENTS[name],
        max_steps=STEPS,
        save_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
    )
    return arguments(runs["model"], runs["data"], output, **settings | more)


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Raise in the middle of step `at` + 1, once."""
    training_step = Trainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step == at:
            monkeypatch.setattr(Trainer, "training_step", training_step)
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(Trainer, "training_step", step)


@pytest.mark.parametrize("name", SEGMENTS)
def test_interrupted_run_goes_on_with_its_memory(name: str, runs: Any, tmp_path: Path, monkeypatch: Any):
    """And evaluation on the way, which the interrupted run does without, disturbs nothing."""
    output, words = tmp_path / "out", command(runs, name, tmp_path / "out")
    interrupt(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        recipe("segments").main(words)
    saved = load_file(output / "checkpoint-6/memory-0.safetensors")
    assert saved["0.keys"].any() and (name == "transformer_xl" or saved["0.slots.there"].any())
    recipe("segments").main([*words, "--resume"])
    assert losses(output) == losses(runs[name]) and len(losses(output)) == STEPS
    actual, expected = (load_file(folder / "model/model.safetensors") for folder in (output, runs[name]))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert result(output)["metrics"]["trained"]["loss"] == result(runs[name])["metrics"]["trained"]["loss"]


def test_resumed_without_its_memory_it_would_be_another_run(runs: Any, tmp_path: Path, monkeypatch: Any):
    output, words = tmp_path / "out", command(runs, "transformer_xl", tmp_path / "out")
    interrupt(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        recipe("segments").main(words)
    lost = tmp_path / "lost"
    shutil.copytree(output, lost)
    monkeypatch.setattr(SegmentMemory, "_load", lambda self, file: None)
    batch_before = SegmentMemory._enter

    def begins_anew(self: Any, model: Any, args: Any, kwargs: Any) -> Any:
        if self.held[model.training] is None and "begins" in kwargs:
            kwargs = kwargs | {"begins": torch.ones_like(kwargs["begins"])}
        return batch_before(self, model, args, kwargs)

    monkeypatch.setattr(SegmentMemory, "_enter", begins_anew)
    recipe("segments").main([*command(runs, "transformer_xl", lost), "--resume"])
    assert losses(lost)[:6] == losses(runs["transformer_xl"])[:6]
    assert losses(lost) != losses(runs["transformer_xl"])


def test_checkpoint_without_memory_is_not_resumed(runs: Any, tmp_path: Path):
    output = tmp_path / "out"
    shutil.copytree(runs["transformer_xl"], output)
    for file in output.glob("checkpoint-*/memory-*"):
        file.unlink()
    marker = output / f"checkpoint-{STEPS}/complete.json"
    known = json.loads(marker.read_text())
    known["files"].pop("memory-0.safetensors")
    marker.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"memory-0\.safetensors is missing: the run was not trained with memory"):
        recipe("segments").main([*command(runs, "transformer_xl", output), "--resume"])


def test_perplexity_is_that_of_the_texts_read_whole(runs: Any):
    """The recipe's evaluation against one forward over each held-out text."""
    folder = runs["transformer_xl"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    texts = token_blocks(
        load_texts(str(runs["data"]))["validation"], tiny_tokenizer("gpt2"), POSITIONS, special_tokens="end"
    ).rows
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in texts["input_ids"]:
            tokens = torch.tensor([ids])
            total += F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum").item()
            count += len(ids) - 1
    figures = result(folder)["metrics"]["trained"]
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_log_has_the_reconstruction_loss(runs: Any):
    logged = [entry for entry in result(runs["compressive"])["training"]["log"] if "loss" in entry]
    assert len(logged) == STEPS and all(entry["reconstruction_loss"] > 0 for entry in logged[1:])
    plain = result(runs["transformer_xl"])["training"]["log"]
    assert not any("reconstruction_loss" in entry for entry in plain)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(train_sampling_strategy="random"), "train_sampling_strategy='random' breaks texts apart"),
        (dict(torch_compile=True), "recomputed activations and compiled models do without"),
        (dict(activation_checkpointing=True), "recomputed activations and compiled models do without"),
    ],
)
def test_training_that_leaves_no_memory_is_refused(more: dict[str, Any], message: str, tmp_path: Path):
    model = tiny_model("gpt2")
    with he.patch_attention(model, XL):
        memory = SegmentMemory(model)
        args = TrainingArguments(
            str(tmp_path), **dict(train_sampling_strategy="sequential", use_cpu=True, report_to="none") | more
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=segment_rows(texts_of(9, 9), T, 2),
            data_collator=SegmentCollator(tiny_tokenizer("gpt2"), T),
            callbacks=[memory],
        )
        with pytest.raises(ValueError, match=message):
            trainer.callback_handler.on_train_begin(args, trainer.state, trainer.control)


def test_rows_whose_columns_were_taken_out_are_refused(tmp_path: Path):
    """As the Trainer does with what the model's signature does not name, unless told not to."""
    model = tiny_model("gpt2")
    with he.patch_attention(model, XL):
        memory = SegmentMemory(model)
        args = TrainingArguments(
            str(tmp_path), train_sampling_strategy="sequential", use_cpu=True, report_to="none", max_steps=1
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=segment_rows(texts_of(*[9] * 8), T, 8),
            data_collator=SegmentCollator(tiny_tokenizer("gpt2"), T),
            callbacks=[memory],
        )
        with pytest.raises(ValueError, match=r"rows without 'begins'.*remove_unused_columns=False"):
            trainer.train()
        memory.remove()


def test_one_process_with_several_gpus_is_refused(tmp_path: Path):
    model = tiny_model("gpt2")
    with he.patch_attention(model, XL):
        memory = SegmentMemory(model)
        args = TrainingArguments(str(tmp_path), train_sampling_strategy="sequential", use_cpu=True, report_to="none")
        assert args.n_gpu <= 1
        args._n_gpu = 2
        with pytest.raises(ValueError, match=r"one process with 2 GPUs.*torchrun"):
            memory.on_train_begin(args, None, None)
        memory.remove()


def test_a_loop_that_recomputes_activations_is_refused():
    """There the model drops its cache with no more than a warning."""
    model = tiny_model("gpt2").train()
    model.activation_checkpointing_enable()
    with he.patch_attention(model, XL):
        memory = SegmentMemory(model)
        first = batches(segment_rows(texts_of(9), T, 1), 1)[0]
        with pytest.raises(ValueError, match=r"the model left no memory.*activation_checkpointing_disable"):
            model(**first)
        memory.remove()


def test_models_without_segments_are_refused():
    for family, attention in (("gpt2", "local"), ("t5", XL | {"side": "decoder"}), ("gpt2", XL | {"layers": [0]})):
        model = tiny_model(family)
        with he.patch_attention(model, attention), pytest.raises(ValueError, match="training with memory needs"):
            SegmentMemory(model)


def test_batches_of_another_size_are_refused():
    model = tiny_model("gpt2").train()
    with he.patch_attention(model, XL):
        memory = SegmentMemory(model)
        first, second = batches(segment_rows(texts_of(20, 20, 20), T, 3), 3)[:2]
        model(**first)
        with pytest.raises(ValueError, match="a batch of 2 rows after one of 3"):
            model(**{name: value[:2] for name, value in second.items()})
        memory.remove()


def test_readme_command(runs: Any, tmp_path: Path, monkeypatch: Any):
    """As a script, with a tiny checkpoint for the one it names."""
    lines = (RECIPES / "README.md").read_text().splitlines()
    given = shlex.split(next(line for line in lines if line.startswith("python recipes/segments.py")))[1:]
    given[given.index("--model") + 1] = str(runs["model"])
    given[given.index("--output-dir") + 1] = str(tmp_path / "out")
    memory = '{"mechanism": "transformer_xl", "segment_length": 16, "memory_length": 16}'
    more = [
        f"--dataset={runs['data']}",
        "--max_steps=2",
        "--per_device_train_batch_size=2",
        "--per_device_eval_batch_size=1",
    ]
    monkeypatch.setattr(sys, "argv", [*given, *more, f"--attention={memory}"])
    runpy.run_path(str(RECIPES / "segments.py"), run_name="__main__")
    assert result(tmp_path / "out")["finished"]
    config = AutoConfig.from_pretrained(tmp_path / "out/model")
    assert config.max_position_embeddings == 4096 and config.efficient_attention[0]["memory_length"] == 16


def test_record_compares_equal_texts_and_steps(runs: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    def here(command: list[str], check: bool) -> Any:
        recipe(Path(command[1]).stem).main(command[2:])
        return SimpleNamespace(returncode=0)

    # processes of their own keep apart only what is printed
    monkeypatch.setattr(recipe("segments"), "subprocess", SimpleNamespace(run=here))
    memory = '{"mechanism": "transformer_xl", "segment_length": 8, "memory_length": 8}'
    words = [
        f"--dataset={runs['data']}",
        f"--attention={memory}",
        "--block_length=16",
        "--per_device_train_batch_size=2",
    ]
    words += ["--max_steps=2", "--hidden_size=16", "--layers=1", "--heads=2", "--vocabulary_size=300", "--use_cpu"]
    words += [
        "--per_device_eval_batch_size=1",
        f"--output_dir={tmp_path / 'out'}",
        f"--record={tmp_path / 'figures.json'}",
    ]
    recipe("segments").main(words)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["ratios"]["memory"] == found["memory"]["perplexity"] / found["dense"]["perplexity"]
    # the memory reaches the whole text
    assert found["ratios"]["read"] == pytest.approx(1, rel=1e-5)
    assert f"trained in segments {found['ratios']['memory']:.4f}" in capsys.readouterr().out
    runs_of = {name: result(tmp_path / "out" / name)["settings"] for name in ("dense", "memory")}
    assert (
        runs_of["memory"]["gradient_accumulation_steps"] == 2 and "gradient_accumulation_steps" not in runs_of["dense"]
    )
    assert runs_of["memory"]["per_device_train_batch_size"] == runs_of["dense"]["per_device_train_batch_size"] == 2
    with pytest.raises(ValueError, match="block_length=20 is no whole number of segments of 8 tokens"):
        recipe("segments").main([*words, "--block_length=20"])
