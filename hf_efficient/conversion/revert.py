"""A converted checkpoint on disk back to the stock checkpoint it was made from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hf_efficient.conversion.folders import OutputFolder
from hf_efficient.conversion.loading import load_converted, load_preparation, takes_pictures
from hf_efficient.conversion.sentence_transformers import copy_side_files
from hf_efficient.families import HostModel
from hf_efficient.models.in_place import revert
from hf_efficient.models.provenance import Provenance

logger = logging.getLogger(f"transformers.{__name__}")


def revert_checkpoint(converted: str, out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the original of a converted checkpoint, with its tokenizer, to a folder: all of it or nothing.

    Returns:
        `checkpoint`, `out`, `model_class`, `max_positions` and the number of `tensors`.

    Raises:
        FileExistsError, OSError: see `OutputFolder`. ValueError: the checkpoint is not converted, or `out` holds it.
    """
    target = OutputFolder(out, overwrite, [converted])
    model = load_converted(converted)
    before = getattr(model.config, "efficient_source", {})
    model = revert(model)
    tokenizer = load_preparation(converted, model)
    if tokenizer is None:
        missing = "image processor" if takes_pictures(model) else "tokenizer"
        logger.warning(f"{converted} has no {missing}: only the model is reverted.")
    elif "model_max_length" in before:
        tokenizer.model_max_length = before["model_max_length"]
    with target.written() as folder:
        model.save_pretrained(folder)
        Provenance.of(model).write(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if Path(converted).is_dir():
            copy_side_files(Path(converted), folder, before.get("max_seq_length"))
    return {
        "checkpoint": converted,
        "out": str(out),
        "model_class": type(model).__name__,
        "max_positions": HostModel.of(model).max_positions,
        "tensors": len(model.state_dict()),
    }
