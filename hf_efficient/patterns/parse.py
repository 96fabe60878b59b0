"""The JSON text of a pattern, as caches and reports hold it, back to the pattern."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from hf_efficient.patterns.pattern import _KINDS, Pattern


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        if (kind := value["kind"]) not in _KINDS:
            raise ValueError(
                f"no pattern of kind {kind!r} is known; import the module that defines it (mechanisms: "
                f"hf_efficient.list_mechanisms()). Known are {', '.join(sorted(_KINDS))}."
            )
        return _KINDS[kind](**{k: _read(v) for k, v in value.items() if k != "kind"})
    return tuple(_read(v) for v in value) if isinstance(value, list) else value


@lru_cache(maxsize=1024)
def parse_pattern(spec: str) -> Pattern:
    """The pattern that `Pattern.spec` wrote.

    Raises:
        ValueError: a kind of pattern that no imported module defines.
    """
    from hf_efficient.patterns import random_blocks, sets  # noqa: F401  so that their kinds are known

    pattern: Pattern = _read(json.loads(spec))
    return pattern
