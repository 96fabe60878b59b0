"""What an export did and what was measured; the folder that it is saved to, with its card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCardData

from hf_efficient.conversion.saving import Report, Result
from hf_efficient.models.card import README, write_sealed
from hf_efficient.models.config import is_hub_id, names_of
from hf_efficient.profiling.environment import versions
from hf_efficient.profiling.json_files import write_json

EXPORT_NAME = "export_report.json"
CARD = """---
{metadata}
---

# {title}

A `{result_class}` with the weights of {origin} ({attention} attention, `hf_efficient`). It needs transformers alone.

```python
import torch
from transformers import AutoTokenizer, {result_class}

model = {result_class}.from_pretrained("{title}")
batch = AutoTokenizer.from_pretrained("{title}")(["…"], return_tensors="pt")
{usage}
```

{conditions}

{figures}

The rows of the table are random tokens; `{file}` has the figures of all calls, and where each tensor is from.
"""


@dataclass
class ExportReport(Report):
    """What an export gave, tensor by tensor, and how far the result is from its source.

    Attributes:
        source: the converted checkpoint. target: what it was exported to.
        model_class, result_class: of source and result. efficient_attention: the options of the source, as JSON.
        max_positions: longest input of the result, in tokens; `None` = no table limits it.
        conditions, cautions: sentences: when the result equals the source; what callers must see to.
        usage: Python that calls the result on a `batch` of the tokenizer.
        tensors: {name in the result: {"status": "copied" | "extended" | "initialised", "from": …, "shape": […]}}.
        dropped: tensors of the source that the result has no place for.
        checks: rows of figures, see `exporting.check.compare`. tolerance: the largest `error` that was allowed.
        history: the steps that led to the source.
    """

    source: str
    target: str
    model_class: str
    result_class: str
    efficient_attention: list[dict[str, Any]]
    max_positions: int | None
    conditions: list[str]
    cautions: list[str]
    usage: str
    tensors: dict[str, dict[str, Any]]
    dropped: list[str]
    checks: list[dict[str, Any]]
    tolerance: float
    history: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)
    statuses: ClassVar[tuple[str, ...]] = ("copied", "extended", "initialised")

    @property
    def error(self) -> float:
        """The largest relative error of all checks."""
        return max(row["error"] for row in self.checks)

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Headings and rows of the table of checks."""
        heads = {
            "tokens": "length",
            "padded": "padded",
            "with a mask of global tokens": "global_tokens",
            "largest relative error": "error",
            "same argmax": "argmax_agreement",
            "distance to the converted model": "distance",
            "same argmax as it": "distance_agreement",
        }
        heads = {head: key for head, key in heads.items() if key in self.checks[0]}
        if not any(row["global_tokens"] for row in self.checks):
            heads = {head: key for head, key in heads.items() if key != "global_tokens"}
        return list(heads), [[shown(row[key]) for key in heads.values()] for row in self.checks]


def shown(value: Any) -> str:
    """An entry of the table of checks."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.1e}" if isinstance(value, float) and value != 1.0 else f"{value:g}"


class ExportResult(Result):
    """An exported model with its tokenizer (`None` = it has none) and the report; `save(path)` writes a folder for
    `from_pretrained`: weights, tokenizer, card and `export_report.json`.

    Attributes:
        card: text of the card, with the names that `_card` fills in. library: what loads the folder; `None` = no package of
            the Hub's list.
    """

    report: ExportReport
    card: ClassVar[str] = CARD
    library: ClassVar[str | None] = "transformers"

    def _describe(self, folder: Path, title: str) -> None:
        write_json(folder / EXPORT_NAME, self.report.to_dict())
        if not (folder / README).exists():
            write_sealed(folder / README, self._card(title))

    def _card(self, title: str) -> str:
        report = self.report
        base = report.source if is_hub_id(report.source) else None
        heads, rows = report.rows()
        table = [heads, ["---"] * len(heads), *rows]
        return self.card.format(
            metadata=ModelCardData(library_name=self.library, base_model=base).to_yaml(),
            title=title,
            stock_class=report.model_class.removeprefix("Efficient"),
            result_class=report.result_class,
            origin=f"[{base}](https://huggingface.co/{base})" if base else f"`{report.source}`",
            attention=names_of(report.efficient_attention),
            usage=report.usage,
            conditions="\n".join(f"- {condition}" for condition in (*report.conditions, *report.cautions)),
            figures="\n".join(f"| {' | '.join(row)} |" for row in table),
            file=EXPORT_NAME,
        )
