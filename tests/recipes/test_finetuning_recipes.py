"""Finetuning recipes: their commands as typed, their data against truth, their figures against a second computation."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from finetuning import AUTO, SMALL, datasets_of, recipe, rows_of, sources, write
from paths import RECIPES
from tiny import tiny_tokenizer, words
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from hf_efficient.conversion.upcycle import upcycle
from hf_efficient.corpus import KINDS
from hf_efficient.ops.global_tokens import up_to_separator
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.testing import VOCABULARY, tiny_model
from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.metrics import metric
from hf_efficient.training.recipe import run
from hf_efficient.training.results import RunRecord

__all__ = ["datasets_of", "sources"]  # fixtures

LONGFORMER = '{"mechanism": "longformer", "attention_window": 8, "global_tokens": "first"}'
PERFORMER = '{"mechanism": "performer", "num_features": 16, "redraw_interval": 1}'


def finished(output: Path, task: str) -> tuple[RunRecord, Any]:
    """The record of a finished run, and its model as a user loads it."""
    record = RunRecord.read(output / "result.json")
    assert record.finished and record.recipe == task
    assert {name.split()[0] for name in record.data} == {"train", "validation"}
    assert all(0 < use["tokens_used"] <= use["tokens"] for use in record.data.values())
    assert (output / "loss.png").stat().st_size > 1000
    assert all(np.isfinite(v) for v in record.metrics["trained"].values() if isinstance(v, float))
    model, info = AUTO[task].from_pretrained(output / "model", output_loading_info=True)
    assert not info["missing_keys"] or task == "embed"
    return record, model.eval()


# ---- the commands of the recipes -----------------------------------------------------------------------------------

COMMANDS = [
    (name, number, command.replace("\\\\\n", " "))
    for name in AUTO
    for number, command in enumerate(
        re.findall(r"^    python recipes/((?:.*\\\\\n)*.*)", (RECIPES / f"{name}.py").read_text(), re.M)
    )
]


def _tiny(name: str, command: str, sources: dict, datasets_of: dict, output: Path) -> list[str]:
    """The arguments of a command, with tiny files where the user's own models, data and lengths stand."""
    arguments = shlex.split(command)[1:]
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    family = "t5" if name == "summarize" else "bert"
    is_converted = values["--model"] == "converted-checkpoint"
    values["--model"] = sources[family + ("-longformer" if is_converted else "")]
    values["--output-dir"] = str(output)
    if "--max-positions" in values:
        values["--max-positions"] = "256"
    if "--max-length" in values:
        values["--max-length"] = "200"
    if "--dataset" in values:
        rows = [json.loads(line) for line in Path(datasets_of[name]).read_text().splitlines()]
        own = {key[2:].removesuffix("-column"): value for key, value in values.items() if key.endswith("-column")}
        rows = [{own.get(key, key): value for key, value in row.items()} for row in rows]
        file = values["--dataset"].replace("rajpurkar/squad", "squad.jsonl")
        values["--dataset"] = _as_file(output.parent / file, rows)
    if name == "question_answering":
        values["--stride"] = "16"
    if name == "summarize":
        values["--generation_max_length"] = "8"
    return [*(word for pair in values.items() for word in pair), "--max_steps", "2", *SMALL]


def _as_file(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows in the format that the file's name asks for."""
    from datasets import Dataset

    data = Dataset.from_list(rows)
    {".csv": data.to_csv, ".parquet": data.to_parquet, ".jsonl": data.to_json}[path.suffix](str(path))
    return str(path)


@pytest.mark.parametrize("name, number, command", COMMANDS, ids=[f"{name}-{number}" for name, number, _ in COMMANDS])
def test_command(name: str, number: int, command: str, sources, datasets_of, tmp_path):
    """As its docstring types it, on a tiny checkpoint; the first one of each recipe in a process of its own."""
    assert {name for name, _, _ in COMMANDS} == set(AUTO) and len(COMMANDS) == 2 * len(AUTO)
    arguments = _tiny(name, command, sources, datasets_of, tmp_path / "out")
    if number == 0:
        done = fresh.python(RECIPES / f"{name}.py", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Model: " in done.stdout
    else:
        recipe(name).main(arguments)
    record, model = finished(tmp_path / "out", name)
    assert type(model).__name__.startswith("Efficient")
    assert record.training["steps"] == 2
    assert "--max-positions" not in arguments or model.config.max_position_embeddings == 256


def test_what_is_refused_is_one_sentence(sources, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"words": "w5"}, {"words": "w6"}])
    arguments = ["--model", sources["bert"], "--output_dir", str(tmp_path / "out"), "--dataset", data]
    with pytest.raises(SystemExit, match=r"error: .* has no column 'text', 'label' in train; its columns are words"):
        run(lambda: recipe("classify").main(arguments))
    assert not (tmp_path / "out").exists()


