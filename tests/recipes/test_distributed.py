"""Two processes (gloo, CPU) train as one does: stock Trainer, raw FSDP2, Accelerate, attention transfer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from distributed_worker import SCENARIOS, SHARDED, STEPS, TRAINED, TRANSFERRED, converted, logits, trainer_for
from paths import ROOT
from pretraining import dataset, source
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hf_efficient.testing import assert_close, tiny_model

WORKER = ROOT / "tests" / "support" / "distributed_worker.py"
LAUNCHERS = ROOT / "recipes" / "accelerate"
SECONDS = 300


def launched(scenario: str, folder: Path) -> Any:
    """Figures and tensors of a scenario in two processes."""
    failed = [ended for ended in fresh.launch(2, WORKER, scenario, folder) if ended.returncode]
    assert not failed, failed[0].stdout[-2000:] + failed[0].stderr[-4000:]
    return written(folder)


def launched_by_accelerate(scenario: str, folder: Path) -> Any:
    """The same, started by `accelerate launch` with its file; nothing it started outlives it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "--config_file", LAUNCHERS / "cpu_two_processes.yaml", WORKER, scenario, folder]
    process = subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()  # on which the launcher ends its workers, as killing it would not
            process.communicate(timeout=60)
    assert process.returncode == 0, output[-4000:]
    return written(folder)


def written(folder: Path) -> Any:
    document = json.loads((folder / "figures.json").read_text())
    assert document["processes"] == 2, "one process was started, so this shows nothing"
    return document["figures"], load_file(folder / "tensors.safetensors")


def alone(scenario: str, folder: Path) -> Any:
    folder.mkdir()
    return SCENARIOS[scenario](folder)


def assert_same_curves(actual: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert actual.keys() == expected.keys()
    for name, curve in expected.items():
        assert actual[name] == pytest.approx(curve, rel=1e-5), name
        assert len(set(curve)) == len(curve) > 1, f"{name}: nothing was learned, so nothing is shown"


# ---- training ----------------------------------------------------------------------------------------------------


def test_trainer_in_two_processes_equals_one(tmp_path):
    """Same loss curve at the same global batch, accumulated or not, of the stock Trainer and of a recipe, which evaluates
    before it trains; the result, and a checkpoint, load in one process.
    """
    (tmp_path / "two").mkdir()
    source(tmp_path / "gpt2", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    dataset(tmp_path / "data", train=8)
    figures, tensors = launched("trainer", tmp_path / "two")
    expected, expected_logits = alone("trainer", tmp_path / "one")
    first, second = tensors["weights"]
    assert torch.equal(first, second), "the recipe trained two models"
    assert_same_curves(figures, expected)
    for family in TRAINED:
        plain, accumulated = (figures[f"{family}, accumulation {steps}"] for steps in (1, 2))
        assert plain == pytest.approx(accumulated, rel=1e-5)
        assert_close(tensors[family], expected_logits[family], 1e-4, family)

        # what two processes wrote gives the same logits in one
        loader = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
        loaded = loader.from_pretrained(tmp_path / "two" / family / "model")
        assert torch.equal(logits(loaded, family), tensors[family])

        # and training goes on from their checkpoint as if nobody had left
        mechanism, options = TRAINED[family]
        rest = trainer_for(converted(family, mechanism, **options), family, tmp_path / "rest")
        rest.train(resume_from_checkpoint=str(tmp_path / "two" / family / "checkpoint-2"))
        curve = [float(entry["loss"]) for entry in rest.state.log_history if "loss" in entry]
        assert len(curve) == STEPS and curve == pytest.approx(plain, rel=1e-5)


def test_fsdp_in_two_processes_equals_one(tmp_path):
    """Every layer sharded: same losses and same full state dict after three steps, parameters of mechanisms included."""
    (tmp_path / "two").mkdir()
    figures, tensors = launched("fsdp", tmp_path / "two")
    expected, expected_tensors = alone("fsdp", tmp_path / "one")
    refusal = tensors.pop("refusal")
    assert bytes(refusal.tolist()).decode().startswith("Parameter 'bert.encoder.layer.1"), "sharded twice, silently"
    assert figures.keys() == SHARDED.keys()
    assert_same_curves(figures, expected)
    assert tensors.keys() == expected_tensors.keys()
    assert any(".efficient." in name for name in tensors)
    for name, tensor in expected_tensors.items():
        assert (tensors[name] - tensor).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), name


def test_accelerate_loop_in_two_processes_equals_one(tmp_path):
    """Started by `accelerate launch` from the file in recipes/accelerate: losses and gathered predictions of odd rows."""
    (tmp_path / "two").mkdir()
    figures, tensors = launched_by_accelerate("loop", tmp_path / "two")
    expected, expected_tensors = alone("loop", tmp_path / "one")
    assert_same_curves(figures, expected)
    assert_close(tensors["predictions"], expected_tensors["predictions"], 1e-4)
    assert len(tensors["predictions"]) == 7
    loaded, other = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / n / "t5").state_dict() for n in ("two", "one"))
    for name, tensor in other.items():
        assert_close(loaded[name], tensor, 1e-4, name)


def test_attention_transfer_in_two_processes_equals_one(tmp_path):
    """Layer by layer, with a parameter that layers share, and end to end: same losses, same trained mechanisms."""
    (tmp_path / "two").mkdir()
    figures, tensors = launched("transfer", tmp_path / "two")
    expected, expected_tensors = alone("transfer", tmp_path / "one")
    assert figures.keys() == TRANSFERRED.keys()
    assert_same_curves(figures, expected)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert_close(tensors[name], tensor, 1e-4, name)


# ---- launcher files ----------------------------------------------------------------------------------------------

EXPECTED: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO", "num_processes": 1, "use_cpu": False},
    "ddp": {"distributed_type": "MULTI_GPU", "use_cpu": False},
    "cpu_two_processes": {"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True},
    "fsdp2": {"distributed_type": "FSDP", "use_cpu": False},
    "deepspeed_zero2": {"distributed_type": "DEEPSPEED", "use_cpu": False},
    "deepspeed_zero3": {"distributed_type": "DEEPSPEED", "use_cpu": False},
}


def test_every_launcher_file_is_tested():
    assert sorted(EXPECTED) == sorted(path.stem for path in LAUNCHERS.iterdir())


@pytest.mark.parametrize("name", EXPECTED)
def test_launcher_files_are_read_by_accelerate(name):
    """By its own loader, which refuses unknown keys; and the settings inside are options of `accelerate launch`."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config: Any = load_config_from_file(str(LAUNCHERS / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.num_machines == 1 and config.mixed_precision == "no", "precision is the recipe's own setting"
    for key, value in EXPECTED[name].items():
        assert getattr(config, key) == value, key
    known = {action.dest for action in launch_command_parser()._actions}
    assert config.fsdp_config.keys() | config.deepspeed_config.keys() <= known
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_fsdp_file_shards_the_layers_of_every_family(family, monkeypatch):
    """The file names no class, so that accelerate takes each model's own layer classes, converted or not."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    settings: Any = load_config_from_file(str(LAUNCHERS / "fsdp2.yaml")).fsdp_config
    assert "fsdp_transformer_layer_cls_to_wrap" not in settings
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=None)
    plugin.set_auto_wrap_policy(tiny_model(family))
    model = converted(family, "local", attention_window=8)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    chosen = [name for name, module in model.named_modules() if policy(module)]
    layers = [name for name in chosen if name.rpartition(".")[2].isdigit()]
    assert len(layers) == (4 if family == "t5" else 2), chosen
