"""What a model of another class was converted from: an export notes it in its config, and an import reads it there."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from hf_efficient.attention.base.registry import attention_configs, stored_attention
from hf_efficient.exporting.target import OWN_FIELDS, Converted

FIELD = "converted_from"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The converted model that another was exported from.

    Attributes:
        model_class: name of its stock class. attention: its mechanisms, as JSON.
        source: its `efficient_source`, from which `revert` knows what its original was like; empty = it had none.
        values: what its config has and that of the other class has no field for.
        exported_attention: the mechanism, as JSON, that the other class had when it was exported.
    """

    model_class: str
    attention: list[dict[str, Any]]
    source: dict[str, Any]
    values: dict[str, Any]
    exported_attention: dict[str, Any]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Origin | None:
        """What an export noted in a config, if anything.

        Raises:
            ValueError: the note is damaged.
        """
        note = getattr(config, FIELD, None)
        if note is None:
            return None
        kinds = {"model_class": str, "attention": list, "source": dict, "values": dict, "exported_attention": dict}
        if not isinstance(note, dict) or not all(isinstance(note.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(
                f"{FIELD} in the config is damaged; remove it there to import the checkpoint without its original."
            )
        return cls(**{name: copy.deepcopy(note[name]) for name in kinds})

    def note(self, config: PreTrainedConfig) -> None:
        """Put it into the config of the exported model."""
        setattr(config, FIELD, asdict(self))

    def is_as_exported(self, attention: dict[str, Any]) -> bool:
        """Whether the other class still has the mechanism that it was exported with."""
        return bool(attention_configs(stored_attention([self.exported_attention]))[0].to_dict() == attention)


def origin_of(source: Converted, exported: PreTrainedConfig, attention: dict[str, Any]) -> Origin | None:
    """What is to be noted of a converted model; `None` = it was imported, and the checkpoint it came from had no original.

    Args:
        exported: config of the model that it is exported to. attention: the mechanism of that, as JSON.
    """
    before = getattr(source.config, "efficient_source", {})
    if "import" in before:
        return None
    known = {field.name for field in fields(type(exported))} | {*OWN_FIELDS, "experts_implementation"}
    values = {
        name: value
        for name, value in source.config.to_dict().items()
        if name not in known and not name.startswith("efficient_")
    }
    return Origin(
        model_class=source.stock.__name__,
        attention=source.config.efficient_attention,
        source=before,
        values=values,
        exported_attention=attention,
    )
