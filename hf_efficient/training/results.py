"""What a run was and what came of it, as one JSON file that is always whole."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_efficient.corpus import TextUse
from hf_efficient.models.provenance import RESULT_NAME, Provenance, run_step
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import finite, write_json

__all__ = ["RESULT_NAME", "RunRecord"]

logger = logging.getLogger(f"transformers.{__name__}")


@dataclasses.dataclass
class RunRecord:
    """Everything that `result.json` says of a run.

    Attributes:
        recipe: name of the job.
        settings: every setting, as JSON.
        metrics: {"exact" | "converted" | "control" | "trained" | …: {figure: number}}: the model with full attention and
            with its mechanisms before training, with the mean of values instead of attention, and after training.
        layer_errors: {"before" | "after": what `layer_errors` returns}; empty for unconverted models.
        data: {"train" | …: how much of the texts that were given the run reads, see `TextUse`}.
        training: steps, passes over the rows (`epochs`), and the seconds, tokens and tokens per second that they took, of
            all parts of a resumed run together (without the steps that were lost); peak memory of the last part, which began
            after step `resumed_from`; trained and all parameters.
        conversion: the report of a conversion on the way, if there was one.
        finished: False while the run goes on, or if it was interrupted.
    """

    recipe: str
    settings: dict[str, Any]
    metrics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    layer_errors: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    conversion: dict[str, Any] | None = None
    finished: bool = False
    data: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    def note_texts(self, name: str, use: TextUse) -> None:
        """Keep and log how much of some texts is read; a warning where some of what is trained on is left out."""
        self.data[name] = dataclasses.asdict(use)
        is_cut = name.startswith("train") and use.tokens_used < use.tokens
        logger.log(logging.WARNING if is_cut else logging.INFO, f"{name}: {use}.")

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Put figures under `metrics[name]`, beside those that are there."""
        self.metrics[name] = self.metrics.get(name, {}) | figures

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with what the figures depend on beside the settings."""
        return finite(dataclasses.asdict(self)) | {
            "seed": self.settings.get("seed"),
            "versions": versions(),
            "hardware": hardware(),
        }

    def begin(self, model: Any) -> None:
        """Put the run into the history of `model` (of a wrapped one: of the model inside), unfinished as yet."""
        self.provenance(model).history.append(run_step(self.to_dict()) | {"finished": False})

    def end(self, model: Any, trained: str = "all") -> Provenance:
        """Say in the history how the run ended: with the figures of now, and what was `trained`. Returns all of it."""
        provenance = self.provenance(model)
        provenance.history[-1] |= run_step(self.to_dict()) | {"finished": True, "trained": trained}
        return provenance

    def provenance(self, model: Any) -> Provenance:
        """What `model`, or the model inside of a wrapped one, was made from."""
        inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        return Provenance.of(inner, self.settings.get("model"))

    def write(self, path: str | Path) -> Path:
        """Write it atomically."""
        return write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """The record that `write` wrote.

        Raises:
            ValueError: the file is none.
        """
        try:
            values = {"data": {}} | json.loads(Path(path).read_text(encoding="utf-8"))  # older records have no data
            return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of a run: {error!r}.") from error
