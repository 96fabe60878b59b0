"""What every Efficient config class adds to its stock class."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from hf_efficient.attention.base.registry import attention_configs, stored_attention
from hf_efficient.experts.layer import ExpertsConfig
from hf_efficient.patching.names import IMPLEMENTATION

LOADER = "configuration_hf_efficient"
LOADER_TEXT = '''"""transformers imports this file where it is told to trust the code of a checkpoint. Without that:

    pip install hf_efficient
    import hf_efficient  # before from_pretrained
"""

from hf_efficient import {name}

__all__ = ["{name}"]
'''
NEEDED = f"{IMPLEMENTATION}: pip install {IMPLEMENTATION}; import {IMPLEMENTATION}"


class EfficientConfigMixin:
    """Holds `efficient_attention` and `efficient_experts` as JSON, whatever form they are given in.

    What it saves can't be taken for a stock checkpoint: see `to_dict`.

    Raises:
        ValueError: an unknown mechanism or option, or a value that is not possible.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        for mark in ("auto_map", "experts_implementation"):
            kwargs.pop(mark, None)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "efficient_attention" and value:
            value = [config.to_dict() for config in attention_configs(value)]
        elif name == "efficient_experts" and value:
            value = (value if isinstance(value, ExpertsConfig) else ExpertsConfig.from_dict(value)).to_dict()
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "efficient_attention" in config_dict:
            # of any version
            stored_groups = stored_attention(config_dict["efficient_attention"])
            config_dict = config_dict | {"efficient_attention": stored_groups}
        for part in ("efficient_attention", "efficient_experts"):
            given, stored = kwargs.get(part), config_dict.get(part)
            if given is not None and cls(**{part: given}).to_dict()[part] != stored:
                raise ValueError(
                    f"{part} can't be changed while a converted checkpoint is loaded"
                    + (f" (it has {names_of(stored)})" if part == "efficient_attention" and stored else "")
                    + ": leave it out, or revert the checkpoint and convert it again."
                )
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: importing the package registers the class, and its source is not copied beside checkpoints."""

    def to_dict(self) -> dict[str, Any]:
        """The values, and what keeps transformers from loading them as a stock checkpoint with full attention.

        Without this package `model_type` is unknown: `auto_map` says where the reason stands, and `trust_remote_code=True`
        imports the package. Stock classes stop at the implementations, of which `attn_implementation="eager"` replaces
        one; the other stops them although there may be no experts.
        """
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        values["auto_map"] = {"AutoConfig": f"{LOADER}.{type(self).__name__}"}
        values["experts_implementation"] = NEEDED
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        Path(save_directory, f"{LOADER}.py").write_text(LOADER_TEXT.format(name=type(self).__name__))


def is_hub_id(name: str) -> bool:
    """Whether a recorded name of a checkpoint is of the Hub: no path here, and of its form; single words only if cached."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return False
    return "/" in name or isinstance(try_to_load_from_cache(name, "config.json"), str)


def names_of(attention: Any) -> str:
    """The mechanisms of a config's `efficient_attention`, for messages: `"longformer, local"`."""
    return ", ".join(dict.fromkeys(group["mechanism"] for group in attention))
