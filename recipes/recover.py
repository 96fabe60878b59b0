"""What every mechanism costs a language model, and what of it transfer and continued pretraining give back.

A small model is trained from scratch, then taken through the same pipeline with every mechanism that fits it, each step the
command that a user would type: convert → transfer attention → continue pretraining. Held-out perplexity all along, the
dense model trained on just as long as ceiling, the mean of values and the window alone as floor. One table, one JSON.

    python recipes/recover.py --family gpt2
    python recipes/recover.py --family t5 --learning-rate 1e-4 --record model_cards/results/perplexity_t5.json

Interrupted, it goes on where it was. What is already there is read, and refused where it was made with other settings.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainingArguments

import hf_efficient as he
from hf_efficient.corpus import offline_texts
from hf_efficient.profiling.json_files import write_json
from hf_efficient.training.recipe import run
from hf_efficient.training.results import RESULT_NAME
from hf_efficient.training.settings import parse_settings


@dataclass
class Settings:
    family: str = "gpt2"  # gpt2, or t5, whose encoder is converted
    output_dir: str = ""  # every model of the pipeline; empty = outputs/recover-gpt2 or outputs/recover-t5
    record: str = ""  # also write the table's JSON here
    only: str = ""  # names of pipelines, with semicolons between them; empty = all
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    vocabulary_size: int = 2000
    block_length: int = 256
    batch_size: int = 8
    pretrain_steps: int = 600  # of the dense model from scratch
    pretrain_learning_rate: float = 2e-3
    transfer_steps: int = 100  # layer by layer, of mechanisms with parameters of their own
    steps: int = 100  # of continued pretraining, also of the dense model
    learning_rate: float = 5e-4
    max_eval_rows: int = 8  # held-out documents, 0 = all
    seed: int = 0


# {name: attention}; a mechanism that learns stands beside the same window without it
PATTERNS: dict[str, dict[str, Any]] = {
    "local": dict(mechanism="local", attention_window=16),
    "longformer": dict(mechanism="longformer", attention_window=16, global_tokens="first"),
    "bigbird": dict(mechanism="bigbird", block_size=8, num_random_blocks=2),
    "sparse_transformer": dict(mechanism="sparse_transformer", stride=16),
    "blockwise": dict(mechanism="blockwise", block_size=32),
    "image_local": dict(mechanism="image_local", block_size=16, memory_size=16),
    "axial": dict(mechanism="axial", row_length=16),
}
FIXED = dict(mechanism="sparse_transformer", pattern="fixed", stride=16, summary_size=2)
PIPELINES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": PATTERNS
    | {
        "combined": dict(mechanism="combined", patterns=[PATTERNS["local"], FIXED]),
        "reformer": dict(
            mechanism="reformer", num_buckets=8, bucket_size=16, num_hashes=2, num_chunks_before=0, attention_window=16
        ),
        "routing_transformer": dict(
            mechanism="routing_transformer", num_clusters=8, cluster_size=16, attention_window=16
        ),
        "sinkhorn": dict(mechanism="sinkhorn", block_size=16, num_sorted_blocks=2),
        "transformer_xl": dict(mechanism="transformer_xl", segment_length=16, memory_length=16, relative=True),
        "compressive": dict(mechanism="compressive", segment_length=16, memory_length=16, compressed_memory_length=16),
        "memory_compressed": dict(mechanism="memory_compressed", compression_rate=4, block_size=32),
        "synthesizer": dict(mechanism="synthesizer", max_length=256),
        "performer": dict(mechanism="performer", num_features=64),
        "linear_transformer": dict(mechanism="linear_transformer"),
        "cosformer": dict(mechanism="cosformer"),
        "random_feature": dict(mechanism="random_feature", num_features=64, gate=True),
        "t2r": dict(mechanism="t2r"),
        "hedgehog": dict(mechanism="hedgehog", attention_window=0),
        "hedgehog + window": dict(mechanism="hedgehog", attention_window=16),
    },
    "t5": PATTERNS
    | {
        "local, wide": dict(mechanism="local", attention_window=184),
        "etc": dict(mechanism="etc", attention_window=16, num_global_tokens=8),
        "longt5": dict(mechanism="longt5", attention_window=16, global_block_size=8),
        "linformer": dict(mechanism="linformer", rank=32, max_length=256),
        "hedgehog + window, wide": dict(mechanism="hedgehog", attention_window=184),
    },
}
RECIPES = {"gpt2": "clm.py", "t5": "span_corruption.py"}
# settings that say where results go and how many of them, not how they are made
PLACES = ("output_dir", "record", "only")


def main(arguments: list[str] | None = None) -> None:
    settings = parse_settings(Settings, arguments)
    if settings.family not in PIPELINES:
        raise ValueError(f"family={settings.family!r} is not possible; it must be one of {', '.join(PIPELINES)}.")
    pipelines = PIPELINES[settings.family]
    chosen = [name.strip() for name in settings.only.split(";")] if settings.only else list(pipelines)
    unknown = [name for name in chosen if name not in pipelines]
    if unknown:
        raise ValueError(
            f"only={settings.only!r}: there is no pipeline {unknown[0]!r}; there are {'; '.join(pipelines)}."
        )
    folder = Path(settings.output_dir or f"outputs/recover-{settings.family}")
    files = [folder / "perplexity.json", *([Path(settings.record)] if settings.record else [])]
    made_with = {name: value for name, value in asdict(settings).items() if name not in PLACES}
    earlier = [recorded(file, made_with) for file in files]
    dense = train(settings, f"scratch:{settings.family}", folder / "dense", settings.pretrain_steps, from_scratch=True)
    ceiling = train(settings, str(folder / "dense/model"), folder / "dense-continued", settings.steps)
    rows = {}
    for name in tqdm(chosen, desc="pipelines"):
        rows[name] = run_pipeline(settings, folder, name, pipelines[name])
    document: dict[str, Any] = {
        "suite": "perplexity",
        "settings": made_with,
        "dense": dense["metrics"]["trained"] | {"tokens": dense["training"]["tokens"]},
        "dense, continued": ceiling["metrics"]["trained"],
        "results": rows,
        "hardware": dense["hardware"],
        "versions": dense["versions"],
    }
    for file, former in zip(files, earlier, strict=True):
        write_json(file, document | {"results": other_rows(file, former, document) | rows})
    show(document)


def recorded(file: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call wrote into `file`, if there is one; refused if it was made with other settings."""
    if not file.is_file():
        return None
    former: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    refuse_changes(
        file, former.get("settings", {}), made_with, "the former settings, or another --record and --output_dir"
    )
    return former


