"""The funnel against a slow forward of its own, tokens that repeat, parts of transformers' FunnelModel, and its hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairs import Bench, Pair
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transfers import heads, relative

import hf_efficient as he
from hf_efficient.attention.funnel import FunnelAttentionConfig
from hf_efficient.families import family_of
from hf_efficient.ops.pooling import PoolingWindow, pooled_bias
from hf_efficient.ops.relative_bias import RelativeBias
from hf_efficient.patching.downsampling import FULL_LENGTH
from hf_efficient.patching.hooks import state_of
from hf_efficient.profiling.counters import flops
from hf_efficient.testing import assert_close, inputs_for, tiny_model
from hf_efficient.training import AttentionTransfer, layer_errors

ENCODERS = ("bert", "roberta", "t5")
OPTIONS: list[dict[str, Any]] = [
    dict(),
    dict(blocks=(1, 2, 1)),
    dict(blocks=(0, 2, 1), separate_cls=False),
    dict(pool_size=3, blocks=(1, 1, 1)),
    dict(pool_size=3, blocks=(0, 2), separate_cls=False),
    dict(pool_size=5, blocks=(2, 2)),
]


def encoder(model: Any) -> Any:
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def embedded(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same call by embeddings that require gradients; positions count from each row's first real token."""
    states = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    call = {"inputs_embeds": states, "attention_mask": inputs["attention_mask"]}
    if model.config.model_type != "t5":
        offset = family_of(model).positions.offset(model.config)
        call["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + offset
    return call


# ---- the whole forward -------------------------------------------------------------------------------------------


def runs_of(n: int, size: int, apart: bool) -> list[list[int]]:
    """The tokens of every window."""
    first = [[0]] if apart else []
    return first + [list(range(i, min(i + size, n))) for i in range(len(first), n, size)]


def places(index: int, size: int, apart: bool) -> list[int]:
    """Where a slot's tokens stand, or would if it were full."""
    end = (index + 1) * size - (size - 1 if apart else 0)
    return list(range(end - size, end))


def short_layer(model: Any, index: int, h: Tensor, kv: Tensor, logits: Tensor) -> Tensor:
    """One stock layer on (slots, hidden) states, keys and values from other states, with an addend to the logits."""
    stack = encoder(model)
    if model.config.model_type == "t5":
        block = stack.block[index]
        attention, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
        q, k, v = attention.q(norm(h)), attention.k(norm(kv)), attention.v(norm(kv))
        count, scale = attention.n_heads, 1.0
    else:
        block = stack.encoder.layer[index]
        attention = block.attention.self
        q, k, v = attention.query(h), attention.key(kv), attention.value(kv)
        count, scale = attention.num_attention_heads, attention.attention_head_size**-0.5
    q, k, v = (x.unflatten(-1, (count, -1)).transpose(0, 1) for x in (q, k, v))
    out = ((scale * q @ k.transpose(-1, -2) + logits).softmax(-1) @ v).transpose(0, 1).flatten(1)[None]
    if model.config.model_type == "t5":
        return block.layer[-1](h + attention.o(out))[0]
    out = block.attention.output(out, h[None])
    return block.output(block.intermediate(out), out)[0]


def addend(model: Any, queries: int, keys: list[list[int]], sizes: tuple[int, int], apart: bool) -> Tensor:
    """(H or 1, queries, keys): log-counts, and in T5 the bias from a query's middle to a key, the mean over its places."""
    logits = torch.tensor([len(run) for run in keys], dtype=torch.float64).log()[None, None]
    if model.config.model_type != "t5":
        return logits
    attention = encoder(model).block[0].layer[0].SelfAttention
    rows = []
    for i in range(queries):
        middle = places(i, sizes[0], apart)[(sizes[0] - 1) // 2]
        offsets = torch.tensor([[j - middle for j in places(key, sizes[1], apart)] for key in range(len(keys))])
        ids = attention._relative_position_bucket(
            offsets,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        rows.append(attention.relative_attention_bias.weight[ids].mean(1))
    return logits + torch.stack(rows).permute(2, 0, 1)


def slow_forward(model: Any, states: Tensor, config: FunnelAttentionConfig) -> dict[int, Tensor]:
    """{layers done: (n, hidden) states} at the ends of blocks and after each layer of the decoder, of one row alone.

    Within a block the sequence stays short; its tokens get the difference that the whole block made.
    """
    x, n, p, apart, layer = states, len(states), config.pool_size, config.separate_cls is not False, 0
    total = len(family_of(model).stacks(model)[0].layers)
    found = {0: x}
    for e, count in enumerate(config.layer_blocks(total)):
        runs = runs_of(n, p**e, apart and e > 0)
        start = h = torch.stack([x[run].mean(0) for run in runs])
        for place in range(count):
            finer = e - 1 if e and place == 0 else e
            keys = runs_of(n, p**finer, apart and finer > 0)
            kv = torch.stack([x[run].mean(0) for run in keys]) if finer < e else h
            logits = addend(model, len(runs), keys, (p**e, p**finer), apart)
            h = short_layer(model, layer, h, kv, logits)
            layer += 1
        change = torch.zeros_like(x)
        for slot, run in enumerate(runs):
            change[run] = (h - start)[slot]
        found[layer] = x = x + change
    alone = [[i] for i in range(n)]
    for index in range(layer, total):
        found[index + 1] = x = short_layer(model, index, x, x, addend(model, n, alone, (1, 1), False))
    return found


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_equals_a_slow_forward(family: str, options: dict[str, Any], length: int) -> None:
    """States at the ends of blocks and in the decoder, and gradients; rows full, padded right and padded left."""
    model = tiny_model(family, layers=6 if not options else 4).double()
    config: Any = he.attention_config("funnel", **options)
    call = embedded(model, inputs_for(model, length=length))
    stack = encoder(model)
    with he.patch_attention(model, config):
        states = stack(**call, output_hidden_states=True).hidden_states
    direction = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    real, total, compared = call["attention_mask"].bool(), 0.0, 0
    # T5 takes its norms in fp32
    tolerance = 1e-10 if family == "bert" else 1e-5
    for row in range(3):
        own = states[0][row][real[row]]
        for layers, expected in slow_forward(model, own, config).items():
            last = layers == len(states) - 1
            if last and family == "t5":
                expected = stack.final_layer_norm(expected)
            assert_close(states[layers][row][real[row]], expected, tolerance, f"row {row} after {layers} layers")
            compared += layers > 0
            if last:
                total = total + (expected * direction[row][real[row]]).sum()
    assert compared >= 6
    (expected,) = torch.autograd.grad(total, call["inputs_embeds"], retain_graph=True)
    (actual,) = torch.autograd.grad((states[-1] * direction)[real].sum(), call["inputs_embeds"])
    assert_close(actual, expected, tolerance, "gradient")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [1, 7, 45])
def test_bias_between_windows(length: int, options: dict[str, Any]) -> None:
    """Every layer's queries and keys against the mean over places, the table's gradient included."""
    config: Any = he.attention_config("funnel", **options)
    table = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    bias = RelativeBias(table, lambda offsets: offsets.clamp(-5, 5) + 5, 5)
    for layer in range(4):
        queries, keys = config.pooling(layer, 4)
        actual = pooled_bias(bias, queries, keys, length, table.device)
        rows = []
        for i in range(queries.number(length)):
            middle = places(i, queries.size, queries.first_apart)[(queries.size - 1) // 2]
            rows.append(
                torch.stack(
                    [
                        torch.stack(
                            [bias.at(torch.tensor(j - middle)) for j in places(key, keys.size, keys.first_apart)]
                        )
                        for key in range(keys.number(length))
                    ]
                ).mean(1)
            )
        expected = torch.stack(rows).permute(2, 0, 1)[None]
        assert_close(actual, expected, 1e-12, f"layer {layer}")
        ours, theirs = (torch.autograd.grad(x.square().sum(), table)[0] for x in (actual, expected))
        assert_close(ours, theirs, 1e-12)


# ---- tokens that repeat ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(pool_size=2, blocks=(1, 1, 2)), dict(pool_size=3, blocks=(0, 2, 1))], ids=str
)
@pytest.mark.parametrize("family", ENCODERS)
def test_equals_the_unconverted_model_where_neighbours_are_equal(family: str, options: dict[str, Any]) -> None:
    """Every token stands p² times in a row, without positions: windows of equal tokens, the last one not full."""
    model = tiny_model(family, layers=4).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name or "relative_attention_bias" in name:
                parameter.zero_()
    inputs = inputs_for(model, length=97, padded=False)
    call = embedded(model, inputs)
    states = call["inputs_embeds"].detach()[:, ::2].repeat_interleave(options["pool_size"] ** 2, dim=1)[:, :97]
    call["inputs_embeds"] = states
    call["attention_mask"][1, 50:] = 0
    call["attention_mask"][2, 71:] = 0
    with torch.no_grad():
        expected = encoder(model)(**call).last_hidden_state
        with he.patch_attention(model, "funnel", separate_cls=False, **options):
            actual = encoder(model)(**call).last_hidden_state
        with he.patch_attention(model, "funnel", separate_cls=True, **options):
            shifted = encoder(model)(**call).last_hidden_state
    assert_close(actual, expected, 1e-9, where=call["attention_mask"])
    difference = (shifted - expected)[call["attention_mask"].bool()].abs().max()
    assert difference > 1e-3, "slots across unequal tokens change nothing, so this shows nothing"


# ---- transformers' own funnel ------------------------------------------------------------------------------------


def structure(**options: Any) -> Any:
    from transformers import FunnelConfig
    from transformers.models.funnel.modeling_funnel import FunnelAttentionStructure

    return FunnelAttentionStructure(FunnelConfig(truncate_seq=False, **options))


@pytest.mark.parametrize("apart", [True, False])
def test_pooling_and_upsampling_are_those_of_transformers_funnel(apart: bool) -> None:
    """Two levels where all windows are full, and a last window of one token at one level."""
    from transformers.models.funnel.modeling_funnel import upsample

    other = structure(separate_cls=apart)
    for n in (12 + apart, 13 + apart):
        states = torch.randn(2, n, 5, dtype=torch.float64)
        once = other.pool_tensor(states)
        assert_close(PoolingWindow(2, apart).means(states, None), once, 1e-12)
        assert torch.equal(PoolingWindow(2, apart).repeat(once, n), upsample(once, 2, n, apart))
        twice = other.pool_tensor(once)
        if n == 12 + apart:
            assert_close(PoolingWindow(4, apart).means(states, None), twice, 1e-12)
        assert torch.equal(PoolingWindow(4, apart).repeat(twice, n), upsample(twice, 4, n, apart))
    # its positions are the first places of our slots
    positions = other.stride_pool_pos(other.stride_pool_pos(list(range(13)), 1), 2)
    assert positions == [places(slot, 4, apart)[0] for slot in range(len(positions))]


def test_masks_differ_from_transformers_only_where_a_slot_is_half_real() -> None:
    """It drops such a slot as a key, and averages padding into it as a query."""
    other, runs = structure(separate_cls=True), PoolingWindow(2, True)
    states = torch.randn(1, 13, 5, dtype=torch.float64)
    for real in range(1, 14):
        keep = torch.arange(13)[None] < real
        counts, means = runs.counts(13, keep, keep.device), runs.means(states, keep)
        assert counts is not None
        theirs = other.pool_tensor(keep.double(), mode="min")
        half = counts == 1
        half[:, 0] = False
        assert torch.equal((counts > 0) & ~half, theirs > 0)
        assert int(half.sum()) == int(real % 2 == 0)
        full = (counts > 0) & ~half
        assert_close(means[full], other.pool_tensor(states)[full], 1e-12)
        if real % 2 == 0:
            assert torch.equal(means[half][0], states[0, real - 1])


# ---- cost --------------------------------------------------------------------------------------------------------


def test_whole_layers_run_on_pooled_tokens() -> None:
    """What two more layers of a block cost, beside what two more layers of the unconverted model do."""
    costs = {}
    for layers in (2, 4):
        model = tiny_model("bert", layers=layers, positions=256)
        inputs = inputs_for(model, length=256, padded=False)
        costs["full", layers] = flops(model, **inputs)
        with he.patch_attention(model, "funnel", pool_size=4, blocks=(0, layers), separate_cls=False):
            costs["funnel", layers] = flops(model, **inputs)
    full, funnel = (costs[name, 4] - costs[name, 2] for name in ("full", "funnel"))
    assert 0.05 * full < funnel <= 0.25 * full, (full, funnel)


# ---- blocks and options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "blocks"), [(1, (1,)), (2, (1, 1)), (3, (1, 1, 1)), (6, (2, 2, 1)), (12, (4, 3, 3)), (24, (7, 7, 6))]
)
def test_default_blocks(layers: int, blocks: tuple[int, ...]) -> None:
    config = FunnelAttentionConfig()
    assert config.layer_blocks(layers) == blocks
    sizes = [config.pooling(layer, layers).queries.size for layer in range(layers)]
    assert sizes == [2**e for e, count in enumerate(blocks) for _ in range(count)] + [1] * (layers - sum(blocks))
    keys = [config.pooling(layer, layers).keys.size for layer in range(layers)]
    firsts = {sum(blocks[:e]) for e in range(1, len(blocks))}
    assert keys == [size // 2 if layer in firsts else size for layer, size in enumerate(sizes)]


@pytest.mark.parametrize(
    "options",
    [
        dict(pool_size=0),
        dict(pool_size=2.0),
        dict(blocks=()),
        dict(blocks=(1, 0, 1)),
        dict(blocks=(-1, 2)),
        dict(blocks=(1.0, 2)),
        dict(blocks=3),
        dict(separate_cls=1),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        he.attention_config("funnel", **options)


def test_more_layers_than_there_are_are_refused() -> None:
    model = tiny_model("bert", layers=2)
    with pytest.raises(ValueError, match=r"blocks=\(1, 2\) are 3 layers, but the encoder has 2"):
        he.patch_attention(model, "funnel", blocks=(1, 2))
    assert not he.patching.is_installed(model)


@pytest.mark.parametrize(
    "options", [dict(layers=(0,)), dict(blocks=(2,)), dict(blocks=(1,)), dict(blocks=(1, 1), layers=(0,))]
)
def test_a_funnel_that_pools_nothing_is_refused(options: dict[str, Any]) -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=r"no layer of the encoder is pooled.*blocks=\(0, 1\), or pool_size=1"):
        he.patch_attention(model, "funnel", **options)
    he.patch_attention(model, "funnel", **options, pool_size=1)


def test_extra_tokens_of_other_layers_are_refused() -> None:
    attention: Any = [dict(mechanism="etc", layers=[0]), dict(mechanism="funnel", layers=[1])]
    with pytest.raises(ValueError, match=r"extra global tokens run through the whole stack"):
        he.patch_attention(tiny_model("bert"), attention)


@torch.no_grad()
def test_layers_count_in_the_stack_whichever_are_converted() -> None:
    """The layers of block 0 and of the decoder are exact anyway, and others may have another mechanism."""
    model = tiny_model("bert", layers=4).double()
    inputs = inputs_for(model)
    funnel = dict(mechanism="funnel", blocks=(1, 2))
    with he.patch_attention(model, funnel):
        expected = model(**inputs).logits
    with he.patch_attention(model, funnel | {"layers": [1, 2]}):
        assert_close(model(**inputs).logits, expected, 1e-12, where=inputs["attention_mask"])
    local = dict(mechanism="local", layers=[0, 3], attention_window=200)
    with he.patch_attention(model, [local, funnel | {"layers": [1, 2]}]):
        assert_close(model(**inputs).logits, expected, 1e-9, where=inputs["attention_mask"])


# ---- in and out --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
def test_every_output_has_the_length_of_the_input(family: str) -> None:
    """Also where hidden states were recorded before the conversion, whose hooks then come before."""
    model = tiny_model(family, layers=3)
    inputs = inputs_for(model, length=41)
    stock = model(**inputs, output_hidden_states=True)
    for recorded in (True, False):
        if not recorded:
            model = tiny_model(family, layers=3)
        with he.patch_attention(model, "funnel", blocks=(0, 1, 1)):
            out = model(**inputs, output_hidden_states=True)
            states = out.encoder_hidden_states if family == "t5" else out.hidden_states
            assert len(states) == 4 and all(state.shape[1] == 41 for state in states)
            assert torch.equal(out.logits, model(**inputs).logits)
            as_tuple = model(**inputs, return_dict=False)
            assert torch.equal(as_tuple[0], out.logits)
            by_position = encoder(model)(inputs["input_ids"], inputs["attention_mask"])[0]
            assert torch.equal(states[-1], by_position)
    before = stock.encoder_hidden_states if family == "t5" else stock.hidden_states
    assert torch.equal(states[0], before[0])


@torch.no_grad()
def test_the_pooler_reads_the_first_token() -> None:
    from transformers import BertModel

    torch.manual_seed(1)
    model = BertModel(tiny_model("bert").config).eval()
    inputs = inputs_for(model, length=40, padded=False)
    with he.patch_attention(model, "funnel"):
        out = model(**inputs)
        assert torch.equal(out.pooler_output, model.pooler(out.last_hidden_state))


def test_generation_reads_all_tokens() -> None:
    model = tiny_model("t5")
    inputs = {k: v for k, v in inputs_for(model, length=40).items() if not k.startswith("decoder")}
    with he.patch_attention(model, "funnel"):
        batch = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            alone = model.generate(inputs["input_ids"][row][real][None], max_new_tokens=6, min_new_tokens=6)
            assert torch.equal(alone[0], batch[row])


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """The unpooled states that first layers of blocks read must not lose their gradient on the way."""
    model = tiny_model(family, layers=4).double().train()
    inputs = inputs_for(model)
    found = []
    with he.patch_attention(model, "funnel", blocks=(1, 1, 1)):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.zero_grad()
            model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, gradient in found[0].items():
        if not name.endswith("key.bias"):
            assert_close(found[1][name], gradient, 1e-10, name)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    """Two levels of pooling and a decoder, rows padded on either side."""
    model = tiny_model("t5", layers=4)
    inputs = {k: v for k, v in inputs_for(model).items() if not k.startswith("decoder")}
    torch.compiler.reset()
    with torch.no_grad(), he.patch_attention(model, "funnel", blocks=(0, 2, 1)):
        expected = encoder(model)(**inputs)[0]
        actual = torch.compile(encoder(model), fullgraph=True, backend="aot_eager", dynamic=False)(**inputs)[0]
    assert_close(actual, expected, 1e-5, where=inputs["attention_mask"])
    torch.compiler.reset()


def test_adapters(tmp_path: Any) -> None:
    """The wrapped mechanism still shortens its layer, and a reloaded adapter gives the same."""
    result = he.convert(tiny_model("bert"), "funnel", tokenizer=None)
    source = copy.deepcopy(result.model)
    inputs = inputs_for(source, length=40)
    expected = source(**inputs).logits.detach()
    config = LoraConfig(r=2, target_modules=["query", "key", "value"], modules_to_save=["efficient"])
    model = get_peft_model(result.model, config)
    assert_close(model(**inputs).logits, expected, 1e-6, where=inputs["attention_mask"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    gradients = [name for name, p in model.named_parameters() if "lora_A" in name and not p.grad.any()]
    assert not gradients, "adapters of unpooled keys and values must learn too"
    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(source, tmp_path).eval()
    trained = model(**inputs).logits
    assert torch.equal(reloaded(**inputs).logits, trained)
    assert (trained - expected).abs().max() > 1e-3


# ---- heads alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
@pytest.mark.parametrize("layer", [1, 2])
def test_heads_alone_are_pooled_and_repeated(layer: int, options: dict[str, Any]) -> None:
    """The mechanism outside any layer, in rows padded left, right and in the middle."""
    one = Bench(Pair("funnel", "bert", None, options | {"blocks": None}, "funnel"))
    config: Any = he.attention_config("funnel", **options)
    one.mechanism.pooling = config.pooling(layer, 4)
    queries, keys = one.mechanism.pooling
    tokens = one.tokens(4, 41)
    keep = torch.ones(4, 41, dtype=torch.bool)
    keep[1, 30:] = keep[2, :7] = keep[3, 9:22] = False
    actual = one(tokens, keep)
    for row in range(4):
        start = int(keep[row].int().argmax())
        q, k, v = (x[row][:, start:] for x in tokens[:3])
        real, n = keep[row, start:], 41 - start
        slots = [[i for i in run if real[i]] for run in runs_of(n, queries.size, queries.first_apart)]
        members = [[i for i in run if real[i]] for run in runs_of(n, keys.size, keys.first_apart)]
        members = [run for run in members if run]
        pooled_k, pooled_v = (torch.stack([x[:, run].mean(1) for run in members], 1) for x in (k, v))
        counts = torch.tensor([len(run) for run in members], dtype=torch.float64)
        for run in filter(None, slots):
            logits = one.WIDTH**-0.5 * q[:, run].mean(1, keepdim=True) @ pooled_k.transpose(-1, -2) + counts.log()
            expected = (logits.softmax(-1) @ pooled_v).expand(-1, len(run), -1)
            assert_close(actual[row][:, start:][:, run], expected, 1e-9, f"row {row}")


@torch.no_grad()
def test_layer_errors_are_those_of_heads_at_full_length() -> None:
    """What a shortened layer's heads are on the unconverted model's states, repeated, beside full attention's."""
    model = tiny_model("bert", layers=3).double()
    inputs = inputs_for(model, padded=False)
    states = model(**inputs, output_hidden_states=True).hidden_states
    expected = heads(model, inputs, None)
    config: Any = he.attention_config("funnel", blocks=(0, 2, 1))
    with he.patch_attention(model, config):
        errors = layer_errors(model, [inputs])["mechanism"]
        for index, layer in enumerate(model.base_model.encoder.layer):
            found: list[Tensor] = []
            hook = layer.attention.output.dense.register_forward_pre_hook(lambda _, args, to=found: to.append(args[0]))
            layer(states[index])
            hook.remove()
            runs = config.pooling(index, 3).queries
            assert found[0].shape[1] == runs.number(97) < 97
            own = runs.repeat(found[0], 97)
            error = relative(own, expected[index], inputs["attention_mask"]).sqrt()
            assert errors[index] == pytest.approx(error.item(), rel=1e-6), index
        assert not any(state_of(module, FULL_LENGTH) for module in model.modules())


def test_transfer_end_to_end_teaches_a_funnel() -> None:
    """The teacher runs at full length; per layer there is nothing to learn."""
    model = tiny_model("bert").double()
    inputs = inputs_for(model)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    with he.patch_attention(model, "funnel"):
        actual = model(**inputs, output_hidden_states=True).hidden_states
        with AttentionTransfer(model, "hidden_states"):
            output = model(**inputs)
            output.loss.backward()
        losses = [relative(a, b, inputs["attention_mask"]) for a, b in zip(actual[1:], expected[1:], strict=True)]
        assert_close(output.layer_loss, torch.stack(losses).detach(), 1e-9)
        with pytest.raises(ValueError, match="end to end"), AttentionTransfer(model):
            pass


def test_hooks_of_others_stay() -> None:
    model = tiny_model("bert")
    calls: list[tuple[str, Any]] = []

    def note(name: str) -> Any:
        return lambda module, args, output: calls.append((name, tuple(output.shape)))

    layer: nn.Module = model.bert.encoder.layer[1]
    layer.register_forward_hook(note("before"))
    handle = he.patch_attention(model, "funnel")
    layer.register_forward_hook(note("within"))
    inputs = inputs_for(model, length=10)
    model(**inputs)
    handle.undo()
    model(**inputs)
    assert calls == [(name, (3, 10, 32)) for name in ("before", "within") * 2]
