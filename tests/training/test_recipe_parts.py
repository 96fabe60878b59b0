"""The parts of the recipes, each against truth: settings, data, checkpoints, records, callbacks, scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from pretraining import t5_tokenizer
from tiny import tiny_tokenizer, words
from torch import nn
from transformers import TrainingArguments

from hf_efficient.corpus import TextUse, text_use
from hf_efficient.profiling.json_files import write_json
from hf_efficient.training import callbacks as callback_parts
from hf_efficient.training import checkpoints as checkpoint_parts
from hf_efficient.training.callbacks import FirstStep, NothingLeft
from hf_efficient.training.checkpoints import (
    MARKER,
    CompleteCheckpoints,
    last_complete_checkpoint,
    load_state,
    mark_complete,
    rotate,
    save_state,
    signature,
)
from hf_efficient.training.data.collators import IGNORED, SpanCorruptionCollator
from hf_efficient.training.data.texts import load_rows, load_texts, token_blocks
from hf_efficient.training.plots import layer_picture, loss_curve
from hf_efficient.training.pretraining import TokenScores, target_size, text_size, train_tokenizer
from hf_efficient.training.results import RunRecord
from hf_efficient.training.settings import Settings, parse_settings

# ---- settings ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Job(Settings):
    """A job."""

    text: str  # what is read
    learning_rate: float = 3e-4  # highest rate; 10 % of it at the end
    pack: bool = True


GIVEN = ["--text=t", "--model=m", "--output-dir=out"]


def job(**settings: Any) -> Job:
    return Job(text="t", model="m", output_dir="out", **settings)


def test_settings_from_both_spellings():
    settings = parse_settings(Job, [*GIVEN, "--learning_rate", "1e-4", "--max-steps=3", "--bf16"])
    assert settings == job(learning_rate=1e-4, max_steps=3, bf16=True)
    assert parse_settings(Job, [*GIVEN, "--no-pack", "--bf16", "false"]) == job(pack=False)


def test_settings_of_a_plain_dataclass():
    assert vars(parse_settings(dataclass(type("Plain", (), {"__annotations__": {"a": int}})), ["--a=3"])) == {"a": 3}


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_settings_from_a_file_then_the_command_line(kind, tmp_path):
    """Options of TrainingArguments in every form that it takes them in, and a mechanism written out."""
    file = tmp_path / f"job.{kind}"
    values = {"text": "t", "model": "m", "output_dir": "out", "attention": {"mechanism": "local"}, "max_steps": 7}
    more = {
        "learning_rate": "1e-4",  # YAML takes this for text
        "bf16": True,
        "num_train_epochs": 2,
        "optim": "adafactor",
        "report_to": ["tensorboard"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "label_names": ["labels"],
        "accelerator_config": {"even_batches": False},
        "hub_token": None,
        "save_total_limit": 3,
    }
    if kind == "json":
        file.write_text(json.dumps(values | more))
    else:
        import yaml

        file.write_text(yaml.safe_dump(values | more).replace("'1e-4'", "1e-4"))
    expected = job(**{"attention": '{"mechanism": "local"}', "max_steps": 9} | more | {"learning_rate": 1e-4})
    for given in (
        ["--config", str(file), "--max_steps", "9"],
        ["--max-steps=9", f"--config={file}"],
        [str(file), "--max-steps=9"],
    ):
        assert parse_settings(Job, given) == expected


def test_settings_from_all_values_of_training_arguments(tmp_path):
    """As `TrainingArguments.to_dict` gives them: transformers' defaults are honoured, and no option refuses its own."""
    import yaml

    file = tmp_path / "arguments.yaml"
    stock = TrainingArguments(
        "out", learning_rate=2e-5, lr_scheduler_type="cosine", eval_strategy="steps", eval_steps=7
    )
    file.write_text(yaml.safe_dump(stock.to_dict()))
    settings = parse_settings(Job, [str(file), "--text=t", "--model=m"])
    assert (settings.learning_rate, settings.seed, settings.eval_steps) == (2e-5, 42, 7)
    assert settings.lr_scheduler_type == "cosine" and settings.remove_unused_columns is False
    file.write_text(yaml.safe_dump(stock.to_dict() | {"fp16": True}))
    with pytest.raises(ValueError, match="fp16=True is not possible"):
        parse_settings(Job, [str(file), "--text=t", "--model=m"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", r"job.yaml: there is no setting learning_rat. Did you mean learning_rate\? --help"),
        (
            "batch_size: 1",
            "Did you mean per_device_train_batch_size or auto_find_batch_size or per_device_eval_batch_size",
        ),
        ("max_steps: many", "--max_steps.*invalid int value: 'many'"),
        ("max_steps: [1]", r"invalid int value: '\[1\]'"),
        ("max_steps:", "max_steps has no value"),
        ("optim: best", "best.* OptimizerNames|invalid choice: 'best'"),
        ("fp16: true", "fp16=True is not possible: .*use --bf16"),
        (
            "include_num_input_tokens_seen: all",
            "include_num_input_tokens_seen='all' is not possible: result.json counts",
        ),
        ("eval_steps: 5", "eval_steps=5 needs --eval-strategy steps"),
        ("just words", "must hold `setting: value` lines"),
        ("a: [", "can't be read"),
    ],
)
def test_files_that_are_refused(line, message, tmp_path):
    (tmp_path / "job.yaml").write_text(line)
    with pytest.raises(ValueError, match=message):
        parse_settings(Job, [*GIVEN, f"--config={tmp_path / 'job.yaml'}"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lerning_rate=1"], "no setting --lerning_rate. Did you mean learning_rate"),
        (["--cpu"], r"no setting --cpu. Did you mean use_cpu\?"),
        (["--learn=1"], "no setting --learn"),  # no abbreviations
        (["--learning_rate=fast"], "invalid float value: 'fast'"),
        (["--bf16=maybe"], "Truthy value expected"),
        (["stray"], "no setting stray"),
        (["--resume-from-checkpoint=x"], "resume_from_checkpoint='x' is not possible: --resume"),
    ],
)
def test_command_line_that_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(Job, [*GIVEN, *given])


