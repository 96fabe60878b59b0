"""A flat dataclass of settings as a command line, a YAML file, or both."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import json
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

SettingsType = TypeVar("SettingsType")


class _Parser(HfArgumentParser):
    """Raises one ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows every setting.")


def parse_settings(settings: type[SettingsType], arguments: Sequence[str] | None = None) -> SettingsType:
    """The dataclass `settings` filled from the command line: `--learning_rate 1e-4` or `--learning-rate 1e-4`.

    `--config FILE.yaml` gives values by field name; what stands on the command line comes after it and wins. A comment
    behind a field of the dataclass is its text in `--help`.

    Args:
        settings: a dataclass of str, int, float and bool fields; one without a default must be given.
        arguments: what stands on the command line; `None` = `sys.argv`.

    Raises:
        ValueError: an unknown setting (with the list of the known ones), a value of another type, or a missing one.
        OSError: the YAML file can't be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    kind: Any = settings
    parser = _Parser(kind, allow_abbrev=False, description=_first_line(settings))
    parser.add_argument("--config", default="", help="YAML file with settings; the command line wins over it")
    comments = _comments(settings)
    for action in parser._actions:
        # a blank text keeps argparse from leaving the default out
        action.help = action.help or comments.get(action.dest, " ")
    known = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    file = _config_file(words)
    if file is not None:
        words = _from_yaml(file, known) + words
    _refuse_unknown(words, known)
    namespace = vars(parser.parse_args(words))
    return settings(**{name: namespace[name] for name in known})


def _refuse_unknown(words: Sequence[str], known: list[str]) -> None:
    for word in words:
        name = word.partition("=")[0][2:].replace("-", "_")
        if word.startswith("--") and name not in (*known, "config", "help", *(f"no_{field}" for field in known)):
            raise ValueError(_unknown(word.partition("=")[0], name, known))


def _unknown(given: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"there is no setting {given}.{hint} The settings are {', '.join(known)}."


def _config_file(words: list[str]) -> Path | None:
    """The file behind `--config`, if it is given."""
    for place, word in enumerate(words):
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
        if word == "--config" and place + 1 < len(words):
            return Path(words[place + 1])
    return None


def _from_yaml(file: Path, known: list[str]) -> list[str]:
    """The settings of a YAML file as words of a command line, so that both are read by the same rules."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold `setting: value` lines.")
    words = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{file}: {_unknown(str(name), str(name), known)}")
        if value is None:
            raise ValueError(f"{file}: {name} has no value; leave the line out for the default.")
        # a mechanism with options may be written as YAML: it is JSON on the command line
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        words.append(f"--{name}={text}")
    return words


def _first_line(settings: Any) -> str:
    return (settings.__doc__ or settings.__name__).strip().splitlines()[0]


def _comments(settings: Any) -> dict[str, str]:
    """{field: the comment behind it} from the source of the dataclass."""
    try:
        source = inspect.getsource(settings)
    except (OSError, TypeError):
        return {}
    found = {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            name = lines[token.start[0] - 1].partition(":")[0].strip()
            # argparse would take a percent sign for a format
            found[name] = token.string.lstrip("# ").replace("%", "%%")
    return found
