"""Metrics against their definitions, both sources of them, and the offline datasets that the recipes are judged on."""

from __future__ import annotations

import builtins
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from rouge_score import rouge_scorer
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score as entity_precision

from hf_efficient import corpus
from hf_efficient.training import metrics
from hf_efficient.training.data import offline_tasks
from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.metrics import NAMES, bits_per_character, metric, perplexity


@pytest.fixture(autouse=True)
def _forget_loaded_metrics():
    metrics._from_hub.cache_clear()
    yield
    metrics._from_hub.cache_clear()


# ---- against the definitions -------------------------------------------------------------------------------------


def test_accuracy_and_f1_of_classes():
    chosen = np.random.default_rng(0)
    references, predictions = chosen.integers(0, 4, 97), chosen.integers(0, 4, 97)
    assert metric("accuracy")(predictions, references) == {"accuracy": float((references == predictions).mean())}

    def one(label: int) -> float:
        hits = ((predictions == label) & (references == label)).sum()
        return 2 * hits / ((predictions == label).sum() + (references == label).sum())

    macro = metric("f1")(predictions, references)
    assert macro == {"f1": pytest.approx(np.mean([one(label) for label in range(4)]), abs=1e-12)}
    given, wanted = predictions % 2, references % 2
    assert metric("f1")(given, wanted, average="binary") == {"f1": sklearn.metrics.f1_score(wanted, given)}
    assert metric("f1")(given, wanted, average="binary", pos_label=0)["f1"] == sklearn.metrics.f1_score(
        wanted, given, pos_label=0
    )


@pytest.mark.parametrize(
    "prediction, answers, exact, f1",
    [
        ("the Eiffel Tower", ["Eiffel tower."], 1, 1),  # case, article, punctuation
        ("  in\t Paris\n", "in Paris", 1, 1),  # white space; one answer without a list
        ("a an the", ["", "x"], 1, 0),  # nothing is left: equal, but no word in common
        ("another theory", ["other theory"], 0, 0.5),  # articles are whole words
        ("U.S.", ["US", "United States"], 1, 1),  # punctuation goes without a gap; the best answer counts
        ("state-of-the-art", ["stateoftheart"], 1, 1),
        ("red red blue", ["red green"], 0, 2 / 5),  # one of three words, one of two: a bag, not a set
        ("1,234 metres", ["1234"], 0, 2 / 3),
        ("", ["x"], 0, 0),
    ],
)
def test_the_squad_rule(prediction: str, answers: Any, exact: float, f1: float):
    assert metric("exact_match")([prediction], [answers]) == {"exact_match": exact}
    assert metric("qa_f1")([prediction], [answers]) == {"f1": pytest.approx(f1, abs=1e-12)}
    # a mean over questions
    assert metric("qa_f1")([prediction, "y"], [answers, ["z"]]) == {"f1": pytest.approx(f1 / 2, abs=1e-12)}


def test_rouge_is_the_mean_over_texts():
    predictions = ["The cat sat on the mats.", "A dog\nbarked loudly", "nothing in common"]
    references = ["the cats sat on a mat", "a dog barked\nvery loudly", "something else"]
    for stemmed in (True, False):
        scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=stemmed)
        rows = [scorer.score(wanted, given) for given, wanted in zip(predictions, references, strict=True)]
        actual = metric("rouge")(predictions, references, use_stemmer=stemmed)
        for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
            assert actual.pop(name) == pytest.approx(np.mean([row[name].fmeasure for row in rows]), abs=1e-12)
        assert not actual
    # by hand: 2 of 3 words on one side, 2 of 4 on the other
    assert metric("rouge")(["x y z"], ["x y u v"])["rouge1"] == pytest.approx(4 / 7)
    assert metric("rouge")(["x y z"], ["x y u v"])["rouge2"] == pytest.approx(2 / 5)
    stemmed, plain = (metric("rouge")(["cats"], ["cat"], use_stemmer=s)["rouge1"] for s in (True, False))
    assert (stemmed, plain) == (1, 0)


