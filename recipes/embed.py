"""Finetune a sentence encoder to embed long documents.

    python recipes/embed.py --model sentence-transformers/all-MiniLM-L6-v2 --max-positions 2048 --output-dir out \\
        --attention '{"mechanism": "longformer", "attention_window": 256, "global_tokens": "first"}'
    python recipes/embed.py --model converted-checkpoint --dataset questions.jsonl --anchor-column query \\
        --positive-column document --output-dir out

Rows are pairs: a short text, and the document that should be found by it. Without a dataset of yours: a passage of 30 words,
and the document it was cut from. Loss: multiple negatives ranking. Figures: recall@1 of the documents by their short texts;
"early" and "deep" are passages that lie within and beyond what the unconverted model reads, whose own figures, with
documents cut to its length, are "truncated". `output_dir/model` loads with SentenceTransformer. Needs sentence-transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoModel

from hf_efficient.corpus import text_use
from hf_efficient.experts.layer import expert_layers
from hf_efficient.patching.exact import exact_attention
from hf_efficient.training.data.offline_tasks import offline_task
from hf_efficient.training.data.texts import load_rows
from hf_efficient.training.finetuning import input_length, require_filled
from hf_efficient.training.loading import load_model, prepared
from hf_efficient.training.pooling import pool_by_attention
from hf_efficient.training.recipe import run, start, train
from hf_efficient.training.results import RESULT_NAME, RunRecord
from hf_efficient.training.settings import Settings as CommonSettings
from hf_efficient.training.settings import parse_settings


@dataclass(kw_only=True)
class Settings(CommonSettings, SentenceTransformerTrainingArguments):
    """Finetune a sentence encoder to embed long documents."""

    REFUSED: ClassVar = CommonSettings.REFUSED | {"torch_compile": "a SentenceTransformer is not compiled here"}

    anchor_column: str = "anchor"  # column of short texts
    positive_column: str = "positive"  # column of their documents
    max_length: int = 0  # tokens read of each text; 0 = all that the model can read
    pooling: str = "checkpoint"  # "attention" = learned, starting as the mean; loads with trust_remote_code=True
    batch_sampler: str = "no_duplicates"  # each document of a batch is a wrong answer for the others
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-5
    warmup_steps: float = 0.1  # below 1 = share of all steps
    weight_decay: float = 0.01


class Encoder(SentenceTransformer):
    """A SentenceTransformer that can do what a run asks of every model."""

    main_input_name = "positive_input_ids"  # the tokens that are counted

    def forward(self, input: Any = None, **options: Any) -> Any:
        if input is None:  # a batch of pairs: its documents
            kind = "positive_"
            input = {name.removeprefix(kind): value for name, value in options.items() if name.startswith(kind)}
            options = {}
        return super().forward(input, **options)

    def merge_and_unload(self) -> Encoder:
        """Adapters into the weights, if there are any."""
        if hasattr(self[0].model, "merge_and_unload"):
            self[0].model = self[0].model.merge_and_unload()
        return self

    def save_pretrained(self, path: str, **options: Any) -> None:
        super().save_pretrained(str(path), **options | {"create_model_card": False})


class Trainer(SentenceTransformerTrainer):
    """Its checkpoints hold all weights, also beside adapters, whose own files name a base model that is nowhere saved."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        load_weights(self.model, Path(checkpoint_path) / "model.safetensors")


