"""What distillation reads: rows of tokens to learn from, and held-out batches, as the model's head was trained to read them.

A masked-LM head predicts masked tokens: its text is masked, once, by the rule of `LanguageModelCollator`, in all that is
trained on and measured. The loss of a head with a vocabulary is measured next to full attention's, because states can come
closer to the teacher's while predictions get worse.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.corpus import TextUse, text_batches, text_use
from hf_efficient.patching.exact import eval_mode
from hf_efficient.training.data.collators import IGNORED, LanguageModelCollator, SeededCollator
from hf_efficient.training.data.texts import token_blocks

GUARD_BATCHES = 4
MASKED = 0.15
CAUSAL_HEADS = ("LMHeadModel", "ForCausalLM")


class DistillationData(NamedTuple):
    """Texts as `distillation_data` makes them.

    Attributes:
        rows, guard: of tokens, to train on, and set aside to choose the best parameters on.
        batches: held-out texts, (B, N) `input_ids` and `attention_mask`, of T5 those of the decoder as well.
        labels: of each batch (B, N) what a masked or causal language model is to predict there; `None` for other heads.
        use: {"train" | "held-out": how much of the texts that is}; those of "train" are shared by `rows` and `guard`.
    """

    rows: list[list[int]]
    guard: list[list[int]]
    batches: list[dict[str, Tensor]]
    labels: list[Tensor] | None
    use: dict[str, TextUse]


def distillation_data(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    held_out: Sequence[str],
    *,
    length: int,
    batch_size: int,
    eval_texts: int,
    seed: int,
) -> DistillationData:
    """Rows of at most `length` tokens of all texts, short ones too, and the beginning of `eval_texts` held-out texts.

    Raises:
        ValueError: fewer than two rows.
    """
    blocks, use = token_blocks(texts, tokenizer, length)
    if len(blocks) < 2:
        raise ValueError(f"{len(texts)} texts give {len(blocks)} row of {length} tokens; at least 2 are needed.")
    masking = _masking(model, tokenizer, seed)
    rows = [(row if masking is None else masking.choose(row))["input_ids"] for row in blocks]
    random.Random(seed).shuffle(rows)
    aside = min(GUARD_BATCHES * batch_size, max(1, len(rows) // 10))
    batches = text_batches(tokenizer, held_out[:eval_texts], length, batch_size, model)
    labels = None
    if masking is not None:
        labels = [_masked(batch, masking, tokenizer, index) for index, batch in enumerate(batches)]
    elif _head(model).endswith(CAUSAL_HEADS):
        labels = [batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED) for batch in batches]
    measured = text_use(tokenizer, held_out, length, first=eval_texts)
    return DistillationData(rows[aside:], rows[:aside], batches, labels, {"train": use, "held-out": measured})


def _head(model: Any) -> str:
    """The name of a model's class, of the one inside adapters."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _masking(model: Any, tokenizer: Any, seed: int) -> SeededCollator | None:
    if "ForMaskedLM" not in _head(model) and "ForPreTraining" not in _head(model):
        return None
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{_head(model)} predicts masked tokens, and {type(tokenizer).__name__} has no mask token: add one."
        )
    return SeededCollator(LanguageModelCollator(tokenizer, MASKED), seed)


def _masked(batch: dict[str, Tensor], masking: SeededCollator, tokenizer: Any, number: int) -> Tensor:
    """Mask the batch of this number in place; returns its labels."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for index, (ids, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        plain = ids[real].tolist()
        special = tokenizer.get_special_tokens_mask(plain, already_has_special_tokens=True)
        if all(special):
            continue
        row = {"input_ids": plain, "special_tokens_mask": special, "index": f"held-out {number} {index}"}
        chosen = masking.choose(row)
        ids[real], labels[index, real] = torch.tensor(chosen["input_ids"]), torch.tensor(chosen["labels"])
    return labels


@torch.no_grad()
def head_loss(model: Any, teacher: Any, data: DistillationData) -> dict[str, float]:
    """{"loss", "source_loss"}: what the model's and the teacher's head lose on held-out text, in nats per predicted token.

    Empty for models without such a head, and where no token of the text can be predicted since the tokenizer knows none.
    """
    shift = int(_head(model).endswith(CAUSAL_HEADS))
    predicted = any(bool((labels[:, shift:] != IGNORED).any()) for labels in data.labels or ())
    if not predicted or "ForPreTraining" in _head(model):
        return {}
    with eval_mode(model):
        return {"loss": _loss(model, data, shift), "source_loss": _loss(teacher, data, shift)}


def _loss(model: Any, data: DistillationData, shift: int) -> float:
    """The mean over predicted tokens; the first `shift` of a row are not."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for batch, labels in zip(data.batches, data.labels or (), strict=True):
        predicted = int((labels[:, shift:] != IGNORED).sum())
        if predicted:
            inputs: Mapping[str, Tensor] = {k: v.to(device) for k, v in (batch | {"labels": labels}).items()}
            total += float(model(**inputs).loss) * predicted
            count += predicted
    return total / count
