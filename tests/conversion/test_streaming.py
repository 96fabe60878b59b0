"""Conversion with the weights left on the disk: the same files as in memory, in little memory, and resumed after a kill."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import fresh
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import hf_efficient as he
from hf_efficient.conversion import offloading, revert_checkpoint, streaming
from hf_efficient.conversion.offloading import is_on_disk, value_of
from hf_efficient.testing import tiny_model

SHARD = "20KB"
CASES = {
    "copied projections, tied weights": ("llama", "longformer", {"attention_window": 8, "tie_word_embeddings": True}),
    "longer table": ("gpt2", "local", {"attention_window": 8, "max_positions": 256}),
    "shared parameters": ("bert", "linformer", {"rank": 8}),
    "extra tokens": ("bert", "etc", {"attention_window": 8, "num_global_tokens": 3}),
    "seeded buffers": ("roberta", "performer", {"num_features": 8}),
    "relative bias": ("t5", "longformer", {"attention_window": 8}),
    "merged experts": ("mixtral", "local", {"attention_window": 8}),
    "no family": ("biogpt", "local", {"attention_window": 8}),
}


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def both_ways(act, tmp_path):
    """{file: bytes} that `act(out, streaming)` writes with the weights in memory, and on the disk."""
    written = []
    for on_disk in (False, True):
        torch.manual_seed(0)
        out = tmp_path / str(on_disk) / "out"  # the card's title is the folder's name
        act(out, on_disk)
        written.append(content(out))
    return written


@pytest.fixture
def sharded(tmp_path):
    """A Llama of three layers in several files."""
    tiny_model("llama", layers=3).save_pretrained(tmp_path / "source", max_shard_size=SHARD)
    return tmp_path / "source"


@pytest.mark.parametrize("case", CASES)
def test_the_files_of_both_ways_are_equal_and_so_are_those_of_the_way_back(case, tmp_path):
    model_type, mechanism, options = CASES[case]
    overrides = {"tie_word_embeddings": True} if options.get("tie_word_embeddings") else {}
    options = {name: value for name, value in options.items() if name not in overrides}
    source = tmp_path / "source"
    tiny_model(model_type, **overrides).save_pretrained(source, max_shard_size=SHARD)

    def convert(out, on_disk):
        result = he.convert(source, mechanism, streaming=on_disk, **options)
        assert is_on_disk(result.model) == on_disk
        result.save(out, max_shard_size=SHARD)

    def revert(out, on_disk):
        revert_checkpoint(
            str(tmp_path / "False" / "out"), out.parent / "back", streaming=on_disk, max_shard_size=SHARD
        )
        out.parent.joinpath("back").rename(out.parent / "again")

    memory, disk = both_ways(convert, tmp_path)
    assert memory == disk
    assert (SAFE_WEIGHTS_INDEX_NAME in disk) == (len([name for name in disk if name.endswith(".safetensors")]) > 1)
    for on_disk in (False, True):
        revert(tmp_path / str(on_disk) / "out", on_disk)
    assert content(tmp_path / "False" / "again") == content(tmp_path / "True" / "again")


def test_what_the_checkpoint_lacks_starts_as_in_memory(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "source")

    def convert(out, on_disk):
        options = {"model_class": BertForSequenceClassification, "streaming": on_disk}
        result = he.convert(tmp_path / "source", "local", attention_window=8, **options)
        assert result.report.tensors["classifier.weight"]["status"] == "random"
        result.save(out)

    memory, disk = both_ways(convert, tmp_path)
    assert memory == disk


def test_tied_weights_that_differ_in_the_checkpoint_are_both_kept(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    def convert(out, on_disk):
        he.convert(tmp_path / "source", "local", attention_window=8, streaming=on_disk).save(out)

    memory, disk = both_ways(convert, tmp_path)
    assert memory == disk


@pytest.mark.parametrize("mechanism", ["longformer", "performer"])
def test_a_model_on_the_disk_computes_what_it_computes_in_memory(mechanism, sharded):
    models = [he.convert(sharded, mechanism, streaming=on_disk).model for on_disk in (False, True)]
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
    names = models[0].state_dict()
    assert list(names) == list(models[1].state_dict())
    assert all(torch.equal(*(value_of(model, name) for model in models)) for name in names)


KILLED = """
import os, signal, sys
from hf_efficient.conversion import convert, streaming
source, out, *attempts = sys.argv[1:]
streaming.SYNC_BYTES = 4000
write = streaming._write_tensor
def attempt(kill_at):
    calls = 0
    def counted(file, tensor):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, tensor)
    streaming._write_tensor = counted
    convert(source, "longformer", attention_window=8, streaming=True).save(out, max_shard_size="50KB")
    return calls
for kill_at in map(int, attempts):
    if (child := os.fork()) == 0:
        attempt(kill_at)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not os.path.exists(out)
