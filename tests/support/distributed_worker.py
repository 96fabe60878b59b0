"""What tests/recipes/test_distributed.py runs alone and in two processes: the same program, at the same global batch.

    torchrun --nproc_per_node=2 tests/support/distributed_worker.py SCENARIO FOLDER

A scenario gives figures and tensors; its first process writes them into FOLDER. Alone it is called as a function.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pretraining import WINDOW, arguments, recipe, result
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hf_efficient as he
from hf_efficient.testing import VOCABULARY, tiny_model
from hf_efficient.training import recipe as recipe_parts
from hf_efficient.training.transfer.attention_transfer import AttentionTransfer, trainable

Outcome = tuple[dict[str, list[float]], dict[str, Tensor]]
ROWS, LENGTH, BATCH, STEPS, LABELS = 40, 37, 8, 4, 5
TIMEOUT = 240  # seconds after which a process gives up, waiting for a dead one or whatever else


def processes() -> tuple[int, int]:
    """(number of processes, index of this one)."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def converted(family: str, mechanism: str, **options: Any) -> Any:
    model = tiny_model(family)
    return he.convert(model, mechanism, tokenizer=object(), **options).model.train()


def rows(family: str, count: int = ROWS) -> list[dict[str, Tensor]]:
    """Rows of 12 to 37 real tokens; as many labels in each, except for GPT-2, where every real token is one."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        ids = torch.randint(5, VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < 12 + (7 * index) % (LENGTH - 11)).long()
        labels = torch.where(mask.bool(), ids, -100)
        if family != "gpt2":
            labels[LABELS:] = -100
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def stacked(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def logits(model: Any, family: str) -> Tensor:
    model = model.eval()
    with torch.no_grad():
        return model(**stacked(rows(family, 3))).logits


# ---- the stock Trainer -------------------------------------------------------------------------------------------


def trainer_for(
    model: Any, family: str, folder: Path, accumulation: int = 1, data: Any = None, **more: Any
) -> Trainer:
    """Global batches of 8 rows, whatever the number of processes and accumulated steps."""
    arguments: dict[str, Any] = dict(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        ddp_timeout=TIMEOUT,
    )
    settings = TrainingArguments(**arguments | more)
    settings.per_device_train_batch_size = BATCH // (settings.world_size * accumulation)
    return Trainer(model, settings, train_dataset=data or rows(family), data_collator=stacked)  # type: ignore[arg-type]


TRAINED = {
    "bert": ("longformer", {"attention_window": 8, "global_tokens": "first"}),
    "gpt2": ("local", {"attention_window": 8}),
}


def trainer(folder: Path) -> Outcome:
    """Loss curves of BERT and GPT-2, plain and accumulated; the models and a checkpoint stay in `folder`."""
    figures, tensors = {}, {}
    for family, (mechanism, options) in TRAINED.items():
        for accumulation in (1, 2):
            model = converted(family, mechanism, **options)
            saving = dict(save_strategy="steps", save_steps=2) if accumulation == 1 else {}
            made = trainer_for(model, family, folder / family, accumulation, **saving)
            made.train()
            curve = [float(entry["loss"]) for entry in made.state.log_history if "loss" in entry]
            figures[f"{family}, accumulation {accumulation}"] = curve
            if accumulation == 1:
                made.save_model(str(folder / family / "model"))
                tensors[family] = logits(model, family)
    own, tensors["weights"] = recipe_run(folder)
    return figures | own, tensors


def recipe_run(folder: Path) -> tuple[dict[str, list[float]], Tensor]:
    """Figures of the recipe clm on the source and data beside `folder`, and the weights (processes, P) they ended with."""
    source, data = folder.parent / "gpt2", folder.parent / "data"
    sizes = {"per_device_train_batch_size": 4 // processes()[0], "max_steps": STEPS, "block_length": 32}
    words = arguments(source, data, folder / "clm", attention=WINDOW, **sizes)
    with mock.patch.object(recipe_parts, "save_model", wraps=recipe_parts.save_model) as saved:
        recipe("clm").main([*words, "--use_cpu"])
    own = torch.cat([p.detach().flatten() for p in saved.call_args.args[0].model.parameters()])
    weights = [torch.empty_like(own) for _ in range(processes()[0])]
    if dist.is_initialized():
        dist.all_gather(weights, own)
        dist.barrier()  # the first process may still be writing the record
    record = result(folder / "clm")
    log = [entry for entry in record["training"]["log"] if "loss" in entry]
    figures = {f"clm, {name}": [entry[name] for entry in log] for name in ("loss", "grad_norm")}
    figures["clm, evaluated"] = [figures_["loss"] for figures_ in record["metrics"].values()]
    figures["clm, sizes"] = [float(record["training"][name]) for name in ("tokens", "parameters", "steps")]
    return figures, torch.stack(weights) if dist.is_initialized() else own[None]


# ---- raw FSDP2 ---------------------------------------------------------------------------------------------------

SHARDED: dict[str, tuple[str, dict[str, Any]]] = {
    "longformer": ("longformer", {"attention_window": 8, "global_tokens": "first"}),
    "linformer": ("linformer", {"rank": 16}),
    "linformer, layer-wise": ("linformer", {"rank": 16, "sharing": "layerwise"}),
    "performer": ("performer", {"num_features": 32}),
}


def fsdp(folder: Path) -> Outcome:
    """Losses and full state dict of three steps, every layer and the rest of the model sharded over the processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    count, index = processes()
    figures, tensors = {}, {}
    for name, (mechanism, options) in SHARDED.items():
        model = converted("bert", mechanism, **options)
        layers = model.bert.encoder.layer
        if count > 1:
            if name.endswith("layer-wise"):
                tensors["refusal"] = refusal_of_a_parameter_sharded_twice(copy.deepcopy(model))
                # one parameter in several layers can only be sharded once, with all that hold it
                fully_shard([layer.attention.self.efficient for layer in layers])
            for part in (*layers, model):
                fully_shard(part)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        figures[name] = []
        for step in range(3):
            batch = rows("bert")[BATCH * step : BATCH * (step + 1)][index::count]
            loss = model(**stacked(batch)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            figures[name].append(mean_over_processes(loss))
        options_ = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options_) if count > 1 else model.state_dict()
        tensors |= {f"{name}: {key}": value.clone() for key, value in state.items()}
    return figures, tensors


