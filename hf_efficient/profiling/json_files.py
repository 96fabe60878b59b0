"""Files written completely or not at all, and JSON that every strict reader takes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORDS: dict[Any, str] = {dict: "an object", list: "a list"}


@contextmanager
def whole_file(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """A new file beside `path` to write to; it takes the place of `path` at the end, and goes if that is not reached.

    So whoever reads `path` finds the former file or the new one, never half of it. The folder is made if it is missing.

    Raises:
        FileExistsError: without `overwrite`, something is at `path` by the end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        os.close(handle)
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        if overwrite:
            os.replace(name, path)
        else:
            os.link(name, path)  # unlike a renaming, this never replaces
            os.unlink(name)
    except BaseException:
        os.unlink(name)
        raise


def finite(value: Any) -> Any:
    """`value` with `None` for every number that is infinite or NaN, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, indent: int | None = 2, **options: Any) -> str:
    """Strict JSON (RFC 8259): `json.dumps` with `options`, of the `finite` value."""
    return json.dumps(finite(value), indent=indent, allow_nan=False, **options)


def write_json(path: str | Path, value: Any) -> Path:
    """Write strict JSON completely or not at all."""
    with whole_file(path) as file:
        file.write_text(json_text(value) + "\n", encoding="utf-8")
    return Path(path)


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: the file is damaged, or its value is not of `kind`; one line that names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds {json.dumps(value):.40}, where {WORDS[kind]} is needed.")
    return value
