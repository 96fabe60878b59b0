"""Teach the attention of a converted checkpoint what full attention did, as a plain Accelerate loop.

    python recipes/distill.py --model sentence-transformers/all-MiniLM-L6-v2 --attention hedgehog --output-dir distilled
    python recipes/distill.py --model converted-checkpoint --steps 500 --end-to-end-steps 200 --output-dir distilled
    python recipes/distill.py --model gpt2 --attention hedgehog --lora-rank 8 --end-to-end-steps 200 \\
        --end-to-end-losses logits --output-dir distilled
    accelerate launch recipes/distill.py --config distill.yaml --resume

Two stages: layer by layer on the original model's own states, where only what the mechanism added learns; then, if asked,
end to end against the original's states. No second copy of the weights is held: the converted model is its own teacher.
`hf-efficient distill` does the same job with the stock Trainer. `output_dir` gets model/ (for the Auto classes, adapters
merged), result.json and complete checkpoints per stage; an interrupted run goes on with the same command and --resume.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig

from hf_efficient.conversion.folders import OutputFolder
from hf_efficient.corpus import TextUse
from hf_efficient.evaluation.fidelity import compare
from hf_efficient.patching.exact import Teacher, converted_layers, eval_mode, mechanism_of
from hf_efficient.profiling.memory import peak_memory
from hf_efficient.training import AttentionTransfer, KeepBest, layer_errors, trainable
from hf_efficient.training.callbacks import MechanismCallback, NonFiniteLoss
from hf_efficient.training.checkpoints import load_state, save_state
from hf_efficient.training.data.distillation import DistillationData, distillation_data, head_loss
from hf_efficient.training.data.texts import load_texts
from hf_efficient.training.distill import DistillSettings
from hf_efficient.training.distill_loop import Clock, collate, optimizer_of, training_figures
from hf_efficient.training.loading import load_model
from hf_efficient.training.recipe import run, start
from hf_efficient.training.results import RESULT_NAME, RunRecord
from hf_efficient.training.settings import parse_settings


@dataclass
class Settings:
    """Teach the attention of a converted checkpoint what full attention did."""

    model: str  # Hub id or folder: converted, or original together with --attention
    output_dir: str  # an empty or new folder, unless --resume
    attention: str = ""  # mechanism to convert to on the way, or its JSON
    max_positions: int = 0  # lengthen the converted model to so many positions; 0 = as is
    positions: str | None = None  # how: tile, linear, yarn, …, see hf-efficient convert; by default as usual
    dataset: str = "offline"  # offline, files (.jsonl .json .csv .parquet .txt), a folder, or a Hub id
    dataset_config: str = ""  # configuration of a Hub dataset
    text_column: str = "text"  # column that the text stands in
    length: int = 512  # tokens of a row
    steps: int = 200  # optimiser steps layer by layer; 0 = leave this stage out
    learning_rate: float = 0.0  # layer by layer; 0 = what each mechanism asks for
    losses: str = "attention_output"  # layer by layer; or attention_weights
    end_to_end_steps: int = 0  # optimiser steps end to end
    end_to_end_learning_rate: float = 2e-4  # end to end
    end_to_end_losses: str = "hidden_states,embedding"  # of hidden_states, logits, embedding
    train: str = "attention"  # what learns end to end: mechanism, attention or all
    lora_rank: int = 0  # end to end train adapters of this rank and the mechanisms instead; 0 = no adapters
    eval_texts: int = 16  # held-out texts that fidelity is measured on
    resume: bool = False  # continue from the last complete checkpoint
    # ---- as in TrainingArguments ----
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0  # end to end; 0 = gradients are not clipped
    save_steps: int = 0  # steps between checkpoints; 0 = at the end of a stage
    seed: int = 0
    bf16: bool = False
    use_cpu: bool = False


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(Settings, arguments)
    refuse_impossible(settings)
    record = start("distill", settings)
    texts = load_texts(
        settings.dataset,
        dataset_config=settings.dataset_config,
        text_column=settings.text_column,
        seed=settings.seed,
    )
    model, tokenizer = load_model(settings, auto_class(settings.model), record=record)
    if not converted_layers(model):
        raise ValueError(f"{settings.model} is not converted: say to what with --attention.")
    output = Path(settings.output_dir)
    result = OutputFolder(output / "model", settings.resume, [settings.model])
    model.to(accelerator_of(settings).device)
    data = distillation_data(
        model,
        tokenizer,
        list(texts["train"]["text"]),
        list(texts["validation"]["text"]),
        length=settings.length,
        batch_size=settings.per_device_train_batch_size,
        eval_texts=settings.eval_texts,
        seed=settings.seed,
    )
    for name, use in data.use.items():
        record.note_texts(name, use)
    if accelerator_of(settings).is_main_process:
        record.write(output / RESULT_NAME)

    # the teacher is the model as it is now, so what is trained must be decided first
    if not settings.lora_rank:
        trainable(model, settings.train if settings.end_to_end_steps else "mechanism")
    final = AttentionTransfer(model, settings.end_to_end_losses.split(",")) if settings.end_to_end_steps else None
    teacher = Teacher(model) if final is None else final.teacher
    record.begin(model)
    measure(model, teacher, data, record, "converted", "before")
    stages = []
    if settings.steps and any(p.requires_grad for layer in converted_layers(model).values()
                              for p in mechanism_of(layer).parameters()):  # fmt: skip
        transfer = AttentionTransfer(model, settings.losses)
        stages.append(stage(settings, "transfer", transfer, data, settings.steps, settings.learning_rate))
        measure(model, teacher, data, record, *(("trained", "after") if final is None else ["transferred"] * 2))
    elif final is None:
        raise ValueError("these mechanisms have nothing to learn layer by layer: give --end_to_end_steps.")
    if final is not None:
        steps, rate = settings.end_to_end_steps, settings.end_to_end_learning_rate
        stages.append(stage(settings, "end_to_end", final, data, steps, rate))
        measure(model, teacher, data, record, "trained", "after")

    record.training, record.finished = training_figures(stages), True
    learns_host = settings.lora_rank or (final is not None and settings.train != "mechanism")
    record.end(model, "all" if learns_host else "mechanism")
    if accelerator_of(settings).is_main_process:
        save(model, tokenizer, result)
        record.write(output / RESULT_NAME)
        for name, read in record.data.items():
            print(f"{name:>12}: {TextUse(**read)}")
        for name, figures in record.metrics.items():
            print(
                f"{name:>12}: embedding cosine {figures['embedding_cosine']:.4f}, hidden error {figures['hidden_error']:.3f}"
            )


def refuse_impossible(settings: Settings) -> None:
    """What `hf_efficient.training.distill` refuses, the loop refuses as well."""
    shared = {field.name for field in fields(DistillSettings)} & set(vars(settings)) - {"end_to_end_losses"}
    DistillSettings(
        batch_size=settings.per_device_train_batch_size,
        accumulation_steps=settings.gradient_accumulation_steps,
        **{name: getattr(settings, name) for name in shared},
    )


def accelerator_of(settings: Settings) -> Accelerator:
    return Accelerator(
        cpu=settings.use_cpu,
        mixed_precision="bf16" if settings.bf16 else "no",
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
    )


def auto_class(name: str) -> Any:
    """The Auto class whose models have the head of a checkpoint."""
    heads = {
        "ForMaskedLM": "AutoModelForMaskedLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForTokenClassification": "AutoModelForTokenClassification",
        "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    }
    architecture = (AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or [""])[0]
    return getattr(
        transformers, next((auto for end, auto in heads.items() if architecture.endswith(end)), "AutoModel")
    )


def stage(
    settings: Settings,
    name: str,
    transfer: AttentionTransfer,
    data: DistillationData,
    steps: int,
    rate: float,
) -> dict[str, Any]:
    """Train one stage, or what is left of it, and give each layer the best parameters it had. Returns its figures."""
    accelerator, folder, model = accelerator_of(settings), Path(settings.output_dir) / name, transfer.model
    size = settings.per_device_train_batch_size
    batches = [collate(model, data.guard[i : i + size]) for i in range(0, len(data.guard), size)]
    # all rows of the stage in their order, so that going on means skipping those that were seen
    per_step = size * settings.gradient_accumulation_steps * accelerator.num_processes
    shuffle, order = random.Random(settings.seed), []
    while len(order) < steps * per_step:
        order += shuffle.sample(data.rows, len(data.rows))
    order = order[: steps * per_step]
    # a generator of its own: the seed that a loader draws would shift dropout after resuming
    loader = DataLoader(order, size, collate_fn=lambda rows: collate(model, rows), generator=torch.Generator())  # type: ignore[arg-type]

    with transfer:
        optimizer = optimizer_of(model, rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        guard, clock = KeepBest(transfer, batches), Clock()
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerator.register_for_checkpointing(schedule, guard, clock)
        step = load_state(accelerator, folder, prepared) if settings.resume else 0
        clock.start()
        bar = tqdm(total=steps, initial=step, desc=name, disable=not accelerator.is_main_process)
        prepared.train()
        for batch in skip_first_batches(loader, step * settings.gradient_accumulation_steps):
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                if not loss.isfinite():
                    raise NonFiniteLoss(
                        f"{name}, step {step + 1}: the loss is {loss.item()}. Nothing of this step was kept. Start anew in "
                        "another --output_dir with a lower learning rate, or without --bf16."
                    )
                accelerator.backward(loss)
                # one norm over all layers would couple those that learn independently of each other
                if accelerator.sync_gradients and settings.max_grad_norm and not transfer.is_local:
                    accelerator.clip_grad_norm_(prepared.parameters(), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            schedule.step()
            step += 1
            MechanismCallback.step(model, step)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if step % -(-steps // 8) == 0 or step == steps:
                guard.update()
            if step == steps or (settings.save_steps and step % settings.save_steps == 0):
                save_state(accelerator, folder, step, prepared)
        figures = {"steps": steps, "epochs": len(order) / len(data.rows), "tokens": sum(map(len, order))}
        figures |= {"seconds": clock.seconds()} | peak_memory()
        guard.restore()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()
    return figures


def measure(model: Any, teacher: Any, data: DistillationData, record: RunRecord, metrics: str, errors: str) -> None:
    """Fidelity to the unconverted model, and the error of each layer beside controls."""
    with eval_mode(model):
        record.add(metrics, compare(model, teacher, data.batches) | head_loss(model, teacher, data))
    record.layer_errors[errors] = layer_errors(model, data.batches)


def save(model: Any, tokenizer: Any, target: OutputFolder) -> None:
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    with target.written() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
