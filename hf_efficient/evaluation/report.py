"""What `verify` found: checks, a verdict on the fidelity, and whether the weights were trained since."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_efficient.evaluation.verdict import NAMES, verdict
from hf_efficient.profiling.environment import versions
from hf_efficient.profiling.json_files import finite


@dataclass
class Check:
    """One check: its outcome, its figures, and the rule it was held to.

    `status` is "passed", "failed", "measured" (figures without a limit), "trained since" (of copied tensors) or "not
    applicable".
    """

    name: str
    status: str
    detail: dict[str, Any]
    rule: str


@dataclass
class FidelityReport:
    """All checks with the settings and versions that the figures depend on; JSON-serialisable by `to_dict`.

    It states three things, each for itself: `passed`, integrity and correctness, which the exit code of the command follows;
    `verdict`, whether the model is closer to its source than one without attention; and `weights`.

    Attributes:
        weights: `state`, what the copied tensors are: "as in the source", "trained since", or changed with no run that did
            it recorded; `runs`, in words, that trained them since; `steps`, the number of recorded steps (see `Provenance`)
            that the model had behind it when this was measured.
    """

    checks: list[Check]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)
    weights: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.status != "failed" for check in self.checks)

    @property
    def verdict(self) -> dict[str, Any]:
        """See `hf_efficient.evaluation.verdict.verdict`."""
        detail = {check.name: check.detail for check in self.checks if check.status in ("measured", "failed")}
        figures = detail.get("fidelity")
        controls = {name: detail[f"control: {name}"] for name in NAMES if f"control: {name}" in detail}
        return {"better": None, "text": None} if figures is None else verdict(figures, controls)

    def statements(self) -> dict[str, str]:
        """The three statements, in words."""
        failed = [check.name for check in self.checks if check.status == "failed"]
        runs, state = ", ".join(self.weights.get("runs", [])), self.weights.get("state", "not compared")
        return {
            "integrity and correctness": f"failed: {', '.join(failed)}" if failed else "passed",
            "fidelity": self.verdict["text"] or self._no_verdict,
            "weights": f"{state} ({runs})" if runs else state,
        }

    @property
    def _no_verdict(self) -> str:
        by_layer = any(check.name == "fidelity by layer" for check in self.checks)
        return "compared layer by layer" if by_layer else "not compared: all attention is full attention"

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        """The three statements and a paragraph per check, for a terminal of 80 columns."""
        lines = [textwrap.fill(f"{name}: {text}", 80) for name, text in self.statements().items()]
        for check in self.checks:
            figures = ", ".join(f"{name} {_short(value)}" for name, value in check.detail.items())
            text = f"{check.status:15} {check.name}: {figures}"
            lines.append(textwrap.fill(text, 80, subsequent_indent=" " * 16))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return finite({"passed": self.passed, "verdict": self.verdict, **asdict(self)})


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(entry)}" for name, entry in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
