"""What every recipe with a Trainer shares: a run that can be stopped, resumed and trusted."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from hf_efficient.conversion.folders import OutputFolder
from hf_efficient.corpus import TextUse
from hf_efficient.evaluation.controls import MeanOfValues, MeanOfValuesConfig
from hf_efficient.patching.exact import converted_layers, exact_attention, substituted
from hf_efficient.profiling.ending import terminable, write_errors
from hf_efficient.profiling.memory import peak_memory
from hf_efficient.training.callbacks import (
    FirstStep,
    KeepRandomState,
    LogRouting,
    MechanismCallback,
    NonFiniteLoss,
    NothingLeft,
    StopOnNonFiniteLoss,
)
from hf_efficient.training.checkpoints import CompleteCheckpoints, last_complete_checkpoint
from hf_efficient.training.plots import layer_picture, loss_curve
from hf_efficient.training.results import RESULT_NAME, RunRecord
from hf_efficient.training.settings import Settings

logger = logging.getLogger(f"transformers.{__name__}")

# settings that a resumed run may change: they say what is kept and shown, not what is computed
FREE_ON_RESUME = {
    "resume", "output_dir", "report_to", "run_name", "project", "disable_tqdm", "per_device_eval_batch_size", "use_cpu",
    "cpu",
}  # fmt: skip
FREE_PREFIXES = ("eval_", "save_", "log_", "logging_", "trackio_")
LENGTH = {"max_steps", "num_train_epochs"}
LAYER_ERROR_BATCHES = 2
KEPT_CHECKPOINTS = 2


def run(main: Callable[[], Any]) -> None:
    """Call a recipe's `main` as a script does: what it refuses is one sentence on stderr and exit code 1.

    Interrupted by Ctrl-C, it says how to go on and exits with code 130.
    """
    try:
        with terminable(), write_errors("the run"):
            main()
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, NonFiniteLoss) as error:
        sys.exit(f"error: {error}")


def start(recipe: str, settings: Any) -> RunRecord:
    """Begin a run, or with `settings.resume` go on with the one in `settings.output_dir`; seeds everything.

    Raises:
        ValueError: the folder holds something and `resume` is off; or it holds the run of another recipe, or of other
            settings than may change (`FREE_ON_RESUME`, `FREE_PREFIXES`, and `LENGTH` where no learning rate depends on
            it), or no run at all.
    """
    set_seed(settings.seed)
    values = settings.recorded() if isinstance(settings, Settings) else dataclasses.asdict(settings)
    folder = Path(settings.output_dir)
    if not folder.exists() or not any(folder.iterdir()):
        return RunRecord(recipe, values)
    if not settings.resume:
        raise ValueError(
            f"{folder} already holds something: choose another --output_dir, or go on with the run in it by --resume."
        )
    if not (folder / RESULT_NAME).is_file():
        raise ValueError(f"{folder} holds no run to resume (there is no {RESULT_NAME}): choose another --output_dir.")
    record = RunRecord.read(folder / RESULT_NAME)
    if record.recipe != recipe:
        raise ValueError(f"{folder} holds a run of {record.recipe}, not of {recipe}: choose another --output_dir.")
    free = FREE_ON_RESUME | (LENGTH if _is_endless(settings) else set())
    changed = [
        f"{name} {record.settings.get(name)!r} → {values.get(name)!r}"
        for name in values | record.settings
        if record.settings.get(name) != values.get(name)
        and hasattr(settings, name)
        and not (name in free or name.startswith(FREE_PREFIXES))
    ]
    if changed:
        raise ValueError(
            f"the run in {folder} was made with other settings ({', '.join(changed)}): give the former "
            "ones to resume it exactly, or start anew in another --output_dir."
        )
    record.settings, record.finished = values, False
    return record


def _is_endless(settings: Any) -> bool:
    """Whether the learning rate of a step is the same however many steps come after it."""
    schedule, warmup = getattr(settings, "lr_scheduler_type", ""), getattr(settings, "warmup_steps", 0)
    return schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < warmup < 1)


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(trainer: Any, settings: Any, record: RunRecord, *, before: bool = True) -> None:
    """Evaluate, train, evaluate, and keep everything under `settings.output_dir`.

    * `checkpoint-N/`: complete checkpoints, of which the newest is resumed from if `settings.resume`;
    * `model/`: the final model and tokenizer for the Auto classes, adapters merged, all of it or nothing;
    * `result.json`: `record`, from the beginning on with `finished: false`; `loss.png`, and of converted models
      `layers.png`.

    Args:
        trainer: with an evaluation set. record: from `start`.
        before: also evaluate before training: with full attention ("exact"), with the mechanisms ("converted") and with
            the mean of values in their place ("control"); an unconverted model is "exact" alone.

    Raises:
        NonFiniteLoss, ValueError: see `StopOnNonFiniteLoss` and `last_complete_checkpoint`.
        KeyboardInterrupt: as it came, wherever the run is; its text says how to resume.
    """
    try:
        _run(trainer, settings, record, before)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(Path(settings.output_dir), trainer.state.global_step)) from None


def _run(trainer: Any, settings: Any, record: RunRecord, before: bool) -> None:
    output, first = Path(settings.output_dir), trainer.is_world_process_zero()
    trainer.accelerator.wait_for_everyone()  # nobody may still be looking whether the folder is free
    _refuse_impossible(trainer, settings)
    result = OutputFolder(output / "model", settings.resume, [record.settings.get("model")])
    checkpoint = last_complete_checkpoint(output, trainer.model) if settings.resume else None
    if settings.resume and first:
        logger.warning(
            f"resuming from {checkpoint}."
            if checkpoint
            else f"no complete checkpoint in {output}: from the beginning."
        )
    if first:
        record.write(output / RESULT_NAME)
    is_converted = bool(converted_layers(trainer.model))
    evaluates = before and not record.metrics
    begin = FirstStep(settings.seed, (lambda: _evaluate_before(trainer, record, is_converted)) if evaluates else None)
    _add_callbacks(trainer, begin)
    record.begin(trainer.model)
    has_trained = _train(trainer, checkpoint)
    figures = _training_figures(trainer, checkpoint, begin.seconds())  # before another evaluation adds to them
    history = trainer.state.log_history
    evaluate(trainer, record, "trained")
    if is_converted:
        record.layer_errors["after"] = _layer_errors(trainer)
    if has_trained or not record.training:
        record.training = figures
    record.end(trainer.model)
    save_model(trainer, result, record)
    if first:
        losses = {name: figures["loss"] for name, figures in record.metrics.items() if figures.get("loss") is not None}
        loss_curve(history, output / "loss.png", {k: v for k, v in losses.items() if k != "trained"})
        if record.layer_errors:
            layer_picture(record.layer_errors, output / "layers.png")
        record.finished = True
        record.write(output / RESULT_NAME)
        if logger.isEnabledFor(logging.WARNING):  # the script's result, which silence silences too
            print(summary(record, output))


def _training_figures(trainer: Any, checkpoint: Path | None, seconds: float) -> dict[str, Any]:
    parameters, tokens = list(trainer.model.parameters()), trainer.state.num_input_tokens_seen
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from": int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    } | peak_memory()


def _train(trainer: Any, checkpoint: Path | None) -> bool:
    """Whether there was anything left to train."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NothingLeft:
        trainer.is_in_train = False
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        return False
    return True


