"""verify: the proof ladder, from bit-equal tensors over the exact limit to fidelity beside its controls."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from .base import AttentionContext, EfficientAttention, EfficientAttentionConfig, attention_configs
from .conversion import load_converted, load_stock, versions
from .families import family_of
from .models import EfficientModelMixin
from .patching import CHILD, patch_attention

EXACT_TOLERANCE = 1e-5
DOUBLE_TOLERANCE = 1e-8
EXACT_LENGTH = 128


@dataclass
class Rung:
    """One check: its outcome, its figures, and the rule it was held to.

    `status` is "passed", "failed", "measured" (figures without a verdict) or "not applicable".
    """

    name: str
    status: str
    detail: dict[str, Any]
    rule: str


@dataclass
class FidelityReport:
    """All rungs with the settings and versions that the figures depend on; JSON-serialisable by `to_dict`."""

    rungs: list[Rung]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def passed(self) -> bool:
        return all(rung.status != "failed" for rung in self.rungs)

    def __getitem__(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


class MeanOfValues(EfficientAttention):
    """Control: every visible value counts the same, `y_i = mean of v_j`; a mechanism must be closer than this."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        keep = torch.ones_like(value[..., :1])
        if context.key_padding_mask is not None:
            keep = keep * context.key_padding_mask[:, None, :, None]
        n = query.shape[2]
        if context.is_causal:
            total, count = (value * keep).cumsum(2)[:, :, -n:], keep.cumsum(2)[:, :, -n:]
        else:
            total, count = (value * keep).sum(2, keepdim=True), keep.sum(2, keepdim=True)
        return (total / count.clamp(min=1)).expand_as(query)


@dataclass(frozen=True, kw_only=True)
class MeanOfValuesConfig(EfficientAttentionConfig):
    """Options of the control: none of its own."""


MeanOfValues.Config = MeanOfValuesConfig
MeanOfValuesConfig.attention_class = MeanOfValues