def other_rows(file: Path, former: dict[str, Any] | None, document: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier document of the same dense model."""
    if former is None:
        return {}
    then, now = ({"perplexity": d["dense"]["perplexity"]} for d in (former, document))
    refuse_changes(file, then, now, "another --record, or the --output_dir that it was made in")
    return dict(former["results"])


def refuse_changes(file: Path, then: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    changed = [f"{name} {then.get(name)!r} → {value!r}" for name, value in now.items() if then.get(name) != value]
    if changed:
        raise ValueError(f"{file} was made otherwise ({', '.join(changed)}): give {remedy}.")


def run_pipeline(settings: Settings, folder: Path, name: str, attention: dict[str, Any]) -> dict[str, Any]:
    """One mechanism all the way; figures of what is already there are read, not computed again."""
    place = folder / name.replace(" ", "-").replace(",", "")
    converted = place / "converted"
    # what starts from data starts from some of the texts that the dense model was trained on
    texts = offline_texts("train")[:16] if hasattr(he.get_mechanism(attention["mechanism"]), "calibrate") else None
    result = he.convert(folder / "dense/model", attention, calibration=texts)
    if not converted.exists():
        result.save(converted)
    kind = "efficient_attention"
    there = json.loads((converted / "config.json").read_text(encoding="utf-8"))[kind]
    refuse_changes(converted, {kind: there}, {kind: result.model.config.efficient_attention}, "another --output_dir")
    plain = train(settings, str(converted), place / "continued", settings.steps)
    figures = {
        "attention": attention,
        "control": plain["metrics"]["control"],
        "converted": plain["metrics"]["converted"],
        "continued": plain["metrics"]["trained"],
        "versions": plain["versions"],
    }
    if any(".efficient." in parameter for parameter, _ in result.model.named_parameters()):
        distill(settings, converted, place / "transfer")
        after = train(settings, str(place / "transfer/model"), place / "transferred-continued", settings.steps)
        figures["transferred"] = after["metrics"]["converted"]
        figures["transferred, continued"] = after["metrics"]["trained"]
    return figures


def train(settings: Settings, model: str, out: Path, steps: int, from_scratch: bool = False) -> dict[str, Any]:
    """The pretraining recipe as a command; returns its result.json."""
    options: dict[str, Any] = {
        "model": model, "block_length": settings.block_length, "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size, "seed": settings.seed,
        "max_eval_rows": settings.max_eval_rows, "warmup_steps": 0.1,
        "learning_rate": settings.pretrain_learning_rate if from_scratch else settings.learning_rate,
    }  # fmt: skip
    if from_scratch:
        options |= {name: getattr(settings, name) for name in ("hidden_size", "layers", "heads", "vocabulary_size")}
    whole = finished(out, options)
    if whole is not None:
        return whole
    recipe = Path(__file__).with_name(RECIPES[settings.family])
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    call([sys.executable, recipe, *words, "--output_dir", out, "--save_steps", 100, "--logging_steps", 20, "--resume"])
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the run is whole; many of them would fill the disk
    return dict(json.loads((out / RESULT_NAME).read_text(encoding="utf-8")))


def distill(settings: Settings, converted: Path, out: Path) -> None:
    """`hf-efficient distill` as a command."""
    options = {
        "steps": settings.transfer_steps, "length": settings.block_length, "batch_size": settings.batch_size,
        "seed": settings.seed,
    }  # fmt: skip
    if finished(out, {"model": str(converted)} | options) is None:
        words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
        call([sys.executable, "-m", "hf_efficient.cli", "distill", converted, out, "--resume", *words])


def finished(out: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """What is recorded of a run in `out` that is whole; `None` where there is none, or it is to be gone on with. Refused
    if it was made with other settings than `options`.
    """
    file = out / RESULT_NAME
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # a record leaves out what has transformers' default
    then = {name: getattr(TrainingArguments, name, None) for name in options} | record["settings"]
    refuse_changes(file, then, options, "the former settings, or another --output_dir")
    return record if record["finished"] else None


def call(command: list[Any]) -> None:
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}")


def show(document: dict[str, Any]) -> None:
    """The table: perplexity at every step of the pipeline, and the end as a multiple of the dense model's."""
    settings, ceiling = document["settings"], document["dense, continued"]["perplexity"]
    steps = ("control", "converted", "continued", "transferred", "transferred, continued")
    table = Table(title=f"{settings['family']}: held-out perplexity (dense {document['dense']['perplexity']:.2f}, "
                        f"continued {ceiling:.2f})")  # fmt: skip
    for heading in ("mechanism", *steps, "× dense"):
        table.add_column(heading)
    for name, row in document["results"].items():
        figures = [row[step]["perplexity"] if step in row else None for step in steps]
        best = min(value for value in figures[2:] if value is not None)
        table.add_row(name, *("–" if v is None else f"{v:.2f}" for v in figures), f"{best / ceiling:.4f}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