def test_settings_that_are_missing():
    with pytest.raises(ValueError, match="required: --output_dir/--output-dir, --model"):
        parse_settings(Job, ["--text=t"])


def test_every_refused_option_is_one_of_the_trainers():
    assert set(Job.REFUSED) <= {field.name for field in fields(TrainingArguments)}


def test_what_is_recorded_gives_the_same_settings(tmp_path):
    """Own fields and changed defaults always, other options where they were given, secrets never."""
    settings = job(adam_beta2=0.98, hub_token="secret", report_to=["tensorboard"], max_steps=4)
    recorded = settings.recorded()
    assert json.loads(json.dumps(recorded)) == recorded
    assert recorded["seed"] == 0 and recorded["attention"] == "" and recorded["adam_beta2"] == 0.98
    assert "hub_token" not in recorded and "adam_beta1" not in recorded
    (tmp_path / "job.json").write_text(json.dumps(recorded))
    assert parse_settings(Job, [str(tmp_path / "job.json")]) == settings.replaced(hub_token=None)


def test_help_shows_the_comments(capsys):
    with pytest.raises(SystemExit) as done:
        parse_settings(Job, ["--help"])
    assert done.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "what is read" in printed and "highest rate; 10 % of it at the end (default: 0.0003)" in printed
    assert "mechanism to convert to, or its JSON" in printed, "of the class that it extends"


# ---- data --------------------------------------------------------------------------------------------------------

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(40)]


