"""`hf-efficient card` and `hf-efficient distill`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.cli.common import Json, Texts, emit, running
from hf_efficient.cli.options import as_text, read_texts

Folder = Annotated[Path, typer.Argument(help="Folder of a checkpoint.")]


def card(
    checkpoint: Folder,
    results: Annotated[
        list[Path] | None, typer.Option(help="result.json of a run; repeat it, earlier runs first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="CHECKPOINT/README.md")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, if there is one.")] = False,
    as_json: Json = False,
) -> None:
    """Write the model card of a checkpoint from what was recorded: conversion, fidelity, runs. Nothing is measured."""
    with running():
        require_folder(checkpoint)
        from hf_efficient.cards.checkpoint import write_card

        document = write_card(checkpoint, out, results, overwrite)
    rows = [[name, value] for name, value in document["metadata"].items() if name != "model-index"]
    emit(document, as_json, f"{checkpoint} → {document['out']}", ["front matter", "value"], rows)


def distill(
    checkpoint: Folder,
    out: Annotated[Path, typer.Argument(help="Folder to write: model, result.json, stages.")],
    texts: Texts = None,
    steps: Annotated[int, typer.Option(help="Steps layer by layer.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Layer by layer.", show_default="each mechanism's own")] = 0.0,
    end_to_end_steps: Annotated[int, typer.Option(help="Additional training steps for the whole model.")] = 0,
    train: Annotated[str, typer.Option(help="What learns end to end: mechanism, attention or all.")] = "attention",
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in OUT, if there is one.")] = False,
    as_json: Json = False,
) -> None:
    """Teach a converted checkpoint's mechanisms what full attention does; the result is OUT/model."""
    settings = dict(
        steps=steps,
        batch_size=batch_size,
        length=length,
        learning_rate=learning_rate,
        end_to_end_steps=end_to_end_steps,
        train=train,
        seed=seed,
    )
    with running():
        require_folder(checkpoint)
        if resume and overwrite:
            raise ValueError("--resume goes on with the run in OUT and --overwrite replaces it; give one of them.")
        if not resume and not overwrite and out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty: choose another folder, or give --resume or --overwrite.")
        with _room_for_a_run(out, overwrite, checkpoint, texts):
            document = _distill(checkpoint, out, texts, resume, settings)
    emit(document, as_json, f"{checkpoint} → {out / 'model'}: relative error by layer", *_layer_rows(document))
    if not as_json:
        emit(document, False, "closeness to full attention on held-out text", *_fidelity_rows(document))
        emit(document, False, "texts that were read", *_text_rows(document))


def require_folder(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is not a folder; give that of a checkpoint.")


def _distill(
    checkpoint: Path, out: Path, texts: Path | None, resume: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    from hf_efficient.conversion.loading import load_converted, load_tokenizer, takes_pictures
    from hf_efficient.corpus import offline_texts
    from hf_efficient.models.provenance import Provenance
    from hf_efficient.profiling.json_files import write_json
    from hf_efficient.training.distill import distill
    from hf_efficient.training.results import RESULT_NAME

    documents, held_out = (offline_texts("train"), offline_texts()) if texts is None else (read_texts(texts), None)
    model, tokenizer = load_converted(checkpoint), load_tokenizer(str(checkpoint), None)
    if takes_pictures(model):
        raise ValueError(f"{checkpoint} reads pictures, and this reads texts: train it with transformers' Trainer.")
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer; put that of its source into the folder.")
    report = distill(model, tokenizer, documents, output_dir=out, held_out=held_out, resume=resume, **settings)
    words = ["hf-efficient", "distill", str(checkpoint), str(out), *(["--texts", str(texts)] if texts else [])]
    words += [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]
    given = {"model": str(checkpoint), "texts": "offline" if texts is None else str(texts)}
    document = report | {"settings": report["settings"] | given, "command": shlex.join(words)}
    write_json(out / RESULT_NAME, document)
    made = Provenance.read(out / "model")
    if made.history:
        made.history[-1] |= {name: document[name] for name in ("settings", "command")} | {"source": str(checkpoint)}
        made.write(out / "model")
    return document


@contextmanager
def _room_for_a_run(out: Path, overwrite: bool, *sources: Path | None) -> Iterator[None]:
    """Put the run in `out` aside while another takes its place; it comes back if that fails.

    Raises:
        FileExistsError: there is something that no run wrote. ValueError: there is something that is read.
    """
    from hf_efficient.conversion.folders import OutputFolder

    if not overwrite:
        yield
        return
    with OutputFolder(out, overwrite, sources, _strangers_of_a_run).cleared():
        yield


def _strangers_of_a_run(out: Path) -> list[str]:
    written = ("model", "result.json", "end_to_end")
    return sorted(p.name for p in out.iterdir() if p.name not in written and not p.name.startswith("transfer"))


def _layer_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows: each layer's error before and after, next to the controls."""
    errors = document["layer_errors"]
    stages = [name for name in ("before", "transferred", "after") if name in errors]
    last = errors[stages[-1]]
    controls = [name for name in last if name not in ("layers", "mechanism")]
    columns = [*(errors[name]["mechanism"] for name in stages), *(last[name] for name in controls)]
    return ["layer", *stages, *controls], [list(row) for row in zip(last["layers"], *columns, strict=True)]


def _fidelity_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows: each figure of the control, as converted, and as trained."""
    metrics = document["metrics"]
    stages = [name for name in ("control", "converted", "transferred", "trained") if name in metrics]
    figures = metrics[stages[-1]]
    rows = [[name.replace("_", " "), *(as_text(metrics[stage].get(name)) for stage in stages)] for name in figures]
    return ["figure", *stages], rows


def _text_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows: how much of the texts was read, and how often."""
    # records of before say neither
    epochs = {"train": as_text(document["training"].get("epochs"))}
    rows = []
    for name, use in document.get("data", {}).items():
        tokens, texts = (f"{use[f'{what}_used']} of {use[what]}" for what in ("tokens", "texts"))
        rows.append([name, tokens, texts, epochs.get(name, "–")])
    return ["texts", "tokens", "of texts", "epochs"], rows