def refusal_of_a_parameter_sharded_twice(model: Any) -> Tensor:
    """What torch says, as bytes, when layers that share a parameter are sharded one by one."""
    from torch.distributed.fsdp import fully_shard

    for part in (*model.bert.encoder.layer, model):
        fully_shard(part)
    try:
        model(**stacked(rows("bert", 2)))
    except ValueError as error:
        return torch.tensor(list(str(error).encode()), dtype=torch.uint8)
    return torch.zeros(0, dtype=torch.uint8)


def mean_over_processes(loss: Tensor) -> float:
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / processes()[0]


# ---- a plain Accelerate loop -------------------------------------------------------------------------------------


def loop(folder: Path) -> Outcome:
    """T5 with accumulated steps, clipped gradients, and predictions for an odd number of rows gathered at the end."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    size = BATCH // (2 * accelerator.num_processes)
    model: Any = converted("t5", "longformer", attention_window=8, global_tokens="first")
    # a gradient that is rounding alone moves nothing, as with the usual eps it would, by its sign
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    data: Any = DataLoader(rows("t5"), batch_size=size, collate_fn=stacked)  # type: ignore[arg-type]
    held_out: Any = DataLoader(rows("t5", 7), batch_size=2, collate_fn=stacked)  # type: ignore[arg-type]
    model, optimizer, data, held_out = accelerator.prepare(model, optimizer, data, held_out)
    losses, predictions = [], []
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
    model.eval()
    for batch in held_out:
        with torch.no_grad():
            predictions.append(accelerator.gather_for_metrics(model(**batch).logits))
    accelerator.unwrap_model(model).save_pretrained(folder / "t5", is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return {"losses": losses}, {"predictions": torch.cat(predictions)}


# ---- attention transfer ------------------------------------------------------------------------------------------

TRANSFERRED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "layer by layer": ("linformer", {"rank": 16}, "attention_output"),
    "shared parameters": ("linformer", {"rank": 16, "sharing": "layerwise"}, "attention_output"),
    "end to end": ("linformer", {"rank": 16}, {"hidden_states": 1.0, "logits": 0.5}),
}


def transfer(folder: Path) -> Outcome:
    """Loss curves and trained mechanisms. A loss is relative per batch, so alone as many batches are accumulated."""
    data = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows("bert")]
    figures, tensors = {}, {}
    for name, (mechanism, options, losses) in TRANSFERRED.items():
        model = converted("bert", mechanism, **options)
        trainable(model, "attention" if name == "end to end" else "mechanism")
        with AttentionTransfer(model, losses):
            made = trainer_for(model, "bert", folder / "transfer", 2 // processes()[0], data)
            made.train()
        figures[name] = [float(entry["loss"]) for entry in made.state.log_history if "loss" in entry]
        state = model.state_dict()
        tensors |= {f"{name}: {key}": value.clone() for key, value in state.items() if ".efficient." in key}
    return figures, tensors


SCENARIOS: dict[str, Callable[[Path], Outcome]] = {
    "trainer": trainer,
    "fsdp": fsdp,
    "loop": loop,
    "transfer": transfer,
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    torch.set_num_threads(1)
    if name in ("fsdp", "transfer"):
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    figures, tensors = SCENARIOS[name](folder)
    count, index = processes()
    if index == 0:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "tensors.safetensors")
        (folder / "figures.json").write_text(json.dumps({"processes": count, "figures": figures}))
    dist.barrier()
    # without taking the group down: that can wait for a thread of gloo which waits for Python
    os._exit(0)


if __name__ == "__main__":
    main()
