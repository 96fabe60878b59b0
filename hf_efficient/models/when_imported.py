"""Additions to a module of another package, made right after it is imported, and never the reason for importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _WhenImported(MetaPathFinder):
    """Stands in the import path until one module has been imported, and completes it then.

    Whoever only looks for the module, or fails to import it, leaves it standing.
    """

    def __init__(self, name: str, complete: Callable[[ModuleType], None]) -> None:
        self.name, self.complete = name, complete
        self.is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = find_spec(fullname)  # of all others
        finally:
            self.is_asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_complete(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.complete(module)

            spec.loader.exec_module = execute_and_complete  # type: ignore[method-assign]
        return spec


def when_imported(name: str, complete: Callable[[ModuleType], None]) -> None:
    """Call `complete` with the module of that name: now, if it has been imported, or right after it is."""
    if name in sys.modules:
        complete(sys.modules[name])
    else:
        sys.meta_path.insert(0, _WhenImported(name, complete))