# ---- figures against a second computation ---------------------------------------------------------------------------


def test_classify_learns_and_reports_what_the_saved_model_does(sources, datasets_of, tmp_path):
    out = tmp_path / "out"
    recipe("classify").main(
        ["--model", sources["bert"], "--attention", LONGFORMER, "--dataset", datasets_of["classify"], "--use_cpu",
         "--output_dir", str(out), "--max_steps", "40", "--learning_rate", "5e-3", "--per_device_train_batch_size", "8"]
    )  # fmt: skip
    record, model = finished(out, "classify")
    assert model.config.id2label == {0: "a", 1: "b"} and model.config.label2id == {"a": 0, "b": 1}
    assert record.metrics["trained"]["accuracy"] == 1.0, "two classes without a word in common were not told apart"
    assert record.metrics["majority"]["accuracy"] <= 1.0
    tokenizer, labels = AutoTokenizer.from_pretrained(out / "model"), []
    for row in rows_of("classify"):
        with torch.no_grad():
            labels.append(
                model.config.id2label[int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())]
            )
    assert labels == [row["label"] for row in rows_of("classify")]


def test_classify_reads_pictures_where_the_checkpoint_does(tmp_path):
    source = tmp_path / "source"
    tiny_model("vit", image_size=32).save_pretrained(source)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(source)
    common = ["--model", str(source), "--attention", "axial", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    with pytest.raises(ValueError, match=r"max_length=32 cuts texts, and .* reads pictures"):
        recipe("classify").main([*common, "--max_length", "32"])
    sizes = ["--max_train_rows", "64", "--max_eval_rows", "32", "--per_device_train_batch_size", "16"]
    recipe("classify").main([*common, *sizes, "--max_steps", "40", "--learning_rate", "1e-2"])
    record = RunRecord.read(tmp_path / "out" / "result.json")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "model").eval()
    assert record.finished and type(model).__name__ == "EfficientViTForImageClassification"
    assert list(model.config.id2label.values()) == list(KINDS)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    assert processor.size == {"height": 32, "width": 32}
    rows = offline_task("pictures", 0)["validation"].select(range(32))
    with torch.no_grad():
        found = model(**processor(list(rows["image"]), return_tensors="pt")).logits.argmax(-1)
    accuracy = float((found == torch.tensor(rows["label"])).double().mean())
    assert accuracy == record.metrics["trained"]["accuracy"] > record.metrics["majority"]["accuracy"]


def test_a_decoder_without_a_padding_token_classifies(sources, datasets_of, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(sources["gpt2"])
    model = AutoModel.from_pretrained(sources["gpt2"])
    tokenizer.pad_token = model.config.pad_token_id = None
    tokenizer.save_pretrained(tmp_path / "source")
    model.save_pretrained(tmp_path / "source")
    recipe("classify").main(
        ["--model", str(tmp_path / "source"), "--attention", "local", "--dataset", datasets_of["classify"], "--output_dir",
         str(tmp_path / "out"), "--max_steps", "2", *SMALL]
    )  # fmt: skip
    _, model = finished(tmp_path / "out", "classify")
    assert model.config.pad_token_id == tokenizer.eos_token_id
    # the last real token decides, whatever follows it in a batch
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    with torch.no_grad():
        alone = model(**tokenizer(["w5 w6"], return_tensors="pt")).logits[0]
        batched = model(**tokenizer(["w5 w6", words(9)], padding=True, return_tensors="pt")).logits[0]
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)