def write_rows(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    rows = Dataset.from_list(ROWS)
    if kind == "txt":
        path.write_text("\n".join(row["text"] for row in ROWS) + "\n\n  \n")
    elif kind in ("json", "jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "csv":
        rows.to_csv(path)
    else:
        rows.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_texts_from_files(kind, tmp_path):
    """A fixed twentieth of the rows is held out, by seed; nothing is lost and nothing twice."""
    path = write_rows(tmp_path, kind)
    loaded = load_texts(str(path), seed=3)
    assert [len(loaded[split]) for split in ("train", "validation")] == [38, 2]
    assert sorted([*loaded["train"]["text"], *loaded["validation"]["text"]]) == sorted(row["text"] for row in ROWS)
    assert load_texts(str(path), seed=3)["validation"].to_list() == loaded["validation"].to_list()
    assert load_texts(str(path), seed=4)["validation"].to_list() != loaded["validation"].to_list()
    assert loaded["train"].column_names == ["text"]


def test_texts_from_a_folder_and_a_pattern(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"body": "a b"}\n{"body": "c d"}\n')
    (tmp_path / "validation.jsonl").write_text('{"body": "e f"}\n')
    loaded = load_texts(str(tmp_path), text_column="body")
    assert (list(loaded["train"]["text"]), list(loaded["validation"]["text"])) == (["a b", "c d"], ["e f"])
    pattern = load_texts(str(tmp_path / "*.jsonl"), text_column="body", max_train_rows=1)
    assert (len(pattern["train"]), len(pattern["validation"])) == (1, 1)


def test_offline_texts():
    loaded = load_texts("offline", max_train_rows=3, max_eval_rows=2)
    assert [len(loaded[split]) for split in ("train", "validation")] == [3, 2]
    assert not set(loaded["train"]["text"]) & set(loaded["validation"]["text"])


def test_rows_are_renamed():
    given = DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:3])})
    loaded = load_rows(given, {"sentence": "text", "label": "label"}, max_eval_rows=2)
    assert loaded["validation"].to_list() == [{"sentence": "text 0", "label": 0}, {"sentence": "text 1", "label": 1}]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"body": "a"}\n{"body": "b"}\n', {}, r"no column 'text' in train; its columns are body\."),
        ('{"text": ""}\n{"text": " "}\n', {}, "0 training rows and no validation split"),
        ('{"text": "a"}\n', {}, "1 training rows and no validation split"),
        ('{"text": 1}\n{"text": 2}\n', {}, "holds [12], which is no text; choose another with --text_column"),
        ('{"text": \n', {}, r"can't be loaded, neither from disk nor from the Hub.*Give 'offline', files"),
    ],
)
def test_data_that_is_refused(content, options, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / "rows.jsonl"), **options)


@pytest.mark.parametrize("name", ["missing.jsonl", "*.csv", "nobody/no-such-dataset"])
def test_dataset_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"can't be loaded, neither from disk nor from the Hub"):
        load_texts(name)


# ---- rows of tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("length", [7, 16, 63])
@pytest.mark.parametrize(("family", "special"), [("bert", "around"), ("gpt2", "end"), ("gpt2", "none")])
def test_blocks_hold_every_token_once_and_never_mix_texts(family, special, length, pack):
    tokenizer = tiny_tokenizer(family)
    texts = [words(n, start=n) for n in (1, 2, 5, 14, 15, 16, 40, 97)]
    rows, use = token_blocks(
        texts, tokenizer, length, special_tokens=special, pack=pack, first_position=2 if pack else 0
    )
    found = []
    for row in rows:
        ids, special_mask = row["input_ids"], row["special_tokens_mask"]
        assert len(ids) == len(special_mask) <= length
        positions = row["position_ids"] if pack else list(range(len(ids)))
        starts = [i for i, p in enumerate(positions) if p == (2 if pack else 0)]
        assert pack or starts == [0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:stop] == [p + positions[start] for p in range(stop - start)]
            block = list(zip(ids[start:stop], special_mask[start:stop], strict=True))
            if special == "around":
                assert block[0] == (tokenizer.cls_token_id, 1) and block[-1] == (tokenizer.sep_token_id, 1)
            found.append(tuple(i for i, is_special in block if not is_special))
            assert len(found[-1]) >= 2
    room = length - (2 if special == "around" else 0)
    expected = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [tuple(ids[i : i + room]) for i in range(0, len(ids), room)]
    assert Counter(found) == Counter(piece for piece in expected if len(piece) >= 2)
    assert use == TextUse(len(texts), len(texts) - 1, sum(map(len, expected)), sum(map(len, found)))
    assert rows["index"] == list(range(len(rows)))
    if not pack and special == "end":
        ends = sum(row.count(tokenizer.eos_token_id) for row in rows["input_ids"])
        assert ends == sum(len(t.split()) >= 2 and len(t.split()) % room not in (0, 1) for t in texts)


