"""What `import hf_efficient` tells transformers and PEFT, without importing what either needs for a model.

A config of a converted checkpoint, a class or a call brings the rest of the package in.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers import CONFIG_MAPPING

from hf_efficient.models.adapter_targets import TABLES, add_targets
from hf_efficient.models.when_imported import when_imported
from hf_efficient.names import IMPLEMENTATION, PREFIX


class ConfigsByType(dict[str, Any]):
    """What was registered with `AutoConfig`; the Efficient model types are found in it before they have been."""

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key) or not (isinstance(key, str) and key.startswith(PREFIX)):
            return super().__contains__(key)
        from hf_efficient.families import is_family

        return is_family(key.removeprefix(PREFIX))

    def __missing__(self, key: str) -> Any:
        from hf_efficient.models.registry import CONFIGS

        return CONFIGS[key.removeprefix(PREFIX)]


def _attend(*args: Any, **kwargs: Any) -> Any:
    from hf_efficient.patching.dispatch import efficient_attention_forward

    return efficient_attention_forward(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    from hf_efficient.patching.dispatch import efficient_mask

    return efficient_mask(*args, **kwargs)


def _name_attention(modeling: ModuleType) -> None:
    # whoever installs a mechanism imports the dispatcher, which registers its functions themselves in these places
    modeling.AttentionInterface._global_mapping.setdefault(IMPLEMENTATION, _attend)


def _name_masks(masks: ModuleType) -> None:
    masks.AttentionMaskInterface._global_mapping.setdefault(IMPLEMENTATION, _mask)


def register() -> None:
    """Have `AutoConfig` know every Efficient model type, transformers' models the attention and mask functions, and PEFT's
    tables the layers of Efficient models.
    """
    if not isinstance(CONFIG_MAPPING._extra_content, ConfigsByType):
        CONFIG_MAPPING._extra_content = ConfigsByType(CONFIG_MAPPING._extra_content)
    when_imported("transformers.modeling_utils", _name_attention)
    when_imported("transformers.masking_utils", _name_masks)
    when_imported(TABLES, add_targets)