def test_seqeval_counts_whole_entities():
    references = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC", "O", "B-PER"]]
    predictions = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-LOC", "O", "O", "B-PER"]]
    actual = metric("seqeval")(predictions, references)
    # predicted PER, PER, LOC, PER of which two are right; there are PER, LOC, LOC, PER
    assert actual["overall_precision"] == 2 / 4 == entity_precision(references, predictions)
    assert actual["overall_recall"] == 2 / 4
    assert actual["overall_f1"] == pytest.approx(entity_f1(references, predictions)) == 0.5
    assert actual["overall_accuracy"] == 7 / 9
    assert actual["PER"] == {"precision": 2 / 3, "recall": 1, "f1": pytest.approx(0.8), "number": 2}
    assert actual["LOC"] == {"precision": 0, "recall": 0, "f1": 0, "number": 2}


def test_seqeval_without_any_entity():
    actual = metric("seqeval")([["O", "O"]], [["O", "O"]])
    assert actual == {"overall_precision": 0, "overall_recall": 0, "overall_f1": 0, "overall_accuracy": 1}
    assert metric("seqeval")([["O", "O"]], [["O", "B-PER"]])["overall_f1"] == 0


def test_figures_of_a_loss():
    assert perplexity(math.log(17)) == pytest.approx(17)
    assert perplexity(1e4) == math.inf
    # ten tokens of ln 4 nats each over forty characters
    assert bits_per_character(math.log(4), 10, 40) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="characters=0"):
        bits_per_character(1.0, 10, 0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_scored_silently(name: str):
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        metric(name)([], [])
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metric(name)(["x", "y"], ["x"])


def test_refusals():
    with pytest.raises(ValueError, match="'bleu' is not known; it must be one of accuracy"):
        metric("bleu")
    with pytest.raises(ValueError, match="without a right answer"):
        metric("exact_match")(["x"], [[]])


@pytest.mark.parametrize(
    "name, package", [("rouge", "rouge-score"), ("seqeval", "seqeval"), ("accuracy", "scikit-learn")]
)
def test_a_missing_package_is_named(name: str, package: str, monkeypatch):
    module = {"scikit-learn": "sklearn", "rouge-score": "rouge_score"}.get(package, package)
    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda n, *a, **k: _missing(n) if n.startswith(module) else real(n, *a, **k)
    )
    monkeypatch.setitem(sys.modules, module, None)
    example = {"rouge": ("x", "x"), "seqeval": (["O"], ["B-PER"]), "accuracy": (0, 0)}[name]
    with pytest.raises(ImportError, match=rf"needs {package}.*hf-efficient\[recipes\]"):
        metric(name)([example[0]], [example[1]])


def _missing(name: str) -> None:
    raise ImportError(name)


# ---- through evaluate --------------------------------------------------------------------------------------------

# evaluate's own metrics, as far as they are called: features, keywords and results as published
SCRIPTS = {
    "accuracy": """
        features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
    ---
    def _compute(self, predictions, references, normalize=True, sample_weight=None):
        import sklearn.metrics
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}
    """,
    "f1": """
        features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
    ---
    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary", sample_weight=None):
        import sklearn.metrics
        score = sklearn.metrics.f1_score(references, predictions, labels=labels, pos_label=pos_label, average=average)
        return {"f1": score if getattr(score, "size", 1) > 1 else float(score)}
    """,
    "squad": """
        features=datasets.Features({
            "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")},
            "references": {"id": datasets.Value("string"), "answers": datasets.features.Sequence(
                {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")})}})
    ---
    def _compute(self, predictions, references):
        # not the rule: only that questions and answers arrive where the published script reads them
        given = {row["id"]: row["prediction_text"] for row in predictions}
        right = [given[row["id"]] in row["answers"]["text"] for row in references]
        return {"exact_match": 100.0 * sum(right) / len(right), "f1": 100.0}
    """,
    "rouge": """
        features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
    ---
    def _compute(self, predictions, references, rouge_types=None, use_aggregator=True, use_stemmer=False, tokenizer=None):
        from rouge_score import rouge_scorer
        assert not use_aggregator
        scorer = rouge_scorer.RougeScorer(rouge_types=rouge_types, use_stemmer=use_stemmer, tokenizer=tokenizer)
        scores = [scorer.score(r, p) for r, p in zip(references, predictions)]
        return {key: [score[key].fmeasure for score in scores] for key in scores[0]}
    """,
    "seqeval": """
        features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("string")),
                                    "references": datasets.Sequence(datasets.Value("string"))})
    ---
    def _compute(self, predictions, references, scheme=None, zero_division="warn"):
        from seqeval.metrics import accuracy_score, classification_report
        report = classification_report(y_true=references, y_pred=predictions, output_dict=True, zero_division=zero_division)
        report.pop("macro avg"), report.pop("weighted avg")
        overall = report.pop("micro avg")
        names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "number": "support"}
        scores = {kind: {key: row[name] for key, name in names.items()} for kind, row in report.items()}
        for key in ("precision", "recall", "f1"):
            scores["overall_" + key] = overall[names[key]]
        scores["overall_accuracy"] = accuracy_score(y_true=references, y_pred=predictions)
        return scores
    """,
}


