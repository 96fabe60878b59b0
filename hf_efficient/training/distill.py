"""distill: from a converted model and texts to a model whose mechanisms have learned what full attention did."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from hf_efficient.conversion.folders import OutputFolder
from hf_efficient.conversion.sentence_transformers import copy_side_files
from hf_efficient.evaluation.controls import MeanOfValues, MeanOfValuesConfig
from hf_efficient.evaluation.fidelity import compare
from hf_efficient.models.mixin import EfficientModelMixin
from hf_efficient.patching.exact import Teacher, converted_layers, eval_mode, mechanism_of, substituted
from hf_efficient.profiling.json_files import json_text
from hf_efficient.profiling.memory import peak_memory
from hf_efficient.training.callbacks import FirstStep, MechanismCallback, NothingLeft, StopOnNonFiniteLoss
from hf_efficient.training.checkpoints import CompleteCheckpoints, is_first_process, last_complete_checkpoint
from hf_efficient.training.data.distillation import distillation_data, head_loss
from hf_efficient.training.distill_loop import collate, optimizer_of, training_figures
from hf_efficient.training.recipe import start
from hf_efficient.training.results import RESULT_NAME
from hf_efficient.training.transfer.attention_transfer import AttentionTransfer, blocks, trainable
from hf_efficient.training.transfer.keep_best import KeepBest
from hf_efficient.training.transfer.layer_errors import layer_errors

TRAINED = "trained.safetensors"
GUARD_CHECKS = 8


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How `distill` trains.

    Args:
        steps: optimiser steps of the transfer layer by layer; 0 = leave it out.
        length: tokens of a row. batch_size: rows of a batch. accumulation_steps: batches of a step.
        learning_rate: of the first stage; 0 = what each mechanism asks for (`transfer_learning_rate`).
        losses: of the first stage, see `AttentionTransfer`.
        layers_per_block: transfer so many layers at a time, each block for all `steps`; 0 = all at once.
        end_to_end_steps, end_to_end_learning_rate: of the second stage, against the unconverted model's own states.
        end_to_end_losses: {name: weight}, see `AttentionTransfer`.
        train: what the second stage trains, see `trainable`.
        eval_texts: held-out texts that fidelity is measured on.
        save_steps: steps between checkpoints; 0 = only what each stage ends with.
        logging_steps, seed, bf16, cpu: as the Trainer's `logging_steps`, `seed`, `bf16`, `use_cpu`.
    """

    steps: int = 200
    length: int = 512
    batch_size: int = 2
    accumulation_steps: int = 1
    learning_rate: float = 0.0
    losses: str = "attention_output"
    layers_per_block: int = 0
    end_to_end_steps: int = 0
    end_to_end_learning_rate: float = 2e-4
    end_to_end_losses: dict[str, float] = field(default_factory=lambda: {"hidden_states": 1.0, "embedding": 1.0})
    train: str = "attention"
    eval_texts: int = 16
    save_steps: int = 0
    logging_steps: int = 10
    seed: int = 0
    bf16: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "accumulation_steps", "eval_texts", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not possible; it must be at least 1.")
        for name in ("steps", "layers_per_block", "end_to_end_steps", "save_steps", "learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is not possible; it must be at least 0.")
        if not self.end_to_end_learning_rate > 0:
            raise ValueError(
                f"end_to_end_learning_rate={self.end_to_end_learning_rate} is not possible; it must be above 0."
            )


