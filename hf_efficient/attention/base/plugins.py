"""What other distributions bring by entry points."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata
from typing import Any

logger = logging.getLogger(f"transformers.{__name__}")


def entry_points(kind: str) -> Iterator[tuple[Any, metadata.EntryPoint]]:
    """The objects of the group `hf_efficient.<kind>`; one that can't be imported is named in a warning and left out."""
    for entry in metadata.entry_points(group=f"hf_efficient.{kind}"):
        try:
            given = entry.load()
        except Exception as error:
            name = "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
            logger.warning(
                f"hf_efficient.{kind}: {entry.name} = {entry.value} of {name} can't be imported and is left out: "
                f"{type(error).__name__}: {error}"
            )
            continue
        yield given, entry
