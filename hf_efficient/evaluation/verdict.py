"""Whether a converted model is closer to its source than one without attention: the sentence beside the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from hf_efficient.conversion.loading import takes_pictures
from hf_efficient.conversion.offloading import is_on_disk
from hf_efficient.corpus import text_batches
from hf_efficient.evaluation.controls import MeanOfValues, MeanOfValuesConfig
from hf_efficient.evaluation.fidelity import compare, unknown_share
from hf_efficient.patching.exact import eval_mode, exact_attention, substituted

MARGIN = 0.9
"""A model is better than a control if it is at most this share of the control's distance away from the source."""
MOSTLY_UNKNOWN = 0.3
NAMES = {"mean of values": ("no attention", "without attention"), "window only": ("its window alone", "window alone")}
LENGTH = 512


def verdict(figures: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare a model's fidelity with that of its controls.

    The distance is the head's `kl`, of a score its relative error, of models without a head 1 - the cosine of embeddings.

    Args:
        figures: see `compare`. controls: {name: the figures of a control}, see `controls`.

    Returns:
        `figure`, its `value`, that of each of the `controls`, `better` (than no attention; `None` = not compared), and
        `text`, a sentence with all numbers. NaN is never better.
    """
    figure = next((name for name in ("kl", "score_error") if name in figures), "embedding_cosine")
    word, values = figure.replace("_", " "), {name: control.get(figure) for name, control in controls.items()}
    better, parts = {}, []
    for name, value in values.items():
        than, beside = NAMES[name]
        better[name] = _is_closer(figure, figures[figure], value)
        how = f"closer to the source than {than}" if better[name] else f"no better than {than}"
        parts.append(f"{how}: {word} {figures[figure]:.4g}, {beside} {value:.4g}")
    found = {"figure": figure, "value": figures[figure], "controls": values, "better": better.get("mean of values")}
    return found | {"text": "; ".join(parts) or None}


def _is_closer(figure: str, value: float, control: Any) -> bool:
    distance, limit = (1 - value, 1 - control) if figure == "embedding_cosine" else (value, control)
    return bool(distance <= max(MARGIN * limit, 1e-6))


class _Unconverted:
    """The model before its conversion, for `compare`."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def __call__(self, **batch: Any) -> Any:
        with exact_attention(self.model):
            return self.model(**batch)


def quick_verdict(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """The `verdict` of a model just converted, against itself with full attention, on a few texts; no second copy is made.

    Returns:
        The same; where it can't be measured (no tokenizer, texts in another language than the tokenizer's, a model of
        sound, or inputs that the model refuses) only `better`, `None`, and the reason in `text`.
    """
    if takes_pictures(model):
        return {"better": None, "text": "not measured: use hf-efficient verify, which draws pictures"}
    if model.main_input_name != "input_ids":
        name = type(model).__name__
        return {
            "better": None,
            "text": f"not measured: {name} reads {model.main_input_name}, of which there is no sample",
        }
    if is_on_disk(model):
        return {
            "better": None,
            "text": "not measured: the weights are on the disk; use hf-efficient verify --sample-layers",
        }
    if tokenizer is None:
        return {"better": None, "text": "not measured: there is no tokenizer"}
    limit = getattr(model.config, "efficient_source", {}).get("max_positions") or LENGTH
    batches = text_batches(tokenizer, texts, min(limit, LENGTH), 1, model)
    share = unknown_share(tokenizer, batches)
    if share > MOSTLY_UNKNOWN:
        why = f"{share:.0%} of the sample text's tokens are unknown to the tokenizer; use hf-efficient verify with --texts"
        return {"better": None, "text": f"not measured: {why}"}
    try:
        with eval_mode(model):
            figures = compare(model, _Unconverted(model), batches)  # type: ignore[arg-type]
            with substituted(model, lambda mechanism: MeanOfValues(MeanOfValuesConfig(), mechanism.geometry)):
                control = compare(model, _Unconverted(model), batches)  # type: ignore[arg-type]
    except ValueError as error:
        return {"better": None, "text": f"not measured: {error}"}
    return verdict(figures, {"mean of values": control}) | {"tokens": sum(b["input_ids"].numel() for b in batches)}
