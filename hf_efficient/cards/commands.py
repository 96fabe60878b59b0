"""The commands that make a checkpoint again, one for every step of its history."""

from __future__ import annotations

import json
import shlex

from hf_efficient.models.provenance import Step, described

OUT = "converted"
"""The folder of the last step, of which nobody knows what it was called."""


def commands(history: list[Step], measured: int | None, verification: str | None) -> list[str]:
    """The lines of a shell script.

    Args:
        measured: after how many of the steps the fidelity was measured; `None` = it was not, or nobody knows.
        verification: the command that measured it.
    """
    lines = []
    for index, step in enumerate(history):
        out = _written_to(history, index)
        # what a run did on its way is in its own command
        if step.get("within") is None:
            lines.append(_command(step, out))
        if measured == index + 1 and verification is not None:
            lines.append(verification)
        elif step["what"] in ("convert", "upcycle") and step.get("within") is None:
            began = _compared_with(history, index)
            words = ["hf-efficient", "verify", out, str(began["source"]), *_loading(began, "subfolder")]
            lines.append(shlex.join(words))
    return lines


def _written_to(history: list[Step], index: int) -> str:
    began_with = [step["source"] for step in history[index + 1 : index + 2]]
    out = (*began_with, None)[0]
    return str(OUT if out in (None, "", history[index]["source"]) else out)


def _compared_with(history: list[Step], index: int) -> Step:
    """The step that began with the checkpoint without efficient attention that a converted or upcycled one came from."""
    if history[index]["what"] == "upcycle":
        for step in reversed(history[:index]):
            if step["what"] == "revert":
                break
            if step["what"] == "convert":
                return step
    return history[index]


def _command(step: Step, out: str) -> str:
    if step.get("command"):
        return str(step["command"])
    make = {"convert": _convert, "import": _import, "upcycle": _upcycle, "revert": _revert, "training": _training}
    return make.get(step["what"], _run)(step, out)


def _convert(step: Step, out: str) -> str:
    settings, groups = step["settings"], step["settings"]["attention"]
    if step.get("calibration_batches") and not settings.get("calibration"):
        batches = f"{step['calibration_batches']} batches that are not recorded"
        return f"# convert, calibrated on {batches}: settings {json.dumps(settings)}"
    attention = json.dumps(groups[0] if len(groups) == 1 else groups)
    words = ["hf-efficient", "convert", str(step["source"]), out, "--attention", attention]
    if settings.get("max_positions") is not None:
        words += ["--max-positions", str(settings["max_positions"])]
        if settings["positions"] != "tile":  # which is usual for tables, and was written of all others too
            words += ["--positions", settings["positions"]]
        if settings.get("rope"):
            words += ["--rope", json.dumps(settings["rope"])]
    if settings.get("calibration"):
        words += ["--calibration", settings["calibration"]]
    return shlex.join(words + _loading(step))


def _import(step: Step, out: str) -> str:
    return shlex.join(["hf-efficient", "import", str(step["source"]), out, *_loading(step)])


def _upcycle(step: Step, out: str) -> str:
    words = ["hf-efficient", "upcycle", str(step["source"]), out]
    for name, value in step["settings"]["efficient_experts"].items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words + _loading(step))


def _revert(step: Step, out: str) -> str:
    return shlex.join(["hf-efficient", "revert", str(step["source"]), out])


def _training(step: Step, out: str) -> str:
    return f"# {described(step)}, of which no command is recorded"


def _run(step: Step, out: str) -> str:
    """A recipe with all its settings."""
    settings = step["settings"]
    if not {"output_dir", "dataset"} <= settings.keys():  # called from Python
        return f"# {step['what']}: settings {json.dumps(settings)}"
    given = {name: value for name, value in settings.items() if value not in ("", None) and name != "resume"}
    words = [f"--{name}={json.dumps(v) if isinstance(v, (dict, list)) else v}" for name, v in given.items()]
    return shlex.join(["python", f"recipes/{step['what']}.py", *words])


def _loading(step: Step, *names: str) -> list[str]:
    """How the source was found and read, as words of a command; of all that was said, or of these and the revision."""
    given = {"revision": step.get("revision")} | (step.get("loading") or {})
    kept = {name: value for name, value in given.items() if value and (not names or name in ("revision", *names))}
    return [word for name, value in kept.items() for word in (f"--{name.replace('_', '-')}", str(value))]