def distill(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    output_dir: str | Path,
    held_out: Sequence[str] | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Transfer full attention into the mechanisms of `model`, in place, and measure what that was worth.

        report = distill(he.convert("…", "hedgehog").model, tokenizer, texts, output_dir="out", end_to_end_steps=100)

    Two stages with the stock Trainer: layer by layer (only what the mechanisms added learns; skipped with a note where that
    is nothing), then if asked end to end (`train` says what learns). AdamW without weight decay, the learning rate falling
    linearly to 0. Each stage keeps the best it measured on rows set aside from `texts`, so that no layer ends worse
    than it began, and resumes from its last complete checkpoint.

    Writes into `output_dir`: `model` (weights and tokenizer), `result.json`, and a folder per stage.

    Args:
        model: a converted model, of any class. tokenizer: its own.
        texts: documents to train on, all of them; rows never mix two, and short ones are padded. Those of a masked-LM head
            are masked, as it was trained.
        held_out: documents to measure on; `None` sets 5 % of `texts` aside, at least one.
        resume: go on with what stands in `output_dir`.
        settings: fields of `DistillSettings`.

    Returns:
        What `result.json` holds: `metrics` (fidelity to the unconverted model of "converted", "control", "trained", and with
        both stages "transferred"; of masked and causal language models also the `loss` of the head and the unconverted
        model's, `source_loss`), `layer_errors` ("before", "after", and with both stages "transferred") and `data` (how much
        of the texts was read; `training["epochs"]` says how often).

    Raises:
        ValueError: an unconverted model, impossible settings, nothing to train, too few texts, or an `output_dir` that holds
            something without `resume`, or a run with other settings.
    """
    is_converted = isinstance(model, EfficientModelMixin)
    if not is_converted:
        raise ValueError(
            f"{type(model).__name__} is not a converted model: convert it with hf_efficient.convert first. For adapters see "
            "recipes/distill.py."
        )
    installed = model.config.efficient_attention
    run = _Run(
        **settings, output_dir=str(output_dir), resume=resume, model=model.config._name_or_path, attention=installed
    )
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        return _Distillation(model, tokenizer, texts, held_out, run).run()
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@dataclass(frozen=True, kw_only=True)
class _Run(DistillSettings):
    """What is noted of a call, and must be the same where it is resumed."""

    output_dir: str
    resume: bool
    model: str
    attention: list[dict[str, Any]]


@dataclass
class _Stage:
    """One training run: a folder's name, the transfer that is active in it, and how it is trained."""

    name: str
    transfer: AttentionTransfer
    steps: int
    learning_rate: float
    warmup: float = 0.0


class _Distillation:
    """One call of `distill`."""

    def __init__(self, model: Any, tokenizer: Any, texts: Any, held_out: Any, settings: _Run):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.folder, self.resume = Path(settings.output_dir), settings.resume
        self.notes: list[str] = []
        own = any(True for layer in converted_layers(model).values() for _ in mechanism_of(layer).parameters())
        if not own and settings.steps:
            self.notes.append("layer by layer: skipped, these mechanisms have no parameters of their own")
        self.transfers_layers = own and settings.steps > 0
        if not self.transfers_layers and not settings.end_to_end_steps:
            raise ValueError(
                "nothing to train layer by layer (no steps, or mechanisms without parameters): give end_to_end_steps."
            )
        train, held_out = _split(list(texts), held_out, settings.seed)
        self.data = distillation_data(
            model,
            tokenizer,
            train,
            held_out,
            length=settings.length,
            batch_size=settings.batch_size,
            eval_texts=settings.eval_texts,
            seed=settings.seed,
        )
        self.batches = self.data.batches
        self.record = start("distill", settings)
        for name, use in self.data.use.items():
            self.record.note_texts(name, use)
        self.result = OutputFolder(self.folder / "model", self.resume, [settings.model])

    def run(self) -> dict[str, Any]:
        settings, record = self.settings, self.record
        if is_first_process():
            record.write(self.folder / RESULT_NAME)
        # what the teacher needs former values of must require gradients when it is made
        trainable(self.model, settings.train if settings.end_to_end_steps else "mechanism")
        final = None
        if settings.end_to_end_steps:
            transfer = AttentionTransfer(self.model, settings.end_to_end_losses)
            final = _Stage("end_to_end", transfer, settings.end_to_end_steps, settings.end_to_end_learning_rate)
        teacher = Teacher(self.model) if final is None else final.transfer.teacher
        assert teacher is not None
        record.begin(self.model)
        self._measure(teacher, "converted", "before")
        with self._control():
            record.add("control", self._figures(teacher))
        stages = []
        if self.transfers_layers:
            for stage in self._layer_stages():
                stages.append(self._train(stage))
            self._measure(teacher, *(("trained", "after") if final is None else ("transferred", "transferred")))
        if final is not None:
            stages.append(self._train(final))
            self._measure(teacher, "trained", "after")
        log = [entry for stage in stages for entry in stage["log"]]
        record.training = training_figures(stages) | {"notes": self.notes, "log": log}
        record.end(self.model, "mechanism" if final is None or settings.train == "mechanism" else "all")
        self._save()
        record.finished = True
        if is_first_process():
            record.write(self.folder / RESULT_NAME)
        return record.to_dict()

    # ---- training ------------------------------------------------------------------------------------------------

    def _layer_stages(self) -> Iterator[_Stage]:
        settings = self.settings
        groups = blocks(self.model, settings.layers_per_block or len(converted_layers(self.model)))
        for index, group in enumerate(groups):
            # layers without parameters of their own have nothing to learn
            if not any(True for n in group for _ in mechanism_of(converted_layers(self.model)[n]).parameters()):
                continue
            name = "transfer" if len(groups) == 1 else f"transfer-{index}"
            transfer = AttentionTransfer(self.model, settings.losses, group)
            yield _Stage(name, transfer, settings.steps, settings.learning_rate)

    def _train(self, stage: _Stage) -> dict[str, Any]:
        """Run a stage, or what is left of it. Returns its figures, and the Trainer's log."""
        folder = self.folder / stage.name
        if self.resume and (folder / TRAINED).is_file():
            return self._load(folder / TRAINED)
        checkpoint = last_complete_checkpoint(folder, self.model) if self.resume else None
        size = self.settings.batch_size
        with stage.transfer as transfer:
            aside = self.data.guard
            guard_batches = [collate(self.model, aside[i : i + size]) for i in range(0, len(aside), size)]
            guard = KeepBest(transfer, guard_batches, every=-(-stage.steps // GUARD_CHECKS))
            if checkpoint is not None:
                guard.load(checkpoint)
            clock = FirstStep(self.settings.seed)
            trainer = Trainer(
                model=self.model,
                args=self._arguments(stage, folder),
                train_dataset=self.data.rows,
                data_collator=partial(collate, self.model),
                optimizers=(optimizer_of(self.model, stage.learning_rate), None),
                # the guard writes into a checkpoint before it is marked as complete
                callbacks=[guard, CompleteCheckpoints(self.model), StopOnNonFiniteLoss(), MechanismCallback(), clock],
            )
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except NothingLeft:
                trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
            trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            learned = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        figures: dict[str, Any] = {
            "steps": stage.steps,
            "epochs": trainer.state.epoch,
            "tokens": trainer.state.num_input_tokens_seen,
            "seconds": clock.seconds(),
            "log": [{"stage": stage.name, **entry} for entry in trainer.state.log_history if "loss" in entry],
        } | peak_memory()
        if is_first_process():
            partial_file, metadata = folder / f".{TRAINED}", {"figures": json_text(figures, indent=None)}
            save_file({name: p.contiguous() for name, p in learned.items()}, partial_file, metadata)
            partial_file.replace(folder / TRAINED)
        return figures

    def _arguments(self, stage: _Stage, folder: Path) -> TrainingArguments:
        settings = self.settings
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=stage.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation_steps,
            lr_scheduler_type="linear",
            warmup_steps=stage.warmup,
            # one norm over all layers would couple those that learn independently of each other
            max_grad_norm=0.0 if stage.transfer.is_local else 1.0,
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="steps" if settings.save_steps else "no",
            save_steps=settings.save_steps or 500,
            seed=settings.seed,
            bf16=settings.bf16,
            use_cpu=settings.cpu,
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            report_to="none",
        )

    @torch.no_grad()
    def _load(self, file: Path) -> dict[str, Any]:
        """Take over what a stage ended with; returns its figures."""
        parameters = dict(self.model.named_parameters())
        for name, value in load_file(file).items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(f"{file} is of another model: {name} does not fit. Give another output_dir.")
            parameters[name].copy_(value)
        with safe_open(file, "pt") as opened:
            return dict(json.loads(opened.metadata()["figures"]))

    # ---- what comes of it ----------------------------------------------------------------------------------------

    def _figures(self, teacher: Teacher) -> dict[str, Any]:
        closeness = compare(self.model, teacher, self.batches)  # type: ignore[arg-type]
        return closeness | head_loss(self.model, teacher, self.data)

    def _measure(self, teacher: Teacher, metrics: str, errors: str) -> None:
        with eval_mode(self.model):
            self.record.add(metrics, self._figures(teacher))
        self.record.layer_errors[errors] = layer_errors(self.model, self.batches)

    @contextmanager
    def _control(self) -> Iterator[None]:
        with (
            substituted(self.model, lambda mechanism: MeanOfValues(MeanOfValuesConfig(), mechanism.geometry)),
            eval_mode(self.model),
        ):
            yield

    def _save(self) -> None:
        if not is_first_process():
            return
        with self.result.written() as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            source = Path(self.model.config._name_or_path or "")
            if source.is_dir() and str(source) != ".":
                copy_side_files(source, folder, None)


def _split(texts: list[str], held_out: Any, seed: int) -> tuple[list[str], list[str]]:
    if held_out is not None:
        return texts, list(held_out)
    if len(texts) < 2:
        raise ValueError("one text can't be trained on and held out as well: give more texts, or held_out.")
    order = random.Random(seed).sample(texts, len(texts))
    aside = max(1, round(0.05 * len(texts)))
    return order[aside:], order[:aside]