@pytest.mark.parametrize("behind", [" </s>", " </s>\n", " </s> </s> "])
def test_a_text_has_one_end_token(behind):
    tokenizer, texts = tiny_tokenizer("gpt2"), [words(n) for n in (5, 15, 16, 40)]
    behind = behind.replace("</s>", tokenizer.eos_token)
    plain, ended = (
        token_blocks([text + end for text in texts], tokenizer, 16, special_tokens="end").rows for end in ("", behind)
    )
    assert plain["input_ids"] == ended["input_ids"] and plain["special_tokens_mask"] == ended["special_tokens_mask"]
    assert sum(row.count(tokenizer.eos_token_id) for row in ended["input_ids"]) == 3  # 16 leaves no room for it


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_how_much_of_texts_is_read(family):
    tokenizer, texts = tiny_tokenizer(family), [words(n) for n in (5, 1, 40)]
    special = tokenizer.num_special_tokens_to_add()
    assert text_use(tokenizer, texts) == TextUse(3, 3, 46, 46)
    assert text_use(tokenizer, texts, length=20 + special) == TextUse(3, 3, 46, 26)
    assert text_use(tokenizer, texts, most=6 + 2 * special) == TextUse(3, 2, 46, 6)
    assert text_use(tokenizer, texts, first=2) == TextUse(3, 2, 46, 6)
    assert str(text_use(tokenizer, [words(3000)], length=1000 + special)) == "1,000 of 3,000 tokens, of 1 of 1 texts"


def test_packed_rows_are_nearly_full():
    """First fit, longest first: at most one row is half empty."""
    texts = [words(n) for n in range(2, 60)]
    rows = token_blocks(texts, tiny_tokenizer("gpt2"), 64, special_tokens="end", pack=True).rows
    assert sum(len(ids) <= 32 for ids in rows["input_ids"]) <= 1
    assert len(rows) < len(token_blocks(texts, tiny_tokenizer("gpt2"), 64, special_tokens="end").rows) * 0.6


@pytest.mark.parametrize("length", [5, 200])
def test_characters_of_blocks_add_up(length):
    texts = [words(50), "  " + words(23)]
    rows = token_blocks(texts, tiny_tokenizer("bert"), length).rows
    # spaces before the first word belong to no token, and a last block of one token is left out
    assert len("".join(texts)) - 2 - 4 <= sum(rows["characters"]) <= len("".join(texts)) - 2
    assert text_size(rows)[1] == sum(rows["characters"])
    assert text_size(rows)[0] == sum(len(ids) - 2 for ids in rows["input_ids"])


@pytest.mark.parametrize(
    ("texts", "length", "options", "message"),
    [
        ([words(5)], 16, {"drop_short": True}, "no block is left of 1 texts: none has 16 tokens"),
        (["w10", "w11"], 16, {}, "no block is left of 2 texts: all are empty"),
        ([words(5)], 3, {}, "a block of 3 tokens leaves 1 for text beside the special tokens"),
        ([words(5)], 16, {"pack": True, "drop_short": True}, "drop_short has nothing to say beside it"),
        ([words(5)], 16, {"special_tokens": "some"}, "must be one of around, end, none"),
    ],
)
def test_blocks_that_are_refused(texts, length, options, message):
    with pytest.raises(ValueError, match=message):
        token_blocks(texts, tiny_tokenizer("bert"), length, **options)


def test_drop_short_keeps_full_rows_alone():
    rows = token_blocks([words(33), words(3)], tiny_tokenizer("bert"), 12, drop_short=True).rows
    assert [len(ids) for ids in rows["input_ids"]] == [12, 12, 12]


