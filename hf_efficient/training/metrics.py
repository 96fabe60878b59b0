"""Metrics of the recipes: from `evaluate` where the Hub answers, else local equivalents with the same keys and values."""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

Scores = dict[str, Any]

NAMES = ("accuracy", "f1", "exact_match", "qa_f1", "rouge", "seqeval")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
HUB_SECONDS = 3.0


def metric(name: str) -> Callable[..., Scores]:
    """A metric by name, called as `metric(name)(predictions, references, **options)`; every score lies in 0 … 1.

    * `"accuracy"`: class ids → `accuracy`.
    * `"f1"`: class ids → `f1`; `average="macro"` is the default, `"binary"` counts class `pos_label=1` alone.
    * `"exact_match"`, `"qa_f1"`: predicted answers, and for each the list of right ones (or the only one) → `exact_match`,
      `f1` by the SQuAD rule: lower case, without punctuation, articles and repeated white space; the best over the right
      answers counts; F1 is that of the bags of words. Rajpurkar et al. 2016 (arXiv 1606.05250), §6.1.
    * `"rouge"`: texts → `rouge1`, `rouge2`, `rougeL`, `rougeLsum`: mean F-measure over the texts; `use_stemmer=True`.
      rougeLsum takes lines for sentences. Lin 2004 (aclanthology W04-1013).
    * `"seqeval"`: lists of tags such as O, B-PER, I-PER → `overall_precision`, `overall_recall`, `overall_f1` of whole
      entities, `overall_accuracy` of tags, and for each entity type its precision, recall, f1 and number.

    Raises:
        ValueError: an unknown name; in the call: nothing to score, or not one reference per prediction.
        ImportError: the local equivalent's package is missing; says which.
    """
    if name not in NAMES:
        raise ValueError(f"metric {name!r} is not known; it must be one of {', '.join(NAMES)}.")
    rule = _RULES[name]

    def scores(predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> Scores:
        if len(predictions) != len(references) or len(predictions) == 0:
            raise ValueError(
                f"{name}: {len(predictions)} predictions and {len(references)} references; it takes one reference (or list "
                "of right answers) per prediction, and at least one."
            )
        return rule(list(predictions), list(references), **options)

    return scores


def perplexity(loss: float) -> float:
    """exp(loss), for a mean cross-entropy per token in nats; infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_character(loss: float, tokens: int, characters: int) -> float:
    """loss · tokens / (characters · ln 2): comparable between tokenizers, unlike the loss.

    Args:
        loss: mean cross-entropy per predicted token, in nats.
        tokens: how many tokens were predicted.
        characters: how many characters of text those tokens stand for.
    """
    if tokens < 1 or characters < 1:
        raise ValueError(f"bits_per_character: tokens={tokens} and characters={characters} must be ≥ 1.")
    return loss * tokens / (characters * math.log(2))


# ---- the rules: both sources are called in the same way -----------------------------------------------------------


def _accuracy(predictions: list[Any], references: list[Any]) -> Scores:
    return _compute("accuracy")(predictions=predictions, references=references)


def _f1(predictions: list[Any], references: list[Any], average: str = "macro", pos_label: int = 1) -> Scores:
    compute = _compute("f1")
    return compute(predictions=predictions, references=references, average=average, pos_label=pos_label)


def _rouge(predictions: list[str], references: list[str], use_stemmer: bool = True) -> Scores:
    # per text, since the default aggregate is the middle of a random resampling
    rows = _compute("rouge")(
        predictions=predictions,
        references=references,
        rouge_types=list(ROUGE_TYPES),
        use_aggregator=False,
        use_stemmer=use_stemmer,
    )
    return {name: float(sum(values) / len(values)) for name, values in rows.items()}


def _seqeval(predictions: list[list[str]], references: list[list[str]]) -> Scores:
    return _compute("seqeval")(predictions=predictions, references=references)


def _exact_match(predictions: list[str], references: list[Any]) -> Scores:
    return {"exact_match": _squad(predictions, references)["exact_match"] / 100}


def _qa_f1(predictions: list[str], references: list[Any]) -> Scores:
    return {"f1": _squad(predictions, references)["f1"] / 100}


def _squad(predictions: list[str], references: list[Any]) -> Scores:
    answers = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    if not all(answers):
        raise ValueError("a question without a right answer can't be scored: the SQuAD 1.1 rule has none.")
    return _compute("squad")(
        predictions=[{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)],
        references=[
            {"id": str(i), "answers": {"text": texts, "answer_start": [0] * len(texts)}}
            for i, texts in enumerate(answers)
        ],
    )


_RULES: dict[str, Callable[..., Scores]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "exact_match": _exact_match,
    "qa_f1": _qa_f1,
    "rouge": _rouge,
    "seqeval": _seqeval,
}


# ---- the two sources ---------------------------------------------------------------------------------------------


def _compute(name: str) -> Callable[..., Scores]:
    """`compute` of evaluate's metric `name`, or its local equivalent."""
    loaded = _from_hub(name)
    return _LOCAL[name] if loaded is None else loaded.compute


@cache
def _from_hub(name: str) -> Any:
    """evaluate's metric, whose script lives on the Hub; `None` offline, or where the one quick try fails."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        # asked before evaluate is, which would try again and again
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        import evaluate

        return evaluate.load(name, keep_in_memory=True)
    except Exception:  # whatever keeps the Hub from serving it, the local equivalent gives the same scores
        return None


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}.get(name := module.split(".")[0], name)
        raise ImportError(f'this metric needs {package}: pip install "hf-efficient[recipes]".') from error


def _local_accuracy(predictions: list[Any], references: list[Any]) -> Scores:
    return {"accuracy": float(_library("sklearn.metrics").accuracy_score(references, predictions))}


def _local_f1(predictions: list[Any], references: list[Any], average: str, pos_label: int) -> Scores:
    f1_score = _library("sklearn.metrics").f1_score
    return {"f1": float(f1_score(references, predictions, average=average, pos_label=pos_label))}


def _local_rouge(
    predictions: list[str], references: list[str], rouge_types: list[str], use_aggregator: bool, use_stemmer: bool
) -> Scores:
    assert not use_aggregator, "the mean is taken here, not by resampling"
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(rouge_types, use_stemmer=use_stemmer)
    rows = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: [row[name].fmeasure for row in rows] for name in rouge_types}


def _local_seqeval(predictions: list[list[str]], references: list[list[str]]) -> Scores:
    seqeval = _library("seqeval.metrics")
    overall = {"precision": 0.0, "recall": 0.0, "f1-score": 0.0}
    types: Scores = {}
    # the report of tags without a single entity on either side fails
    if any(tag != "O" for tags in [*predictions, *references] for tag in tags):
        report = seqeval.classification_report(references, predictions, output_dict=True, zero_division=0)
        overall = report["micro avg"]
        types = {name: row for name, row in report.items() if not name.endswith(" avg")}
    scores: Scores = {
        name: {
            "precision": float(row["precision"]),
            "recall": float(row["recall"]),
            "f1": float(row["f1-score"]),
            "number": int(row["support"]),
        }
        for name, row in types.items()
    }
    for key, name in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        scores[f"overall_{key}"] = float(overall[name])
    scores["overall_accuracy"] = float(seqeval.accuracy_score(references, predictions))
    return scores


def _local_squad(predictions: list[Scores], references: list[Scores]) -> Scores:
    pairs = [
        (_normalised(given["prediction_text"]), [_normalised(text) for text in wanted["answers"]["text"]])
        for given, wanted in zip(predictions, references, strict=True)
    ]
    exact = sum(text in answers for text, answers in pairs)
    overlap = sum(max(_word_f1(text, answer) for answer in answers) for text, answers in pairs)
    return {"exact_match": 100 * exact / len(pairs), "f1": 100 * overlap / len(pairs)}


def _normalised(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(text: str, answer: str) -> float:
    given, wanted = Counter(text.split()), Counter(answer.split())
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total()) if common else 0.0


_LOCAL: dict[str, Callable[..., Scores]] = {
    "accuracy": _local_accuracy,
    "f1": _local_f1,
    "squad": _local_squad,
    "rouge": _local_rouge,
    "seqeval": _local_seqeval,
}
