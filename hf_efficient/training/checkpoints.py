"""Checkpoints of a training run that are known to be whole: written last, read first, never lost to rotation."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_efficient.attention.base.registry import stored_attention
from hf_efficient.profiling.json_files import write_json

logger = logging.getLogger(f"transformers.{__name__}")

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def signature(model: Any) -> dict[str, Any]:
    """What a checkpoint's model and the one that it is loaded into must agree in: mechanisms, names and shapes."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "efficient_attention": getattr(getattr(plain, "config", None), "efficient_attention", None),
        # ZeRO-3 keeps the whole shape there
        "shapes": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()},
    }


class CompleteCheckpoints(TrainerCallback):
    """Marks every checkpoint that was written to its end, and deletes older ones only after that.

    After a save `complete.json` appears in `checkpoint-N`, by rename: step, names and sizes of all files, and what `model`
    is (`signature`). What lacks it was interrupted. The newest `keep` complete checkpoints stay, and the best one if the
    Trainer tracks it; interrupted ones are never deleted. The Trainer's own `save_total_limit` goes by age alone and could
    delete the last complete checkpoint in favour of a half-written one, so it is refused.
    """

    def __init__(self, model: Any, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must stay.")
        self.signature = signature(model)
        self.keep = keep

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_total_limit:
            raise ValueError(
                f"save_total_limit={args.save_total_limit} would delete complete checkpoints; leave it out and give "
                "CompleteCheckpoints(keep=…)."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and state.is_world_process_zero:
            # the folder of an earlier attempt is about to be written over: until that is done it is not whole
            (_folder(args, state) / MARKER).unlink(missing_ok=True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate import PartialState

        PartialState().wait_for_everyone()  # each process writes files of its own
        if state.is_world_process_zero:
            mark_complete(_folder(args, state), state.global_step, self.signature)
            rotate(args.output_dir, self.keep, spare=state.best_model_checkpoint)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def mark_complete(folder: str | Path, step: int, signature: dict[str, Any]) -> None:
    """Write the list of what is in a finished checkpoint folder."""
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files.pop(MARKER, None)
    write_json(folder / MARKER, {"step": step, "files": files} | signature)


def _marker(folder: Path) -> dict[str, Any] | str:
    """The marker of a whole checkpoint, or what is wrong with it."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MARKER}: the save was interrupted"
    except ValueError:
        return f"its {MARKER} can't be read"
    kinds: dict[str, Any] = {"step": int, "files": dict, "shapes": dict, "efficient_attention": (list, type(None))}
    if not isinstance(marker, dict) or not all(isinstance(marker.get(key, ...), kind) for key, kind in kinds.items()):
        return f"its {MARKER} can't be read"
    for name, size in marker["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return marker


def _checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def last_complete_checkpoint(folder: str | Path, model: Any = None) -> Path | None:
    """The newest whole `checkpoint-N` under `folder`, or `None`; others are passed over with a logged line.

    Args:
        model: what it is to be loaded into.

    Raises:
        ValueError: the checkpoint has other mechanisms or other shapes than `model`.
    """
    for path in _checkpoints(folder):
        marker = _marker(path)
        if isinstance(marker, str):
            if is_first_process():
                logger.warning(f"{path} is left out: {marker}.")
            continue
        if model is not None:
            _require_same(path, marker, signature(model))
        return path
    return None


def _require_same(path: Path, marker: dict[str, Any], own: dict[str, Any]) -> None:
    remedy = "Give the settings that it was made with, or start anew in another --output_dir."
    if stored_attention(marker["efficient_attention"]) != stored_attention(own["efficient_attention"]):
        raise ValueError(
            f"{path} has efficient_attention={marker['efficient_attention']}, the model {own['efficient_attention']}. "
            + remedy
        )
    theirs, ours = marker["shapes"], own["shapes"]
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{path} does not fit the model: {name} has shape {theirs.get(name, 'none')} there and "
                f"{ours.get(name, 'none')} here. {remedy}"
            )


def rotate(folder: str | Path, keep: int, spare: str | None = None) -> None:
    """Delete all complete checkpoints but the newest `keep` and `spare`."""
    complete = [path for path in _checkpoints(folder) if isinstance(_marker(path), dict)]
    for path in complete[keep:]:
        if spare is None or path.resolve() != Path(spare).resolve():
            # under its old name there is never a half-deleted one
            path.rename(path.with_name(f".{path.name}.old"))
    for path in Path(folder).glob(".checkpoint-*.old"):
        shutil.rmtree(path, ignore_errors=True)


# ---- loops without a Trainer ---------------------------------------------------------------------------------------


def save_state(accelerator: Any, folder: str | Path, step: int, model: Any, keep: int = 2) -> Path:
    """`accelerator.save_state` as `folder/checkpoint-{step}`, which appears whole or not at all.

    Every process calls it. `model` is the one that `accelerator.prepare` was given or returned; the newest `keep`
    checkpoints stay.
    """
    path = Path(folder) / f"checkpoint-{step}"
    partial = path.with_name(f".{path.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark_complete(partial, step, signature(accelerator.unwrap_model(model)))
        if path.exists() and isinstance(_marker(path), dict):
            shutil.rmtree(partial)  # the same step, whole
        else:
            if path.exists():
                path.rename(path.with_name(f".{path.name}.old"))
            partial.rename(path)
        rotate(folder, keep)
    accelerator.wait_for_everyone()
    return path


def load_state(accelerator: Any, folder: str | Path, model: Any) -> int:
    """Restore everything that was prepared from the newest whole checkpoint; returns its step, 0 = there is none.

    Raises:
        ValueError: see `last_complete_checkpoint`.
    """
    path = last_complete_checkpoint(folder, accelerator.unwrap_model(model))
    if path is None:
        return 0
    accelerator.load_state(str(path))
    return int(json.loads((path / MARKER).read_text(encoding="utf-8"))["step"])