# ---- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_scores_are_means_over_tokens_not_over_batches(is_causal):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 9, 11), torch.randint(0, 11, (5, 9))
    labels[0, 1:] = labels[3, 4:] = IGNORED
    scores = TokenScores(is_causal, tokens=40, characters=120)
    parts = [scores.losses((logits[i : i + 2], None), labels[i : i + 2]) for i in (0, 2, 4)]
    prediction = type("Prediction", (), {"predictions": torch.cat(parts).numpy()})()
    x, y = (logits[:, :-1], labels[:, 1:]) if is_causal else (logits, labels)
    expected = float(F.cross_entropy(x.reshape(-1, 11).double(), y.reshape(-1), ignore_index=IGNORED))
    figures = scores(prediction)
    assert figures["token_loss"] == pytest.approx(expected, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert figures["bits_per_character"] == pytest.approx(expected / math.log(2) * 40 / 120, rel=1e-6)


def test_target_size_counts_hidden_text():
    tokenizer = t5_tokenizer()
    first, second = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    rows = Dataset.from_dict({"labels": [[first, 10, 11, second, 1]]})
    tokens, characters = target_size(rows, tokenizer.decode)
    assert tokens == 5 and characters >= len("w10w11")


@pytest.mark.parametrize(("kind", "size"), [("gpt2", 300), ("bert", 200), ("t5", 220)])
def test_tokenizers_from_scratch(kind, size, tmp_path):
    from transformers import AutoTokenizer

    texts = [
        f"The {a} fox jumps over the {b} dog, {a}{b}." for a in ("quick", "brown", "lazy") for b in ("old", "wet")
    ] * 9
    tokenizer = train_tokenizer(kind, texts, size)
    assert len(tokenizer) <= size
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "the quick brown dog jumps"
    ids = reloaded(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert reloaded.unk_token_id not in ids or kind == "gpt2"
    assert reloaded.decode(ids, skip_special_tokens=True).strip() == text
    if kind == "t5":
        assert len(SpanCorruptionCollator(reloaded).sentinels) == 100
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(kind, texts, 50)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, model: Any, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"x" * 10)
    if complete:
        mark_complete(path, step, signature(model))
    return path


def test_newest_whole_checkpoint_is_found(tmp_path, logged):
    model = nn.Linear(3, 2)
    assert last_complete_checkpoint(tmp_path) is None
    for step in (2, 9, 10):  # by number, not by name
        checkpoint(tmp_path, step, model)
    assert last_complete_checkpoint(tmp_path, model) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10/weights").write_bytes(b"x" * 9)
    (tmp_path / "checkpoint-9/weights").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    checkpoint(tmp_path, 20, model, complete=False)
    (tmp_path / "checkpoint-2" / MARKER).write_text('{"step":')
    assert last_complete_checkpoint(tmp_path) is None
    printed = "\n".join(logged)
    for reason in ("9 bytes instead of 10", "weights is missing", "the save was interrupted", "can't be read"):
        assert reason in printed
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4


DAMAGE = ("null", "[]", "3", '"text"', "{", "{}")


@pytest.mark.parametrize("key", [None, "step", "files", "shapes", "efficient_attention"])
@pytest.mark.parametrize("value", DAMAGE)
def test_a_damaged_marker_is_no_traceback(key, value, tmp_path, logged):
    """Each value of the marker in turn, and all of it."""
    model = nn.Linear(3, 2)
    file = checkpoint(tmp_path, 2, model) / MARKER
    if key is None or value == "{":
        file.write_text(value)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: json.loads(value)}))
    try:
        found = last_complete_checkpoint(tmp_path, model)
    except ValueError as error:
        assert "does not fit the model" in str(error) or "efficient_attention=" in str(error)
    else:
        harmless = (key == "step" and value == "3") or (key, value) in {
            ("files", "{}"),
            ("efficient_attention", "null"),
        }
        assert (found is None) != harmless
        assert harmless or any("can't be read" in line for line in logged)
    rotate(tmp_path, keep=1)


