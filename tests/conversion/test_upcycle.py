"""upcycle as a user meets it: the verb and the command, what is written, what loads, what composes, what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import transformers
from command_line import document, error, run
from tiny import SPECIALS, save_source, words
from torch import Tensor

import hf_efficient as he
from hf_efficient.cards.checkpoint import checkpoint_card
from hf_efficient.conversion.loading import load_as_it_is, load_converted
from hf_efficient.experts.layer import ExpertLayer, expert_layers
from hf_efficient.models.registry import MODELS
from hf_efficient.testing import FAMILIES, assert_close, inputs_for, tiny_model

AUTO = {
    "bert": transformers.AutoModelForMaskedLM,
    "roberta": transformers.AutoModelForMaskedLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}
RELATIVES = ("xlm-roberta", "camembert", "mt5", "umt5")
# a mechanism of every kind of call: hidden states, projections, slots, extra tokens, feature maps, caches of its own
WITH = [
    ("bert", "longformer", {"attention_window": 8, "global_tokens": "first"}),
    ("bert", "linformer", {"rank": 8}),
    ("bert", "etc", {"attention_window": 8, "num_global_tokens": 4}),
    ("bert", "funnel", {"pool_size": 2, "blocks": (0, 2)}),
    ("roberta", "synthesizer", {"variant": "dense", "max_length": 128}),
    ("gpt2", "local", {"attention_window": 8}),
    ("gpt2", "linear_transformer", {}),
    ("t5", "longt5", {"attention_window": 8, "global_block_size": 4}),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: save_source(root / family, family) for family in sorted(SPECIALS)}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert not [name for name in before if not torch.equal(after[name], before[name])]


def train(model: Any, steps: int = 1) -> None:
    """A few steps that tell the experts apart, on padded rows."""
    inputs = inputs_for(model, length=24)
    labels = inputs["decoder_input_ids"] if model.config.is_encoder_decoder else inputs["input_ids"]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        model.train()(**inputs, labels=labels.masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
        optimiser.step()
    model.eval()


# ---- the verb ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_report_accounts_for_every_tensor(sources, family: str, tmp_path):
    result = he.upcycle(sources[family], 4, top_k=2, capacity_factor=1.5, seed=3)
    original = load_as_it_is(str(sources[family]))[0]
    result.save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "upcycling_report.json").read_text())
    assert report == result.report.to_dict()
    assert report["source"] == str(sources[family]) and report["model_class"] == type(original).__name__
    state, before = result.model.state_dict(), original.state_dict()
    assert set(report["tensors"]) == set(state)
    for name, entry in report["tensors"].items():
        assert entry["shape"] == list(state[name].shape)
        assert (entry["status"] == "copied") == (name in before)
        assert name not in before or torch.equal(state[name], before[name])
    experts = sum(
        state[n].numel() for n, e in report["tensors"].items() if e["from"] == "4 copies of the dense weights"
    )
    routers = sum(state[n].numel() for n in state if ".router." in n)
    assert report["source_parameters"] == original.num_parameters()
    assert report["parameters"] == report["source_parameters"] + routers + 3 * experts // 4
    assert report["active_parameters"] == report["source_parameters"] + routers + experts // 4
    assert report["difference"] <= report["tolerance"] == 1e-5
    assert result.model.config.efficient_experts == report["efficient_experts"]


def test_options_reach_the_layers_and_the_seed_the_routers():
    def routers(seed: int) -> list[Tensor]:
        model = he.upcycle(tiny_model("t5", layers=3), 4, layers=(0, 2), seed=seed).model
        assert [name.split(".")[2] for name in expert_layers(model)] == ["0", "2", "0", "2"]
        return [layer.router.weight.detach() for layer in expert_layers(model).values()]

    first, again, other = routers(5), routers(5), routers(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    spread = he.upcycle(tiny_model("bert", hidden_size=64, intermediate_size=16), 64).model
    assert next(iter(expert_layers(spread).values())).router.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("family", RELATIVES)
def test_relatives_there_and_back(family: str, tmp_path):
    model = tiny_model(family)
    inputs = inputs_for(model)
    before, expected = snapshot(model), logits(model, inputs)
    result = he.upcycle(model, 3, layers=[0])
    assert_close(logits(result.model, inputs), expected, 1e-6)
    loaded = load_converted(result.save(tmp_path / "out"))
    assert torch.equal(logits(loaded, inputs), logits(result.model, inputs))
    assert_same(he.revert(loaded), before)


def test_half_precision_and_t5_in_fp16(tmp_path):
    model = tiny_model("bert").to(torch.bfloat16)
    inputs = inputs_for(model)
    expected = logits(model, inputs).float()
    assert_close(logits(he.upcycle(model, 4).model, inputs).float(), expected, 0.03)
    he.upcycle(tiny_model("t5"), 4).save(tmp_path / "t5")
    loaded = AUTO["t5"].from_pretrained(tmp_path / "t5", dtype=torch.float16)
    part = next(iter(expert_layers(loaded).values()))
    # as T5 keeps its dense one
    assert part.up.dtype == torch.float16 and part.down.dtype == torch.float32
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


# ---- persistence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_checkpoint_reloads_bit_for_bit(sources, family: str, tmp_path):
    result = he.upcycle(sources[family], 4, top_k=2, router_aux_loss_coef=0.5)
    train(result.model)
    result.save(tmp_path / "out")
    loaded = AUTO[family].from_pretrained(tmp_path / "out")
    assert type(loaded) is type(result.model) and not loaded.training
    assert_same(loaded, snapshot(result.model))
    inputs = inputs_for(loaded)
    assert torch.equal(logits(loaded, inputs), logits(result.model, inputs))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("out", "again"):
        stored = json.loads((tmp_path / name / "config.json").read_text())
        assert stored["experts_implementation"].startswith("hf_efficient") and stored["efficient_attention"] == []
        assert stored["efficient_experts"] == result.model.config.efficient_experts
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert list(expert_layers(encoder)) and type(encoder).__name__.startswith("Efficient")


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_without_these_classes_fails(sources, family: str, tmp_path):
    he.upcycle(sources[family], 2).save(tmp_path / "out")
    with pytest.raises(ValueError, match="hf_efficient"):
        type(load_as_it_is(str(sources[family]))[0]).from_pretrained(tmp_path / "out")


def test_fresh_process(sources, tmp_path):
    result = he.upcycle(sources["gpt2"], 4)
    train(result.model)
    result.save(tmp_path / "out")
    inputs = inputs_for(result.model, padded=False)
    torch.save({"inputs": inputs, "logits": logits(result.model, inputs)}, tmp_path / "saved.pt")
    common = (
        "import torch, transformers; torch.set_num_threads(1); saved = torch.load('saved.pt');"
        "model = transformers.AutoModelForCausalLM.from_pretrained('out');"
    )
    program = "import hf_efficient;" + common + "assert torch.equal(model(**saved['inputs']).logits, saved['logits'])"
    done = fresh.python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    failed = fresh.python("-c", common, cwd=tmp_path)
    assert failed.returncode != 0 and "contains custom code" in failed.stderr


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(way: str):
    model = he.upcycle(tiny_model("t5"), 4).model
    train(model)
    inputs = inputs_for(model)
    model.train()(**inputs)  # without labels, what the routers did keeps its gradient
    expected = logits(model, inputs)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, inputs), expected)
    # the masks of the copy go to the copy's layers
    train(twin)
    assert all(layer.tokens is not None for layer in expert_layers(twin).values())


def test_incomplete_checkpoint_and_unknown_options_are_refused(sources, tmp_path):
    from safetensors.torch import load_file, save_file

    he.upcycle(sources["bert"], 2).save(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.router.weight"
    save_file(
        {n: t for n, t in weights.items() if n != name}, tmp_path / "out" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="lacks 1 tensors of its efficient attention or experts"):
        AUTO["bert"].from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["efficient_experts"]["noise"] = 1
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no option noise"):
        AUTO["bert"].from_pretrained(tmp_path / "out")


def test_signatures_are_those_of_the_stock_classes_and_name_the_global_mask():
    # the Trainer drops columns and finds labels by them
    for stock, efficient in MODELS.items():
        signature = inspect.signature(efficient.forward)
        rest = [p for name, p in signature.parameters.items() if name != "global_attention_mask"]
        assert signature.replace(parameters=rest) == inspect.signature(stock.forward)
        assert len(rest) == len(signature.parameters) - 1
        assert transformers.utils.generic.find_labels(efficient) == transformers.utils.generic.find_labels(stock)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_other_heads_dtypes_and_placements_load_the_trained_experts(sources, family: str, tmp_path):
    result = he.upcycle(sources[family], 4)
    train(result.model)
    result.save(tmp_path / "out")
    trained = list(expert_layers(result.model).values())
    for options in (
        {"dtype": torch.bfloat16},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}, "dtype": torch.bfloat16},
    ):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", **options)
        assert all(p.isfinite().all() and p.dtype == options.get("dtype", torch.float32) for p in model.parameters())
        for part, expected in zip(layers(model), trained, strict=True):
            for name, parameter in part.named_parameters():
                assert torch.equal(parameter, expected.get_parameter(name).to(parameter.dtype)), name


def test_model_from_its_config_has_no_uninitialised_weight():
    config = he.EfficientGPT2Config(
        n_embd=32, n_head=4, n_layer=2, vocab_size=99, n_positions=64, efficient_experts={"num_experts": 3}
    )
    model = he.EfficientGPT2LMHeadModel(config)
    assert all(p.isfinite().all() for p in model.parameters())
    part = expert_layers(model)["transformer.h.1.mlp"]
    assert (part.up == part.up[0]).all() and part.up.std() > 0
    with pytest.raises(ValueError, match="needs config"):
        he.EfficientGPT2LMHeadModel(he.EfficientGPT2Config())


# ---- with efficient attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mechanism", "options"), WITH, ids=lambda v: v if isinstance(v, str) else "")
def test_composes_with_mechanisms_in_both_orders(family: str, mechanism: str, options: dict[str, Any], tmp_path):
    def converted(model: Any) -> Any:
        return he.convert(model, mechanism, **options).model

    inputs = inputs_for(tiny_model(family), length=40)
    expected = logits(converted(tiny_model(family)), inputs)
    first = he.upcycle(converted(tiny_model(family)), 4, capacity_factor=1.0)
    second = converted(he.upcycle(tiny_model(family), 4, capacity_factor=1.0).model)
    assert type(first.model) is type(second) and snapshot(first.model).keys() == snapshot(second).keys()
    for model in (first.model, second):
        assert_close(logits(model, inputs), expected, 1e-5, where=inputs["attention_mask"])
        assert model.config.efficient_attention[0]["mechanism"] == mechanism
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model)
        # how many tokens there are is known behind slots and extra tokens too
        assert all(
            layer.routing.dropped < 1 and layer.routing.load.sum() == pytest.approx(1) for layer in layers(model)
        )
    assert_same(first.model, snapshot(second))
    first.save(tmp_path / "out")
    loaded = AUTO[family].from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(first.model, inputs))
    # the attention goes back, trained experts stay
    reverted = he.revert(loaded)
    reverted.save_pretrained(tmp_path / "reverted")
    again = AUTO[family].from_pretrained(tmp_path / "reverted")
    assert type(again) is type(reverted) is type(loaded) and again.config.efficient_attention == []
    assert_same(again, snapshot(reverted))
    assert torch.equal(logits(again, inputs), logits(reverted, inputs))
    assert len(layers(again)) == len(layers(first.model))


def layers(model: Any) -> list[ExpertLayer]:
    return list(expert_layers(model).values())


@pytest.mark.parametrize("sparse_first", [True, False])
@pytest.mark.parametrize(
    ("mechanism", "options"), [(WITH[i][1], WITH[i][2]) for i in (0, 2, 3)], ids=["plain", "extra", "slots"]
)
def test_padding_is_left_out_behind_slots_and_extra_tokens(
    mechanism: str, options: dict[str, Any], sparse_first: bool
):
    model = tiny_model("bert").double()
    if sparse_first:
        he.upcycle(model, 4, capacity_factor=0.5)
    he.convert(model, mechanism, **options)
    if not sparse_first:
        he.upcycle(model, 4, capacity_factor=0.5)
    inputs = inputs_for(model, batch=1, length=30)
    figures = []
    for right in (0, 17):
        padded = {name: torch.nn.functional.pad(tensor, (0, right)) for name, tensor in inputs.items()}
        model.train()(**padded)
        figures.append(layers(model)[0].routing)
    assert figures[0].dropped > 0
    for one, other in zip(*figures, strict=True):
        assert_close(one, other, 1e-9)


def traces(model: Any) -> dict[str, Any]:
    """What every module is, holds, and has hooked to it."""
    return {
        name: (
            type(module),
            sorted(set(vars(module)) - {"_is_hf_initialized"}),
            [len(hooks) for kind, hooks in sorted(vars(module).items()) if kind.startswith("_forward_")],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_revert_is_exact_until_training(family: str, way: str):
    model = tiny_model(family)
    inputs = inputs_for(model)
    before, expected, kind = snapshot(model), logits(model, inputs), type(model)
    found = traces(model)
    he.upcycle(model, 4)
    assert traces(model)[""] != found[""]
    if way != "itself":
        model = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert he.revert(model) is model and type(model) is kind
    assert_same(model, before)
    assert traces(model) == found
    assert torch.equal(logits(model, inputs), expected)
    assert not [key for key in model.config.to_dict() if "efficient" in key or "experts" in key]
    he.upcycle(model, 4)
    train(model)
    trained = snapshot(model)
    with pytest.raises(ValueError, match="trained apart"):
        he.revert(model)
    assert_same(model, trained)
    logits(model, inputs)


def test_attention_of_other_implementations_still_works(sources, tmp_path):
    he.upcycle(sources["bert"], 2).save(tmp_path / "out")
    model = AUTO["bert"].from_pretrained(tmp_path / "out", attn_implementation="eager")
    inputs = inputs_for(model)
    attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 2 and attentions[0].shape == (3, 4, 97, 97)
    expected = logits(model, inputs)
    model.set_attn_implementation("sdpa")
    assert_close(logits(model, inputs), expected, 1e-5, where=inputs["attention_mask"])


def test_router_trains_beside_adapters(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = he.upcycle(tiny_model("bert"), 4).model
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value"], modules_to_save=["router"]))
    train(adapted, 2)
    router = base.bert.encoder.layer[1].intermediate.router.weight
    trained = adapted.base_model.model.bert.encoder.layer[1].intermediate.router
    assert not torch.equal(trained.modules_to_save["default"].weight, router)
    inputs = inputs_for(base)
    expected = logits(adapted, inputs)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs), expected)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(ValueError, match="has experts already"):
        he.upcycle(he.upcycle(tiny_model("bert"), 2).model, 2)
    with pytest.raises(ValueError, match=r"layers \[7\] do not exist: the encoder has layers 0 to 1"):
        he.upcycle(tiny_model("bert"), 2, layers=[1, 7])
    with pytest.raises(ValueError, match="give layers"):
        he.upcycle(tiny_model("bert", layers=1), 2)
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        he.upcycle(tiny_model("bert", chunk_size_feed_forward=4), 2)
    with pytest.raises(ValueError, match="feed-forward parts of markuplm are not known"):
        he.upcycle(tiny_model("markuplm"))
    with torch.device("meta"):
        empty = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=2))
    with pytest.raises(ValueError, match="not loaded"):
        he.upcycle(empty)
    model = tiny_model("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match="do not exist"):
        he.upcycle(model, 2, layers=[9])
    assert_same(model, before)
    assert type(model) is transformers.BertForMaskedLM


def test_outputs_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(ExpertLayer, "run_experts", lambda self, rows, chosen, weights: 1.01 * rows)
    for family in FAMILIES:
        model = tiny_model(family)
        before, kind, config = snapshot(model), type(model), model.config.to_dict()
        owners = list(model.named_modules()) + list(model.named_parameters())
        with pytest.raises(ValueError, match="the outputs differ by"):
            he.upcycle(model, 2)
        # the very modules and parameters, which an optimiser may hold
        after = list(model.named_modules()) + list(model.named_parameters())
        assert all(n == m and a is b for (n, a), (m, b) in zip(after, owners, strict=True))
        assert type(model) is kind and model.config.to_dict() == config
        assert_same(model, before)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        model.train()(**inputs_for(model))


def test_conversion_on_the_way_is_sent_to_convert(sources, tmp_path):
    he.upcycle(sources["bert"], 2).save(tmp_path / "out")
    with pytest.raises(ValueError, match="has experts; convert it with"):
        he.EfficientBertForMaskedLM.from_pretrained(tmp_path / "out", efficient_attention="local", attention_window=8)


# ---- the command -------------------------------------------------------------------------------------------------


def test_command_writes_the_checkpoint_and_prints_the_report(sources, tmp_path):
    out = tmp_path / "out"
    given = document(
        "upcycle", sources["t5"], out, "--num-experts", 4, "--top-k", 2, "--capacity-factor", 1.25, "--layers", "0-1",
        "--seed", 7,
    )  # fmt: skip
    saved = json.loads((out / "upcycling_report.json").read_text())
    assert given.pop("out") == str(out)
    assert given.pop("counts")["initialised"] == 3 * 4 and given == saved
    assert saved["efficient_experts"] == {
        "num_experts": 4, "top_k": 2, "capacity_factor": 1.25, "layers": [0, 1], "router_aux_loss_coef": 1e-2,
        "router_z_loss_coef": 1e-3, "seed": 7,
    }  # fmt: skip
    assert len(expert_layers(load_converted(out))) == 4
    assert transformers.AutoTokenizer.from_pretrained(out).pad_token == "<pad>"
    table = run("upcycle", sources["t5"], out, "--overwrite").stdout
    assert "decoder.block.1.layer.2.DenseReluDense" in table and "→" in table
    assert document("inspect", out)["experts"]["num_experts"] == 8
    assert "8 experts" in run("inspect", out).stdout


def test_commands_compose_and_go_back(sources, tmp_path):
    run("upcycle", sources["bert"], tmp_path / "sparse", "--num-experts", 4)
    options = ["--attention", "longformer", "--attention-window", 8, "--max-positions", 256]
    document("convert", tmp_path / "sparse", tmp_path / "both", *options)
    document("convert", sources["bert"], tmp_path / "long", *options)
    document("upcycle", tmp_path / "long", tmp_path / "other", "--num-experts", 4)
    for name in ("both", "other"):
        for kind in ("conversion", "upcycling"):
            assert (tmp_path / name / f"{kind}_report.json").is_file(), (name, kind)
    one, other = (load_converted(tmp_path / name) for name in ("both", "other"))
    assert_same(one, snapshot(other))
    for name in ("both", "other"):
        reverted = document("revert", tmp_path / name, tmp_path / f"{name}_sparse")
        assert reverted["model_class"] == "EfficientBertForMaskedLM" and reverted["max_positions"] == 128
        # a report stays as long as what it tells of
        assert [p.name for p in (tmp_path / f"{name}_sparse").glob("*_report.json")] == ["upcycling_report.json"]
        last = document("revert", tmp_path / f"{name}_sparse", tmp_path / f"{name}_dense")
        assert not list((tmp_path / f"{name}_dense").glob("*_report.json"))
        assert last["model_class"] == "BertForMaskedLM"
        assert_same(
            load_as_it_is(str(tmp_path / f"{name}_dense"))[0], snapshot(load_as_it_is(str(sources["bert"]))[0])
        )


def test_verify_command_records_its_figures_in_the_upcycling_report(sources, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(words(30, i) for i in range(3)))
    run("upcycle", sources["bert"], tmp_path / "out", "--num-experts", 4)
    found = document("verify", tmp_path / "out", sources["bert"], "--texts", tmp_path / "texts.txt")
    assert found["passed"] and not (tmp_path / "out" / "conversion_report.json").exists()
    assert json.loads((tmp_path / "out" / "upcycling_report.json").read_text())["fidelity"] == found


def test_recipes_log_the_routers_and_keep_the_report(sources, tmp_path):
    from hf_efficient.training.loading import load_model
    from hf_efficient.training.recipe import start, train
    from hf_efficient.training.settings import Settings

    he.upcycle(sources["bert"], 4, capacity_factor=0.5).save(tmp_path / "sparse")
    settings = Settings(
        model=str(tmp_path / "sparse"), output_dir=str(tmp_path / "run"), max_steps=2, logging_steps=1, use_cpu=True,
        learning_rate=1e-3, per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    record = start("mlm", settings)
    model, tokenizer = load_model(settings, AUTO["bert"], record=record)
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}
        for row in torch.randint(5, 99, (8, 16))
    ]
    trainer = transformers.Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
    )  # fmt: skip
    train(trainer, settings, record)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert all(entry["router_balance"] > 0 for entry in written["training"]["log"] if "loss" in entry)
    assert set(written["metrics"]) == {"exact", "trained"}, "its attention is that of the source"
    report = tmp_path / "run" / "model" / "upcycling_report.json"
    kept, before = (json.loads(path.read_text()) for path in (report, tmp_path / "sparse" / "upcycling_report.json"))
    assert [step["what"] for step in kept.pop("history")] == ["upcycle", record.recipe]
    del before["history"]
    assert kept == before
    text = str(checkpoint_card(tmp_path / "run" / "model"))
    assert "sparse experts: 4 in a layer" in text and "hf-efficient upcycle" in text


def test_command_errors(sources, tmp_path):
    source, out = sources["bert"], tmp_path / "out"
    assert "num_experts=0 is not possible" in error("upcycle", source, out, "--num-experts", 0)
    assert "top_k=2 is more than num_experts=1" in error("upcycle", source, out, "--num-experts", 1, "--top-k", 2)
    assert "capacity_factor=-1.0" in error("upcycle", source, out, "--capacity-factor", -1)
    assert "--layers 'x' can't be read" in error("upcycle", source, out, "--layers", "x")
    assert "layers [5] do not exist" in error("upcycle", source, out, "--layers", "1,5")
    assert "does not exist" in error("upcycle", tmp_path / "nothing", out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    run("upcycle", source, out)
    assert "out exists" in error("upcycle", source, out)
    assert "has experts already" in error("upcycle", out, tmp_path / "twice")
    assert "is the source itself" in error("upcycle", out, out, "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "is not a checkpoint folder" in error("upcycle", source, tmp_path / "mine", "--overwrite")
    tiny_model("markuplm").save_pretrained(tmp_path / "markuplm")
    assert "feed-forward parts of markuplm are not known" in error("upcycle", tmp_path / "markuplm", tmp_path / "new")
