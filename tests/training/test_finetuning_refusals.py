"""What finetuning recipes refuse, each in one sentence and before anything is trained."""

from __future__ import annotations

import re
from typing import Any

import pytest
from finetuning import AUTO, datasets_of, recipe, sources, write
from tiny import tiny_tokenizer
from transformers import AutoModelForSeq2SeqLM

from hf_efficient.training.finetuning import input_length, label_options, require_filled, with_label_ids

__all__ = ["datasets_of", "sources"]  # fixtures

GOOD = {
    "classify": {"text": "w5 w6", "label": "a"},
    "token_classify": {"tokens": ["w5"], "tags": ["O"]},
    "question_answering": {"question": "w5", "context": "w6 w7", "answers": {"text": ["w7"], "answer_start": [3]}},
    "summarize": {"document": "w5 w6", "summary": "w5"},
    "embed": {"anchor": "w5", "positive": "w5 w6"},
}


@pytest.mark.parametrize(
    "name, bad, message",
    [
        ("classify", {"text": " "}, "row 2 of train has nothing in 'text'"),
        ("classify", {"label": None}, "row 2 of train has the label None in 'label', which is no class"),
        ("token_classify", {"tokens": []}, "row 2 of train has nothing in 'tokens'"),
        ("token_classify", {"tags": ["O", "B-X"]}, "row 2 of train has 1 words, but 2 tags"),
        ("question_answering", {"context": None}, "row 2 of train has nothing in 'context'"),
        ("question_answering", {"answers": {"text": [], "answer_start": []}}, "row 2 of train has no answer"),
        (
            "question_answering",
            {"answers": {"text": ["w7"], "answer_start": [2]}},
            "'w7' does not stand at character 2",
        ),
        (
            "question_answering",
            {"answers": {"text": ["w7", "w6"], "answer_start": [3]}},
            "row 2 of train has the answers",
        ),
        ("summarize", {"summary": ""}, "row 2 of train has nothing in 'summary'"),
        ("embed", {"anchor": None}, "row 2 of train has nothing in 'anchor'"),
    ],
)
def test_bad_rows_are_refused(name: str, bad: dict, message: str, sources, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    other = GOOD[name] | (
        {"label": "b"} if name == "classify" else {"tags": ["B-X"]} if name == "token_classify" else {}
    )
    write(folder / "train.jsonl", [GOOD[name], other, GOOD[name] | bad])
    write(folder / "validation.jsonl", [GOOD[name], other])
    monkeypatch.setattr(recipe(name), "load_model", lambda *args, **options: pytest.fail("the model was loaded first"))
    family = "t5" if name == "summarize" else "bert"
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(name).main(
            ["--model", sources[family], "--dataset", str(folder), "--output_dir", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, column, values, message",
    [
        ("classify", "label", [["a"], ["b"]], "row 0 of train has ['a'] in 'label', where one label is needed"),
        ("token_classify", "tags", ["O", "B-X"], "row 0 of train has 'O' in 'tags', where a list of labels"),
        ("token_classify", "tokens", ["w", "v"], "row 0 of train has 'w' in 'tokens': it must be a list of words"),
        (
            "question_answering",
            "answers",
            [["w7"], ["w6"]],
            "row 0 of train has the answers ['w7']: they must be a text",
        ),
        (
            "question_answering",
            "answers",
            [{"text": ["w7"]}] * 2,
            "row 0 of train has the answers {'text': ['w7']}: they",
        ),
    ],
)
def test_columns_of_another_form_are_refused(name: str, column: str, values: list, message: str, sources, tmp_path):
    (tmp_path / "data").mkdir()
    others = [GOOD[name], GOOD[name] | {"tags": ["B-X"]} if name == "token_classify" else GOOD[name]]
    rows = [row | {column: value} for row, value in zip(others, values, strict=True)]
    for split in ("train", "validation"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(name).main(["--model", sources["bert"], "--dataset", str(tmp_path / "data"), "--output_dir",
                           str(tmp_path / "out")])  # fmt: skip


def _rows(train: list[Any], validation: list[Any], names: list[str] | None = None) -> Any:
    from datasets import ClassLabel, Dataset, DatasetDict, Features

    features = Features({"label": ClassLabel(names=names)}) if names else None
    splits = {"train": train, "validation": validation}
    return DatasetDict(
        {split: Dataset.from_dict({"label": labels}, features=features) for split, labels in splits.items()}
    )


@pytest.mark.parametrize(
    ("labels", "more", "names", "head", "ids"),
    [
        (["c", "a"], ["c"], None, ["a", "b", "c"], [2, 0]),
        (["c", "a"], ["b"], None, ["c", "b", "a"], [0, 2]),  # a class that is only evaluated; the head's own order
        (["b", "b"], ["b"], None, ["a", "b"], [1, 1]),
        ([["O", "B-X"], ["O"]], [["O"]], None, ["B-X", "B-Y", "O"], [[2, 0], [2]]),
        ([1, 0], [1], ["y", "x"], ["x", "y", "z"], [0, 1]),  # a ClassLabel with other ids
        ([2, 0], [0], ["y", "-", "x"], ["x", "y"], [0, 1]),  # whose unused class the head does not know
        ([2, 0], [2], None, ["0", "1", "2"], [2, 0]),
        ([2, 0], [2], None, ["LABEL_0", "LABEL_1", "LABEL_2"], [2, 0]),
    ],
)
def test_labels_of_a_head_keep_its_order(labels, more, names, head, ids):
    rows, found = with_label_ids(_rows(labels, more, names), "label", listed=isinstance(ids[0], list), head=head)
    assert found == [name.removeprefix("LABEL_") for name in head] and list(rows["train"]["label"]) == ids


def test_labels_that_a_head_lacks_are_labels_of_the_rows():
    for labels, names in ((["d", "a"], None), ([1, 0], ["a", "d"]), ([3, 0], None)):
        for head in ([], ["a", "b", "c"], ["LABEL_0", "LABEL_1", "LABEL_2"]):
            rows, found = with_label_ids(_rows(labels, labels, names), "label", listed=False, head=head)
            assert len(found) == 2 and list(rows["train"]["label"]) == [1, 0]


def test_labels_of_every_form():
    for labels, names, ids in (
        (["x", "b", "x"], ["b", "x"], [1, 0, 1]),
        ([5, 1, 10], ["1", "5", "10"], [1, 0, 2]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([["O", "B-X"], [], ["O"]], ["B-X", "O"], [[1, 0], [], [1]]),
    ):
        rows, found = with_label_ids(_rows(labels, labels[:1]), "label", listed=isinstance(ids[0], list))
        assert (found, list(rows["train"]["label"]), list(rows["validation"]["label"])) == (names, ids, ids[:1])
    # names of the dataset keep their order and their unused classes
    assert with_label_ids(_rows([2, 0], [2], ["z", "y", "x"]), "label", listed=False)[1] == ["z", "y", "x"]


@pytest.mark.parametrize(
    "train, validation, names, message",
    [
        (["a", "b"], ["a", "c"], None, r"row 1 of validation has the label 'c' .*none of the 2 classes .*'a', 'b'"),
        ([0, 1], [2], None, r"row 0 of validation has the label 2 "),
        ([0, -1], [0], None, r"row 1 of train has the label -1 .*no class"),
        ([0.5, 1.5], [0.5], None, r"row 0 of train has the label 0.5 .*no class"),
        ([0, -1], [0], ["a", "b"], r"row 1 of train has the label -1 .*no class"),
        (["a", "a"], ["a"], None, r"has 1 classes in the training rows; at least 2"),
    ],
)
def test_labels_out_of_range_are_refused(train, validation, names, message):
    with pytest.raises(ValueError, match=message):
        with_label_ids(_rows(train, validation, names), "label", listed=False)


def test_rows_without_a_value_are_refused():
    for value in (None, " \n", []):
        with pytest.raises(ValueError, match="row 1 of validation has nothing in 'label'"):
            require_filled(_rows(["a"], [["a"] if value == [] else "a", value]), "label")
    require_filled(_rows([0], [0]), "label")  # a zero is a value


def test_lengths_that_do_not_fit_are_refused(sources, datasets_of, tmp_path):
    common = ["--model", sources["bert"], "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    with pytest.raises(ValueError, match=r"inputs of 300 tokens .* has 128 positions: .*--max_positions 300"):
        recipe("classify").main([*common, "--dataset", datasets_of["classify"], "--max_length", "300"])
    with pytest.raises(
        ValueError, match=r"inputs of 20 tokens leave 13 beside a question, .* share 16: raise --max_length"
    ):
        arguments = ["--dataset", datasets_of["question_answering"], "--max_length", "20", "--stride", "16"]
        recipe("question_answering").main([*common, *arguments])
    tokenizer = tiny_tokenizer("t5", max_length=int(1e30))
    model = AutoModelForSeq2SeqLM.from_pretrained(sources["t5"])
    with pytest.raises(ValueError, match="neither model nor tokenizer limits the input"):
        input_length(model, tokenizer)
    assert input_length(model, tokenizer, 5000) == 5000


@pytest.mark.parametrize("name", ["classify", "token_classify"])
def test_a_head_of_other_labels_is_refused(name: str, sources, datasets_of, tmp_path):
    AUTO[name].from_pretrained(sources["bert"], num_labels=3).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"already tells 3 labels apart \(LABEL_0, .*\), but the rows have 2 \("):
        recipe(name).main(["--model", str(tmp_path / "source"), "--dataset", datasets_of[name], "--output_dir",
                           str(tmp_path / "out")])  # fmt: skip


def test_a_head_of_other_names_is_refused(sources, tmp_path):
    """The same number of labels, but others, or in another order: the head's meanings would change without a word."""
    for names in (["a", "c"], ["b", "a"]):
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        folder = tmp_path / "".join(names)
        AUTO["classify"].from_pretrained(sources["bert"], **labels).save_pretrained(folder)
        with pytest.raises(
            ValueError, match=rf"already tells 2 labels apart \({', '.join(names)}\), but .* 2 \(a, b\)"
        ):
            label_options(["a", "b"], str(folder), "ForSequenceClassification")
        assert label_options(names, str(folder), "ForSequenceClassification") == {"num_labels": 2, **labels}
        # another kind of head is not used
        assert label_options(["a", "b"], str(folder), "ForTokenClassification")["num_labels"] == 2
    # nobody said what these are
    AUTO["classify"].from_pretrained(sources["bert"], num_labels=2).save_pretrained(tmp_path / "unnamed")
    assert label_options(["a", "b"], str(tmp_path / "unnamed"), "ForSequenceClassification")["num_labels"] == 2


def test_a_converted_t5_is_not_lengthened_in_passing(sources, datasets_of, tmp_path):
    arguments = ["--model", sources["t5-longformer"], "--dataset", datasets_of["summarize"], "--output_dir",
                 str(tmp_path / "out"), "--max_positions", "4096"]  # fmt: skip
    with pytest.raises(ValueError, match="is already converted and has 256 positions, not max_positions=4096"):
        recipe("summarize").main(arguments)
    assert not (tmp_path / "out").exists()


def test_a_baseline_of_nothing_is_refused(sources, datasets_of, tmp_path):
    for attention in ("", "none"):
        with pytest.raises(
            ValueError, match="baseline trains the unconverted model for comparison, but this run is it already"
        ):
            recipe("classify").main(["--model", sources["bert"], "--attention", attention, "--baseline", "--output_dir",
                                     str(tmp_path / "out"), "--dataset", datasets_of["classify"]])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_single_document_is_nothing_to_retrieve(sources, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"anchor": f"w{i}", "positive": "w5 w6"} for i in range(5)])
    with pytest.raises(ValueError, match="a single positive in its training rows"):
        recipe("embed").main(["--model", sources["bert"], "--dataset", data, "--output_dir", str(tmp_path / "out")])
