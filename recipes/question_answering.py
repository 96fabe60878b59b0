"""Finetune a checkpoint to answer questions by spans of long texts.

    python recipes/question_answering.py --model google-bert/bert-base-uncased --attention longformer --max-positions 4096 \\
        --output-dir out
    python recipes/question_answering.py --model converted-checkpoint --dataset rajpurkar/squad --output-dir out

Rows hold a question, a context, and answers as SQuAD has them (`{"text": [...], "answer_start": [...]}`), or the answer as
plain text. Without a dataset of yours it learns to find one of several look-alike facts in a text of some 1500 tokens.
A context longer than `--max-length` is read in overlapping windows. The question's tokens are global in Longformer attention
unless `--no-question-global`. `--baseline` trains the unconverted model too. Figures: exact match and F1 by the SQuAD rule.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, EvalPrediction, Trainer

from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.corpus import text_use
from hf_efficient.models.loading import read_config
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.data.texts import load_rows
from hf_efficient.training.finetuning import (
    FinetuningSettings,
    ensure_padding,
    input_length,
    require_filled,
    with_baseline,
)
from hf_efficient.training.loading import load_model
from hf_efficient.training.metrics import metric
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.results import RunRecord
from hf_efficient.training.settings import parse_settings

logger = logging.getLogger(f"transformers.hf_efficient.{__name__}")


@dataclass(kw_only=True)
class Settings(FinetuningSettings):
    """Finetune a checkpoint to answer questions by spans of long texts."""

    question_column: str = "question"  # column of questions
    context_column: str = "context"  # column of texts
    answers_column: str = "answers"  # column of answers
    question_global: bool = True  # Longformer: the tokens of the question see and are seen everywhere
    stride: int = 128  # tokens that neighbouring windows share
    max_answer_length: int = 30  # tokens of the longest answer


def load_data(settings: Settings) -> Any:
    """Rows with `question`, `context`, `answers` (texts) and `place` (first character of the first answer)."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task("question_answering", settings.seed) if offline else settings.dataset,
        {"question": settings.question_column, "context": settings.context_column, "answers": settings.answers_column},
        together="context",
        **settings.data_options(),
    )
    require_filled(rows, "question", "context", "answers")
    for split in rows:
        found = [located(row, f"row {index} of {split}") for index, row in enumerate(rows[split])]
        rows[split] = rows[split].remove_columns("answers").add_column("answers", [texts for texts, _ in found])
        rows[split] = rows[split].add_column("place", [place for _, place in found])
    return rows


def located(row: dict[str, Any], name: str) -> tuple[list[str], int]:
    """The right answers of a row, and where the first one starts."""
    answers, context = row["answers"], row["context"]
    if isinstance(answers, str):
        answers = {"text": [answers], "answer_start": [context.find(answers)]}
    texts, places = (answers.get(k) if isinstance(answers, dict) else None for k in ("text", "answer_start"))
    if not (isinstance(texts, list) and isinstance(places, list) and len(texts) == len(places)):
        raise ValueError(
            f"{name} has the answers {answers!r:.60}: they must be a text, or texts and the character that each starts at, "
            "{'text': […], 'answer_start': […]}."
        )
    if not texts or not all(text and text.strip() for text in texts):
        raise ValueError(f"{name} has no answer: a question that the context leaves open can't be trained here.")
    if places[0] < 0 or context[places[0] : places[0] + len(texts[0])] != texts[0]:
        raise ValueError(f"{name}: the answer {texts[0]!r} does not stand at character {places[0]} of its context.")
    return texts, places[0] + len(texts[0]) - len(texts[0].lstrip())