def _write_script(folder: Path, name: str) -> None:
    features, compute = SCRIPTS[name].split("---")
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text(
        "import datasets\nimport evaluate\n\n\nclass Script(evaluate.Metric):\n    def _info(self):\n"
        '        return evaluate.MetricInfo(description="d", citation="c", inputs_description="i",\n'
        f"{features})\n\n{compute.rstrip()}\n"
    )


EXAMPLES: dict[str, tuple[list, list]] = {
    "accuracy": ([0, 1, 1], np.array([0, 1, 0])),  # type: ignore[dict-item]
    "f1": ([0, 1, 1, 2], [0, 1, 0, 2]),
    "exact_match": (["Paris", "Rome"], [["Paris", "paris"], "London"]),
    "rouge": (["the cats sat", "b c"], ["a cat sat", "b d"]),
    "seqeval": ([["B-A", "I-A", "O"], ["B-B"]], [["B-A", "I-A", "B-B"], ["B-B"]]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_both_sources_give_the_same(name: str, tmp_path, monkeypatch):
    """evaluate loads a script of the published interface from a folder: same keys, same values as the local equivalent."""
    import evaluate
    import huggingface_hub

    predictions, references = EXAMPLES[name]
    local = metric(name)(predictions, references)
    script, loaded, real = {"exact_match": "squad"}.get(name, name), [], evaluate.load
    _write_script(tmp_path / script, script)

    def load(asked: str, **options: Any) -> Any:
        loaded.append(asked)
        return real(str(tmp_path / asked), **options)

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 5

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(evaluate, "load", load)
    metrics._from_hub.cache_clear()
    assert metrics._from_hub(script) is not None, "the script was not loaded"
    remote = metric(name)(predictions, references)
    assert loaded == [script]
    assert remote.keys() == local.keys()
    for key, value in remote.items():
        assert value == pytest.approx(local[key], abs=1e-12), key


@pytest.mark.parametrize("fault", ["no answer", "no script"])
def test_a_hub_that_fails_is_tried_once(fault: str, monkeypatch):
    import evaluate
    import huggingface_hub

    tries: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            tries.append("head")
            if fault == "no answer":
                raise TimeoutError

    def load(asked: str, **options: Any) -> Any:
        tries.append("load")
        raise FileNotFoundError(asked)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(evaluate, "load", load)
    for _ in range(2):
        assert metric("accuracy")([1, 0], [1, 1]) == {"accuracy": 0.5}
    assert tries == (["head"] if fault == "no answer" else ["head", "load"])


# ---- the offline datasets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "token_classification", "question_answering"])
def test_offline_tasks_are_seeded(task: str):
    first, again, other = offline_task(task), offline_task(task), offline_task(task, seed=1)
    for split in ("train", "validation"):
        assert len(first[split]) >= 20
        assert first[split].to_list() == again[split].to_list()
        assert first[split].to_list() != other[split].to_list()


def test_pieces_of_source_code_do_not_leak():
    data = offline_task("classification")
    lines = {split: [set(text.splitlines()) for text in data[split]["text"]] for split in data}
    seen = set().union(*lines["train"])
    shared = [len(piece & seen) / len(piece) for piece in lines["validation"]]
    assert np.mean(shared) < 0.4 and max(shared) < 1, "validation pieces stand in the training data"
    counts = Counter(data["validation"]["label"])
    assert set(counts) == set(range(len(offline_tasks.LIBRARIES)))
    assert max(counts.values()) < 0.4 * counts.total(), "one class alone would score well"
    assert data["train"].features["label"].names == list(offline_tasks.LIBRARIES)


def test_tags_mark_what_the_reference_sets_apart():
    row = list(offline_tasks._tagged('The "for" loop, and *generator functions* of ``a.b``; 2 * 3 * 4.'))
    assert " ".join(word for word, _ in row) == "The for loop , and generator functions of a . b ; 2 * 3 * 4 ."
    tags = {word: tag for word, tag in row}
    assert (tags["for"], tags["generator"], tags["functions"]) == ("B-CODE", "B-TERM", "I-TERM")
    assert [tag for word, tag in row if word in "a.b"][:3] == ["B-CODE", "I-CODE", "I-CODE"]
    assert tags["*"] == tags[","] == "O"
    data = offline_task("token_classification")
    names = offline_tasks.TAGS
    for split in data:
        for tokens, tags_ in zip(data[split]["tokens"], data[split]["tags"], strict=True):
            assert len(tokens) == len(tags_) <= offline_tasks.ROW_WORDS
            assert '"' not in tokens and "`" not in tokens, "the marks give the tags away"
    counts = Counter(names[tag] for row in data["train"]["tags"] for tag in row)
    assert min(counts[name] for name in names) >= 10 and counts["O"] < 0.97 * counts.total()


def test_answers_stand_where_they_should():
    data = offline_task("question_answering")
    for split in data:
        for row in data[split]:
            (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
            name = row["question"].removeprefix("What is the code of the ").removesuffix("?")
            sentence = f"The code of the {name} is {answer}."
            assert row["context"][start : start + len(answer)] == answer
            assert row["context"].count(sentence) == 1 and row["context"].index(sentence) == start - len(
                sentence[: -len(answer) - 1]
            )
            assert row["context"].count("The code of the ") == offline_tasks.FACTS
    places = [row["answers"]["answer_start"][0] / len(row["context"]) for row in data["train"]]
    assert np.quantile(places, 0.1) < 0.2 and np.quantile(places, 0.9) > 0.8, "facts lie all over the text"


def test_summaries_are_sentences_that_the_document_lacks():
    source = '''
import re

class Box:
    """Holds one thing at a time.

    Ask for it again whenever it is needed.
    """

    def first(self):
        """No sentence"""
        return FILLER
'''.replace("FILLER", "1 + " * 300 + "1")
    (row,) = offline_tasks._summaries(source)
    assert row["summary"] == "Holds one thing at a time."
    assert row["document"].startswith("Ask for it again") and "class Box:" in row["document"]
    assert "Holds one" not in row["document"] and "No sentence" in row["document"]


def test_summaries_do_not_leak():
    data = offline_task("summarisation")
    rows = {split: data[split].to_list() for split in data}
    assert min(map(len, rows.values())) >= 20
    assert not {row["document"] for row in rows["train"]} & {row["document"] for row in rows["validation"]}
    assert all(row["summary"] not in row["document"] for split in rows.values() for row in split)


def test_pairs_keep_to_the_split_of_the_corpus(monkeypatch):
    data = offline_task("pairs")
    rows = {split: data[split].to_list() for split in data}
    assert min(map(len, rows.values())) >= 20
    monkeypatch.setattr(corpus, "offline_documents", lambda minimum: offline_tasks._documents())
    for split, name in (("train", "train"), ("validation", "held-out")):
        texts = {text[: offline_tasks.DOCUMENT_CHARACTERS] for text in corpus.offline_texts(name)}
        assert {row["positive"] for row in rows[split]} <= texts
        assert all(row["anchor"] in row["positive"] for row in rows[split])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'translation' is not known; it must be one of classification"):
        offline_task("translation")


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_tasks.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"lacks the sources .*asyncio"):
        offline_task("classification")
