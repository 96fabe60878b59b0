"""PEFT's default target modules for Efficient models: those of their stock forms.

PEFT chooses the layers that adapters go to by `model_type`, in one table per method. It is an optional library and slow to
import, so its tables are completed when they are made: now, if PEFT has been imported, or right after they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from hf_efficient.families import PREFIX, efficient_type

TABLES = "peft.utils.constants"


def add_targets(tables: ModuleType) -> None:
    """Give every table of the module that names a stock `model_type` the same entry for its Efficient form."""
    for name, table in vars(tables).items():
        if name.endswith("_MAPPING") and isinstance(table, dict):
            for model_type in [t for t in table if isinstance(t, str) and not t.startswith(PREFIX)]:
                table.setdefault(efficient_type(model_type), table[model_type])


class _WhenImported(MetaPathFinder):
    """Stands in the import path until the tables are imported, and completes them then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                add_targets(module)

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def register_targets() -> None:
    """Have PEFT's tables know the Efficient model types, without importing PEFT."""
    if TABLES in sys.modules:
        add_targets(sys.modules[TABLES])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
