"""The `hf-efficient` program: `--help` and `--version` answer before torch and transformers are imported.

`import hf_efficient` imports transformers, to register with it, and so would the import of any module in it. The program
therefore starts with a package whose `__init__` has yet to run.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Waiting(ModuleType):
    """`hf_efficient` before its `__init__` ran; the first name that is asked of it runs it."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(self)
        return getattr(self, name)


def main() -> None:
    spec = importlib.util.find_spec("hf_efficient")
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Waiting
    sys.modules["hf_efficient"] = package
    from hf_efficient.cli.app import app

    app()


if __name__ == "__main__":
    main()
