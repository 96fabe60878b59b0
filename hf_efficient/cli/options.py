"""Text from the command line as options, layers and texts; one option per config field of every mechanism."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from hf_efficient.cli import catalogue

if TYPE_CHECKING:
    from hf_efficient.attention.base.mechanism import EfficientAttentionConfig

GIVEN = "hf_efficient.mechanism_options"
WORDS: dict[Any, dict[str, Any]] = {types.NoneType: {"none": None}, bool: {"true": True, "false": False}}


def parse_option(config_class: type[EfficientAttentionConfig], name: str, text: str) -> Any:
    """`text` as a value of the type that the config's field declares.

    Raises:
        ValueError: the mechanism has no such option, or the text is of none of its types.
    """
    known = [field.name for field in dataclasses.fields(config_class)]
    if name not in known:
        from hf_efficient.attention.base.suggestions import did_you_mean

        options = [flag(one) for one in known]
        hint = did_you_mean(flag(name), options)
        raise ValueError(
            f"{config_class.mechanism} has no option {flag(name)}{hint}; its options are {', '.join(options)}."
        )
    hint = typing.get_type_hints(config_class)[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    # text is what everything can be read as, so it comes last
    for kind in sorted(kinds, key=lambda kind: kind is str):
        try:
            return _parse(kind, text.strip())
        except ValueError:
            continue
    names = " or ".join(
        getattr(kind, "__name__", str(kind)) if kind is not types.NoneType else "none" for kind in kinds
    )
    raise ValueError(f"{flag(name)} {text!r} can't be read: {config_class.mechanism} wants {names} there.")


def _parse(kind: Any, text: str) -> Any:
    if kind in (int, float, str):
        return kind(text)
    if typing.get_origin(kind) is tuple and text.startswith("["):
        return tuple(json.loads(text))
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(typing.get_args(kind)[0], part.strip()) for part in text.split(","))
    if kind not in WORDS:  # anything richer is written as JSON
        return json.loads(text)
    words = WORDS[kind]
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def parse_layers(text: str) -> tuple[int, ...]:
    """`"0,1,2"`, `"0-5"` or `"0-2,7"` as layer indices."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            found = range(0)
        if not found:
            raise ValueError(f"--layers {text!r} can't be read; write 0,1,2 or 0-5.")
        layers += found
    return tuple(layers)


def parse_lengths(text: str | None) -> list[int] | None:
    """`"512,4096"` as lengths in tokens."""
    if text is None:
        return None
    lengths = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if 0 in lengths:
        raise ValueError(
            f"--lengths {text!r} can't be read; write numbers of tokens with commas between them, as 64,512."
        )
    return lengths


