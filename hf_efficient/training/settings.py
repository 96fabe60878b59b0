"""The settings of a recipe: transformers' `TrainingArguments` under their own names, read from a command line or a file."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import json
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments

SettingsType = TypeVar("SettingsType")
FILES = (".yaml", ".yml", ".json")
# what says which checkpoint is meant where `convert` or `from_pretrained` reads one
ELSEWHERE = ("dtype", "model_class", "revision", "subfolder", "variant")


@dataclass(kw_only=True)
class Settings(TrainingArguments):
    """What every recipe takes: all of transformers' `TrainingArguments`, and the fields below.

    Raises:
        ValueError: options that a recipe can't honour (`REFUSED`), each with its reason.
    """

    # {option: why nothing but the default is possible}
    REFUSED: ClassVar[dict[str, str]] = {
        "auto_find_batch_size": "a smaller batch is another run; lower --per-device-train-batch-size",
        "batch_eval_metrics": "figures are computed over the whole evaluation set",
        "do_predict": "there is no test split; evaluate on the validation split",
        "eval_do_concat_batches": "figures are computed over the whole evaluation set",
        "fp16": "its loss scaling tries steps with infinite gradients, at which a run stops; use --bf16",
        "include_num_input_tokens_seen": "result.json counts the tokens that are not padding",
        "label_smoothing_factor": "the loss is the model's own",
        "push_to_hub": "upload OUTPUT_DIR/model when the run is finished",
        "restore_callback_states_from_checkpoint": "the callbacks of a recipe restore themselves",
        "resume_from_checkpoint": "--resume continues from the last complete checkpoint",
        "save_only_model": "a checkpoint without the optimizer can't be resumed exactly",
        "use_liger_kernel": "its kernels replace layers of stock models alone",
    }

    model: str  # Hub id or checkpoint folder, converted or not
    output_dir: str = field()  # a new or empty folder, except with --resume
    attention: str = ""  # mechanism to convert to, or its JSON with options; none = back to full attention
    max_positions: int = 0  # longest input after the conversion; 0 = unchanged
    positions: str | None = (
        None  # how it gets there: tile, linear, yarn, …, see hf-efficient convert; by default as usual
    )
    lora_rank: int = (
        0  # train low-rank adapters of this rank, the mechanisms and new layers alone; 0 = train everything
    )
    dataset: str = "offline"  # offline, a Hub id, a folder, or files (.jsonl, .json, .csv, .parquet, .txt)
    dataset_config: str = ""  # configuration of a Hub dataset
    max_train_rows: int = 0  # train on the first rows only; 0 = all
    max_eval_rows: int = 0  # evaluate on the first rows only; 0 = all
    resume: bool = False  # continue from the last complete checkpoint
    # ---- other defaults than transformers' ----
    seed: int = 0
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    include_num_input_tokens_seen: str = "non_padding"

    def __post_init__(self) -> None:
        # transformers' own defaults, as a file with all values of a TrainingArguments has them: collators read columns that
        # the model does not know, and give it none of them; result.json needs the number of tokens
        self.remove_unused_columns = False
        if self.include_num_input_tokens_seen == "no":
            self.include_num_input_tokens_seen = "non_padding"
        # transformers changes some of them below
        self.given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        reasons = [
            f"{name}={self.given[name]!r} is not possible: {why}"
            for name, why in self.REFUSED.items()
            if self.given[name] != getattr(type(self), name)
        ]
        if self.eval_steps and self.eval_strategy == "no":
            reasons.append(f"eval_steps={self.eval_steps:g} needs --eval-strategy steps")
        if reasons:
            raise ValueError("; ".join(reasons) + ".")
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        # mixed precision looks for a GPU unless it is told that there is none
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()

    def replaced(self, **changes: Any) -> Any:
        """The settings as they were given, but for `changes`."""
        return type(self)(**self.given | changes)

    def recorded(self) -> dict[str, Any]:
        """What a recipe declares, and what else was given, without secrets; all others have transformers' defaults."""
        declared = {
            name for cls in type(self).__mro__ if issubclass(cls, Settings) for name in inspect.get_annotations(cls)
        }
        values = {f.name: (self.given[f.name], _default(f)) for f in dataclasses.fields(self) if f.init}
        return {
            name: getattr(value, "value", value)
            for name, (value, default) in values.items()
            if (name in declared or value not in (default, None)) and not name.endswith("_token")
        }

    def data_options(self) -> dict[str, Any]:
        """Keywords of `load_texts` and `load_rows`."""
        return {name: getattr(self, name) for name in ("dataset_config", "seed", "max_train_rows", "max_eval_rows")}


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