print(attempt(0))
"""


def test_killed_twice_and_resumed_it_writes_the_same_files(sharded, tmp_path):
    out, before = tmp_path / "other" / "out", content(sharded)
    done = fresh.python("-c", KILLED, sharded, out, 5, 9)
    assert done.returncode == 0, done.stderr
    expected, result = tmp_path / "expected" / "out", he.convert(sharded, "longformer", attention_window=8)
    assert 0 < int(done.stdout) < len(result.model.state_dict())  # what was written is not written again
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
    result.save(expected, max_shard_size="50KB")
    assert content(out) == content(expected)
    assert content(sharded) == before


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_what_another_conversion_left_is_not_gone_on_with(sharded, tmp_path, monkeypatch):
    write, out = streaming._write_tensor, tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(streaming, "SYNC_BYTES", 4000)
        patched.setattr(streaming, "_write_tensor", lambda f, t: no_space() if t.dim() == 1 else write(f, t))
        he.convert(sharded, "longformer", attention_window=8, streaming=True).save(out, max_shard_size="50KB")
    assert (tmp_path / ".out.partial" / streaming.PROGRESS).is_file()
    he.convert(sharded, "longformer", attention_window=16, streaming=True).save(out, max_shard_size="50KB")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    model = he.convert(sharded, "longformer", attention_window=16).model
    found = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["mixtral", "llama"])
def test_runs_go_on_with_one_another_while_the_checkpoint_is_the_same(model_type, tmp_path):
    """Wherever each has its new tensors: the command has them in another folder every time."""
    source = tmp_path / "source"
    tiny_model(model_type).save_pretrained(source, max_shard_size=SHARD)

    def identity(waiting):
        options = {"attention_window": 8, "streaming": True, "offload_folder": tmp_path / waiting}
        return streaming.ModelFiles(he.convert(source, "local", **options).model).identity()

    first = identity("one")
    assert identity("another") == first
    os.utime(last_shard(source), (0, 0))
    assert identity("one") != first


def test_a_folder_of_new_tensors_serves_one_checkpoint_after_another(tmp_path):
    model = tiny_model("bert")
    for number in range(2):
        source = tmp_path / f"source {number}"
        model.save_pretrained(source)
        options = {"attention_window": 8, "streaming": True, "offload_folder": tmp_path / "waiting"}
        state = he.convert(source, "longformer", **options)
        for name in [name for name in state.report.tensors if name.endswith("query_global.weight")]:
            own = name.replace("efficient.query_global", "query")
            assert torch.equal(value_of(state.model, name), model.state_dict()[own])
        for parameter in model.parameters():
            parameter.data += 1


def test_two_runs_do_not_write_to_one_folder(sharded, tmp_path):
    files = streaming.ModelFiles(he.convert(sharded, "local", attention_window=8, streaming=True).model)
    partial = streaming.PartialFolder(tmp_path / "out")
    with partial._owned(), pytest.raises(OSError, match="another process writes"):
        streaming.PartialFolder(tmp_path / "out").write(files)


# ---- bad input ----------------------------------------------------------------------------------------------------


def last_shard(folder):
    return sorted(folder.glob("*.safetensors"))[-1]


def cut(folder):
    file = last_shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def edit_index(folder, change):
    file = folder / SAFE_WEIGHTS_INDEX_NAME
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def name_more(folder):
    edit_index(folder, lambda names: names.update({"model.layers.9.weight": last_shard(folder).name}))


def name_less(folder):
    edit_index(folder, lambda names: names.pop("model.embed_tokens.weight"))


def lose(folder):
    name_less(folder)
    file = folder / "model-00001-of-00007.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "model.embed_tokens.weight"}, file, {"format": "pt"})


def widen(folder):
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    for file in sorted(folder.glob("*.safetensors"))[:-1]:
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: last_shard(folder).unlink(), "model-"),
        (cut, "can't be read"),
        (name_more, "1 tensors are in one of both alone: model.layers.9.weight"),
        (name_less, "1 tensors are in one of both alone: model.embed_tokens.weight"),
        (lose, "lacks 1 tensors of the model itself"),
        (widen, "would lose digits"),
    ],
)
def test_a_damaged_checkpoint_is_one_error_and_stays_as_it_is(damage, message, sharded):
    damage(sharded)
    before = content(sharded)
    with pytest.raises((ValueError, OSError), match=message):
        he.convert(sharded, "longformer", attention_window=8, streaming=True)
    assert content(sharded) == before


def test_a_full_disk_is_an_error_and_the_next_attempt_goes_on(sharded, tmp_path, monkeypatch):
    result = he.convert(sharded, "longformer", attention_window=8, streaming=True)
    monkeypatch.setattr(streaming, "_synced", no_space)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / SAFE_WEIGHTS_NAME).is_file()


def test_what_can_t_stay_on_the_disk_is_refused(sharded, tmp_path):
    with pytest.raises(ValueError, match="streaming=True is for checkpoints"):
        he.convert(tiny_model("bert"), "local", streaming=True)
    with pytest.raises(ValueError, match=r"calibration .*streaming=False"):
        he.convert(sharded, "routing_transformer", calibration=["a text"], streaming=True)
    shutil.copy(sharded / "config.json", tmp_path)
    torch.save(tiny_model("llama", layers=3).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, .* needs safetensors files"):
        he.convert(tmp_path, "local", streaming=True)


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "on_disk"), [(10**12, False), (10**4, True), (None, False)])
def test_the_size_of_the_checkpoint_chooses(free, on_disk, sharded, monkeypatch, logged):
    monkeypatch.setattr(offloading, "available_memory", lambda: free)
    model = he.convert(sharded, "local", attention_window=8).model
    assert is_on_disk(model) == on_disk
    assert any("weights stay on the disk" in message for message in logged) == on_disk


def wide_llama(folder, layers=24):
    """A checkpoint of 4 MB for each layer, in files of 12 MB."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="12MB")
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


MEASURED = """
import sys
from hf_efficient.conversion import convert
from hf_efficient.profiling.memory import growth_of
def streamed(size):
    convert(f"{sys.argv[1]}/{size}", "longformer", attention_window=64, streaming=True).save(f"{sys.argv[1]}/of_{size}")
streamed("small")
print(growth_of(lambda: streamed("large")))
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    wide_llama(tmp_path / "small", layers=1)
    megabytes = wide_llama(tmp_path / "large") / 1e6
    done = fresh.python("-c", MEASURED, tmp_path)
    assert done.returncode == 0, done.stderr
    # a layer and what Longformer adds to it are 5 MB; the objects of all modules take some, too
    assert float(done.stdout) < 5 + 30 < megabytes / 2.5
