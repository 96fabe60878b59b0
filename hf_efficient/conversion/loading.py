"""Load stock and converted checkpoints, and their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_efficient.conversion.sentence_transformers import checkpoint_folder
from hf_efficient.families import family_of
from hf_efficient.models.registry import is_efficient, named_class

Loaded = tuple[PreTrainedModel, dict[str, Any]]


@dataclass
class Source:
    """What `convert` and `upcycle` start from.

    Attributes:
        name: of the checkpoint, or of a loaded model. tokenizer: `None` = it has none.
        folder: of the checkpoint; `None` for a loaded model.
        missing, ignored: tensors that the checkpoint lacks, and those that its class does not use.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    folder: Path | None = None
    missing: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)


def open_source(
    source: str | Path | PreTrainedModel,
    tokenizer: Any,
    revision: str | None,
    load: Callable[[str, str | None], Loaded],
) -> Source:
    """A loaded model as it is, or a checkpoint by way of `load`, with its own tokenizer unless one is given."""
    if isinstance(source, PreTrainedModel):
        return Source(source.config._name_or_path or type(source).__name__, source, tokenizer)
    name = str(source)
    model, info = load(name, revision)
    folder = checkpoint_folder(name, revision)
    tokenizer = tokenizer or load_tokenizer(name, revision)
    return Source(name, model, tokenizer, folder, set(info["missing_keys"]), sorted(info["unexpected_keys"]))


def load_stock(name: str, revision: str | None = None) -> Loaded:
    """A checkpoint in the class its config names, and transformers' loading info.

    Raises:
        ValueError: unsupported architecture, or weights that can't be read.
    """
    config = AutoConfig.from_pretrained(name, revision=revision)
    refuse_converted(name, config)
    return load_as_it_is(name, revision)


def refuse_converted(name: str, config: PreTrainedConfig) -> None:
    """Raises ValueError for a checkpoint that has efficient attention already."""
    if getattr(config, "efficient_attention", None):
        raise ValueError(f"{name} already has efficient attention; revert it before converting it to something else.")


def load_as_it_is(name: str, revision: str | None = None) -> Loaded:
    """A checkpoint, original or not, in the class its config names, and transformers' loading info; raises as above."""
    config = AutoConfig.from_pretrained(name, revision=revision)
    cls = named_class(config)
    if cls is None:
        family_of(config.model_type)  # an unsupported architecture is refused before its weights are loaded
        cls = AutoModel
    with _readable(name):
        model, info = cls.from_pretrained(name, revision=revision, output_loading_info=True, use_safetensors=True)
    model.eval()
    return model, info


def load_converted(name: str | Path) -> PreTrainedModel:
    """A converted checkpoint in the Efficient class that its config names.

    Raises:
        ValueError: the checkpoint is not converted, or its weights can't be read.
    """
    config = AutoConfig.from_pretrained(name)
    cls = named_class(config)
    if cls is None or not is_efficient(cls):
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint without efficient attention; convert it first."
        )
    with _readable(name):
        model = cls.from_pretrained(name)
    model.eval()
    return model


@contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """Say which checkpoint it is that can't be read, whatever the reader's own message."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"the weights of {name} can't be read: {error}. Is a file truncated or of another format?"
        ) from error


def load_tokenizer(name: str, revision: str | None) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return None
    # without tokenizer files transformers makes one up, which knows a few special tokens and nothing else
    return tokenizer if len(tokenizer) - len(tokenizer.get_added_vocab()) > 16 else None