# ---- command lines and files -----------------------------------------------------------------------------------------


class _Parser(HfArgumentParser):
    """Raises one ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows every setting.")


def parse_settings(settings: type[SettingsType], arguments: Sequence[str] | None = None) -> SettingsType:
    """The dataclass `settings` filled from the command line: `--learning-rate 1e-4` or `--learning_rate 1e-4`.

    `--config FILE`, or a YAML or JSON file as the first argument, gives values by field name; command-line options override
    it. A comment behind a field of the dataclass is its text in `--help`.

    Args:
        settings: a dataclass, such as a subclass of `Settings`; a field without a default must be given.
        arguments: the words of the command line; `None` = `sys.argv`.

    Raises:
        ValueError: an unknown setting (with the nearest ones), a value of another type, a missing one, or what the dataclass
            refuses.
        OSError: the file can't be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].endswith(FILES):
        words.insert(0, "--config")
    files = _Parser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    file, words = files.parse_known_args(words)
    kind: Any = settings
    parser = _Parser(kind, allow_abbrev=False, description=(settings.__doc__ or "").partition("\n")[0])
    known: dict[str, Any] = {}
    for action in parser._actions:
        known.setdefault(action.dest, action)  # --no-… comes second
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file; command-line options override it")
    comments = _comments(settings)
    for action in parser._actions:
        # a blank text keeps argparse from leaving the default out
        action.help = action.help or comments.get(action.dest, " ")
    if file.config is not None:
        words = _from_file(Path(file.config), known, get_type_hints(settings)) + words
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        raise ValueError(_unknown(unknown[0].partition("=")[0], known))
    values = vars(namespace)
    del values["config"]
    return settings(**values)


def _unknown(given: str, known: dict[str, Any]) -> str:
    name = given.lstrip("-").replace("-", "_")
    if name in ELSEWHERE and name not in known:
        return (
            f"there is no setting {given}: a recipe reads all of --model, as its config says, in fp32. Make a folder of "
            "what you mean first: with hf-efficient convert, which takes --model-class, --subfolder and --revision, "
            "or with save_pretrained of what from_pretrained(…) gives."
        )
    near = [field for field in known if name in field][:3] or difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"there is no setting {given}.{hint} --help shows every setting."


def _from_file(file: Path, known: dict[str, Any], hints: dict[str, Any]) -> list[str]:
    """The settings of a file as words of a command line; what no word can say becomes a default of the parser."""
    import yaml

    text = file.read_text(encoding="utf-8")
    try:
        values = (json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold `setting: value` lines.")
    words = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{file}: {_unknown(str(name), known)}")
        kinds = {get_origin(kind) or kind for kind in (hints[name], *get_args(hints[name]))}
        if type(value) in kinds - {bool, int, float, str}:
            known[name].default, known[name].required = value, False
        elif value is None:
            raise ValueError(f"{file}: {name} has no value; leave the line out for the default.")
        else:
            # a mechanism with options may be written as YAML: it is JSON on the command line
            words.append(f"--{name}={json.dumps(value) if isinstance(value, (dict, list)) else value}")
    return words


def _comments(settings: Any) -> dict[str, str]:
    """{field: the comment behind it} from the sources of our own dataclasses."""
    found: dict[str, str] = {}
    for cls in settings.__mro__:
        try:
            source = "" if issubclass(TrainingArguments, cls) else inspect.getsource(cls)
        except (OSError, TypeError):
            continue
        lines = source.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                name = lines[token.start[0] - 1].partition(":")[0].strip()
                # argparse would take a percent sign for a format
                found.setdefault(name, token.string.lstrip("# ").replace("%", "%%"))
    return found
