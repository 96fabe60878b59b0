"""The README.md that a checkpoint is saved with: what it is, what it was made from, how it is loaded; no figures."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_efficient.models.config import is_hub_id, names_of
from hf_efficient.models.provenance import Provenance

README = "README.md"
AUTOMATIC = "This model card has been automatically generated."
TEXT = """---
{metadata}
---

# {title}

{origin} Loading it needs `hf_efficient`; with the import, the Auto classes load it as well.

```python
from hf_efficient import {cls}

model = {cls}.from_pretrained("{folder}")
```

This card has no figures; `hf-efficient card` puts one in its place with all that are recorded in the folder.
"""


def write_first_card(folder: Path, model: Any, source: str | None = None, title: str | None = None) -> None:
    """Write the card of an Efficient model into the folder that it is saved to; only a card like it is replaced, and the
    one without content that `push_to_hub` makes.

    Args:
        source: checkpoint that it was made from; by default the one that its history begins with.
        title: of the folder, where that is known.
    """
    path = folder / README
    if path.exists() and not is_first_card(path) and not _is_empty(path):
        return
    steps = Provenance.of(model).history
    source = source or next((step["source"] for step in steps), None) or model.config._name_or_path
    base = source if source and is_hub_id(source) else None
    tags = [tag for tag in model.model_tags if not tag.startswith("base_model:")]
    attention = names_of(getattr(model.config, "efficient_attention", None) or [])
    parts = [f"{attention} attention"] if attention else []
    parts += ["sparse experts"] if getattr(model.config, "efficient_experts", None) else []
    made_from = f"[{base}](https://huggingface.co/{base})" if base else f"`{source or model.config.model_type}`"
    text = TEXT.format(
        metadata=ModelCardData(library_name="transformers", base_model=base, tags=tags).to_yaml(),
        title=title or type(model).__name__,
        folder=title or "…",
        origin=f"{made_from} with {' and '.join(parts)}.",
        cls=type(model).__name__,
    )
    write_sealed(path, text)


def write_sealed(path: Path, text: str) -> None:
    """Write a card of ours with a last line by which `is_first_card` knows it."""
    path.write_text(text + _seal(text), encoding="utf-8")


def is_first_card(path: Path) -> bool:
    """Whether a file is such a card, and as it was written: then nothing is lost with it."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return bool(lines) and lines[-1] == _seal("".join(lines[:-1]))


def _is_empty(path: Path) -> bool:
    """Whether a card is transformers' template as it is; its metadata are tags."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if AUTOMATIC not in text:
        return False
    said = next(line for line in text.splitlines() if AUTOMATIC in line)
    return bool(ModelCard(text).text == ModelCard.from_template(ModelCardData(), model_description=said).text)


def _seal(text: str) -> str:
    return f"<!-- hf_efficient {sha256(text.encode()).hexdigest()[:16]} -->\n"
