"""What can be exported, and what a target of an export has to say: its class, its weights, and what equals the source."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.exporting.names import Names, fill
from hf_efficient.families import HostModel
from hf_efficient.models.in_place import stock_class
from hf_efficient.patching.names import MODULE_NAME

TensorReport = dict[str, dict[str, Any]]
Marks = Callable[[Tensor, Tensor], Tensor]
# what a config says of its own class, or of what can be done with it here
OWN_FIELDS = ("architectures", "attn_implementation", "auto_map", "model_type", "transformers_version")


@dataclass(frozen=True)
class Converted:
    """A converted model that is to be exported, with its tokenizer (`None` = it has none)."""

    host: HostModel
    tokenizer: Any

    @property
    def model(self) -> Any:
        return self.host.model

    @property
    def config(self) -> Any:
        return self.host.model.config

    @property
    def stock(self) -> Any:
        """The stock class of the model."""
        return stock_class(self.host.model)

    @property
    def stock_type(self) -> str:
        return self.host.family.model_type

    @property
    def first(self) -> Any:
        """The options in the first layer of all."""
        return self.mechanisms(self.host.stacks[0].side)[0]

    def mechanisms(self, side: str) -> list[EfficientAttentionConfig | None]:
        """The options in each layer of a stack; `None` = full attention."""
        layers = [layer.module for stack in self.host.stacks if stack.side == side for layer in stack.layers]
        found: list[Any] = [layer._modules.get(MODULE_NAME) for layer in layers]
        return [None if mechanism is None else mechanism.config for mechanism in found]


@dataclass(frozen=True)
class Call:
    """One way to call source and result, which must then agree.

    Attributes:
        marks: (ids, real tokens) to a `global_attention_mask`, all (B, N); `None` = neither is given one.
        is_given: the source is given it as well, in place of its own rule.
        separator_token_id: put three of these into each row, as the pair of texts has that RoBERTa's tokenizer makes.
    """

    marks: Marks | None = None
    is_given: bool = False
    separator_token_id: int | None = None


@dataclass(frozen=True)
class Shapes:
    """Which inputs a class takes, or treats as the source does: lengths above `beyond`, up to `most` (`None` = all that the
    source takes), in multiples of `multiple`; or one `length` alone."""

    beyond: int = 0
    most: int | None = None
    multiple: int = 1
    length: int | None = None
    padding: bool = True


class Target(ABC):
    """What a converted model can be exported to.

    Attributes:
        name: as in `to=`. tolerance: largest relative error by default.
        has_distance: the result must equal something other than the converted model itself; how far it is from that model is
            measured, too.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float] = 1e-5
    has_distance: ClassVar[bool] = False

    @abstractmethod
    def refusals(self, source: Converted) -> list[str]:
        """Why this model can't be exported so, each with the setting that could; empty = it can."""

    @abstractmethod
    def build(self, source: Converted) -> tuple[PreTrainedModel, TensorReport]:
        """The exported model, in eval mode, which shares no memory with the source; and where its tensors are from."""

    @abstractmethod
    def conditions(self, source: Converted) -> list[str]:
        """When the result equals the source: sentences for its card."""

    def cautions(self, source: Converted) -> list[str]:
        """What callers must see to, in sentences: for the card, and said at export."""
        return []

    def usage(self, source: Converted) -> str:
        """Python that calls the result on a `batch` of the tokenizer, with all that it must be given."""
        return "outputs = model(**batch)"

    def shapes(self, source: Converted) -> Shapes:
        """The inputs by which source and result are compared."""
        return Shapes()

    def calls(self, source: Converted) -> list[Call]:
        """The calls by which source and result are compared."""
        return [Call()]

    def expected(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Inside, the converted model computes what the result must equal."""
        return nullcontext()


class ClassTarget(Target):
    """Another model class of transformers, whose tensors are those of the source under other names.

    Attributes:
        prefix: of the names of its classes. stocks: {stock `model_type`: prefix of its classes} of what can become one; a
            checkpoint that was not exported from here becomes the first.
    """

    prefix: ClassVar[str]
    stocks: ClassVar[Mapping[str, str]]

    def head(self, name: str) -> str:
        """The head in the name of a class of the target or of its stocks: `"ForMaskedLM"`, or `"Model"`."""
        return re.sub(f"^({'|'.join((self.prefix, *self.stocks.values()))})", "", name)

    def class_name(self, source: Converted) -> str:
        """Name of the model class in transformers, whether or not there is one."""
        return f"{self.prefix}{self.head(source.stock.__name__)}"

    @abstractmethod
    def config_for(self, source: Converted) -> PreTrainedConfig:
        """The config of the result."""

    @abstractmethod
    def names(self, stock_name: str, mechanism: str) -> Names:
        """The names of the tensors in a stock class with a mechanism, and in the class that it is exported to."""

    @abstractmethod
    def options_of(self, model: Any) -> dict[str, Any]:
        """The mechanism, as JSON, that computes what the attention of a model of the other class does.

        Raises:
            ValueError: there is none.
        """

    def imported_name(self, name: str, original: str | None = None) -> str:
        """The stock class that a class of the target becomes: of the architecture of the `original` class, if it had one.

        Raises:
            ValueError: there is none.
        """
        prefix = next(iter(self.stocks.values())) if original is None else original.removesuffix(self.head(original))
        if prefix not in self.stocks.values():
            raise ValueError(f"{original} is not among what a {self.prefix} is exported from: nothing was imported.")
        return f"{prefix}{self.head(name)}"

    def keywords(self, source: Any) -> dict[str, bool]:
        """The keywords that the class of the target is made with for a source."""
        return without_pooler(source)

    def imported_keywords(self, theirs: Any) -> dict[str, bool]:
        """The keywords that the stock class is made with for a model of the target."""
        return without_pooler(theirs)

    def keeps(self, attention: list[dict[str, Any]], theirs: Any) -> bool:
        """Whether a model that was exported from these mechanisms, and has the options that it had then, is still what they
        compute."""
        return True

    def complete(self, config: PreTrainedConfig, tensors: dict[str, Tensor], theirs: Any) -> None:
        """Put into an imported model's config and tensors what names and shared fields leave out, and drop what it has no
        place for."""

    def tensors(self, source: Converted) -> tuple[dict[str, Tensor], TensorReport]:
        """The tensors of the result, under its names, and where they are from."""
        found: dict[str, Tensor] = {}
        report: TensorReport = {}
        names = self.names(source.stock.__name__, source.first.mechanism)
        for ours, tensor in source.model.state_dict().items():
            there = names.there(ours)
            if there in found or names.here(there) != ours:
                raise ValueError(f"{ours} and {names.here(there)} would both be {there}: nothing was exported.")
            found[there] = tensor
            report[there] = {"status": "copied", "from": ours, "shape": list(tensor.shape)}
        return found, report

    def build(self, source: Converted) -> tuple[PreTrainedModel, TensorReport]:
        model = getattr(transformers, self.class_name(source))(self.config_for(source), **self.keywords(source.model))
        model.to(source.model.device)
        tensors, report = self.tensors(source)
        fill(model, tensors)
        if source.model.can_generate() and model.can_generate():
            model.generation_config = type(model.generation_config).from_dict(source.model.generation_config.to_dict())
        return model.eval(), report


def without_pooler(model: Any) -> dict[str, bool]:
    """The keyword that a bare model was made with which has no pooling layer."""
    return {"add_pooling_layer": False} if getattr(model, "pooler", 0) is None else {}


def shared_values(config: PreTrainedConfig, config_class: Any) -> dict[str, Any]:
    """The values of a config that another config class has a field for; labels and the like are among them."""
    known = {field.name for field in fields(config_class)} - set(OWN_FIELDS)
    values: Mapping[str, Any] = config.to_dict()
    return {name: value for name, value in values.items() if name in known}
