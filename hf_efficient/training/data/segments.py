"""Training with memory: long texts a segment at a time, and what the model keeps of them from step to step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, TrainerCallback

from hf_efficient.attention.base.segment import SegmentAttention
from hf_efficient.cache.segments import SegmentLayer
from hf_efficient.families import HostModel
from hf_efficient.patching.exact import converted_layers, mechanism_of
from hf_efficient.training.data.collators import IGNORED, Row, pad_token, padded

if TYPE_CHECKING:
    from datasets import Dataset

FILE_NAME = "memory-{}.safetensors"


def segment_rows(texts: Dataset, length: int, streams: int, seed: int | None = None) -> Dataset:
    """Texts side by side in `streams` streams, one after another in each, cut into segments of at most `length` tokens.

    Row t · streams + b is segment t of stream b: read in order, in batches that divide `streams`, row b of a batch
    continues row b of the one before. A text goes to the stream that is shortest so far; streams that end early are filled
    up with empty rows.

    Args:
        texts: rows of `token_blocks`, each a text (whose segments, the last one filled up, fit the model's positions).
        seed: shuffles the texts; `None` = in their order.

    Returns:
        Columns `input_ids`, `labels` (the next token of each, -100 at a text's end), `begins` (a text begins here), and
        `special_tokens_mask`, `characters` as `token_blocks` has them.

    Raises:
        ValueError: fewer texts than streams.
    """
    from datasets import Dataset

    if len(texts) < streams:
        raise ValueError(
            f"{len(texts)} texts can't fill {streams} streams: lower the batch size, or the length of a text."
        )
    order = list(range(len(texts)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    filled: list[list[Row]] = [[] for _ in range(streams)]
    for index in order:
        min(filled, key=len).extend(_segments(texts[index], length))
    empty: Row = {"input_ids": [], "labels": [], "begins": True, "special_tokens_mask": [], "characters": 0}
    rows = [stream[t] if t < len(stream) else empty for t in range(max(map(len, filled))) for stream in filled]
    return Dataset.from_list(rows)


def _segments(text: Row, length: int) -> list[Row]:
    ids, special = text["input_ids"], text["special_tokens_mask"]
    labels = [*ids[1:], IGNORED]
    return [
        {
            "input_ids": ids[first : first + length],
            "labels": labels[first : first + length],
            "begins": first == 0,
            "special_tokens_mask": special[first : first + length],
            "characters": text["characters"] if first == 0 else 0,
        }
        for first in range(0, len(ids), length)
    ]


class SegmentCollator:
    """Batches of `segment_rows`: `input_ids`, `attention_mask` and `labels` (B, length), and bool `begins` (B,).

    Raises:
        ValueError: rows without `begins`, which a Trainer takes out unless told not to.
    """

    def __init__(self, tokenizer: Any, length: int):
        self.pad, self.length = pad_token(tokenizer), length

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        if any("begins" not in row for row in rows):
            raise ValueError(
                "rows without 'begins' don't say where a text begins: make them with segment_rows, and give "
                "TrainingArguments remove_unused_columns=False."
            )
        ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        following = padded(labels, IGNORED, self.length)
        return {
            "input_ids": padded(ids, self.pad, self.length),
            "attention_mask": padded([[1] * len(row) for row in ids], 0, self.length),
            "labels": following,
            # by this name the Trainer counts them all
            "shift_labels": following,
            "begins": torch.tensor([row["begins"] for row in rows]),
        }


class _Held(NamedTuple):
    """What one run over texts keeps: the cache, (B, tokens) which of its tokens are real, and (B,) the next position."""

    cache: DynamicCache
    mask: Tensor
    position: Tensor


class SegmentMemory(TrainerCallback):
    """Carries the memory of `transformer_xl` and `compressive` layers from batch to batch of a stock Trainer or any loop.

        memory = SegmentMemory(model)
        args = TrainingArguments(…, train_sampling_strategy="sequential", remove_unused_columns=False)
        Trainer(model, args, data_collator=SegmentCollator(tokenizer, T), callbacks=[memory], …)

    A call with `begins` gets the keys, values and slots that the call before left, cut off from its graph; a row in which a
    text begins gets none of them, and its positions start again. Labels are those of the next token already, so that the
    first token of a segment is predicted, too. Training and evaluation have a memory each. That of training is part of
    every checkpoint, so a resumed run continues exactly; calls without `begins` (`generate`) are left alone.

    The dataset must come in order: `train_sampling_strategy="sequential"`, and `segment_rows` with
    `args.train_batch_size · args.world_size` streams (evaluation: `eval_batch_size`).

    Raises:
        ValueError: a model with other layers, or without a table of positions; on training, shuffled rows, recomputed
            activations or compilation, which leave no memory; on resuming, a checkpoint without one; in a call, another
            number of rows than before, or recomputed activations; one process with several GPUs.
    """

    def __init__(self, model: Any):
        layers = [mechanism_of(layer) for layer in converted_layers(model).values()]
        count = getattr(model.config, "num_hidden_layers", 0)
        if len(layers) != count or not all(isinstance(layer, SegmentAttention) for layer in layers):
            raise ValueError(
                "training with memory needs a model whose layers all are transformer_xl or compressive: convert it with "
                "one of them."
            )
        if HostModel.of(model).max_positions is None or model.config.is_encoder_decoder:
            raise ValueError("training with memory needs a decoder with a table of positions, such as GPT-2.")
        self.model = model
        self.held: dict[bool, _Held | None] = {True: None, False: None}
        self.labels: Tensor | None = None
        self.hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()

    # ---- one call ----------------------------------------------------------------------------------------------------

    def _enter(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if "begins" not in kwargs:
            return None
        kwargs = dict(kwargs)
        begins, mask = kwargs.pop("begins").bool(), kwargs["attention_mask"].bool()
        self.labels = kwargs.pop("labels", None)
        kwargs.pop("shift_labels", None)
        held = self.held[model.training]
        if held is None or bool(begins.all()):
            held = _Held(DynamicCache(config=model.config), mask[:, :0], torch.zeros_like(begins, dtype=torch.long))
        if held.position.shape != begins.shape:
            raise ValueError(
                f"a batch of {len(begins)} rows after one of {len(held.position)}: row b continues row b, so make "
                "segment_rows with as many streams as a batch has rows, and leave none out."
            )
        layers = _layers(held.cache)
        for layer in layers:
            layer.restart(begins)
        # what no row holds any more is not counted, or counts would outgrow the table of positions
        past = _rebased(layers)
        mask = torch.cat([held.mask[:, past:] & ~begins[:, None], mask], dim=1)
        position = held.position.masked_fill(begins, 0)
        length = kwargs["attention_mask"].shape[1]
        kwargs |= {
            "past_key_values": held.cache,
            "use_cache": True,
            "attention_mask": mask,
            "position_ids": position[:, None] + torch.arange(length, device=position.device),
        }
        self.held[model.training] = _Held(held.cache, mask, position + length)
        return args, kwargs

    def _leave(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        held = self.held[model.training]
        if held is None or kwargs.get("past_key_values") is not held.cache:
            return None
        if held.cache.get_seq_length() != held.mask.shape[1]:
            raise ValueError(
                "the model left no memory: recomputed activations do without a cache, so call "
                "activation_checkpointing_disable. Segments need little memory as they are."
            )
        for layer in _layers(held.cache):
            layer.detach()
        if self.labels is not None:
            count = kwargs.get("num_items_in_batch")
            count = (self.labels != IGNORED).sum() if count is None else torch.as_tensor(count)
            # a segment may be the last token of its text alone, which predicts nothing: a loss of 0, not NaN
            output["loss"] = model.loss_function(
                output.logits,
                None,
                vocab_size=model.config.vocab_size,
                shift_labels=self.labels,
                num_items_in_batch=count.clamp(min=1),
            )
            self.labels = None
        return output

    # ---- the Trainer -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.train_sampling_strategy != "sequential":
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} breaks texts apart: training with memory needs "
                "'sequential'."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"one process with {args.n_gpu} GPUs copies the model anew in every step, and its copies would share one "
                "memory: start a process per GPU, with torchrun or accelerate launch."
            )
        recomputes = any(getattr(args, f"{name}_checkpointing", False) for name in ("gradient", "activation"))
        if recomputes or getattr(self.model, "is_activation_checkpointing", False) or args.torch_compile:
            raise ValueError(
                "training with memory has a cache, which recomputed activations and compiled models do without: leave "
                "gradient_checkpointing and torch_compile out. Segments need little memory as they are."
            )
        self.held = {True: None, False: None}
        if state.global_step:
            self._load(_file(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = self.held[True]
        if held is None:
            return
        tensors = {"mask": held.mask, "position": held.position}
        for index, layer in enumerate(_layers(held.cache)):
            tensors |= {f"{index}.{name}": x for name, x in layer.tensors().items()}
        save_file({name: x.contiguous().cpu().clone() for name, x in tensors.items()}, _file(args, state))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.held[False] = None

    def _load(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: the run was not trained with memory, or its checkpoint lies elsewhere. Resume in its "
                "own output_dir, or start anew."
            )
        device = next(self.model.parameters()).device
        tensors = load_file(file, device=str(device))
        cache = DynamicCache(config=self.model.config)
        for index, layer in enumerate(converted_layers(self.model).values()):
            own = mechanism_of(layer).cache_layer()
            own.load({name.split(".", 1)[1]: x for name, x in tensors.items() if name.startswith(f"{index}.")})
            cache.layers[index : index + 1] = [own]
        self.held[True] = _Held(cache, tensors["mask"], tensors["position"])


def _layers(cache: DynamicCache) -> list[SegmentLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SegmentLayer)]


def _rebased(layers: list[SegmentLayer]) -> int:
    """Count from the first token that some row holds; returns how many were left out."""
    if not layers or layers[0].positions is None:
        return 0
    first = layers[0]
    assert first.row_start is not None
    count = min(int(first.row_start.min()), first.seen)
    for layer in layers:
        layer.rebase(count)
    return count


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE_NAME.format(args.process_index)
