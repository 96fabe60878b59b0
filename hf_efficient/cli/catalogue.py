"""What `list`, the options of `convert` and shell completion say of mechanisms, without importing torch.

Mechanisms import torch, so their facts and options are read from their source text, which holds them as literals. Installed
packages with mechanisms of their own are imported.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_efficient.attention.base.mechanism import EfficientAttention

SOURCES = Path(__file__).parents[1] / "attention"
PATTERN = "PatternAttentionConfig"
MEANING = re.compile(r"^    ([a-z_, ]+): (.+(?:\n {8}.+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """One mechanism.

    Attributes:
        facts: what `hf_efficient.describe` returns.
        types, meanings: of each option, as its config class declares and documents it.
        is_pattern: what it shows a query depends on positions alone.
    """

    facts: dict[str, Any]
    types: dict[str, str]
    meanings: dict[str, str]
    is_pattern: bool

    @property
    def training(self) -> str:
        told: str = self.facts["training"]
        return "needs training" + told.removeprefix("needed") if told.startswith("needed") else told

    @property
    def in_short(self) -> str:
        """The first words of `training`."""
        return re.split(r"[;:,]| where | with | beside ", self.training)[0].replace("without training", "untrained")


@cache
def cards() -> dict[str, Card]:
    """{name: card} of every mechanism, sorted by name."""
    found = {card.facts["mechanism"]: card for card in map(_of_source, _classes()) if card is not None}
    if metadata.entry_points(group="hf_efficient.mechanisms"):
        from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms

        found |= {name: _of_class(get_mechanism(name)) for name in list_mechanisms() if name not in found}
    return dict(sorted(found.items()))


def shared_options() -> set[str]:
    """The options of every mechanism that is a pattern, which are no part of what it shows."""
    return set(_options(_lineage(PATTERN)))


def complete_mechanism(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names that begin like that, with a few words on each, for the shell."""
    for name, card in cards().items():
        if name.startswith(incomplete):
            yield name, f"{card.facts['title']}; {card.training}"


def complete_pattern(incomplete: str) -> Iterator[tuple[str, str]]:
    """As `complete_mechanism`, of those that have a picture."""
    return (found for found in complete_mechanism(incomplete) if cards()[found[0]].is_pattern)


def meanings(docstrings: list[str]) -> dict[str, str]:
    """{option: what is said of it} in docstrings of config classes, bases first."""
    entries = [entry for text in docstrings for entry in MEANING.findall(text)]
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _of_class(cls: type[EfficientAttention]) -> Card:
    from hf_efficient.attention.base.pattern import PatternAttentionConfig
    from hf_efficient.attention.base.registry import describe

    config = cls.Config
    types = {field.name: str(field.type) for field in dataclasses.fields(config)}
    texts = [inspect.getdoc(one) or "" for one in reversed(config.__mro__)]
    is_pattern = issubclass(config, PatternAttentionConfig)
    return Card(describe(config.mechanism), types, meanings(texts), is_pattern)


# ---- the source text -----------------------------------------------------------------------------------------------


@cache
def _classes() -> dict[str, ast.ClassDef]:
    """All classes of the folder of mechanisms, by name."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(SOURCES.rglob("*.py"))]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _lineage(name: str) -> list[ast.ClassDef]:
    """The class and its bases in the folder, itself first."""
    node = _classes().get(name)
    bases = [] if node is None else [base.id for base in node.bases if isinstance(base, ast.Name)]
    return [] if node is None else [node, *(one for base in bases for one in _lineage(base))]


def _assigned(lineage: list[ast.ClassDef], name: str) -> Any:
    """The expression that the nearest class assigns to a name; a missing one is `None`, as the base class has it."""
    for node in lineage:
        for line in node.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return getattr(line, "value", None)
    return ast.Constant(None)


def _options(lineage: list[ast.ClassDef]) -> dict[str, ast.AnnAssign]:
    """The fields of a config class, those of its bases first."""
    lines = [line for node in reversed(lineage) for line in node.body if isinstance(line, ast.AnnAssign)]
    fields = [line for line in lines if not ast.unparse(line.annotation).startswith("ClassVar")]
    return {line.target.id: line for line in fields if isinstance(line.target, ast.Name)}


def _of_source(name: str) -> Card | None:
    """The card of a class that is registered as a mechanism; `None` of any other."""
    lineage = _lineage(name)
    if not any(isinstance(one, ast.Name) and one.id == "register_mechanism" for one in lineage[0].decorator_list):
        return None
    config = _lineage(_assigned(lineage, "Config").id)
    options = _options(config)
    refusals = {key: _assigned(lineage, f"{key}_refusal") for key in ("causal", "relative_bias")}
    facts: dict[str, Any] = {
        "mechanism": ast.literal_eval(_assigned(config, "mechanism")),
        **{part.arg: ast.literal_eval(part.value) for part in _assigned(lineage, "facts").keywords},
        **{key: isinstance(why, ast.Constant) and why.value is None for key, why in refusals.items()},
        "options": {key: ast.literal_eval(line.value) for key, line in options.items() if line.value is not None},
    }
    types = {key: ast.unparse(line.annotation) for key, line in options.items()}
    texts = [ast.get_docstring(node) or "" for node in reversed(config)]
    return Card(facts, types, meanings(texts), any(node.name == PATTERN for node in config))
