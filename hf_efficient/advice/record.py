"""The measurements of one run, in a file that it goes on from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from hf_efficient.advice.advice import PROTOCOL, Advice
from hf_efficient.profiling.environment import hardware, versions
from hf_efficient.profiling.json_files import read_json, write_json


class Record:
    """Rows by name, kept in a JSON file; `path=None` keeps none.

    Raises:
        ValueError: the file holds another run: other settings, versions or hardware.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]):
        self.path, self.settings = None if path is None else Path(path), settings
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is None or not self.path.exists():
            return
        known = read_json(self.path)
        held = known.get("settings", {}) | {"protocol": known.get("protocol"), "versions": known.get("versions")}
        # files of an interrupted run did not always say where they were made
        held["hardware"] = known.get("hardware") or hardware()
        ours = settings | {"protocol": PROTOCOL, "versions": versions(), "hardware": hardware()}
        other = [
            f"{name} is {held.get(name)!r} there and {value!r} here"
            for name, value in ours.items()
            if held.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{self.path} holds another run: {'; '.join(other)}. Give another file, or delete this one."
            )
        self.rows = {row["name"]: row for row in known["rows"]}

    def save(self) -> None:
        """Write what is measured so far."""
        if self.path is not None:
            facts = {"suite": "advise", "protocol": PROTOCOL, "settings": self.settings, "partial": True}
            facts |= {"hardware": hardware(), "versions": versions()}
            write_json(self.path, facts | {"rows": list(self.rows.values())})

    def finish(self, advice: Advice) -> None:
        """Write the advice, with everything that was measured."""
        advice.rows = list(self.rows.values())
        if self.path is not None:
            write_json(self.path, advice.to_dict())


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and first numbers of all parameters."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(f"{name}{tuple(p.shape)}{p.detach().flatten()[:16].tolist()}".encode())
    return found.hexdigest()