def test_token_classify_learns(sources, datasets_of, tmp_path):
    out = tmp_path / "out"
    recipe("token_classify").main(
        ["--model", sources["roberta"], "--attention", LONGFORMER, "--dataset", datasets_of["token_classify"], "--use_cpu",
         "--output_dir", str(out), "--max_steps", "40", "--learning_rate", "1e-2", "--per_device_train_batch_size", "8"]
    )  # fmt: skip
    record, model = finished(out, "token_classify")
    assert record.metrics["trained"]["f1"] > 0.8, "tags that hang on the word alone were not learnt"
    assert record.metrics["trained"]["X_f1"] == record.metrics["trained"]["f1"]
    assert sorted(model.config.label2id) == ["B-X", "O"]


def test_summarize_reports_rouge_of_what_the_saved_model_generates(sources, datasets_of, tmp_path):
    module, out = recipe("summarize"), tmp_path / "out"
    settings = ["--model", sources["t5"], "--dataset", datasets_of["summarize"], "--output_dir", str(out), "--use_cpu"]
    module.main([*settings, "--max_steps=3", "--learning_rate=1e-2", "--generation_max_length=7", "--max_length=64"])
    record, model = finished(out, "summarize")
    rows = module.load_data(module.parse_settings(module.Settings, settings))
    tokenizer, texts = AutoTokenizer.from_pretrained(out / "model"), []
    for row in rows["validation"]:
        inputs = tokenizer("summarize: " + row["document"], return_tensors="pt", truncation=True, max_length=64)
        tokens = model.generate(**inputs, max_length=7, num_beams=1)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    summaries = list(rows["validation"]["summary"])
    for name, value in metric("rouge")(texts, summaries).items():
        assert record.metrics["trained"][name] == pytest.approx(value, abs=1e-9)
    # summaries are the first three words of their documents
    assert module.lead(rows) == summaries and record.metrics["lead"]["rouge2"] == 1.0
    assert "exact" in record.metrics and "converted" not in record.metrics


def test_summarize_takes_mt5(datasets_of, tmp_path):
    config = MT5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    MT5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    tiny_tokenizer("t5").save_pretrained(tmp_path / "source")
    recipe("summarize").main(
        ["--model", str(tmp_path / "source"), "--attention", LONGFORMER, "--dataset", datasets_of["summarize"],
         "--output_dir", str(tmp_path / "out"), "--max_steps=2",
         "--generation_max_length=5", "--generation_num_beams=2", *SMALL]
    )  # fmt: skip
    record, model = finished(tmp_path / "out", "summarize")
    assert type(model).__name__ == "EfficientMT5ForConditionalGeneration"
    assert {"exact", "converted", "control", "trained", "lead"} == set(record.metrics)