def _add_callbacks(trainer: Any, begin: FirstStep) -> None:
    # the Trainer's own limit goes by age alone
    keep, trainer.args.save_total_limit = trainer.args.save_total_limit or KEPT_CHECKPOINTS, None
    own: list[Any] = [CompleteCheckpoints(trainer.model, keep), StopOnNonFiniteLoss(), KeepRandomState()]
    # each does something only where a model has what it is for
    own += [MechanismCallback(), LogRouting()]
    collator = trainer.data_collator
    if isinstance(collator, TrainerCallback) and collator not in trainer.callback_handler.callbacks:
        own.append(collator)
    # last, because its clock starts there
    for callback in [*own, begin]:
        trainer.add_callback(callback)


def _refuse_impossible(trainer: Any, settings: Any) -> None:
    if getattr(settings, "lora_rank", 0) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "lora_rank: adapters of a sharded model can't be merged at the end; train without FSDP or DeepSpeed."
        )
    if getattr(settings, "pack", False) and getattr(trainer.processing_class, "pad_token_id", None) is None:
        # packed rows have no attention mask, so nothing tells their little padding from text
        trainer.args.include_num_input_tokens_seen = "all"


def _how_to_resume(output: Path, step: int) -> str:
    last = last_complete_checkpoint(output)
    if last is None:
        return (
            f"interrupted after step {step}; no checkpoint was complete yet, so start anew in another --output_dir "
            "(--save_steps N writes one every N steps)."
        )
    return f"interrupted after step {step}; {last} is complete: go on with the same command and --resume."


