"""verify: checks from bit-equal tensors over the exact limit to fidelity, next to its controls."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as progress_bars

from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.conversion.loading import load_converted, load_stock, load_tokenizer, takes_pictures
from hf_efficient.corpus import offline_texts, ragged, text_batches
from hf_efficient.evaluation.controls import control_figures, controls
from hf_efficient.evaluation.cost import compare_with_full_attention
from hf_efficient.evaluation.fidelity import compare, output_mask, real_tokens, relative_difference, run, unknown_share
from hf_efficient.evaluation.layerwise import verify_layers
from hf_efficient.evaluation.pictures import picture_batches
from hf_efficient.evaluation.report import Check, FidelityReport
from hf_efficient.evaluation.tensors import copied_tensors, fill, fresh_tensors
from hf_efficient.evaluation.verdict import MOSTLY_UNKNOWN
from hf_efficient.experts.layer import expert_layers
from hf_efficient.families import SOUND, HostModel, family_of
from hf_efficient.models.mixin import EfficientModelMixin
from hf_efficient.models.provenance import Provenance
from hf_efficient.patching.exact import eval_mode
from hf_efficient.patching.temporary import patch_attention
from hf_efficient.profiling.json_files import finite
from hf_efficient.profiling.memory import fresh_python

logger = logging.getLogger(f"transformers.{__name__}")

EXACT_TOLERANCE = 1e-5
DOUBLE_TOLERANCE = 1e-8
EXACT_LENGTH = 128


def verify(
    model: PreTrainedModel | str | Path,
    source: PreTrainedModel | str | Path,
    texts: Sequence[str] | Sequence[Mapping[str, Tensor]] | None,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    batch_size: int = 4,
    max_length: int | None = None,
    speed_lengths: Sequence[int] = (),
    sample_layers: int | None = None,
    progress: bool | None = None,
) -> FidelityReport:
    """Compare a converted or upcycled model with its source, check by check.

    Args:
        model: converted model, or folder or id of a converted checkpoint.
        source: the stock model it came from, or its folder or id; of a converted model also one with experts.
        texts: real text; each is cut to `max_length`. Of models of pictures: batches of their inputs. `None` = those that
            need no download (`offline_texts`, `picture_batches`).
        tokenizer: that of `model`'s folder if not given, or of `source`'s where it has none; needed if neither is a path.
        revision, subfolder: where `source` is a repository or folder: which state of it, and the folder inside.
        max_length: tokens per text; `None` = the source's position table (512 where there is none).
        speed_lengths: lengths at which to measure time and memory against full SDPA attention; none by default.
        sample_layers: check so many layers alone, each on the inputs that it has in the source, with the weights of both
            checkpoints on the disk: see `evaluation.layerwise`. Needs accelerate, and memory for one layer.
        progress: show a bar; `None` = as transformers' verbosity and progress bars are set.

    Returns:
        A report whose `passed` is False if a check failed. A warning is given where most of the text is unknown to the
        tokenizer, since figures on such texts say little.

    Raises:
        ValueError: no texts, no tokenizer, or a model that is not converted, or reads sound.
    """
    place = {key: value for key, value in (("revision", revision), ("subfolder", subfolder)) if value is not None}
    if sample_layers is not None:
        if speed_lengths:
            raise ValueError(f"speed_lengths={speed_lengths} needs whole models in memory: leave sample_layers out.")
        tokenizer = tokenizer or _tokenizer_of((model, {}), (source, place))
        return verify_layers(model, source, texts, sample_layers, max_length, tokenizer, **place)  # type: ignore[arg-type]
    path = None if isinstance(model, PreTrainedModel) else Path(model)
    converted = _converted(model)
    if converted.main_input_name in SOUND:
        raise ValueError(
            f"{type(converted).__name__} reads {converted.main_input_name}: models of texts and of pictures can be verified."
        )
    if tokenizer is None and not takes_pictures(converted):
        tokenizer = _tokenizer_of((model, {}), (source, place))
    stock, fresh = _source_of(converted, source, place)
    with eval_mode(converted), eval_mode(stock):
        batches, short, figures = _material(tokenizer, texts, stock, batch_size, max_length)
        if takes_pictures(stock) and speed_lengths:
            raise ValueError(
                f"speed_lengths={speed_lengths} are lengths of texts, and {type(stock).__name__} reads pictures."
            )
        provenance = Provenance.of(converted)
        tensors, weights = copied_tensors(converted, stock, provenance.since(stock.config._name_or_path), fresh)
        checks: list[Any] = [
            lambda: tensors,
            lambda: _exact_limit(converted, stock, short),
            lambda: _fidelity(converted, stock, batches),
            *_controls(converted, stock, batches),
            lambda: _padding(converted, short),
            lambda: _fresh_process(converted, short, path),
            lambda: _decoding(converted, short),
            lambda: _speed(converted, stock, speed_lengths),
        ]
        quiet = progress_bars.get_verbosity() > logging.WARNING if progress is None else not progress
        outcomes = [check() for check in progress_bars.tqdm(checks, desc="verify", disable=quiet, unit="check")]
    settings = {
        "source": stock.config._name_or_path,
        "efficient_attention": converted.config.efficient_attention,
        "efficient_experts": getattr(converted.config, "efficient_experts", None),
        **figures,
        "dtype": str(converted.dtype),
        "threads": torch.get_num_threads(),
    }
    weights["steps"] = len(provenance.history)
    return FidelityReport(outcomes, settings, weights=weights)


def _material(
    tokenizer: Any, texts: Any, stock: Any, batch_size: int, max_length: int | None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, Any]]:
    """All batches, a short one, and how much there is: `texts`, `tokens`, `unknown_tokens` and `max_length`."""
    limit = HostModel.of(stock).max_positions or 512
    if takes_pictures(stock):
        batches = [dict(batch) for batch in (picture_batches(stock) if texts is None else texts) if _is_batch(batch)]
        if not batches or (texts is not None and len(batches) < len(texts)) or max_length is not None:
            raise ValueError(
                f"{type(stock).__name__} reads pictures: give batches such as {{'pixel_values': …}} instead of texts, or "
                "None for drawn ones, and no max_length."
            )
        count = sum(len(next(iter(batch.values()))) for batch in batches)
        tokens = sum(int(real_tokens(b, run(stock, b)["hidden"][-1]).sum()) for b in batches)
        return batches, batches[0], {"texts": count, "tokens": tokens, "unknown_tokens": 0.0, "max_length": limit}
    texts = offline_texts() if texts is None else texts
    if not texts:
        raise ValueError("no texts to verify with; hf_efficient.corpus.offline_texts() has some.")
    length = min(max_length or limit, limit)
    batches = text_batches(tokenizer, texts, length, batch_size, stock)
    share = unknown_share(tokenizer, batches)
    _warn_of_unknown(share)
    few = texts[: max(2, batch_size // 2)]
    short = text_batches(tokenizer, few, min(EXACT_LENGTH, length), batch_size, stock)[0]
    tokens = int(sum(b["attention_mask"].sum() for b in batches))
    figures = {"texts": len(texts), "tokens": tokens, "unknown_tokens": share, "max_length": length}
    return batches, ragged(short, stock.config.pad_token_id), figures


def _is_batch(given: Any) -> bool:
    return isinstance(given, Mapping)


def _converted(model: PreTrainedModel | str | Path) -> Any:
    """The converted model, loaded where a folder or id is given."""
    if not isinstance(model, PreTrainedModel):
        model = load_converted(model)
    if not isinstance(model, EfficientModelMixin):
        raise ValueError(f"{type(model).__name__} is not a converted model: convert or upcycle it first, then verify.")
    return model


def _source_of(model: Any, source: PreTrainedModel | str | Path, place: dict[str, str]) -> tuple[Any, set[str]]:
    """The stock model, loaded where a folder or id is given, and the tensors that it did not have for the converted one."""
    fresh = fresh_tensors(model)
    if not isinstance(source, PreTrainedModel):
        # read as what was converted, whatever its own config leaves out
        source, info = load_stock(str(source), model_class=type(model).stock_class, **place)
        fresh |= set(info["missing_keys"])
        fill(source, model, fresh)
    return source, fresh


def _warn_of_unknown(share: float) -> None:
    if share > MOSTLY_UNKNOWN:
        logger.warning(
            f"{share:.0%} of the texts' tokens are unknown to the tokenizer, so the figures say little about this model: "
            "give --texts (texts=) of the kind that it is for."
        )


# ---- checks -------------------------------------------------------------------------------------------------------


def _exact_limit(model: Any, source: PreTrainedModel, batch: dict[str, Tensor]) -> Check:
    if not model.config.efficient_attention:
        return _equal_experts(model, source, batch)
    rule = f"at exact settings the logits differ by ≤ {EXACT_TOLERANCE:g} of the largest"
    exact, why = [], []
    length = run(source, batch)["hidden"][-1].shape[1]
    family = family_of(source)
    for config in attention_configs(model.config.efficient_attention):
        stack = next(s for s in family.stacks(source) if config.side in (None, "both", s.side))
        setting = config.attention_class.exact_config(config, family.geometry(stack, stack.layers[0]), length)
        if setting is None:
            why.append(f"{config.mechanism}: exact {config.attention_class.facts.exact_when}")
        else:
            exact.append(setting)
    if why:
        return Check("exact limit", "not applicable", {"why": "; ".join(why)}, rule)
    plain = copy.deepcopy(source).float()
    expected = run(plain, batch)["output"]
    with patch_attention(plain, exact):
        actual = run(plain, batch)["output"]
    real = output_mask(plain, batch)
    error = relative_difference(actual, expected, real)
    detail = {"relative_difference": error, "settings": [c.to_dict() for c in exact], "tokens": length}
    return Check("exact limit", "passed" if error <= EXACT_TOLERANCE else "failed", detail, rule)


def _equal_experts(model: Any, source: PreTrainedModel, batch: dict[str, Tensor]) -> Check:
    rule = f"as long as the experts are equal the logits differ in eval mode by ≤ {EXACT_TOLERANCE:g} of the largest"
    if not all(layer.are_equal() for layer in expert_layers(model).values()):
        return Check("exact limit", "not applicable", {"why": "the experts have been trained apart"}, rule)
    plain, sparse = (copy.deepcopy(m).float() for m in (source, model))
    actual, expected = (run(m, batch)["output"] for m in (sparse, plain))
    error = relative_difference(actual, expected, output_mask(plain, batch))
    detail = {"relative_difference": error, "tokens": run(plain, batch)["hidden"][-1].shape[1]}
    return Check("exact limit", "passed" if error <= EXACT_TOLERANCE else "failed", detail, rule)


def _fidelity(model: PreTrainedModel, source: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Check:
    rule = "figures at the source's own length, all of them numbers; compare them with the control"
    return _measured("fidelity", compare(model, source, batches), rule)


CONTROLS = {
    "mean of values": "what is left when attention carries no information",
    "window only": "what the window gives without the part that is learned",
}


def _controls(model: Any, source: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[Any]:
    """The checks that measure what the converted layers must be better than."""
    if model.config.efficient_attention:
        return [partial(_control, model, source, batches, name) for name in controls(model)]
    name, why = "mean of values", {"why": "all attention is full attention"}
    return [lambda: Check(f"control: {name}", "not applicable", why, CONTROLS[name])]


def _control(model: Any, source: PreTrainedModel, batches: list[dict[str, Tensor]], name: str) -> Check:
    return _measured(f"control: {name}", control_figures(model, source, batches, name), CONTROLS[name])


def _measured(name: str, figures: dict[str, Any], rule: str) -> Check:
    """Figures without a limit; still, those of a model that computes NaN are a failure."""
    return Check(name, "measured" if finite(figures) == figures else "failed", figures, rule)


def _in_double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in double precision, in which the host's own experts are computed by plain products: no others take it."""
    double = copy.deepcopy(model).double()
    for config in {
        id(c): c for module in double.modules() if (c := getattr(module, "config", None)) is not None
    }.values():
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return double


