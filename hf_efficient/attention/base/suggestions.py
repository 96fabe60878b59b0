"""What a mistyped name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'longformer'?)"`, for the middle of a message, if a known name is like this one; else `""`."""
    given, known = _plain(name), {_plain(one): one for one in known}
    found = get_close_matches(given, known, n=2, cutoff=0.7) or get_close_matches(given, known, n=1)
    found = found or [one for one in known if len(given) > 2 and given in one][:3]
    return f" (did you mean {' or '.join(repr(known[one]) for one in found)}?)" if found else ""


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_")