# ---- figures ---------------------------------------------------------------------------------------------------------


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled models run uncompiled inside: another attention would be compiled anew for one pass."""
    with torch.compiler.set_stance("force_eager"):
        yield


def evaluate(trainer: Any, record: RunRecord, name: str) -> None:
    """Put the Trainer's evaluation figures under `record.metrics[name]`."""
    with _eager():
        figures = trainer.evaluate(metric_key_prefix=name)
    figures = {key.removeprefix(f"{name}_"): value for key, value in figures.items()}
    if "token_loss" in figures:  # the Trainer's own is a mean over batches, however many tokens each predicts
        figures["loss"] = figures.pop("token_loss")
    left_out = ("epoch", "model_preparation_time", "num_input_tokens_seen", "steps_per_second")
    record.add(name, {key: value for key, value in figures.items() if key not in left_out})


def _evaluate_before(trainer: Any, record: RunRecord, is_converted: bool) -> None:
    model = trainer.model
    with exact_attention(model):
        evaluate(trainer, record, "exact")
    if is_converted:
        evaluate(trainer, record, "converted")
        with substituted(model, lambda mechanism: MeanOfValues(MeanOfValuesConfig(), mechanism.geometry)):
            evaluate(trainer, record, "control")
        record.layer_errors["before"] = _layer_errors(trainer)
    if trainer.is_world_process_zero():
        record.write(Path(trainer.args.output_dir) / RESULT_NAME)


def _layer_errors(trainer: Any) -> dict[str, Any]:
    from hf_efficient.training.transfer.layer_errors import layer_errors

    with _eager():
        return layer_errors(trainer.model, islice(trainer.get_eval_dataloader(), LAYER_ERROR_BATCHES))


def summary(record: RunRecord, output: Path) -> str:
    """The figures as lines for people."""
    lines = []
    for name, figures in record.metrics.items():
        shown = [f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, (int, float)) and "per_second" not in k]
        lines.append(f"{name:>10}: {', '.join(text for text in shown if not text.startswith('runtime'))}")
    training = record.training
    lines += [f"{name:>10}: {TextUse(**use)}" for name, use in record.data.items()]
    lines.append(
        f"{training['steps']} steps ({training['epochs']:.4g} epochs), {training['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {training['peak_memory_mb']:.0f} MB ({training['peak_memory_of']}). Model: {output / 'model'}, "
        f"figures: {output / RESULT_NAME}"
    )
    return "\n".join(lines)


# ---- the result ------------------------------------------------------------------------------------------------------


def save_model(trainer: Any, target: OutputFolder, record: RunRecord) -> None:
    """Write the final model and its tokenizer to `target`, all of it or nothing; every process calls it."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # all processes together write the gathered weights, so the folder's name must be known to all
        partial = target.path.with_name(f".{target.path.name}.partial")
        trainer.save_model(str(partial))
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            with target.written() as folder:
                shutil.copytree(partial, folder, dirs_exist_ok=True)
                record.provenance(trainer.model).write(folder)
            shutil.rmtree(partial)
    elif trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        # the Trainer switched the cache off, which would make the saved model generate slowly
        model.config.use_cache = getattr(type(model.config)(), "use_cache", True)
        with target.written() as folder:
            model.save_pretrained(folder)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            record.provenance(model).write(folder)
    trainer.accelerator.wait_for_everyone()