def _padding(model: PreTrainedModel, batch: dict[str, Tensor]) -> Check:
    rule = (
        f"in double precision nothing at real positions changes by more than {DOUBLE_TOLERANCE:g} of the largest value"
    )
    double = _in_double(model)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    together = run(double, batch)["hidden"][-1]
    mask, alone = real_tokens(batch, together), []
    for row in range(len(mask)):
        n = int(mask[row].sum())
        cut = ("input_ids", "attention_mask")
        one = {k: v[row : row + 1, :n] if k in cut else v[row : row + 1] for k, v in batch.items()}
        alone.append(relative_difference(run(double, one)["hidden"][-1][:, :n], together[row : row + 1, :n], None))
    # the largest, or NaN if there is one, which max() would pass over
    errors = {"each row alone": float(torch.tensor(alone, dtype=torch.float64).max())}
    if "input_ids" in batch:
        garbage = dict(batch, input_ids=torch.where(mask, batch["input_ids"], (batch["input_ids"] + 7) % 50 + 5))
        errors["other pad ids"] = relative_difference(run(double, garbage)["hidden"][-1], together, mask)
    passed = all(error <= DOUBLE_TOLERANCE for error in errors.values())
    detail = {"relative_difference": errors, "padded_tokens": int((~mask).sum())}
    return Check("padding and batch", "passed" if passed else "failed", detail, rule)


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from hf_efficient.conversion.loading import load_converted
from hf_efficient.evaluation.fidelity import run
torch.set_num_threads(int(sys.argv[3]))
model = load_converted(sys.argv[1]).eval()
output = run(model, load_file(sys.argv[2] + "/batch.safetensors"))["output"]
save_file({"output": output.contiguous()}, sys.argv[2] + "/out.safetensors")
"""


def _fresh_process(model: PreTrainedModel, batch: dict[str, Tensor], path: Path | None) -> Check:
    rule = "saved, loaded in a fresh process through its registered class: outputs are bit-equal"
    with tempfile.TemporaryDirectory() as scratch:
        if path is None:
            path = Path(scratch) / "checkpoint"
            model.save_pretrained(path)
        save_file({k: v.contiguous() for k, v in batch.items()}, f"{scratch}/batch.safetensors")
        done = fresh_python("-c", FRESH, path, scratch, torch.get_num_threads())
        if done.returncode:
            return Check("fresh process", "failed", {"error": done.stderr[-2000:]}, rule)
        loaded = load_file(f"{scratch}/out.safetensors")["output"]
    # the child loads to the CPU, so that is where both are compared
    on_cpu = model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
    expected = run(on_cpu, batch)["output"]
    equal = torch.equal(loaded, expected)
    detail = {"bit_equal": equal, "largest_difference": float((loaded - expected).abs().max())}
    return Check("fresh process", "passed" if equal else "failed", detail, rule)


def _decoding(model: PreTrainedModel, batch: dict[str, Tensor], steps: int = 8) -> Check:
    rule = f"prefill and steps with a cache equal one full pass, in double precision, to {DOUBLE_TOLERANCE:g}"
    if not model.can_generate() or not (model.config.is_encoder_decoder or _is_causal(model)):
        return Check("prefill = decode", "not applicable", {"why": "no language model head on a causal stack"}, rule)
    double: Any = _in_double(model)
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    # the first row without its padding, so that the decoder needs no mask, which would have to grow with the cache
    masks = {k: batch["decoder_attention_mask" if k.startswith("decoder") else "attention_mask"] for k in batch}
    rows = {k: v[:1, : int(masks[k][0].sum())].to(model.device) for k, v in batch.items()}
    rows.pop("decoder_attention_mask", None)
    ids = rows[name]
    n = ids.shape[1]
    steps = min(steps, n - 1)
    fixed = {k: v for k, v in rows.items() if model.config.is_encoder_decoder and k != name}
    with torch.no_grad():
        full = double(**{name: ids}, **fixed).logits
        part = double(**{name: ids[:, : n - steps]}, **fixed, use_cache=True)
        pieces = [part.logits]
        for i in range(n - steps, n):
            part = double(**{name: ids[:, i : i + 1]}, **fixed, past_key_values=part.past_key_values, use_cache=True)
            pieces.append(part.logits)
    error = relative_difference(torch.cat(pieces, 1), full, None)
    detail = {"relative_difference": error, "prefill": n - steps, "steps": steps}
    return Check("prefill = decode", "passed" if error <= DOUBLE_TOLERANCE else "failed", detail, rule)


def _speed(model: Any, source: PreTrainedModel, lengths: Sequence[int]) -> Check:
    rule = "medians of interleaved runs against full SDPA attention; memory in a fresh process per point"
    if not lengths:
        return Check("speed and memory", "not applicable", {"why": "no lengths were asked for"}, rule)
    return Check("speed and memory", "measured", compare_with_full_attention(model, source, lengths), rule)


def _tokenizer_of(*places: tuple[Any, dict[str, str]]) -> Any:
    """The tokenizer of the first folder, or Hub repository, that has one."""
    given = [(str(name), place) for name, place in places if not isinstance(name, PreTrainedModel)]
    found = next(filter(None, (load_tokenizer(name, **place) for name, place in given)), None)
    if found is None:
        named = [name for name, _ in given]
        who = f"{' and '.join(named)} {'have' if len(named) == 2 else 'has'}" if named else "two loaded models have"
        raise ValueError(f"{who} no tokenizer: put its files into one of the folders, or pass tokenizer=.")
    return found


def _is_causal(model: Any) -> bool:
    family = family_of(model)
    return any(family.is_causal(stack, layer) for stack in family.stacks(model) for layer in stack.layers)
