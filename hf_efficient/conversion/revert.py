"""A converted checkpoint on disk back to the stock checkpoint it was made from."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hf_efficient.conversion.folders import OutputFolder
from hf_efficient.conversion.loading import load_converted, load_preparation, takes_pictures
from hf_efficient.conversion.offloading import chosen_streaming
from hf_efficient.conversion.saving import weights_written
from hf_efficient.conversion.sentence_transformers import copy_side_files
from hf_efficient.conversion.streaming import MAX_SHARD_SIZE
from hf_efficient.families import HostModel
from hf_efficient.models.in_place import revert
from hf_efficient.models.provenance import Provenance

logger = logging.getLogger(f"transformers.{__name__}")


def revert_checkpoint(
    converted: str,
    out: str | Path,
    overwrite: bool = False,
    streaming: bool | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> dict[str, Any]:
    """Write the original of a converted checkpoint, with its tokenizer, to a folder: all of it or nothing.

    Args:
        streaming: see `convert`. max_shard_size: of each file of weights, as for `save_pretrained`.

    Returns:
        `checkpoint`, `out`, `model_class`, `max_positions` and the number of `tensors`.

    Raises:
        FileExistsError, OSError: see `OutputFolder`. ValueError: the checkpoint is not converted, or `out` holds it.
    """
    target = OutputFolder(out, overwrite, [converted])
    is_streamed = chosen_streaming(converted, streaming)
    place: AbstractContextManager[Path | None] = target.beside() if is_streamed else nullcontext()
    with place as folder:
        model = _written_back(converted, folder, target, max_shard_size)
    return {
        "checkpoint": converted,
        "out": str(out),
        "model_class": type(model).__name__,
        "max_positions": HostModel.of(model).max_positions,
        "tensors": len(model.state_dict()),
    }


def _written_back(converted: str, folder: Path | None, target: OutputFolder, max_shard_size: str | int) -> Any:
    """The original model, which is in its folder by now.

    Args:
        folder: for tensors of a model whose weights stay on the disk; `None` = they are loaded.
    """
    model = load_converted(converted, folder)
    if folder is not None and not getattr(model.config, "efficient_attention", None):
        raise ValueError(
            f"{converted} has experts alone, which are compared with each other: --no-streaming loads them."
        )
    before = getattr(model.config, "efficient_source", {})
    model = revert(model)
    tokenizer = load_preparation(converted, model)
    if tokenizer is None:
        missing = "image processor" if takes_pictures(model) else "tokenizer"
        logger.warning(f"{converted} has no {missing}: only the model is reverted.")
    elif "model_max_length" in before:
        tokenizer.model_max_length = before["model_max_length"]
    with weights_written(model, target, max_shard_size) as written:
        Provenance.of(model).write(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        if Path(converted).is_dir():
            copy_side_files(Path(converted), written, before.get("max_seq_length"))
    return model