class Retrieval(BaseEvaluator):
    """Recall@1: how many short texts have their own document as the nearest one, by cosine.

    Args:
        rows: `anchor` and `positive`.
        reach: tokens that the unconverted model reads: a passage that ends there is "early", one that begins behind it is
            "deep", and one that its document does not hold is neither.
    """

    def __init__(self, rows: Any, tokenizer: Any, reach: int, batch_size: int):
        super().__init__()
        self.anchors, positives = list(rows["anchor"]), list(rows["positive"])
        self.documents = list(dict.fromkeys(positives))
        self.wanted = torch.tensor([self.documents.index(text) for text in positives])
        self.batch_size = batch_size
        places = [self._tokens(anchor, text, tokenizer) for anchor, text in zip(self.anchors, positives, strict=True)]
        self.groups = {
            "early": torch.tensor([place is not None and place[1] <= reach for place in places]),
            "deep": torch.tensor([place is not None and place[0] >= reach for place in places]),
        }

    @staticmethod
    def _tokens(anchor: str, document: str, tokenizer: Any) -> tuple[int, int] | None:
        place = document.find(anchor)
        ends = (place, place + len(anchor))
        return None if place < 0 else tuple(len(tokenizer(document[:end], verbose=False)["input_ids"]) for end in ends)

    def __call__(self, model: Any, output_path: Any = None, epoch: Any = -1, steps: int = -1) -> dict[str, float]:
        options = {"batch_size": self.batch_size, "convert_to_tensor": True, "show_progress_bar": False}
        anchors, documents = (
            torch.nn.functional.normalize(model.encode(texts, **options).float().cpu(), dim=-1)
            for texts in (self.anchors, self.documents)
        )
        right = ((anchors @ documents.T).argmax(-1) == self.wanted).float()
        groups = {f"recall_at_1_{name}": mask for name, mask in self.groups.items() if mask.any()}
        return {"recall_at_1": float(right.mean())} | {
            name: float(right[mask].mean()) for name, mask in groups.items()
        }


def load_data(settings: Settings) -> Any:
    """Rows with `anchor` and `positive`."""
    offline = settings.dataset == "offline"
    rows = load_rows(
        offline_task("pairs", settings.seed) if offline else settings.dataset,
        {"anchor": settings.anchor_column, "positive": settings.positive_column},
        together="positive",
        **settings.data_options(),
    )
    require_filled(rows, "anchor", "positive")
    for split in rows:
        if len(set(rows[split]["positive"])) < 2:
            raise ValueError(f"{split} holds a single document: there is nothing to tell it from.")
    return rows


def load_encoder(settings: Settings, record: RunRecord) -> tuple[Encoder, int]:
    """The encoder, and how many tokens the unconverted model reads."""
    # efficient attention: converted on the way, or as the checkpoint has it; pooling as the original's
    model, tokenizer = load_model(settings.replaced(lora_rank=0), AutoModel, record=record)
    if any(layer.config.has_loss for layer in expert_layers(model).values()):
        raise ValueError(
            f"{settings.model} has experts whose routers have a loss of their own, but that of embed is computed outside "
            "the model and leaves it out: upcycle with --router-aux-loss-coef 0 --router-z-loss-coef 0."
        )
    encoder = Encoder(settings.model, device="cpu" if settings.use_cpu else None)
    # the Trainer's collator cuts texts to the setting
    encoder.max_seq_length = settings.max_length = input_length(model, tokenizer, settings.max_length)
    reach = getattr(model.config, "efficient_source", {}).get("max_positions") or input_length(model, tokenizer)
    encoder[0].model = prepared(model, settings).to(encoder.device)
    if settings.pooling == "attention":
        pool_by_attention(encoder, model.config.num_attention_heads)
    elif settings.pooling != "checkpoint":
        raise ValueError(f"pooling={settings.pooling!r} must be 'checkpoint' or 'attention'.")
    return encoder, min(reach, encoder.max_seq_length)


def finetune(settings: Settings) -> RunRecord:
    record = start("embed", settings)
    rows = load_data(settings)
    encoder, reach = load_encoder(settings, record)
    for split in rows:
        for column in ("anchor", "positive"):
            used = text_use(encoder.tokenizer, rows[split][column], encoder.max_seq_length)
            record.note_texts(f"{split} {column}", used)
    retrieval = Retrieval(rows["validation"], encoder.tokenizer, reach, settings.per_device_eval_batch_size)
    # the loss takes every other document of a batch for a wrong one, so each comes once
    first = {text: index for index, text in reversed([*enumerate(rows["validation"]["positive"])])}
    trainer = Trainer(
        model=encoder,
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"].select(sorted(first.values())),
        loss=MultipleNegativesRankingLoss(encoder),
        evaluator=retrieval,
    )
    length, encoder.max_seq_length = encoder.max_seq_length, reach
    with exact_attention(encoder):
        truncated = retrieval(encoder)
    encoder.max_seq_length = length
    train(trainer, settings, record)
    record.add("truncated", truncated)
    if trainer.is_world_process_zero():
        record.write(Path(settings.output_dir) / RESULT_NAME)
    return record


def main(arguments: list[str] | None = None) -> None:
    finetune(parse_settings(Settings, arguments))


if __name__ == "__main__":
    run(main)
