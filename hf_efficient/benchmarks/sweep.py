"""Every model type of the installed transformers: converted exactly, refused with a reason, or what else happens.

    python -m hf_efficient.benchmarks.sweep --out sweep.json [--types llama,bart] [--again crash,silent] [--seconds 30]

Each type is one tiny random model. Full attention by windows of at least twice its length must equal the eager source, a
small window must differ, and undoing must give the source's tensors bit for bit. The keywords are recorded that its layers
hand to the attention function: each must be honoured, harmless, or refused by name. Types that the file has already are left
alone, but for outcomes named by `--again`.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_efficient.conversion.convert import convert
from hf_efficient.families import GenericFamily, HostModel, families
from hf_efficient.families.probe import probe_inputs, real_part, token_outputs
from hf_efficient.models.in_place import revert
from hf_efficient.patching.dispatch import efficient_attention_forward
from hf_efficient.patching.keywords import HARMLESS, REFUSED
from hf_efficient.patching.names import IMPLEMENTATION
from hf_efficient.patching.temporary import patch_attention
from hf_efficient.profiling.environment import versions
from hf_efficient.profiling.json_files import read_json, write_json
from hf_efficient.testing.tiny import tiny_model

TOLERANCE, TOLERANCE_FP64 = 1e-5, 1e-9
LENGTH, WIDE, NARROW = 96, 2**14, 8
OUTCOMES = ("exact", "refused", "own attention code", "composite", "no tiny model", "crash", "silent")
FAULTS = ("crash", "silent")
USUAL = {"query", "key", "value", "attention_mask", "dropout", "scaling"}
REASONS = {
    "WINDOW": "own window of|windows of different|window of the config",
    "MASK": "custom mask function|which its model made itself",
    "BIAS": "position_bias|relative bias|toeplitz",
    "KEYWORD": "does not honour",
    "CAUSALITY": "asks for (causal|bidirectional|is_causal)|config.is_causal",
    "MLA": r"latent attention|do not fit: \(B, H",
    "LOGITS": "softcap=|sinks",
    "SHARED": "layers that share a module|share one module",
    "CACHE": "cache whose keys are longer|keys for [0-9]+ tokens|cache of its own",
    "WEIGHTS": "these weights can't be read",
    "PROOF": "could not be proved",
    "NO FAMILY": "no model family",
}
"""{reason: what its error says}, in this order: the whole list, and anything else is a crash."""
logger = logging.getLogger(f"transformers.{__name__}")


def model_types() -> list[str]:
    """All that transformers has a model for."""
    return sorted(name for name in MODEL_MAPPING_NAMES if name in CONFIG_MAPPING)


def reason_of(error: Exception) -> str | None:
    """Which of `REASONS` an error of this package gives; `None` = it is none of ours."""
    if not isinstance(error, (ValueError, RuntimeError)):
        return None
    return next((reason for reason, text in REASONS.items() if re.search(text, str(error))), None)


def check(model_type: str) -> dict[str, Any]:
    """The outcome of one model type, with its figures or its reason."""
    config_class: Any = CONFIG_MAPPING[model_type]
    parts = sorted({getattr(c, "model_type", "") for c in (getattr(config_class, "sub_configs", None) or {}).values()})
    try:
        if not GenericFamily(model_type=model_type).has_attention and model_type not in families():
            return {"outcome": "composite" if parts else "own attention code", "parts": parts}
        model = tiny_model(model_type, positions=160)
        model.set_attn_implementation("eager")
        inputs = probe_inputs(model, LENGTH, seed=1)
        expected = _run(model, inputs)
    except Exception as error:  # the stock model itself: nothing of ours has run
        outcome = "composite" if parts else "no tiny model"
        return {"outcome": outcome, "parts": parts, "reason": _text(error)[:200]}
    own = model.config.model_type
    facts: dict[str, Any] = {"written": own in families()}
    names: set[str] = set()
    try:
        stacks = HostModel.of(model).stacks
        sides = sorted({stack.side for stack in stacks})
        facts |= {"sides": sides, "layers": sum(len(stack.layers) for stack in stacks)}
        with _keywords(names):
            found = _compared(model, inputs, expected, "both" if len(sides) == 2 else sides[0])
        return found | facts | {"keywords": sorted(names)}
    except Exception as error:
        facts["keywords"] = sorted(names)
        text = _text(error)[-300:]
        if "does not go through AttentionInterface" in str(error):
            return {"outcome": "composite" if parts else "own attention code", "reason": text} | facts
        reason = reason_of(error)
        outcome = "crash" if reason is None else "refused"
        return {"outcome": outcome, "reason": reason or "", "error": text} | facts


@contextmanager
def _keywords(names: set[str]) -> Iterator[None]:
    """Inside, the keywords that hosts give the attention function are added to `names`, but for those of every host."""

    def recorded(module: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name for name, value in kwargs.items() if value is not None and not name.startswith("efficient_")}
        names.update(given - USUAL)
        return efficient_attention_forward(module, *args, **kwargs)

    AttentionInterface.register(IMPLEMENTATION, recorded)
    try:
        yield
    finally:
        AttentionInterface.register(IMPLEMENTATION, efficient_attention_forward)


def unknown_keywords(types: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """{model type: keywords that reached the attention function and are neither honoured, nor harmless, nor refused}."""
    honoured = inspect.signature(efficient_attention_forward).parameters
    known = {*honoured, *HARMLESS, *REFUSED, "output_attentions"}
    found = {name: [word for word in one.get("keywords", ()) if word not in known] for name, one in types.items()}
    return {name: words for name, words in found.items() if words}


def _text(error: Exception) -> str:
    """An error on one line, without paths of this machine."""
    return re.sub(r"/\S+/\S*", "…", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _compared(model: Any, inputs: dict[str, Tensor], expected: Tensor, side: str) -> dict[str, Any]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = convert(model, "local", attention_window=WIDE, side=side)
    exact = _error(_run(result.model, inputs), expected, inputs)
    revert(result.model)
    if any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()):
        return {"outcome": "silent", "reason": "revert gave other tensors"}
    with patch_attention(model, "local", attention_window=NARROW, side=side):
        small = _error(_run(model, inputs), expected, inputs)
    facts = {"exact": exact, "small window": small}
    if exact <= TOLERANCE and small > 100 * exact:
        return {"outcome": "exact"} | facts
    # rounding of an ill-conditioned random model is told from a real difference in fp64
    model, inputs = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    model.set_attn_implementation("eager")
    expected = _run(model, inputs)
    with patch_attention(model, "local", attention_window=WIDE, side=side):
        exact = _error(_run(model, inputs), expected, inputs)
    return {"outcome": "exact" if exact <= TOLERANCE_FP64 and small > exact else "silent", "exact fp64": exact} | facts


@torch.no_grad()
def _run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # masked autoencoders draw what they hide
    return token_outputs(model(**inputs))


def _error(actual: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> float:
    actual, expected = (real_part(x, inputs) for x in (actual, expected))
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class _TooLong(BaseException):
    pass


def timed(model_type: str, seconds: int) -> dict[str, Any]:
    """`check` within a limit of time."""

    def stop(*_: Any) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return check(model_type)
    except _TooLong:
        return {"outcome": "no tiny model", "reason": f"more than {seconds} s"}
    finally:
        signal.alarm(0)


def main() -> int:
    """Run the types that are asked for and not yet recorded; the exit code is 1 if any is a fault, or a keyword unknown."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="", help="comma-separated; default: all")
    parser.add_argument("--again", default="", help="outcomes to run again, comma-separated, or 'all'")
    parser.add_argument("--seconds", type=int, default=30, help="limit for one type")
    options = parser.parse_args()
    names = options.types.split(",") if options.types else model_types()
    again = OUTCOMES if options.again == "all" else options.again.split(",")
    recorded: dict[str, Any] = read_json(options.out)["types"] if options.out.exists() else {}
    todo = [name for name in names if name not in recorded or recorded[name]["outcome"] in again]
    transformers.logging.set_verbosity_error()
    for number, name in enumerate(todo, 1):
        recorded[name] = timed(name, options.seconds)
        print(f"{number}/{len(todo)} {name}: {recorded[name]['outcome']}", flush=True)
        write_json(options.out, {"types": dict(sorted(recorded.items())), "versions": versions()})
    print(Counter(one["outcome"] for one in recorded.values()))
    unknown = unknown_keywords(recorded)
    print(f"unknown keywords: {unknown or 'none'}")
    return int(bool(unknown) or any(one["outcome"] in FAULTS for one in recorded.values()))


if __name__ == "__main__":
    raise SystemExit(main())
