"""The list of benchmark suites, and how each is run and printed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from hf_efficient.benchmarks.models import encoder_suite, memory_suite


def _elsewhere(suite: str) -> Any:
    """The module of a suite that has one of its own."""
    return importlib.import_module(f".{suite}", __package__)


def _run_elsewhere(suite: str, **options: Any) -> dict[str, Any]:
    return getattr(_elsewhere(suite), f"{suite}_suite")(**options)


def as_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of a suite's results, for people."""
    if document["suite"] in OWN_MODULE:
        return _elsewhere(document["suite"]).as_rows(document)
    results = document["results"]
    if document["suite"] == "memory":
        flat = results
    else:
        flat = [{"model": name, "tokens": n} | row for n, table in results.items() for name, row in table.items()]
    rows = [[round(v, 3) if isinstance(v, float) else v for v in row.values()] for row in flat]
    return list(flat[0]), rows


OWN_MODULE = ("attention", "content", "fidelity", "gpu", "linear", "recovery")
SUITES: dict[str, Callable[..., dict[str, Any]]] = {
    "encoder": encoder_suite,
    "memory": memory_suite,
    **{suite: partial(_run_elsewhere, suite) for suite in OWN_MODULE},
}