def encoder(
    tokenizer: Any, length: int, stride: int, mark_question: bool
) -> Callable[[dict[str, list], list[int]], dict[str, list]]:
    """Rows to windows of at most `length` tokens, with where the answer is (token 0: not in this window).

    `offsets` are the characters of each token in the context, -1 outside of it; `row` is the number of the row.
    """

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        room = length - max(len(ids) for ids in tokenizer(batch["question"])["input_ids"]) - 2
        if room <= stride:
            raise ValueError(
                f"inputs of {length} tokens leave {max(room, 0)} beside a question, of which neighbouring windows share "
                f"{stride}: raise --max_length or lower --stride."
            )
        encoded = tokenizer(
            batch["question"], batch["context"], truncation="only_second", max_length=length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        rows, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        columns: dict[str, list] = {"start_positions": [], "end_positions": [], "offsets": [], "row": []}
        marks = []
        for window, row in enumerate(rows):
            parts = encoded.sequence_ids(window)
            place, answer = batch["place"][row], batch["answers"][row][0].strip()
            first = encoded.char_to_token(window, place, 1)
            last = encoded.char_to_token(window, place + len(answer) - 1, 1)
            inside = first is not None and last is not None
            columns["start_positions"].append(first if inside else 0)
            columns["end_positions"].append(last if inside else 0)
            columns["offsets"].append(
                [pair if part == 1 else (-1, -1) for pair, part in zip(offsets[window], parts, strict=True)]
            )
            columns["row"].append(indices[row])
            marks.append([int(i < parts.index(1)) for i in range(len(parts))])
        if mark_question:
            columns["global_attention_mask"] = marks
        return {**encoded, **columns}

    return encode


class Collator:
    """Windows of different lengths as one batch."""

    def __init__(self, pad_token_id: int):
        self.fill = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "global_attention_mask": 0}

    def __call__(self, windows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(window["input_ids"]) for window in windows)
        batch = {name: torch.tensor([w[name] + [fill] * (longest - len(w[name])) for w in windows])
                 for name, fill in self.fill.items() if name in windows[0]}  # fmt: skip
        answers = {name: torch.tensor([w[name] for w in windows]) for name in ("start_positions", "end_positions")}
        return batch | answers


def best_span(start: Any, end: Any, offsets: Any, longest: int) -> tuple[float, int, int]:
    """(score, first character, behind the last one) of the best answer in a window: all spans of up to `longest` tokens."""
    start, end = (np.where(offsets[:, 0] >= 0, logits[: len(offsets)], -np.inf) for logits in (start, end))
    best = (-np.inf, 0, 0)
    for extra in range(min(longest, len(start))):
        scores = start[: len(start) - extra] + end[extra:]
        first = int(scores.argmax())
        if scores[first] > best[0]:
            best = (float(scores[first]), int(offsets[first, 0]), int(offsets[first + extra, 1]))
    return best


def answers_of(start: Any, end: Any, windows: Any, contexts: list[str], longest: int) -> list[str]:
    """The best answer of every row over all its windows."""
    best = [(-np.inf, 0, 0)] * len(contexts)
    for window, row in enumerate(windows["row"]):
        best[row] = max(
            best[row], best_span(start[window], end[window], np.array(windows["offsets"][window]), longest)
        )
    return [context[first:last] for context, (_, first, last) in zip(contexts, best, strict=True)]


def with_global_question(settings: Settings) -> Settings:
    """The settings with Longformer attention on the way told that the question's tokens are global."""
    installed = getattr(read_config(settings.model), "efficient_attention", None)
    if settings.attention in ("", "none") or installed or not settings.question_global:
        return settings
    separator = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False).sep_token_id
    configs = [
        replace(config, global_tokens="question", separator_token_id=separator)
        if config.mechanism == "longformer" and config.global_tokens == "none" and separator is not None
        else config
        for config in attention_configs(settings.attention)
    ]
    return settings.replaced(attention=json.dumps([config.to_dict() for config in configs]))


def finetune(settings: Settings) -> RunRecord:
    record = start("question_answering", settings)
    rows = load_data(settings)
    # efficient attention: converted on the way, or as the checkpoint has it
    model, tokenizer = load_model(with_global_question(settings), AutoModelForQuestionAnswering, record=record)
    mechanisms = [mechanism_of(layer) for layer in converted_layers(model).values()]
    by_call = settings.question_global and any(
        mechanism.uses_global_attention_mask and mechanism.config.global_tokens != "question"
        for mechanism in mechanisms
    )
    if by_call:
        logger.warning(
            "the question is global by global_attention_mask: give it to the finetuned model in every call too."
        )
    ensure_padding(model, tokenizer)
    encode = encoder(tokenizer, input_length(model, tokenizer, settings.max_length), settings.stride, by_call)
    for split in rows:
        record.note_texts(split, text_use(tokenizer, rows[split]["context"]))
    columns = ["question", "context", "answers", "place"]
    windows = rows.map(encode, batched=True, with_indices=True, remove_columns=columns, desc="Tokenising")
    contexts, answers = list(rows["validation"]["context"]), list(rows["validation"]["answers"])
    offsets = {name: list(windows["validation"][name]) for name in ("row", "offsets")}

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        texts = answers_of(*evaluated.predictions[:2], offsets, contexts, settings.max_answer_length)
        return metric("exact_match")(texts, answers) | metric("qa_f1")(texts, answers)

    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    # a fresh head knows nothing: there is nothing to evaluate before training
    train(trainer, settings, record, before=False)
    return record


def main(arguments: list[str] | None = None) -> None:
    with_baseline(finetune, parse_settings(Settings, arguments))


if __name__ == "__main__":
    run(main)