def test_embed_saves_what_sentence_transformers_loads(sources, datasets_of, tmp_path):
    from sentence_transformers import SentenceTransformer

    out, module = tmp_path / "out", recipe("embed")
    settings = ["--model", sources["bert"], "--attention", LONGFORMER, "--max_positions", "256", "--use_cpu", "--output_dir",
                str(out), "--dataset", datasets_of["embed"]]  # fmt: skip
    module.main([*settings, "--max_steps", "10", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4"])
    record, model = finished(out, "embed")
    encoder = SentenceTransformer(str(out / "model"), device="cpu")
    assert encoder.max_seq_length == 256 and type(encoder[0].model) is type(model)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    text = words(180)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        mean = model(**inputs).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(torch.from_numpy(encoder.encode(text)), mean, atol=1e-5, rtol=0)
    # recall, and that of the original model with everything cut to its positions, by hand
    rows = module.load_data(module.parse_settings(module.Settings, settings))["validation"]
    documents = list(dict.fromkeys(rows["positive"]))
    original = SentenceTransformer(sources["bert"], device="cpu")
    original.max_seq_length = 128
    for name, judged in (("trained", encoder), ("truncated", original)):
        given, there = judged.encode(list(rows["anchor"])), judged.encode(documents)
        cosine = (given / np.linalg.norm(given, axis=1, keepdims=True)) @ (
            there / np.linalg.norm(there, axis=1, keepdims=True)
        ).T
        hits = [documents[i] == text for i, text in zip(cosine.argmax(1), rows["positive"], strict=True)]
        assert record.metrics[name]["recall_at_1"] == pytest.approx(np.mean(hits), abs=1e-6)
    assert record.metrics["trained"]["loss"] < record.metrics["converted"]["loss"]


def test_embed_refuses_routers_whose_loss_it_would_leave_out(sources, datasets_of, tmp_path):
    upcycle(sources["bert"], 2, router_z_loss_coef=0.1).save(tmp_path / "experts")
    settings = ["--model", str(tmp_path / "experts"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    with pytest.raises(ValueError, match="upcycle with --router-aux-loss-coef 0 --router-z-loss-coef 0"):
        recipe("embed").main([*settings, "--dataset", datasets_of["embed"], "--max_steps", "1"])


def test_attention_pooling_starts_as_the_mean_learns_and_is_saved(sources, datasets_of, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from hf_efficient.training.pooling import AttentionPooling, pool_by_attention

    encoder, texts = SentenceTransformer(sources["bert"], device="cpu"), [words(40), words(7)]
    mean = encoder.encode(texts)
    pool_by_attention(encoder, num_heads=4)
    np.testing.assert_allclose(encoder.encode(texts), mean, atol=1e-5)
    recipe("embed").main(
        ["--model", sources["bert"], "--attention", LONGFORMER, "--pooling", "attention", "--use_cpu", "--output_dir",
         str(tmp_path / "out"), "--dataset", datasets_of["embed"], "--max_steps", "3", "--per_device_train_batch_size", "4"]
    )  # fmt: skip
    trained = SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu", trust_remote_code=True)
    assert (
        isinstance(trained[1], AttentionPooling)
        and trained[1].num_heads == trained[0].model.config.num_attention_heads
    )
    assert trained[1].pooling.expand.weight.abs().max() > 0, "it never learned"
    inputs = trained.tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        expected = trained[1].pooling(trained[0].model(**inputs).last_hidden_state)[0, 0]
    torch.testing.assert_close(torch.from_numpy(trained.encode(texts[0])), expected, atol=1e-5, rtol=0)
    encoder[1] = Pooling(encoder.get_embedding_dimension(), pooling_mode="cls")
    with pytest.raises(ValueError, match="starts as the mean of tokens, but this checkpoint pools by 'cls'"):
        pool_by_attention(encoder, num_heads=4)


def test_retrieval_tells_early_from_deep_passages():
    document = [f"w{10 + i}" for i in range(60)]
    rows = {"anchor": ["w10 w11", "w40 w41", "w68 w69", "w5"], "positive": [" ".join(document)] * 3 + ["w5 w6"]}
    judge = recipe("embed").Retrieval(rows, tiny_tokenizer("bert"), reach=32, batch_size=2)
    # a separator and a class token come with every text: w39 is the last word within 32 tokens
    assert judge.groups["early"].tolist() == [True, False, False, True]
    assert judge.groups["deep"].tolist() == [False, True, True, False]

    class Model:
        """Puts texts with w68 or w69 beside the second document, all others beside the first."""

        def encode(self, texts: list[str], **options: Any) -> torch.Tensor:
            return torch.stack([torch.eye(2)[int(text in ("w68 w69", "w5 w6"))] for text in texts])

    assert judge(Model()) == {"recall_at_1": 0.5, "recall_at_1_early": 0.5, "recall_at_1_deep": 0.5}


@pytest.mark.parametrize("name", ["classify", "token_classify", "summarize"])
def test_the_loss_is_a_mean_over_labels(name: str, sources, datasets_of, tmp_path):
    """However rows are batched; a row weighs as much as it has labels, and a last batch no more than it has rows."""
    losses = []
    rows = rows_of(name)
    for i, row in enumerate(rows if name == "summarize" else ()):
        row["summary"] = " ".join(row["document"].split()[: 1 + i % 6])
    (tmp_path / "data").mkdir()
    for split, some in (("train", rows[:8]), ("validation", rows[8:15])):
        write(tmp_path / "data" / f"{split}.jsonl", some)
    source = sources["t5" if name == "summarize" else "bert"]
    for size in (1, 3):
        out = tmp_path / str(size)
        more = ["--generation_max_length", "12"] if name == "summarize" else []
        recipe(name).main(["--model", source, "--dataset", str(tmp_path / "data"), "--output_dir", str(out), *SMALL,
                           "--max_steps", "1", "--per_device_eval_batch_size", str(size), *more])  # fmt: skip
        losses.append(finished(out, name)[0].metrics["trained"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- words and their tags -------------------------------------------------------------------------------------------


def subword_tokenizer(max_length: int = 64) -> Any:
    """WordPiece: most words are two or three tokens."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "un",
        "##believ",
        "##able",
        "a",
        "##b",
        "##c",
        "go",
        "##ing",
        ".",
        "?",
        "10",
    ]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **names)


def test_tags_stand_on_first_sub_tokens():
    """Against the words that the tokenizer itself assigns to tokens."""
    tokenizer = subword_tokenizer()
    batch = {"tokens": [["unbelievable", "ab", "go.", "going", "Ünbelievable"], ["a"]], "tags": [[4, 3, 2, 1, 0], [5]]}
    encoded = recipe("token_classify").encoder(tokenizer, 64)(batch)
    oracle = tokenizer(batch["tokens"], is_split_into_words=True)
    for row in range(2):
        assert encoded["input_ids"][row] == oracle["input_ids"][row]
        owners = oracle.word_ids(row)
        expected = [
            -100 if word is None or word in owners[:i] else batch["tags"][row][word] for i, word in enumerate(owners)
        ]
        assert encoded["labels"][row] == expected


def test_no_word_is_lost_in_rows_that_are_too_long():
    tokenizer, tokens = subword_tokenizer(), ["unbelievable", "ab", "going", "a"] * 9
    batch = {"tokens": [tokens, ["ab"]], "tags": [list(range(len(tokens))), [7]]}
    encoded = recipe("token_classify").encoder(tokenizer, 11)(batch)
    assert len(encoded["labels"]) > 8 and max(map(len, encoded["input_ids"])) == 11
    found = [tag for labels in encoded["labels"] for tag in labels if tag != -100]
    assert found == [*range(len(tokens)), 7]
    assert all(len(a) == len(b) for a, b in zip(encoded["labels"], encoded["input_ids"], strict=True))


def test_figures_of_other_tags_than_entities():
    figures = recipe("token_classify").figures
    assert figures([["N", "V"], ["N"]], [["N", "N"], ["N"]]) == {"accuracy": 2 / 3, "macro_f1": pytest.approx(0.4)}
    assert figures([["O", "B-A"]], [["O", "B-A"]])["f1"] == 1.0


# ---- questions and spans --------------------------------------------------------------------------------------------


def _windows(length: int, stride: int, mark: bool = False) -> tuple[Any, list[dict[str, Any]], dict[str, list]]:
    rows = [
        {
            "question": "going?",
            "context": "a ab unbelievable going . " * 4 + "10 a ab",
            "answers": ["10"],
            "place": 104,
        },
        {"question": "a?", "context": "ab unbelievable", "answers": ["unbelievable"], "place": 3},
    ]
    assert all(row["context"].startswith(row["answers"][0], row["place"]) for row in rows)
    tokenizer = subword_tokenizer()
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    return tokenizer, rows, recipe("question_answering").encoder(tokenizer, length, stride, mark)(batch, [0, 1])


def test_windows_hold_the_answer_where_they_say():
    tokenizer, rows, encoded = _windows(20, 4)
    assert encoded["row"].count(0) > 3 and encoded["row"].count(1) == 1
    holding = 0
    for ids, offsets, start, end, row in zip(
        *(encoded[k] for k in ("input_ids", "offsets", "start_positions", "end_positions", "row")), strict=True
    ):
        text = rows[row]["context"]
        shown = text[min(a for a, _ in offsets if a >= 0) : max(b for _, b in offsets)]
        if start == 0:
            assert end == 0 and rows[row]["answers"][0] not in shown
            continue
        holding += 1
        assert text[offsets[start][0] : offsets[end][1]] == rows[row]["answers"][0]
        assert tokenizer.decode(ids[start : end + 1]).replace(" ##", "") == rows[row]["answers"][0]
    assert holding == 2
    # neighbours overlap, so that together the windows show every token of the context
    seen = {
        pair for offsets, row in zip(encoded["offsets"], encoded["row"], strict=True) if row == 0 for pair in offsets
    }
    whole = tokenizer(rows[0]["context"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert seen - {(-1, -1)} == set(whole)


def test_right_logits_give_right_answers():
    """Each row's answer comes from the window that scores highest, whatever windows without it say."""
    module = recipe("question_answering")
    _, rows, encoded = _windows(20, 4)
    count, longest = len(encoded["row"]), max(map(len, encoded["input_ids"]))
    start, end = np.full((2, count, longest), -100.0)
    for i in range(count):
        ids = encoded["input_ids"][i]
        start[i, : len(ids)] = end[i, : len(ids)] = np.random.default_rng(i).uniform(0, 1, len(ids))
        first, last = encoded["start_positions"][i], encoded["end_positions"][i]
        # windows without the answer are sure that it is at token 0, which is no answer
        start[i, first] = end[i, last] = 9
    texts = module.answers_of(start, end, encoded, [row["context"] for row in rows], 30)
    assert texts == ["10", "unbelievable"]


def test_best_span_is_the_best_of_all():
    chosen, best_span = np.random.default_rng(0), recipe("question_answering").best_span
    for _ in range(30):
        n, longest = int(chosen.integers(2, 12)), int(chosen.integers(1, 5))
        start, end = chosen.normal(size=(2, n + 3))
        offsets = np.array([(-1, -1)] * 2 + [(3 * i, 3 * i + 2) for i in range(n - 1)])
        spans = {
            (i, j): start[i] + end[j] for i in range(2, len(offsets)) for j in range(i, min(i + longest, len(offsets)))
        }
        score, first, last = best_span(start, end, offsets, longest)
        (i, j), best = max(spans.items(), key=lambda item: item[1]) if spans else ((0, 0), -np.inf)
        assert score == pytest.approx(best)
        if spans:
            assert (first, last) == (offsets[i, 0], offsets[j, 1])


def test_the_question_is_global(sources, datasets_of, tmp_path, logged):
    """On the way by the mechanism's own rule; in a converted checkpoint with another rule by the call."""
    module = recipe("question_answering")
    common = ["--dataset", datasets_of["question_answering"], "--stride", "16", "--max_steps", "2", *SMALL]
    module.main(
        ["--model", sources["roberta"], "--attention", "longformer", "--output_dir", str(tmp_path / "a"), *common]
    )
    _, model = finished(tmp_path / "a", "question_answering")
    config = mechanism_of(next(iter(converted_layers(model).values()))).config
    assert (config.global_tokens, config.separator_token_id) == ("question", 2)
    assert not any("global_attention_mask" in line for line in logged)
    module.main(["--model", sources["bert-longformer"], "--output_dir", str(tmp_path / "b"), *common])
    assert any("global_attention_mask" in line for line in logged)
    tokenizer, _, encoded = _windows(20, 4, mark=True)
    names = ("input_ids", "attention_mask", "global_attention_mask", "start_positions", "end_positions")
    windows = [{name: encoded[name][i] for name in names} for i in range(len(encoded["row"]))]
    batch = module.Collator(tokenizer.pad_token_id)(windows)
    assert torch.equal(
        batch["global_attention_mask"].bool(), up_to_separator(batch["input_ids"], tokenizer.sep_token_id)
    )
    assert batch["attention_mask"].sum(1).tolist() == [len(window["input_ids"]) for window in windows]
    module.main(["--model", sources["bert"], "--attention", "longformer", "--no_question_global", "--output_dir",
                 str(tmp_path / "c"), *common])  # fmt: skip
    _, model = finished(tmp_path / "c", "question_answering")
    assert mechanism_of(next(iter(converted_layers(model).values()))).config.global_tokens == "none"


def test_answers_in_plain_text_are_found():
    located = recipe("question_answering").located
    assert located({"answers": "b c", "context": "a b c b c"}, "row 0") == (["b c"], 2)
    assert located({"answers": {"text": [" b", "c"], "answer_start": [1, 4]}, "context": "a b c"}, "row 0") == (
        [" b", "c"],
        2,
    )


# ---- baseline, adapters, resuming -----------------------------------------------------------------------------------


def test_the_baseline_is_the_unconverted_model_trained_alike(sources, datasets_of, tmp_path):
    """Its figures are those of a run of its own, and it reads no more than it has positions."""
    module = recipe("classify")
    common = ["--dataset", datasets_of["classify"], "--max_steps", "3", "--learning_rate", "1e-3", *SMALL]
    module.main(["--model", sources["bert-longformer"], "--max_length", "200", "--baseline", "--output_dir",
                 str(tmp_path / "a"), *common])  # fmt: skip
    module.main(["--model", sources["bert"], "--max_length", "128", "--output_dir", str(tmp_path / "b"), *common])
    record, _ = finished(tmp_path / "a", "classify")
    baseline, stock = finished(tmp_path / "a" / "baseline", "classify")
    alone, _ = finished(tmp_path / "b", "classify")
    assert type(stock).__name__ == "BertForSequenceClassification" and stock.config.max_position_embeddings == 128
    assert baseline.settings["max_length"] == 128
    left_out = {"runtime", "samples_per_second"}
    expected = {key: value for key, value in alone.metrics["trained"].items() if key not in left_out}
    assert expected.items() <= record.metrics["baseline"].items()
    assert record.metrics["trained"]["loss"] != expected["loss"]


@pytest.mark.parametrize("name", list(AUTO))
def test_adapters_in_mixed_precision(name: str, sources, datasets_of, tmp_path):
    """LoRA, bf16 and gradient checkpointing together: merged at the end, mechanism and fresh head trained along."""
    source = sources["t5" if name == "summarize" else "bert"]
    extra = {"question_answering": ["--stride", "16"], "summarize": ["--generation_max_length", "6"]}.get(name, [])
    recipe(name).main(
        ["--model", source, "--attention", LONGFORMER, "--dataset", datasets_of[name], "--output_dir",
         str(tmp_path / "out"), "--lora_rank", "2", "--bf16", "--activation_checkpointing", "--max_steps", "2",
         "--learning_rate", "1e-2", *SMALL, *extra]
    )  # fmt: skip
    record, model = finished(tmp_path / "out", name)
    assert 0 < record.training["trained_parameters"] < 0.5 * record.training["parameters"]
    original = AutoModel.from_pretrained(source).state_dict()
    after = {key.removeprefix("bert."): value for key, value in model.state_dict().items()}
    assert not [key for key in after if "lora" in key or "base_layer" in key]
    (first, own) = (
        ("block.0.layer.0.SelfAttention", "q") if name == "summarize" else ("layer.0.attention.self", "query")
    )
    host = f"encoder.{first}.{own}.weight"
    mechanism = f"encoder.{first}.efficient.query_global.weight"
    assert not torch.equal(after[host], original[host]), "the adapters did not learn, or were not merged"
    assert not torch.equal(after[mechanism], original[host]), "the mechanism did not learn"
    assert not torch.equal(after[mechanism], after[host])
    table = "shared.weight" if name == "summarize" else "embeddings.word_embeddings.weight"
    assert torch.equal(after[table], original[table]), "what has no adapters is not frozen"


@pytest.mark.parametrize(
    "name, lora, attention",
    [("classify", 0, LONGFORMER), ("embed", 2, LONGFORMER), ("classify", 2, PERFORMER)],
    ids=["classify", "embed-lora", "classify-lora-performer"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, lora: int, attention: str, sources, datasets_of, tmp_path
):
    """What a mechanism drew anew on the way included, which is no parameter."""
    common = ["--model", sources["bert"], "--attention", attention, "--dataset", datasets_of[name],
              "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", "1e-2",
              "--lora_rank", str(lora), *SMALL]  # fmt: skip
    main = recipe(name).main
    main([*common, "--max_steps", "4", "--output_dir", str(tmp_path / "whole")])
    main([*common, "--max_steps", "2", "--output_dir", str(tmp_path / "parts")])
    main([*common, "--max_steps", "4", "--output_dir", str(tmp_path / "parts"), "--resume"])
    record, resumed = finished(tmp_path / "parts", name)
    _, whole = finished(tmp_path / "whole", name)
    assert record.training["resumed_from"] == 2 and record.training["steps"] == 4
    state = resumed.state_dict()
    assert ("performer" in attention) == any(key.endswith(".features") for key in state)
    for key, value in whole.state_dict().items():
        if not key.startswith("pooler"):
            torch.testing.assert_close(state[key], value, atol=1e-6, rtol=0, msg=key)
