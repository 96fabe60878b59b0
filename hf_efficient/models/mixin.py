"""What every Efficient model class adds to its stock class: installation, loading, and refusing silent fallbacks."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_efficient.attention.base.mechanism import EfficientAttentionConfig
from hf_efficient.attention.base.registry import ConfigLike, attention_configs, get_mechanism, requested_configs
from hf_efficient.experts.install import install_experts
from hf_efficient.experts.layer import ExpertsConfig, expert_layers
from hf_efficient.families import PREFIX, HostModel, family_of
from hf_efficient.families.positions import AS_LONG, LongerInputs
from hf_efficient.models.card import write_first_card
from hf_efficient.models.config import names_of
from hf_efficient.models.in_place import convert_in_place, shared_parameters
from hf_efficient.models.loading import LOCATION_KEYWORDS, Refused, find_weights, read_config, require_host_tensors
from hf_efficient.models.provenance import Provenance, reports_folder, watch
from hf_efficient.patching.call_checks import bound_before_drafts
from hf_efficient.patching.call_inputs import GLOBAL
from hf_efficient.patching.install import install, plan
from hf_efficient.patching.names import IMPLEMENTATION, MODULE_NAME


class EfficientModelMixin:
    """Behaves like the stock class `stock_class`, with the mechanisms of `config.efficient_attention` installed, and the
    experts of `config.efficient_experts`: one of both, or both.
    """

    stock_class: ClassVar[Any]
    all_tied_weights_keys: dict[str, str]
    accepts_loss_kwargs: ClassVar[bool]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        attention, experts = (getattr(config, f"efficient_{part}", None) for part in ("attention", "experts"))
        if not attention and not experts:
            raise ValueError(
                f"{type(self).__name__} needs config.efficient_attention, a list such as [{{'mechanism': 'longformer', "
                "'attention_window': 512}]; to convert a checkpoint use from_pretrained(..., efficient_attention=...)."
            )
        requested = config._attn_implementation
        if attention and requested not in (None, IMPLEMENTATION):
            raise ValueError(
                f"attn_implementation={requested!r} contradicts this checkpoint, whose attention is "
                f"{names_of(attention)}; leave the argument out, or get the original back with hf_efficient.revert."
            )
        if attention:
            config._attn_implementation = IMPLEMENTATION
        config._experts_implementation = None
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        host = HostModel.of(self)  # type: ignore[arg-type]
        host.set_lengths(getattr(config, "efficient_positions", None) or {})
        if attention:
            install(host, plan(host, self._configs_of_stacks(host)), initialise=False)
            self.all_tied_weights_keys.update(shared_parameters(self))  # type: ignore[arg-type]
        if experts:
            install_experts(host, ExpertsConfig.from_dict(experts))
        watch(self)

    @property
    def model_tags(self) -> list[str]:
        """What a pushed model is tagged with: the project, its mechanisms, and the model of the Hub it was made from."""
        if "_model_tags" not in self.__dict__:
            config: Any = self.config  # type: ignore[attr-defined]
            groups = getattr(config, "efficient_attention", None) or []
            base = getattr(config, "efficient_source", {}).get("base_model")
            attention = (
                ["efficient-attention", *dict.fromkeys(group["mechanism"] for group in groups)] if groups else []
            )
            experts = ["sparse-experts"] if getattr(config, "efficient_experts", None) else []
            self.__dict__["_model_tags"] = [
                "hf_efficient",
                *attention,
                *experts,
                *([f"base_model:{base}"] if base else []),
            ]
        tags: list[str] = self.__dict__["_model_tags"]
        return tags

    @model_tags.setter
    def model_tags(self, tags: list[str]) -> None:
        self.__dict__["_model_tags"] = tags

    def _configs_of_stacks(self, host: HostModel) -> list[EfficientAttentionConfig]:
        """The config's groups; a class with only the encoder of an encoder-decoder model drops those of the decoder."""
        groups = attention_configs(host.model.config.efficient_attention)
        sides = [stack.side for stack in host.stacks]
        if "decoder" in sides or not self.stock_class.config_class().is_encoder_decoder:
            return groups
        return [replace(group, side="encoder") for group in groups if group.side != "decoder"]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        ties: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)  # type: ignore[misc]
        return ties | shared_parameters(self)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers initialises other people's classes module by module and skips modules without parameters of their
        # own, where GPT-2 and T5 set the scale of their residual projections and of some heads
        return False

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(self.config, "efficient_attention", None):  # type: ignore[attr-defined]
            super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        elif attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} would silently switch efficient attention off; get the "
                "original model back with hf_efficient.revert(model)."
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        efficient_attention: ConfigLike | None = None,
        max_positions: int | None = None,
        positions: str | None = None,
        rope: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a converted checkpoint, or an original one and convert it on the way.

        Args:
            efficient_attention: for an original checkpoint: the mechanism to convert to, in any form that `convert` takes;
                the options of one that is given by name may stand beside it.
            max_positions, positions, rope: as for `convert`, for an original checkpoint.
            Everything else as for transformers' `from_pretrained`.

        Raises:
            ValueError: an original checkpoint without `efficient_attention`, a converted one with it, a checkpoint of
                another architecture, or converted weights with mechanism tensors missing.
        """
        name, longer = pretrained_model_name_or_path, LongerInputs(max_positions, positions, rope)
        kwargs.setdefault("trust_remote_code", False)
        location = {k: kwargs[k] for k in LOCATION_KEYWORDS if k in kwargs}
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = read_config(name, cls, **location)
        stock_type = cls.stock_class.config_class.model_type
        if config.model_type.removeprefix(PREFIX) != stock_type:
            raise ValueError(
                f"{cls.__name__} loads {stock_type} checkpoints, but {name} is {config.model_type!r}; use the Efficient "
                "class of that architecture, or hf_efficient.convert."
            )
        if config.model_type == stock_type:
            configs = _configs_for(name, config, efficient_attention, kwargs)
            _choose_weights(name, config, kwargs, location)
            wants_info = kwargs.pop("output_loading_info", False)
            model, info = cls.stock_class.from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
            require_host_tensors(name, model, info["missing_keys"])
            Provenance.of(model, reports_folder(name, **location))
            convert_in_place(HostModel.of(model), configs, longer)
            return (model, info) if wants_info else model
        if efficient_attention is not None or longer != AS_LONG:
            raise ValueError(_already(name, config))
        _choose_weights(name, config, kwargs, location)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        _check_complete(name, model, info["missing_keys"])
        Provenance.of(model, reports_folder(name, **location))
        return (model, info) if wants_info else model

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> None:
        # assisted generation announces its drafts to the cache's layers before the first call would replace these
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if model_kwargs.get("past_key_values") is not None:
            bound_before_drafts(self, model_kwargs["past_key_values"], generation_config.is_assistant)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """As transformers'; also writes the reports of what the model was made from (see `Provenance`) and, unless there is
        another, a card."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        if is_main_process:
            Provenance.of(self).write(save_directory)
            write_first_card(Path(save_directory), self)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # save_pretrained(push_to_hub=True) uploads before it returns, and push_to_hub puts an empty card over ours
        Provenance.of(self).write(working_dir)
        write_first_card(Path(working_dir), self, title=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def _choose_weights(name: Any, config: Any, kwargs: dict[str, Any], location: dict[str, Any]) -> None:
    """Say in `kwargs` which files to load, unless the caller did; what holds more than tensors is refused."""
    if name is not None and "use_safetensors" not in kwargs and "gguf_file" not in kwargs:
        weights = find_weights(name, config, kwargs.get("variant"), **location)
        weights.require_tensors_alone()
        kwargs["use_safetensors"] = weights.is_safe


def _configs_for(
    name: Any, config: Any, attention: ConfigLike | None, kwargs: dict[str, Any]
) -> list[EfficientAttentionConfig]:
    """What an original checkpoint is to be converted to."""
    if attention is None:
        raise ValueError(
            f"{name} is an original {config.model_type} checkpoint: say what to convert it to with "
            "efficient_attention='longformer' (or a config), or load it with the stock class."
        )
    if kwargs.get("attn_implementation") not in (None, IMPLEMENTATION):
        raise ValueError(
            f"attn_implementation={kwargs['attn_implementation']!r} contradicts efficient_attention; give one of them."
        )
    if not isinstance(attention, str) or attention.lstrip()[:1] in ("[", "{"):
        attention = attention_configs(attention)
        options = {field.name for one in attention for field in fields(one)}
    else:
        options = {field.name for field in fields(get_mechanism(attention).Config)}
    if "variant" in options and kwargs.get("variant") is not None:
        raise ValueError(
            f"variant={kwargs['variant']!r} means weight files in from_pretrained; give the mechanism's in "
            "efficient_attention={'mechanism': …, 'variant': …}."
        )
    return requested_configs(attention, **{name: kwargs.pop(name) for name in options & kwargs.keys() - {"variant"}})


def _already(name: Any, config: Any) -> str:
    if not getattr(config, "efficient_attention", None):
        return f"{name} has experts; convert it with hf_efficient.convert."
    mechanisms = names_of(config.efficient_attention)
    return f"{name} is already converted, to {mechanisms}; revert it before converting it to something else."


def _check_complete(name: Any, model: Any, missing_keys: list[str]) -> None:
    experts = tuple(f"{layer}." for layer in expert_layers(model))
    missing = sorted(k for k in missing_keys if f".{MODULE_NAME}." in k or (experts and k.startswith(experts)))
    if missing:
        raise Refused(
            f"{name} lacks {len(missing)} tensors of its efficient attention or experts, e.g. {missing[0]}: the "
            "checkpoint is incomplete; convert the original again."
        )
    require_host_tensors(name, model, missing_keys)


def stock_heads(model_type: str) -> list[Any]:
    """Every model class with weights that an architecture's modeling file exports for a model type."""
    modeling = family_of(model_type).modeling
    exported = [getattr(modeling, name) for name in modeling.__all__]
    return [
        cls
        for cls in exported
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and "pretrained" not in cls.__name__.lower()
        and getattr(cls.config_class, "model_type", None) == model_type
    ]


def naming_global_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose signature names `global_attention_mask`, which it has reached through its other keywords so far.

    Who reads signatures then knows of it: the Trainer keeps the column of that name, `generate` takes the keyword. A model
    without global tokens refuses it.
    """
    signature = inspect.signature(forward)
    if GLOBAL in signature.parameters:
        return forward
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    # behind `*args` or a keyword-only parameter there can be no positional one
    kind = max([inspect.Parameter.POSITIONAL_OR_KEYWORD, *(p.kind for p in named)])
    kind = inspect.Parameter.KEYWORD_ONLY if kind > inspect.Parameter.POSITIONAL_OR_KEYWORD else kind
    own = inspect.Parameter(GLOBAL, kind, default=None, annotation=Tensor | None)

    @functools.wraps(forward)
    def naming(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kind is own.POSITIONAL_OR_KEYWORD and len(args) == len(named):  # without `self`: the last one is ours
            args, kwargs[GLOBAL] = args[:-1], args[-1]
        if kwargs.get(GLOBAL) is None:
            kwargs.pop(GLOBAL, None)
        return forward(self, *args, **kwargs)

    naming.__signature__ = signature.replace(parameters=[*named, own, *rest])  # type: ignore[attr-defined]
    return naming


UNTOLD_HEADS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "ForCTC")


def honours_loss_kwargs(stock: Any) -> bool:
    """Whether a stock head's loss divides by `num_items_in_batch`, which it then hands on to `loss_function`.

    The Trainer passes that number to every forward with `**kwargs` and leaves out its own division; a head that ignores it
    would get loss and gradients multiplied by accumulation steps and processes. Heads for classes of texts, pictures and
    sound share a loss that honours it for one of three problem types, and the CTC loss does not: they are not given it.
    """
    if stock.__name__.endswith(UNTOLD_HEADS):
        return False
    return re.search(r"self\.loss_function\([^()]*\*\*", inspect.getsource(stock.forward)) is not None