def test_rotation_never_takes_the_last_whole_checkpoint(tmp_path):
    """By age the half-written ones would stay and the only whole one would go."""
    model = nn.Linear(3, 2)
    checkpoint(tmp_path, 1, model)
    for step in (2, 3, 4):
        checkpoint(tmp_path, step, model, complete=False)
    rotate(tmp_path, keep=2)
    assert len(list(tmp_path.iterdir())) == 4
    for step in (5, 6, 7):
        checkpoint(tmp_path, step, model)
    rotate(tmp_path, keep=2, spare=str(tmp_path / "checkpoint-1"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{i}" for i in (1, 2, 3, 4, 6, 7)]


def test_interrupted_deletion_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    for step in (1, 2):
        checkpoint(tmp_path, step, model)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_parts.shutil, "rmtree", killed)
        rotate(tmp_path, keep=1)
    assert not (tmp_path / "checkpoint-1").exists()
    rotate(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_checkpoint_of_another_shape(tmp_path):
    checkpoint(tmp_path, 1, nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"weight has shape \[2, 3\] there and \[2, 4\] here.*another --output_dir"):
        last_complete_checkpoint(tmp_path, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"bias has shape \[2\] there and none here"):
        last_complete_checkpoint(tmp_path, nn.Linear(3, 2, bias=False))


def test_trainers_own_rotation_is_refused():
    arguments = type("Arguments", (), {"save_total_limit": 2})()
    with pytest.raises(ValueError, match="save_total_limit=2 would delete complete checkpoints"):
        CompleteCheckpoints(nn.Linear(3, 2)).on_train_begin(arguments, None, None)
    with pytest.raises(ValueError, match="keep=0"):
        CompleteCheckpoints(nn.Linear(3, 2), keep=0)


def test_state_of_a_plain_loop(tmp_path, monkeypatch):
    """Saved whole or not at all, restored bit for bit, optimiser and random state included."""
    from accelerate import Accelerator

    def loop(model: nn.Module, folder: Path, until: int, kill_at: int = -1) -> list[float]:
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        done, losses = load_state(accelerator, folder, prepared), []
        for step in range(done + 1, until + 1):
            loss = (prepared(torch.randn(4, 3)) ** 2).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if step == kill_at:
                with monkeypatch.context() as patch:
                    patch.setattr(checkpoint_parts, "mark_complete", lambda *args: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        save_state(accelerator, folder, step, prepared)
                return losses
            save_state(accelerator, folder, step, prepared)
        return losses

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    expected, whole = model(), tmp_path / "whole"
    losses = loop(expected, whole, 6)
    assert sorted(path.name for path in whole.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    resumed, folder = model(), tmp_path / "killed"
    first = loop(resumed, folder, 6, kill_at=4)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-3" and first == losses[:4]
    resumed = model()
    assert loop(resumed, folder, 6) == losses[3:]
    assert torch.equal(resumed.weight, expected.weight)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_state(Accelerator(cpu=True), folder, nn.Linear(5, 2))


def test_evaluation_before_the_first_step_is_no_part_of_its_figures(monkeypatch):
    """Neither of the seconds nor of the GPU's peak memory nor of the random numbers; the seconds of all parts add up."""
    clock, done = [100.0], []
    monkeypatch.setattr(callback_parts.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))

    def evaluate() -> None:
        done.append("evaluated")
        clock[0] += 50
        torch.rand(7)

    def first_step(**state: Any) -> FirstStep:
        begin = FirstStep(3, evaluate)
        state = {"global_step": 0, "max_steps": 9, "stateful_callbacks": {"FirstStep": begin.state()}} | state
        begin.on_train_begin(None, type("State", (), state)(), None)
        return begin

    begin = first_step()
    assert done == ["evaluated", "reset"] and torch.initial_seed() == 3
    drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(3)))
    clock[0] += 2
    saved = begin.state()
    clock[0] += 500  # lost, and the time until it was resumed
    begin = first_step(global_step=4, stateful_callbacks={"FirstStep": json.loads(json.dumps(saved))})
    clock[0] += 3
    assert begin.seconds() == 5
    with pytest.raises(NothingLeft):
        first_step(global_step=9)
    assert len(done) == 4


# ---- records and pictures ----------------------------------------------------------------------------------------


def test_record_round_trip(tmp_path):
    record = RunRecord("mlm", {"seed": 7, "model": "m"})
    record.add("exact", {"loss": 1.5})
    record.add("exact", {"perplexity": math.inf})
    path = record.write(tmp_path / "a/result.json")
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["seed"] == 7 and read["metrics"]["exact"] == {"loss": 1.5, "perplexity": None}
    assert {"torch", "transformers"} <= read["versions"].keys() and "cpu" in read["hardware"]
    assert RunRecord.read(path).metrics == read["metrics"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no record of a run"):
        RunRecord.read(path)


def test_half_written_json_never_replaces_the_former(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "r.json", {"a": object()})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_pictures(tmp_path):
    history = [{"step": i, "loss": 5.0 - i} for i in range(4)] + [{"step": 4, "eval_loss": 2.0}]
    loss_curve(history, tmp_path / "loss.png", {"exact": 3.0})
    loss_curve([], tmp_path / "empty.png")
    errors = {"layers": ["a", "b"], "mechanism": [0.5, 0.25], "mean of values": [0.9, 0.8], "window only": [None, 0.5]}
    layer_picture({"before": errors, "after": errors}, tmp_path / "layers.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf-efficient\[recipes\]"):
        loss_curve([], tmp_path / "loss.png")
