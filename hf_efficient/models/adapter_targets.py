"""PEFT's default target modules for Efficient models: those of their stock forms.

PEFT chooses the layers that adapters go to by `model_type`, in one table per method. It is an optional library and slow to
import, so its tables are completed when they are made.
"""

from __future__ import annotations

from types import ModuleType

from hf_efficient.names import PREFIX, efficient_type

TABLES = "peft.utils.constants"


def add_targets(tables: ModuleType) -> None:
    """Give every table of the module that names a stock `model_type` the same entry for its Efficient form."""
    for name, table in vars(tables).items():
        if name.endswith("_MAPPING") and isinstance(table, dict):
            for model_type in [t for t in table if isinstance(t, str) and not t.startswith(PREFIX)]:
                table.setdefault(efficient_type(model_type), table[model_type])