def verify(
    model: PreTrainedModel | str | Path,
    source: PreTrainedModel | str | Path,
    texts: Sequence[str],
    *,
    tokenizer: Any = None,
    batch_size: int = 4,
    max_length: int | None = None,
    speed_lengths: Sequence[int] = (),
    progress: bool = False,
) -> FidelityReport:
    """Compare a converted model with its source, rung by rung.

    Args:
        model: converted model, or folder or id of a converted checkpoint.
        source: the stock model it came from, or its folder or id.
        texts: real text; each is cut to `max_length`.
        tokenizer: needed if neither `model` nor `source` is a path.
        max_length: tokens per text; `None` = the source's position table (512 where there is none).
        speed_lengths: lengths at which to measure time and memory against full SDPA attention; none by default.

    Returns:
        A report whose `passed` is False if a rung failed.

    Raises:
        ValueError: no texts, no tokenizer, or a model that is not converted.
    """
    if tokenizer is None:
        tokenizer = _tokenizer_of(model, source)
    path = None if isinstance(model, PreTrainedModel) else Path(model)
    if not isinstance(model, PreTrainedModel):
        model = load_converted(model)
    if not isinstance(source, PreTrainedModel):
        source = load_stock(str(source))[0]
    if not isinstance(model, EfficientModelMixin):
        raise ValueError(f"{type(model).__name__} is no converted model: convert it first, then verify.")
    if not texts:
        raise ValueError("no texts to verify with; hf_efficient.corpus.offline_texts() has some.")
    modes = model.training, source.training
    model.eval()
    source.eval()
    limit = family_of(source).max_positions(source.config) or 512
    length = min(max_length or limit, limit)
    batches = _batches(tokenizer, texts, length, batch_size, source)
    short = _ragged(_batches(tokenizer, texts[: max(2, batch_size // 2)], min(EXACT_LENGTH, length), batch_size, source)[0])
    checks: list[Any] = [
        lambda: _copied_tensors(model, source),
        lambda: _exact_limit(model, source, short),
        lambda: _fidelity(model, source, batches),
        lambda: _control(model, source, batches),
        lambda: _padding(model, short),
        lambda: _fresh_process(model, short, path),
        lambda: _decoding(model, short),
        lambda: _speed(model, source, speed_lengths),
    ]
    rungs = [check() for check in tqdm(checks, desc="verify", disable=not progress, unit="rung")]
    model.train(modes[0])
    source.train(modes[1])
    settings = {
        "source": source.config._name_or_path,
        "efficient_attention": model.config.efficient_attention,
        "texts": len(texts),
        "tokens": int(sum(b["attention_mask"].sum() for b in batches)),
        "max_length": length,
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
    }
    return FidelityReport(rungs, settings)


# ---- rungs -------------------------------------------------------------------------------------------------------


def _copied_tensors(model: Any, source: PreTrainedModel) -> Rung:
    ours, theirs = model.state_dict(), source.state_dict()
    extended, different = [], []
    for name, tensor in theirs.items():
        if name not in ours:
            different.append(name)
        elif ours[name].shape != tensor.shape:
            extended.append(name)
        elif not torch.equal(ours[name].cpu(), tensor.cpu()):
            different.append(name)
    extra = [name for name in ours if name not in theirs and f".{CHILD}." not in name]
    detail = {"tensors": len(theirs), "extended": extended, "different": different, "unexplained": extra}
    rule = "every tensor of the source is bit-equal; only position tables may be longer"
    return Rung("copied tensors", "failed" if different or extra else "passed", detail, rule)


def _exact_limit(model: Any, source: PreTrainedModel, batch: dict[str, Tensor]) -> Rung:
    rule = f"at exact settings the logits differ by ≤ {EXACT_TOLERANCE:g} of the largest"
    exact, why = [], []
    length = batch["input_ids"].shape[1]
    family = family_of(source)
    for config in attention_configs(model.config.efficient_attention):
        stack = next(s for s in family.stacks(source) if config.side in (None, "both", s.side))
        setting = config.attention_class.exact_config(config, family.geometry(stack, stack.sites[0]), length)
        if setting is None:
            why.append(f"{config.mechanism}: exact {config.attention_class.facts.exact_when}")
        else:
            exact.append(setting)
    if why:
        return Rung("exact limit", "not applicable", {"why": "; ".join(why)}, rule)
    plain = copy.deepcopy(source).float()
    expected = _run(plain, batch)["output"]
    with patch_attention(plain, exact):
        actual = _run(plain, batch)["output"]
    real = _output_mask(plain, batch)
    error = _relative(actual, expected, real)
    detail = {"relative_difference": error, "settings": [c.to_dict() for c in exact], "tokens": length}
    return Rung("exact limit", "passed" if error <= EXACT_TOLERANCE else "failed", detail, rule)


def _fidelity(model: PreTrainedModel, source: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Rung:
    rule = "figures at the source's own length; compare them with the control"
    return Rung("fidelity", "measured", compare(model, source, batches), rule)


def _control(model: Any, source: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Rung:
    configs = [
        MeanOfValuesConfig(layers=c.layers, side=c.side) for c in attention_configs(model.config.efficient_attention)
    ]
    plain = copy.deepcopy(source)
    with patch_attention(plain, configs):
        figures = compare(plain, source, batches)
    return Rung("control: mean of values", "measured", figures, "what is left when attention carries no information")


def _padding(model: PreTrainedModel, batch: dict[str, Tensor]) -> Rung:
    rule = (
        f"in double precision nothing at real positions changes by more than {DOUBLE_TOLERANCE:g} of the largest value"
    )
    double = copy.deepcopy(model).double()
    together = _run(double, batch)["hidden"][-1]
    mask = batch["attention_mask"].bool()
    garbage = dict(batch, input_ids=torch.where(mask, batch["input_ids"], (batch["input_ids"] + 7) % 50 + 5))
    errors = {"other pad ids": _relative(_run(double, garbage)["hidden"][-1], together, mask), "each row alone": 0.0}
    for row in range(len(mask)):
        n = int(mask[row].sum())
        alone = {k: v[row : row + 1, : n if k in ("input_ids", "attention_mask") else None] for k, v in batch.items()}
        error = _relative(_run(double, alone)["hidden"][-1], together[row : row + 1, :n], None)
        errors["each row alone"] = max(errors["each row alone"], error)
    failed = max(errors.values()) > DOUBLE_TOLERANCE
    detail = {"relative_difference": errors, "padded_tokens": int((~mask).sum())}
    return Rung("padding and batch", "failed" if failed else "passed", detail, rule)


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from hf_efficient.conversion import load_converted
from hf_efficient.verification import _run
torch.set_num_threads(int(sys.argv[3]))
model = load_converted(sys.argv[1]).eval()
output = _run(model, load_file(sys.argv[2] + "/batch.safetensors"))["output"]
save_file({"output": output.contiguous()}, sys.argv[2] + "/out.safetensors")
"""


def _fresh_process(model: PreTrainedModel, batch: dict[str, Tensor], path: Path | None) -> Rung:
    rule = "saved, loaded in a fresh process through its registered class: outputs are bit-equal"
    with tempfile.TemporaryDirectory() as scratch:
        if path is None:
            path = Path(scratch) / "checkpoint"
            model.save_pretrained(path)
        save_file({k: v.contiguous() for k, v in batch.items()}, f"{scratch}/batch.safetensors")
        command = [sys.executable, "-c", FRESH, str(path), scratch, str(torch.get_num_threads())]
        # the child must find this package also where it is not installed
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return Rung("fresh process", "failed", {"error": done.stderr[-2000:]}, rule)
        loaded = load_file(f"{scratch}/out.safetensors")["output"]
    expected = _run(model, batch)["output"].cpu()
    equal = torch.equal(loaded, expected)
    detail = {"bit_equal": equal, "largest_difference": float((loaded - expected).abs().max())}
    return Rung("fresh process", "passed" if equal else "failed", detail, rule)


def _decoding(model: PreTrainedModel, batch: dict[str, Tensor], steps: int = 8) -> Rung:
    rule = f"prefill and steps with a cache equal one full pass, in double precision, to {DOUBLE_TOLERANCE:g}"
    if not model.can_generate() or not (
        model.config.is_encoder_decoder or model.config.is_decoder or _is_causal(model)
    ):
        return Rung("prefill = decode", "not applicable", {"why": "no language model head on a causal stack"}, rule)
    double: Any = copy.deepcopy(model).double()
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    rows = {
        k: v[:1, : int(batch["attention_mask"][0].sum()) if k in ("input_ids", "attention_mask") else None]
        for k, v in batch.items()
    }
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
    error = _relative(torch.cat(pieces, 1), full, None)
    detail = {"relative_difference": error, "prefill": n - steps, "steps": steps}
    return Rung("prefill = decode", "passed" if error <= DOUBLE_TOLERANCE else "failed", detail, rule)


def _speed(model: Any, source: PreTrainedModel, lengths: Sequence[int]) -> Rung:
    rule = "medians of interleaved runs against full SDPA attention; memory in a fresh process per point"
    if not lengths:
        return Rung("speed and memory", "not applicable", {"why": "no lengths were asked for"}, rule)
    from .benchmark import compare_with_full_attention

    return Rung("speed and memory", "measured", compare_with_full_attention(model, source, lengths), rule)


# ---- figures -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(model: PreTrainedModel, source: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
    """How close two models are on the same inputs, over real tokens.

    Returns:
        `embedding_cosine` mean and minimum over texts (mean-pooled last states), `token_cosine` mean,
        `hidden_error` ‖H' - H‖ / ‖H‖ of the last states and `hidden_error_by_layer`; with a vocabulary head also
        `kl` of the source's to the model's distribution in nats and `top1_agreement`.
    """
    cosines: list[Tensor] = []
    token_cosine = tokens = kl = agreement = predictions = 0.0
    squares: list[list[float]] = []
    for batch in batches:
        theirs, ours = _run(source, batch), _run(model, batch)
        mask = batch["attention_mask"].bool()
        for layer, (a, b) in enumerate(zip(ours["hidden"], theirs["hidden"], strict=True)):
            if len(squares) <= layer:
                squares.append([0.0, 0.0])
            squares[layer][0] += float((a - b)[mask].square().sum())
            squares[layer][1] += float(b[mask].square().sum())
        a, b = ours["hidden"][-1].float(), theirs["hidden"][-1].float()
        token_cosine += float(F.cosine_similarity(a[mask], b[mask], dim=-1).sum())
        tokens += float(mask.sum())
        cosines.append(F.cosine_similarity(mean_pool(a, mask), mean_pool(b, mask), dim=-1))
        if ours["logits"] is not None and ours["logits"].shape[-1] == source.config.vocab_size:
            real = _output_mask(source, batch)
            p, q = (x["logits"].float().log_softmax(-1)[real] for x in (theirs, ours))
            kl += float((p.exp() * (p - q)).sum())
            agreement += float((p.argmax(-1) == q.argmax(-1)).sum())
            predictions += len(p)
    cosine = torch.cat(cosines)
    errors = [(a / b) ** 0.5 if b else 0.0 for a, b in squares]
    figures: dict[str, Any] = {
        "embedding_cosine": float(cosine.mean()),
        "embedding_cosine_min": float(cosine.min()),
        "token_cosine": token_cosine / tokens,
        "hidden_error": errors[-1],
        "hidden_error_by_layer": errors,
    }
    if predictions:
        figures |= {"kl": kl / predictions, "top1_agreement": agreement / predictions}
    return figures


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, D) mean of the real tokens of (B, N, D)."""
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def _run(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Hidden states of the (encoder) stack layer by layer, logits if there are any, and whichever of them comes last."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    hidden = getattr(out, "encoder_hidden_states", None) or out.hidden_states
    logits = getattr(out, "logits", None)
    return {"hidden": hidden, "logits": logits, "output": hidden[-1] if logits is None else logits}


def _output_mask(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, N) real positions of the model's output."""
    return batch.get("decoder_attention_mask", batch["attention_mask"]).bool()


def _relative(actual: Tensor, expected: Tensor, where: Tensor | None) -> float:
    if where is not None and actual.dim() == 3:
        actual, expected = actual[where], expected[where]
    return float((actual - expected).abs().max() / expected.abs().max())


def _batches(tokenizer: Any, texts: Sequence[str], length: int, size: int, model: Any) -> list[dict[str, Tensor]]:
    if getattr(tokenizer, "pad_token", None) is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for first in range(0, len(texts), size):
        encoded = tokenizer(
            list(texts[first : first + size]),
            truncation=True,
            max_length=length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        batch = {k: encoded[k] for k in ("input_ids", "attention_mask")}
        if model.config.is_encoder_decoder:
            # the text itself, as if it were to be copied: enough to see what the decoder makes of the encoder's states
            batch["decoder_input_ids"] = batch["input_ids"][:, :64]
            batch["decoder_attention_mask"] = batch["attention_mask"][:, :64]
        batches.append(batch)
    return batches


def _ragged(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the rows to different lengths, so that there is padding to be right about."""
    mask = batch["attention_mask"].clone()
    rows, n = mask.shape
    for row in range(1, rows):
        mask[row, n - row * n // (2 * rows) :] = 0
    ids = batch["input_ids"].masked_fill(mask == 0, 0)
    return batch | {"input_ids": ids, "attention_mask": mask}


def _tokenizer_of(*places: Any) -> Any:
    for place in places:
        if not isinstance(place, PreTrainedModel):
            return AutoTokenizer.from_pretrained(str(place))
    raise ValueError("two loaded models have no tokenizer: pass tokenizer=.")


def _is_causal(model: Any) -> bool:
    family = family_of(model)
    return any(site.module.is_causal for stack in family.stacks(model) for site in stack.sites)