def parse_rope(text: str | None) -> dict[str, Any] | None:
    """The numbers of a method for rotary positions, from their JSON."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f'--rope {text!r} can\'t be read; write JSON such as {{"factor": 4}}.')
    return found


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def chosen_configs(
    attention: str | None, config: Path | None, given: dict[str, str | None], extra: list[str]
) -> list[EfficientAttentionConfig]:
    """The configs that the options of `convert` describe."""
    from hf_efficient.attention.base.registry import (
        attention_config,
        attention_configs,
        get_mechanism,
        list_mechanisms,
    )

    options = {name: text for name, text in given.items() if text is not None}
    for pair in extra:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r} can't be read; write --option NAME=VALUE.")
        name = name.strip().replace("-", "_")
        if name in options:
            raise ValueError(f"{flag(name)} is given twice.")
        options[name] = text
    if (attention is None) == (config is None):
        raise ValueError(f"give either --attention (one of {', '.join(list_mechanisms())}) or --config FILE.json.")
    if attention is not None and attention.lstrip()[:1] in ("{", "["):
        if options:
            raise ValueError(
                f"{', '.join(map(flag, options))}: options go into the JSON of --attention, not beside it."
            )
        return attention_configs(attention)
    if attention is not None:
        kind = get_mechanism(attention).Config
        layers = options.pop("layers", None)
        values = {name: parse_option(kind, name, text) for name, text in options.items()}
        return [attention_config(attention, **values, layers=None if layers is None else parse_layers(layers))]
    assert config is not None
    if options:
        raise ValueError(f"{', '.join(map(flag, options))}: options go into {config}, not beside --config.")
    try:
        return attention_configs(json.loads(config.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from error


def refuse_strays(
    context: typer.Context,
    words: list[str],
    attention: str | None,
    takes: tuple[str, ...] = ("SOURCE", "OUT"),
    without: Collection[str] = (),
) -> None:
    """Options that no mechanism has, or that are of the fields `without`, arrive among the arguments: `words` and the rest.

    Raises:
        ValueError: there are some, or more arguments than the command takes.
    """
    words = [*words, *context.args]
    for word in words:
        if word.startswith("-"):
            raise ValueError(_no_option(context, word, attention, without))
    if len(words) > len(takes):
        raise ValueError(
            f"unexpected argument {words[len(takes)]!r}; {context.info_name} takes {' and '.join(takes)}."
        )


def _no_option(context: typer.Context, word: str, attention: str | None, without: Collection[str]) -> str:
    from hf_efficient.attention.base.registry import get_mechanism, list_mechanisms
    from hf_efficient.attention.base.suggestions import did_you_mean

    names = [attention] if attention in list_mechanisms() else list_mechanisms()
    fields = {field.name for name in names for field in dataclasses.fields(get_mechanism(name).Config)}
    known = sorted(map(flag, fields.difference(without)))
    own = [option for parameter in context.command.params for option in parameter.opts if option.startswith("-")]
    owner = attention if attention in list_mechanisms() else "all mechanisms together"
    hint = did_you_mean(word, [*own, *known])
    return f"no option {word}{hint}; the options of {owner} are {', '.join(known)}."


class MechanismCommand(TyperCommand):
    """A command with one option per config field of its mechanisms; what was given is in `context.meta[GIVEN]`.

    The fields are looked up when the command is called.
    """

    def offered(self) -> tuple[Collection[str], Collection[str]]:
        """The mechanisms, and the fields of theirs that are no options here."""
        return catalogue.cards(), ()

    def mechanism_options(self) -> list[Any]:
        """Typer's parameters for the fields, but for those with the name of an option of the command itself."""
        mechanisms, without = self.offered()
        fields = {field for name in mechanisms for field in catalogue.cards()[name].types}
        names = sorted(fields.difference(without, (parameter.name for parameter in self.params)))

        def probe(**given: str | None) -> None: ...

        probe.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[str | None, typer.Option(flag(name), metavar="VALUE", hidden=True)],
                )
                for name in names
            ]
        )
        app = typer.Typer(add_completion=False)
        app.command()(probe)
        return list(typer.main.get_command(app).params)

    def get_params(self, ctx: Any) -> list[Any]:
        if GIVEN not in ctx.meta:
            ctx.meta[GIVEN] = self.mechanism_options()
        return [*super().get_params(ctx), *ctx.meta[GIVEN]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        ctx.meta[GIVEN] = {option.name: ctx.params.pop(option.name) for option in ctx.meta[GIVEN]}
        return rest


def read_texts(path: Path) -> list[str]:
    """Texts of a file: every non-empty line of a .txt; `{"text": …}` or a string on every line of a .jsonl.

    Raises:
        ValueError: another kind of file, a line that is neither, or no text at all.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: texts come from .txt (one per line) or .jsonl ({{'text': …}} on each line).")
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            texts.append(line)
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        text = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: no text there; write a string or an object with 'text'.")
        texts.append(text)
    if not texts:
        raise ValueError(f"{path} has no text in it.")
    return texts


def as_text(value: Any) -> str:
    """A value for people: few digits, `name=value` for mappings, no brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={as_text(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_text, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
