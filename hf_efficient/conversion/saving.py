"""Saving results: weights, tokenizer, side files, and the report of what was done."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_efficient.conversion.folders import OutputFolder
from hf_efficient.conversion.offloading import is_on_disk
from hf_efficient.conversion.sentence_transformers import copy_side_files
from hf_efficient.conversion.streaming import MAX_SHARD_SIZE, ModelFiles, PartialFolder
from hf_efficient.families.readable import refuse_adapters
from hf_efficient.models.card import write_first_card
from hf_efficient.profiling.json_files import finite

logger = logging.getLogger(f"transformers.{__name__}")


@contextmanager
def weights_written(
    model: PreTrainedModel, target: OutputFolder, max_shard_size: str | int = MAX_SHARD_SIZE
) -> Iterator[Path]:
    """`target.written()` with what `save_pretrained` writes in the folder, wherever the model's weights are."""
    partial = PartialFolder(target.path)
    if not is_on_disk(model):
        if partial.path.exists():
            logger.warning(f"{partial.path} holds weights of a run that was interrupted. Delete it by hand.")
        with target.written() as folder:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            yield folder
        return
    partial.write(ModelFiles(model, max_shard_size))
    with target.written() as folder:
        with warnings.catch_warnings():  # that shards must fit the memory
            warnings.simplefilter("ignore", UserWarning)
            model.save_pretrained(folder, state_dict={})  # everything but weights
        for empty in folder.glob("*.safetensors"):
            empty.unlink()
        yield folder
        partial.move_into(folder)


class Report:
    """What was done to a checkpoint, tensor by tensor: the base of dataclasses, each with the statuses that it knows."""

    statuses: ClassVar[tuple[str, ...]]
    tensors: dict[str, dict[str, Any]]

    def counts(self) -> dict[str, int]:
        """Number of tensors by status."""
        found = [tensor["status"] for tensor in self.tensors.values()]
        return {status: found.count(status) for status in self.statuses}

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))  # type: ignore[call-overload]


@dataclass
class Result:
    """A model made from a checkpoint, with its tokenizer (`None` if the source had none) and the report of its making.

    The report belongs to the model, whose `save_pretrained` writes it.
    """

    model: PreTrainedModel
    tokenizer: Any
    report: Any
    source_folder: Path | None = None

    def save(self, path: str | Path, overwrite: bool = False, max_shard_size: str | int = MAX_SHARD_SIZE) -> Path:
        """Write a checkpoint folder, all of it or nothing.

        Of a model whose weights are on the disk one tensor at a time; after an interruption, what was written goes into the
        next attempt at the same folder.

        Args:
            max_shard_size: of each file of weights, as for transformers' `save_pretrained`.

        Raises:
            FileExistsError, ValueError, OSError: see `OutputFolder`; the source is never overwritten.
            ValueError: the model carries adapters by now, of which no checkpoint of the whole model can be made.
        """
        refuse_adapters(self.model, "save")
        self.write(OutputFolder(path, overwrite), max_shard_size)
        return Path(path)

    def write(self, target: OutputFolder, max_shard_size: str | int = MAX_SHARD_SIZE) -> None:
        """Write it to a folder that was looked at before; raises as `save`."""
        target.require_apart(self.source_folder, self.report.source)
        with weights_written(self.model, target, max_shard_size) as folder:
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if self.source_folder is not None:
                copy_side_files(self.source_folder, folder, self._text_length())
            self._describe(folder, target.path.name)

    def _describe(self, folder: Path, title: str) -> None:
        """Write what people read of the checkpoint into its folder."""
        write_first_card(folder, self.model, self.report.source, title)

    def _text_length(self) -> int | None:
        """Tokens after which sentence-transformers is to cut texts; `None` = as before."""
        return None
