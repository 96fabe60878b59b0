"""Verification of single layers with the weights on the disk."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import hf_efficient as he
from hf_efficient.conversion.offloading import is_on_disk
from hf_efficient.evaluation.layerwise import compare_layers, equal_tensors, pair_on_disk, sampled_layers
from hf_efficient.testing import tiny_model

ROWS = [{"input_ids": torch.arange(5 + n, 45 + 2 * n)[None]} for n in (0, 3)]


@pytest.fixture
def checkpoints(tmp_path):
    """Folders of a converted Llama of four layers and of its source."""
    folders = tmp_path / "converted", tmp_path / "source"
    tiny_model("llama", layers=4).save_pretrained(folders[1], max_shard_size="20KB")
    he.convert(folders[1], "longformer", attention_window=8).save(folders[0])
    return folders


def checks_of(folders, count=2):
    with pair_on_disk(*folders) as (model, source):
        assert is_on_disk(model) and is_on_disk(source)
        sampled = sampled_layers(model, count)
        checks = [equal_tensors(model, source, sampled)[0], *compare_layers(model, sampled, ROWS)]
    return {check.name: check for check in checks}


def edit(folder, name, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name])}, file, {"format": "pt"})


def test_sampled_layers_pass_and_a_window_is_closer_than_no_attention(checkpoints):
    checks = checks_of(checkpoints)
    assert checks["copied tensors"].status == "passed"
    assert checks["exact limit by layer"].status == "passed"
    exact = checks["exact limit by layer"].detail["relative_difference"]
    assert list(exact) == [f"model.layers.{i}.self_attn" for i in (0, 3)]
    errors = checks["fidelity by layer"].detail["error"]
    assert all(errors[name] > 0.01 for name in exact)


def test_the_error_of_a_layer_is_that_in_memory(checkpoints):
    """Layer 0 has the inputs of the source in the converted model too."""
    errors = checks_of(checkpoints, 1)["fidelity by layer"].detail["error"]
    states = []
    for model in (he.convert(checkpoints[1], "longformer", attention_window=8).model, tiny_model("llama", layers=4)):
        layer, outputs = model.model.layers[0].self_attn, []
        layer.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output[0].flatten()))
        with torch.no_grad():
            for row in ROWS:
                model(**row)
        states.append(torch.cat(outputs).double())
    expected = (states[0] - states[1]).norm() / states[1].norm()
    assert errors["model.layers.0.self_attn"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "is_seen"), [("layers.3.mlp.up_proj", True), ("layers.1.mlp.up_proj", False), ("norm", True)]
)
def test_a_changed_tensor_fails_where_it_is_looked_at(name, is_seen, checkpoints):
    edit(checkpoints[0], f"model.{name}.weight", lambda tensor: tensor + 1)
    check = checks_of(checkpoints)["copied tensors"]
    assert check.status == ("failed" if is_seen else "passed")


def test_a_run_that_is_recorded_explains_changed_tensors(tmp_path):
    folders = tmp_path / "converted", tmp_path / "source"
    tiny_model("llama", layers=1).save_pretrained(folders[1])
    result = he.convert(folders[1], "local", attention_window=8)
    result.model(**ROWS[0], labels=ROWS[0]["input_ids"]).loss.backward()
    torch.optim.SGD(result.model.parameters(), lr=0.1).step()
    result.save(folders[0])
    assert checks_of(folders)["copied tensors"].status == "trained since"


def test_a_class_that_does_not_generate_has_no_keys_of_the_call_before(tmp_path):
    folders = tmp_path / "converted", tmp_path / "source"
    tiny_model("llama", layers=1).base_model.save_pretrained(folders[1])
    he.convert(folders[1], "local", attention_window=8).save(folders[0])
    assert checks_of(folders)["exact limit by layer"].status == "passed"


def test_loaded_models_and_numbers_below_one_are_refused(checkpoints):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="give the folders"):
        he.verify(model, model, ["text"], tokenizer=PreTrainedTokenizerFast, sample_layers=2)
    with pair_on_disk(*checkpoints) as (model, _), pytest.raises(ValueError, match="sample_layers=0"):
        sampled_layers(model, 0)
