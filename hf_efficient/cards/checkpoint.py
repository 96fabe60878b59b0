"""The README.md of a checkpoint, rendered from what was recorded: reports, results, config. Nothing else.

A figure that no file holds reads "not measured". No network is used.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_efficient.attention.base.registry import describe, get_mechanism
from hf_efficient.cards.commands import commands
from hf_efficient.cards.experts import PAPERS, TAG, experts_limits, experts_section, experts_words
from hf_efficient.cards.facts import README, CardFacts, gather, is_hub_id
from hf_efficient.cards.markdown import table
from hf_efficient.conversion.inspect import length_words
from hf_efficient.models.card import is_first_card
from hf_efficient.models.provenance import CHANGED, CHANGES, Step, described, runs
from hf_efficient.profiling.json_files import whole_file

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"
PIPELINES = {
    "ForMaskedLM": "fill-mask",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "Model": "feature-extraction",
}
FIDELITY = {
    "embedding_cosine", "embedding_cosine_min", "token_cosine", "hidden_error", "kl", "top1_agreement", "class_agreement",
    "start_agreement", "end_agreement", "choice_agreement", "score_error",
}  # fmt: skip
STAGES = {
    "exact": "full attention", "control": "mean of values", "converted": "converted", "transferred": "transferred",
    "trained": "trained",
}  # fmt: skip


def checkpoint_card(checkpoint: str | Path, results: list[Path] | None = None) -> ModelCard:
    """The card of a checkpoint folder: converted, upcycled, trained, reverted, or with adapters (PEFT).

    Args:
        checkpoint: the folder. Its `conversion_report.json`, `upcycling_report.json` and `result.json` are read if they are
            there, and the `result.json` beside a folder named `model`, where recipes write it.
        results: further `result.json` files, of earlier runs first. Only the last run of all describes the weights as they
            are, so only its figures enter the model index.

    Raises:
        ValueError: no checkpoint folder, a file that can't be read, or a report of another conversion.
        OSError: a file of `results` is missing.
    """
    facts = gather(Path(checkpoint), list(results or []))
    sections = [
        _heading(facts),
        "## Attention\n\n" + _attention(facts),
        *(["## Experts\n\n" + experts_section(facts.experts, facts.upcycling, NOT_RECORDED)] if facts.experts else []),
        "## Conversion\n\n" + _conversion(facts),
        "## How close it is to the original\n\n" + _fidelity(facts),
        "## Training\n\n" + ("\n\n".join(map(_training, facts.runs)) or f"Training runs: {NOT_RECORDED}."),
        "## Speed and memory\n\n" + _speed(facts),
        "## Use\n\n" + _use(facts),
        "## Reproduce\n\n" + _commands(facts),
        "## Limits\n\n" + _limits(facts),
        "## Licence and citation\n\n" + _citation(facts),
    ]
    return ModelCard(f"---\n{_data(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def write_card(
    checkpoint: str | Path, out: Path | None = None, results: list[Path] | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the card to `out` (default: README.md in the checkpoint), whole or not at all.

    Returns:
        `checkpoint`, `out`, `metadata` (the front matter) and `text`.

    Raises:
        FileExistsError: the file exists, `overwrite` is False, and it is no card that a checkpoint was saved with. Also
            see `checkpoint_card`.
    """
    path = Path(checkpoint) / README if out is None else out
    if path.exists() and not overwrite and not is_first_card(path):
        raise FileExistsError(f"{path} exists; choose another file with --out, or replace it with --overwrite.")
    if path.exists() and (path.suffix != ".md" or path.is_dir()):
        raise FileExistsError(f"{path} is no Markdown file, so it is not overwritten; choose another with --out.")
    replaces = path.exists()
    card = checkpoint_card(checkpoint, results)
    with whole_file(path, replaces) as file:
        file.write_text(str(card), encoding="utf-8")
    return {"checkpoint": str(checkpoint), "out": str(path), "metadata": card.data.to_dict(), "text": card.text}


# ---- front matter ------------------------------------------------------------------------------------------------


