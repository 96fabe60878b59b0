"""transformers' Longformer classes from BERT, RoBERTa and their relatives with `longformer` or `local`, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LongformerConfig, PreTrainedConfig

from hf_efficient.attention.base.registry import attention_config
from hf_efficient.exporting.names import Names
from hf_efficient.exporting.target import Call, ClassTarget, Converted, TensorReport, shared_values
from hf_efficient.families import efficient_type
from hf_efficient.ops.global_tokens import up_to_separator

MECHANISMS = ("longformer", "local")
MARKING = ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
GLOBAL_PROJECTION = "encoder.layer.*.attention.self.{}*_global.*"
BERT_HEADS = {
    "ForMaskedLM": (
        ("cls.predictions.transform.dense.*", "lm_head.dense.*"),
        ("cls.predictions.transform.LayerNorm.*", "lm_head.layer_norm.*"),
        ("cls.predictions.*", "lm_head.*"),
    ),
    # the pooler and the linear layer behind it are the two layers of one head there
    "ForSequenceClassification": (
        ("bert.pooler.dense.*", "classifier.dense.*"),
        ("classifier.*", "classifier.out_proj.*"),
    ),
}
PROJECTION = re.compile(r"(.*\.(?:attention\.self|longformer_self_attn)\.)(query|key|value)\.(weight|bias)")
POSITIONS = "embeddings.position_embeddings.weight"


class LongformerTarget(ClassTarget):
    """`Longformer…` of the same head. Its windows, its global tokens and their projections are those of `longformer`.

    Attributes:
        heads: there are classes with. marking: heads whose class marks tokens itself where a call gives no
            `global_attention_mask`. rules: what they mark, as far as it is a rule here; multiple choice marks what is behind
            the question.
    """

    name = "longformer"
    prefix = "Longformer"
    stocks: ClassVar[Mapping[str, str]] = {
        "roberta": "Roberta",
        "xlm-roberta": "XLMRoberta",
        "camembert": "Camembert",
        "bert": "Bert",
    }
    heads: ClassVar[tuple[str, ...]] = ("Model", "ForMaskedLM", "ForTokenClassification", *MARKING)
    marking: ClassVar[tuple[str, ...]] = MARKING
    rules: ClassVar[Mapping[str, str]] = {
        "ForSequenceClassification": "first",
        "ForQuestionAnswering": "before_separator",
    }

    def names(self, stock_name: str, mechanism: str) -> Names:
        prefix = "bert" if stock_name.startswith("Bert") else "roberta"
        ours, theirs = GLOBAL_PROJECTION.format("efficient."), GLOBAL_PROJECTION.format("")
        heads = BERT_HEADS.get(self.head(stock_name), ()) if prefix == "bert" else ()
        inside = ((f"{prefix}.{ours}", f"longformer.{theirs}"), (f"{prefix}.*", "longformer.*"))
        return Names((*heads, *inside, (ours, theirs)))

    # ---- what can't be said in a Longformer ----------------------------------------------------------------------

    def refusals(self, source: Converted) -> list[str]:
        config = source.config
        if source.stock_type not in self.stocks:
            return self._refused_class(source)
        is_decoder = getattr(config, "is_decoder", False)
        reasons = [*([] if is_decoder else self._refused_attention(source)), *self._refused_class(source)]
        if is_decoder:
            reasons.append("is_decoder=True: a Longformer looks both ways, so convert the model with is_decoder=False")
        if config.pad_token_id is None:
            reasons.append(
                "pad_token_id=None: a Longformer counts positions from it, so set it to that of the tokenizer"
            )
        is_bert = source.stock_type == "bert"
        if is_bert and self.head(source.stock.__name__) == "ForMaskedLM" and config.hidden_act != "gelu":
            reasons.append(
                f"hidden_act={config.hidden_act!r}: LongformerForMaskedLM has gelu in its head whatever its config says; "
                "export a BertModel or another head, or use to='stock'"
            )
        return reasons

    def _refused_class(self, source: Converted) -> list[str]:
        if source.stock_type not in self.stocks:
            return [
                f"{source.stock_type} has no {self.prefix} class, which {', '.join(self.stocks)} "
                f"ha{'ve' if len(self.stocks) > 1 else 's'}: to='stock' takes any model"
            ]
        head = self.head(source.stock.__name__)
        if head in self.heads:
            return []
        return [f"there is no {self.prefix}{head}: load the checkpoint as one of {', '.join(self.heads)} and save it"]

    def _refused_attention(self, source: Converted) -> list[str]:
        found = source.mechanisms("encoder")
        exact = [i for i, one in enumerate(found) if one is None]
        if exact:
            return [
                f"layers {exact} keep full attention, which no {self.prefix} layer has: convert all layers, with "
                "longformer and an attention_window for each; one of at least twice the longest input is full attention"
            ]
        options: Any = found[0]
        if any(_without_window(other) != _without_window(options) for other in found):
            kinds = dict.fromkeys(one.mechanism for one in found if one is not None)
            return [
                f"layers differ ({', '.join(kinds)}): all layers of a {self.prefix} have the options of one mechanism, "
                "but for attention_window; convert all layers with longformer or with local"
            ]
        if options.mechanism not in MECHANISMS:
            return [
                f"{options.mechanism} has no {self.prefix} class: convert with longformer or local, or use to='stock'"
            ]
        return self._refused_options(options)

    def _refused_options(self, options: Any) -> list[str]:
        reasons = []
        if options.dilation != 1:
            reasons.append(f"dilation={options.dilation}: {self.prefix} has none, so convert with dilation=1")
        if getattr(options, "sink_tokens", 0):
            reasons.append(
                f"sink_tokens={options.sink_tokens}: {self.prefix} has none; longformer with "
                "global_tokens='first' is nearest"
            )
        rule = getattr(options, "global_tokens", "none")
        if isinstance(rule, tuple):
            reasons.append(
                f"global_tokens={list(rule)}: no {self.prefix} class holds positions; convert with global_tokens='first' or "
                "'none', and give global_attention_mask in the calls of the result"
            )
        if rule == "question":
            reasons.append(
                "global_tokens='question' marks the separator as well, and transformers' classes what is before it: convert "
                "with global_tokens='before_separator'"
            )
        return reasons

    # ---- config and tensors --------------------------------------------------------------------------------------

    def config_for(self, source: Converted) -> PreTrainedConfig:
        config = LongformerConfig(**shared_values(source.config, LongformerConfig))
        config.attention_window = self._windows(source)
        config.max_position_embeddings += self._padding_rows(source)
        config.sep_token_id = self._separator(source)
        return config

    def _windows(self, source: Converted) -> list[int]:
        found: list[Any] = source.mechanisms("encoder")
        return [_window(one, layer) for layer, one in enumerate(found)]

    def _separator(self, source: Converted) -> int | None:
        """None is refused by the class where it needs one, and another token would be taken for one."""
        rule = getattr(source.first, "separator_token_id", None)
        of_text = getattr(source.tokenizer, "sep_token_id", None)
        stored = getattr(source.config, "sep_token_id", None)
        return next((one for one in (rule, of_text, stored) if one is not None), None)

    def _padding_rows(self, source: Converted) -> int:
        """Rows of the position table that a Longformer has for padding, and BERT has not."""
        return source.config.pad_token_id + 1 if source.stock_type == "bert" else 0

    def tensors(self, source: Converted) -> tuple[dict[str, Tensor], TensorReport]:
        found, report = super().tensors(source)
        for name, tensor in list(found.items()):
            rows = self._padding_rows(source)
            if name.endswith(POSITIONS) and rows:
                found[name] = torch.cat([tensor[:1].expand(rows, -1), tensor])
                report[name] |= {"status": "extended", "shape": list(found[name].shape)}
                report[name]["from"] += f", after {rows} rows for padding, which no token has"
            # windows alone use no global projections
            if parts := PROJECTION.fullmatch(name):
                ours = "{}{}_global.{}".format(*parts.groups())
                origin = {"status": "initialised", "from": f"copy of {name}", "shape": list(tensor.shape)}
                report.setdefault(ours, origin)
                found.setdefault(ours, tensor)
        return found, report

    # ---- from a Longformer ---------------------------------------------------------------------------------------

    def options_of(self, model: Any) -> dict[str, Any]:
        rule = self.rules.get(self.head(type(model).__name__), "none")
        separator = model.config.sep_token_id if rule == "before_separator" else None
        if rule == "before_separator" and separator is None:
            rule = "none"  # the class marks nothing then, and takes no call without a mask
        windows = list(model.config.attention_window)
        return attention_config(
            "longformer", attention_window=windows, global_tokens=rule, separator_token_id=separator
        ).to_dict()

    def keeps(self, attention: list[dict[str, Any]], theirs: Any) -> bool:
        if attention[0]["mechanism"] != "local":
            return True
        # global projections that are no copies by now serve whoever marks tokens
        tensors = theirs.state_dict()
        pairs = [(tensors[name], tensors[name.replace("_global.", ".")]) for name in tensors if "_global." in name]
        return all(torch.equal(ours, copied) for ours, copied in pairs)

    def complete(self, config: PreTrainedConfig, tensors: dict[str, Tensor], theirs: Any) -> None:
        config.sep_token_id = theirs.config.sep_token_id
        self._drop_copies(config, tensors)
        if config.model_type == efficient_type("bert"):
            rows = theirs.config.pad_token_id + 1
            for name in [name for name in tensors if name.endswith(POSITIONS)]:
                tensors[name] = tensors[name][rows:]
                config.max_position_embeddings = len(tensors[name])

    def _drop_copies(self, config: Any, tensors: dict[str, Tensor]) -> None:
        """Windows alone have no global projections."""
        if config.efficient_attention[0]["mechanism"] == "local":
            for name in [name for name in tensors if "_global." in name]:
                del tensors[name]

    # ---- calls ---------------------------------------------------------------------------------------------------

    def calls(self, source: Converted) -> list[Call]:
        options = source.first
        rule, head = getattr(options, "global_tokens", "none"), self.head(source.stock.__name__)
        separator = getattr(options, "separator_token_id", None)
        if self._marks_itself(source):
            return [Call(separator_token_id=separator)]
        if rule == "none":
            marks = _no_tokens if head in self.marking else None
            given = [Call(_some_tokens, is_given=True)] if options.mechanism == "longformer" else []
            return [Call(marks), *given]
        return [Call(first_tokens if rule == "first" else _Question(separator), separator_token_id=separator)]

    def usage(self, source: Converted) -> str:
        options = source.first
        rule, head = getattr(options, "global_tokens", "none"), self.head(source.stock.__name__)
        if self._marks_itself(source) or (rule == "none" and head not in self.marking):
            return super().usage(source)
        lines = ['ids = batch["input_ids"]', "mask = torch.zeros_like(ids)"]
        if rule == "first":
            lines.append("mask[..., 0] = 1  # each row's first token is global")
        if rule == "before_separator":
            is_question = f"(ids == {options.separator_token_id}).cumsum(-1) == 0"
            lines[1] = f"mask = ({is_question}).long()  # the tokens before the first separator are global"
        return "\n".join([*lines, "outputs = model(**batch, global_attention_mask=mask)"])

    def _marks_itself(self, source: Converted) -> bool:
        """Whether the class of a head marks the very tokens of the source's rule."""
        rule = getattr(source.first, "global_tokens", "none")
        return bool(self.rules.get(self.head(source.stock.__name__)) == rule)

    def conditions(self, source: Converted) -> list[str]:
        found = ["Equal to the converted model for texts of any length that its position table holds."]
        if self._marks_itself(source):
            found.append("The class marks the global tokens itself; a `global_attention_mask` replaces its choice.")
        return found

    def _must_mark(self, source: Converted) -> list[str]:
        if self.usage(source) == super().usage(source):
            return []
        return ["Calls must give `global_attention_mask` as shown: this class does not know the rule of the source."]

    def cautions(self, source: Converted) -> list[str]:
        found, head = self._must_mark(source), self.head(source.stock.__name__)
        if source.stock_type == "bert":
            found.append(
                "Pad on the right only: a Longformer counts positions from a row's first token that is not padding, and "
                "BERT from the left edge. `position_ids` in a call are those of BERT plus "
                f"{self._padding_rows(source)}, and the padding token stands nowhere else."
            )
        elif head == "ForSequenceClassification":
            found.append("Pad on the right: this class marks the first column as global, padding or not.")
        if head in ("ForQuestionAnswering", "ForMultipleChoice"):
            found.append("Without `global_attention_mask` this class takes texts with exactly three separators.")
        return found


def _window(options: Any, layer: int) -> int:
    window = options.attention_window
    return window[layer] if isinstance(window, tuple) else window


def _without_window(options: Any) -> Any:
    if options.mechanism not in MECHANISMS:
        return options
    return replace(options, attention_window=2, layers=None, side=None, implementation="auto")


def first_tokens(ids: Tensor, real: Tensor) -> Tensor:
    """(B, N) marks of each row's first column; rows are padded on the right."""
    return (torch.arange(ids.shape[-1], device=ids.device) == 0).long().expand(ids.shape)


def _no_tokens(ids: Tensor, real: Tensor) -> Tensor:
    return torch.zeros_like(ids)


def _some_tokens(ids: Tensor, real: Tensor) -> Tensor:
    """Every seventh token and the first one, as far as they are real."""
    return ((torch.arange(ids.shape[-1], device=ids.device) % 7 == 0) & real.bool()).long().expand(ids.shape)


class _Question:
    def __init__(self, separator: Any):
        self.separator = separator

    def __call__(self, ids: Tensor, real: Tensor) -> Tensor:
        return up_to_separator(ids, self.separator, real.bool(), "before_separator").long()