def _data(facts: CardFacts) -> ModelCardData:
    has_side_files = (facts.folder / "modules.json").is_file()
    library = "peft" if facts.adapter else "sentence-transformers" if has_side_files else "transformers"
    tags = [facts.inspected["family"]]
    if facts.inspected["converted"]:
        attention = ["efficient-attention", *facts.mechanisms] if facts.mechanisms else []
        tags += ["hf_efficient", *attention, *([TAG] if facts.experts else [])]
    options: dict[str, Any] = dict(facts.inherited)
    if facts.source is not None and is_hub_id(facts.source):
        options["base_model"] = facts.source
    datasets = [str(run["settings"].get("dataset", "")) for run in facts.runs]
    hub = [name for name in dict.fromkeys(datasets) if "/" in name and is_hub_id(name)]
    results = _eval_results(facts)
    if results:
        options |= {"model_name": facts.name, "eval_results": results}
    return ModelCardData(
        library_name=library,
        pipeline_tag="sentence-similarity" if has_side_files else _pipeline(facts),
        tags=tags,
        datasets=hub or None,
        **options,
    )


def _pipeline(facts: CardFacts) -> str | None:
    name = facts.inspected["model_class"]
    if "T5" in name and not any(name.endswith(head) for head in PIPELINES if head.startswith("For")):
        return None  # one checkpoint, any task from text to text
    return next((pipeline for head, pipeline in PIPELINES.items() if name.endswith(head)), None)


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Finite figures of the trained model, if a run was the last thing that was done to it; times are no quality."""
    if not facts.runs or facts.history[-1] is not facts.runs[-1] or not facts.history[-1]["finished"]:
        return []
    record = facts.history[-1]
    dataset = str(record["settings"].get("dataset") or record["settings"].get("texts") or NOT_RECORDED)
    found = []
    for name, value in _figures(record.get("metrics", {}).get("trained", {})).items():
        if not math.isfinite(value) or _is_time(name):
            continue
        against = ", against the unconverted model" if name in FIDELITY else ""
        found.append(
            EvalResult(
                task_type=_pipeline(facts) or "text-generation",
                dataset_type=dataset if is_hub_id(dataset) else "text",
                dataset_name=dataset,
                dataset_config=record["settings"].get("dataset_config") or None,
                dataset_split="validation",
                metric_type=name,
                metric_name=name.replace("_", " ") + against,
                metric_value=value,
            )
        )
    return found


def _figures(values: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _is_time(name: str) -> bool:
    return name == "runtime" or name.endswith("_per_second")


# ---- text --------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A recorded value in a table."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items() if value is not None)


def _heading(facts: CardFacts) -> str:
    name, source = facts.inspected["model_class"], facts.source
    if not facts.inspected["converted"]:
        back = f"reverted, after {_and(facts.runs)}" if facts.runs else "not converted, or reverted"
        return f"# {facts.name}\n\n`{name}` with full attention in every layer: {back}."
    of = f"[{source}](https://huggingface.co/{source})" if source and is_hub_id(source) else f"`{source}`"
    parts = [f"efficient attention: {', '.join(facts.mechanisms)}"] if facts.mechanisms else []
    parts += [experts_words(facts.experts)] if facts.experts else []
    what = f"{of if source else 'its source (' + NOT_RECORDED + ')'} with {'; and '.join(parts)}"
    lines = [f"# {facts.name}", f"`{name}` made from {what}."]
    if facts.adapter is not None:
        lines.append(f"This folder holds adapters of `{facts.adapter['base_model_name_or_path']}`.")
    lines.append(f"Inputs: {length_words(facts.inspected['lengths'], facts.inspected['made_for'])}.")
    return "\n\n".join(lines)


def _attention(facts: CardFacts) -> str:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for layer in facts.inspected["layers"]:
        options = ", ".join(f"{k} = {json.dumps(v)}" for k, v in layer["options"].items())
        groups.setdefault((layer["side"], layer["mechanism"], options), []).append(layer["layer"])
    rows = [
        [side, ", ".join(map(str, layers)), mechanism, _text(options)]
        for (side, mechanism, options), layers in groups.items()
    ]
    return table(["side", "layers", "attention", "options"], rows)


def _conversion(facts: CardFacts) -> str:
    return "\n\n".join(map(_account, facts.steps)) or f"What was copied and what was added: {NOT_RECORDED}."


def _account(report: dict[str, Any]) -> str:
    """Of one step: where every tensor came from."""
    groups: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for name, tensor in report["tensors"].items():
        status = tensor["status"]
        counts[status] = counts.get(status, 0) + 1
        entry = {"copied": "bit for bit", "initialised": tensor["from"]}.get(status, f"`{name}`")
        if entry not in groups.setdefault(status, []):
            groups[status].append(entry)
    rows = [[status, str(counts[status]), "; ".join(entries)] for status, entries in groups.items()]
    ignored = report.get("ignored") or []
    if ignored:
        rows.append(["not used", str(len(ignored)), "; ".join(f"`{name}`" for name in ignored)])
    head = f"Source: `{report['source']}`, revision {report['revision'] or NOT_RECORDED}. "
    short = report.get("short_inputs") or ("extended" in counts and NOT_RECORDED)
    head += f"Lengthened by positions={report['positions']}; short inputs: {short}. " if short else ""
    head += f"{_listed(report.get('versions') or {})}."
    return head + "\n\n" + table(["tensors", "number", "from"], rows)


def _checks(facts: CardFacts) -> list[dict[str, Any]]:
    fidelity = facts.fidelity or {}
    # earlier reports call them rungs
    return fidelity.get("checks", fidelity.get("rungs", []))


def _measured(facts: CardFacts, name: str) -> dict[str, Any]:
    checks = _checks(facts)
    return next((check["detail"] for check in checks if check["name"] == name and check["status"] == "measured"), {})


def _fidelity(facts: CardFacts) -> str:
    fidelity = facts.fidelity
    # experts alone leave attention as it is, so nothing can be left out of it
    is_sparse = bool(facts.experts) and not facts.mechanisms
    if not fidelity:
        return f"As {'upcycled' if is_sparse else 'converted'}: {NOT_MEASURED}."
    state, column = _state(facts, "upcycled" if is_sparse else "converted")
    found, control = _figures(_measured(facts, "fidelity")), _measured(facts, "control: mean of values")
    rows = [[name.replace("_", " "), _text(value), _text(control.get(name))] for name, value in found.items()]
    header, beside = (
        ["figure", column, "mean of values"],
        ", compared with what is left when attention carries no information",
    )
    if is_sparse:
        rows, header, beside = [row[:2] for row in rows], header[:2], ""
    checks = [[check["name"], check["status"], check["rule"]] for check in _checks(facts)]
    settings = {k: v for k, v in fidelity["settings"].items() if isinstance(v, (int, float, str)) and k != "source"}
    verdict = (fidelity.get("verdict") or {}).get("text")
    return "\n\n".join(
        [
            *([f"**{verdict[0].upper()}{verdict[1:]}.**"] if verdict else []),
            f"{state}{beside}:",
            table(header, rows),
            table(["check", "outcome", "rule"], [[_text(cell) for cell in row] for row in checks]),
            f"{_listed(settings)}; {_listed(fidelity['versions'])}.",
        ]
    )


def _state(facts: CardFacts, made: str) -> tuple[str, str]:
    """What the weights were when the fidelity was measured, as the beginning of a sentence; and the name of a column."""
    if facts.measured is None:
        if facts.runs:
            return (
                "It is not recorded whether these figures are of the weights before or after the training below",
                "measured",
            )
        return f"As {made}", made
    before, later = (runs(steps) for steps in (facts.history[: facts.measured], facts.history[facts.measured :]))
    first = next((i for i, step in enumerate(facts.history) if step["what"] in CHANGES), 0)
    before = [step for step in before if step in facts.history[first:]]
    text = f"After {_and(before)}" if before else f"As {made}"
    if (facts.fidelity or {}).get("weights", {}).get("state") == CHANGED:
        return (
            f"{text}, of weights that differ from the source's though no run that changed them is recorded",
            "measured",
        )
    return text + (f", before {_and(later)}" if later else ""), "trained" if before else made


def _and(steps: list[Step]) -> str:
    return " and ".join(map(described, steps))


def _training(run: Step) -> str:
    stages = {name: _figures(figures) for name, figures in run.get("metrics", {}).items()}
    order = sorted(stages, key=lambda name: [*STAGES, name].index(name))
    names = list(dict.fromkeys(figure for name in order for figure in stages[name] if not _is_time(figure)))
    rows = [[figure.replace("_", " "), *(_text(stages[name].get(figure)) for name in order)] for figure in names]
    parts = [f"### {run['what']}"]
    if not run["finished"]:
        parts.append("This run was not finished.")
    if run["what"] == "training":
        parts.append(f"{described(run)[0].upper()}{described(run)[1:]}; nothing else is recorded of it.")
        return "\n\n".join(parts)
    header = ["figure", *(STAGES.get(name, name) for name in order)]
    parts.append(table(header, rows) if rows else f"Figures: {NOT_MEASURED}.")
    if run.get("layer_errors"):
        parts.append("Relative error of each layer's attention, given the states of full attention:")
        parts.append(_layer_table(run["layer_errors"]))
    facts = {k: v for k, v in run.get("training", {}).items() if isinstance(v, (int, float, str))}
    parts.append(f"{_listed({k.replace('_', ' '): v for k, v in facts.items()}) or 'Cost: ' + NOT_MEASURED}.")
    known = [_listed(run.get("versions") or {}) or f"versions {NOT_RECORDED}", _listed(run.get("hardware") or {})]
    seed = NOT_RECORDED if run.get("seed") is None else run["seed"]
    parts.append("; ".join([f"Seed {seed}", *filter(None, known)]) + ".")
    return "\n\n".join(parts)


def _layer_table(errors: dict[str, Any]) -> str:
    names = [name for name in ("before", "transferred", "after") if name in errors]
    last = errors[names[-1]]
    controls = [name for name in last if name not in ("layers", "mechanism")]
    columns = [*(errors[name]["mechanism"] for name in names), *(last[name] for name in controls)]
    rows = [[f"`{layer}`", *map(_text, values)] for layer, *values in zip(last["layers"], *columns, strict=True)]
    return table(["layer", *names, *controls], rows)


def _speed(facts: CardFacts) -> str:
    detail = _measured(facts, "speed and memory")
    if not detail.get("rows"):
        return f"By length: {NOT_MEASURED}."
    header = list(detail["rows"][0])
    rows = [[_text(row.get(name)) for name in header] for row in detail["rows"]]
    return table([name.replace("_", " ") for name in header], rows) + f"\n\n{_listed(detail.get('hardware') or {})}."


# ---- what to do with it ------------------------------------------------------------------------------------------


def _use(facts: CardFacts) -> str:
    name, cls = json.dumps(facts.name), facts.inspected["model_class"]
    base = name if facts.adapter is None else json.dumps(str(facts.adapter["base_model_name_or_path"]))
    package = "hf_efficient" if facts.inspected["converted"] else "transformers"
    kind = "ImageProcessor" if facts.inspected["inputs"] == "pixel_values" else "Tokenizer"
    lines = [f"from {package} import {cls}", f"from transformers import Auto{kind}", ""]
    lines += [f"{kind.lower()} = Auto{kind}.from_pretrained({base})", f"model = {cls}.from_pretrained({base})"]
    if facts.adapter is not None:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f"model = PeftModel.from_pretrained(model, {name})")
    hint = "Importing `hf_efficient` is all that the Auto classes need to load it.\n\n"
    return (hint if package == "hf_efficient" else "") + "\n".join(["```python", *lines, "```"])


def _commands(facts: CardFacts) -> str:
    lines = commands(facts.history, facts.measured, (facts.fidelity or {}).get("command"))
    return "\n".join(["```bash", *lines, "```"]) if lines else f"Commands: {NOT_RECORDED}."


def _limits(facts: CardFacts) -> str:
    lines = []
    for mechanism in facts.mechanisms:
        cls, told = get_mechanism(mechanism), describe(mechanism)
        lines.append(f"{mechanism}: equals full attention when {told['exact_when']}. Training: {told['training']}.")
        refusals = {"causal layers": cls.causal_refusal, "T5's relative bias": cls.relative_bias_refusal}
        lines += [f"{mechanism} does not take {what}: {why}." for what, why in refusals.items() if why]
    lines += experts_limits(facts.experts) if facts.experts else []
    if facts.mechanisms:
        lines.append("`output_attentions=True` is refused: attention weights are never built.")
    source = facts.config.get("efficient_source") or {}
    before = source.get("max_position_embeddings", source.get("max_positions"))
    if before is not None and any(n is not None and before < n for n in facts.inspected["made_for"].values()):
        lines.append(f"The original was made for {before} tokens; longer inputs were not tested.")
    lines.append("The original's limits and biases apply to this model too.")
    return "\n".join(f"- {line}" for line in lines)


def _citation(facts: CardFacts) -> str:
    licence = facts.inherited.get("license")
    found = f"Licence of the source: {licence or NOT_RECORDED + '; check the source repository'}."
    lines = [found, "Please cite the source model, and:"]
    for mechanism in facts.mechanisms:
        told = describe(mechanism)
        number = re.search(r"arXiv ([\w./-]+)", told["paper"])
        link = f"[{told['paper']}](https://arxiv.org/abs/{number[1]})" if number else told["paper"]
        lines.append(f"- {told['title']}: {link}")
    for title, (paper, arxiv) in PAPERS.items() if facts.experts else ():
        lines.append(f"- {title}: [{paper}, arXiv {arxiv}](https://arxiv.org/abs/{arxiv})")
    return "\n\n".join(lines[:2] if len(lines) > 2 else lines[:1]) + "\n\n" + "\n".join(lines[2:])
