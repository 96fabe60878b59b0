"""ETC against a dense formula over [g; x], and the extra tokens: in at the embeddings, out at the end, undone exactly."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from pairs import Bench, Pair, Tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import hf_efficient as he
from hf_efficient.attention.base.mechanism import EfficientAttention, EfficientAttentionConfig
from hf_efficient.attention.etc import GATE
from hf_efficient.families import family_of
from hf_efficient.patching.dispatch import aligned_call
from hf_efficient.testing import assert_close, inputs_for, tiny_model

ENCODERS = ("bert", "roberta", "t5")
SMALL: dict[str, Any] = dict(attention_window=8, num_global_tokens=3)
RICH: dict[str, Any] = SMALL | dict(sharing="none", relative_labels=3)


# ---- the formula -------------------------------------------------------------------------------------------------


def bench(family: str, options: dict[str, Any]) -> Bench:
    one = Bench(Pair("etc", family, "encoder" if family == "t5" else None, options, "etc"))
    with torch.no_grad():
        for parameter in one.mechanism.parameters():
            parameter.add_(0.3 * one.normal(*parameter.shape))
    return one


def label_of(i: int, j: int, g: int, clip: int) -> int:
    """Row of the label tables: clipped distances from left to right, then long-global, global-long, global-global."""
    if i >= g and j >= g:
        return min(max(j - i, -clip), clip) + clip
    return 2 * clip + 1 + (0 if i >= g else 2 if j < g else 1)


def dense(one: Bench, tokens: Tokens, keep: Tensor) -> Tensor:
    """Every pair's logit and value by the definition, then one masked softmax over [g; x]."""
    mechanism, config = one.mechanism, one.mechanism.config
    g, clip, reach, n = config.num_global_tokens, config.relative_labels, config.attention_window // 2, keep.shape[1]
    scale, sharing, bias = one.WIDTH**-0.5, config.sharing, one.relative_bias()

    def through(name: str, host: Tensor) -> Tensor:
        if not hasattr(mechanism, name):
            return host
        projection = getattr(mechanism, name)
        projected = linear(tokens.hidden, projection.weight, projection.bias)
        return projected.unflatten(-1, (one.HEADS, one.WIDTH)).transpose(1, 2)

    query = through("query_global", tokens.query)
    by_kind = {}  # keys and values by (query is global, key is global)
    for kind, suffix in {
        (False, False): "",
        (False, True): "long_to_global" if sharing == "none" else "",
        (True, False): "global_to_long" if sharing == "none" else "global",
        (True, True): "global",
    }.items():
        by_kind[kind] = through(f"key_{suffix}", tokens.key), through(f"value_{suffix}", tokens.value)
    out = torch.zeros_like(tokens.query)
    for i in range(n):
        q = (query if i < g else tokens.query)[:, :, i]
        logits = torch.full((*q.shape[:2], n), -math.inf, dtype=q.dtype)
        values = torch.zeros_like(tokens.value)
        for j in range(n):
            if min(i, j) >= g and abs(i - j) > reach:
                continue
            key, value = by_kind[i < g, j < g]
            target, label = key[:, :, j], label_of(i, j, g, clip)
            if clip:
                target = target + mechanism.label_vectors[label]
            logit = scale * (q * target).sum(-1)
            if label >= 2 * clip + 1:
                logit = logit + mechanism.global_logits[label - 2 * clip - 1]
            elif clip:
                logit = logit + mechanism.label_logits[label]
            if bias is not None and min(i, j) >= g:
                logit = logit + bias.at(torch.tensor(j - i))
            logits[:, :, j] = logit.where(keep[:, j, None], -math.inf)
            values[:, :, j] = value[:, :, j]
        out[:, :, i] = (logits.softmax(-1)[..., None] * values).sum(2)
    return out


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("labels", [0, 1, 4])
@pytest.mark.parametrize("sharing", ["qkv", "kv", "none"])
def test_equals_the_dense_formula(sharing: str, labels: int, family: str) -> None:
    """97 positions, so that windows run in several blocks; rows full, padded right and padded left of the tokens."""
    options = dict(attention_window=8, num_global_tokens=3, sharing=sharing, relative_labels=labels)
    one = bench(family, options)
    tokens = one.tokens(3, 97)
    keep = torch.ones(3, 97, dtype=torch.bool)
    keep[1, 70:] = keep[2, 3:20] = False
    with torch.no_grad():
        actual, expected = one(tokens, keep), dense(one, tokens, keep)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-9, where=keep)


def test_without_a_mask_the_formula_holds_too() -> None:
    one = bench("t5", RICH)
    tokens = one.tokens(1, 80)
    with torch.no_grad():
        assert_close(one(tokens), dense(one, tokens, torch.ones(1, 80, dtype=torch.bool)), 1e-9)


@pytest.mark.parametrize("family", ENCODERS)
def test_equals_full_attention_over_tokens_and_globals(family: str) -> None:
    """A window over everything and open gates: the stock layers, run on the lengthened sequence."""
    model = tiny_model(family, layers=1).double()
    inputs = inputs_for(model, length=40)
    stack = family_of(model).stacks(model)[0]
    attention = stack.layers[0].module
    if family == "t5":  # global tokens have labels in place of offsets
        attention.relative_attention_bias.weight.data.zero_()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=1)
    with torch.no_grad(), he.patch_attention(model, "etc", attention_window=100, num_global_tokens=3):
        attention.efficient.global_logits.zero_()
        tokens = attention.efficient.global_tokens.detach()
        actual = stack.module(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    with torch.no_grad():
        embeddings = stack.module.embed_tokens if family == "t5" else stack.module.embeddings
        lengthened = torch.cat([tokens.expand(3, -1, -1), embeddings(inputs["input_ids"])], dim=1)
        if family == "t5":
            expected = stack.module(inputs_embeds=lengthened, attention_mask=mask)
        else:
            added = torch.zeros(3, 1, 1, 43, dtype=torch.float64).masked_fill(mask[:, None, None] == 0, -1e300)
            expected = stack.module.encoder(lengthened, attention_mask=added)
    assert_close(actual, expected.last_hidden_state[:, 3:], 1e-9, where=inputs["attention_mask"])


# ---- the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_starts_close_to_the_window_alone(family: str) -> None:
    model = tiny_model(family).double()
    inputs = inputs_for(model)
    keep = inputs["attention_mask"].bool()

    def logits(name: str, gate: float = 0.0, **options: Any) -> Tensor:
        with torch.no_grad(), he.patch_attention(model, name, **options):
            for module in model.modules():
                if hasattr(module, "global_logits"):
                    module.global_logits[0] += gate
            return model(**inputs).logits[keep]

    local = logits("local", attention_window=8, **({"side": "encoder"} if family == "t5" else {}))
    start, opened, shut = (logits("etc", gate, **SMALL) for gate in (0.0, -GATE, -1000.0))
    assert_close(shut, local, 1e-9, "with the gate shut")
    assert (start - local).norm() < 0.25 * (opened - local).norm(), "the gate has no effect"
    assert (start - local).norm() < 0.05 * local.norm()


def test_global_logits_start_from_the_far_relative_bias() -> None:
    model = tiny_model("t5")
    attention = model.encoder.block[0].layer[0].SelfAttention
    with he.patch_attention(model, "etc", **SMALL):
        table, bucket = attention.relative_attention_bias.weight, attention._bucket_of_offsets
        left, right = table[bucket(torch.tensor([-10000, 10000]))]
        expected = torch.stack([left + GATE - math.log(3), right, (left + right) / 2])
        assert torch.allclose(attention.efficient.global_logits, expected)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("count", [3, 200])
def test_global_tokens_start_as_different_mean_words(family: str, count: int) -> None:
    """More of them than words, too."""
    model = tiny_model(family)
    stack = family_of(model).stacks(model)[0]
    with torch.no_grad(), he.patch_attention(model, "etc", attention_window=8, num_global_tokens=count):
        tokens = stack.layers[0].module.efficient.global_tokens
        words = stack.module.get_input_embeddings().weight
        mean = words[1::3].mean(0) if count == 3 else words[1]
        expected = mean if family == "t5" else family_of(model).embedded(stack, mean[None])[0]
        assert tokens.shape == (count, words.shape[1])
        assert torch.allclose(tokens[1], expected, atol=1e-5)
        assert len(tokens[: len(words)].unique(dim=0)) == min(count, len(words))
    if family != "t5":
        plain = stack.module.embeddings(torch.tensor([[7]]))[0, 0]
        again = family_of(model).embedded(stack, words[7][None])[0]
        assert torch.allclose(plain, again, atol=1e-6), "not what leaves the embeddings at the first position"


# ---- in and out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SMALL, RICH], ids=["small", "rich"])
@pytest.mark.parametrize("family", ENCODERS)
def test_every_output_has_the_length_of_the_input(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, layers=3)
    inputs = inputs_for(model, length=40)
    with torch.no_grad(), he.patch_attention(model, "etc", **options):
        out = model(**inputs, output_hidden_states=True)
        states = out.encoder_hidden_states if family == "t5" else out.hidden_states
        assert len(states) == 4 and all(state.shape[1] == 40 for state in states)
        assert out.logits.shape[1] == 40
        plain = model(**inputs)
        assert torch.equal(out.logits, plain.logits)
        as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
        flat = [t for x in as_tuple for t in (x if isinstance(x, tuple) else (x,)) if isinstance(t, Tensor)]
        assert flat and all(t.shape[1] == 40 for t in flat if t.dim() == 3)
        assert torch.equal(as_tuple[0], plain.logits)
        stack = family_of(model).stacks(model)[0].module
        expected = stack(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        assert torch.equal(expected, stack(inputs["input_ids"], inputs["attention_mask"])[0]), "positional arguments"
        assert torch.equal(states[-1], expected)
        if family == "t5":
            assert torch.equal(out.encoder_last_hidden_state, expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_embeddings_in_place_of_ids_and_no_mask(family: str) -> None:
    model = tiny_model(family)
    inputs = inputs_for(model, batch=2, length=40, padded=False)
    embedded = {k: v for k, v in inputs.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    unmasked = {k: v for k, v in inputs.items() if not k.endswith("attention_mask")}
    with torch.no_grad(), he.patch_attention(model, "etc", **SMALL):
        expected = model(**inputs).logits
        assert_close(model(**embedded).logits, expected, 1e-6)
        assert_close(model(**unmasked).logits, expected, 1e-6)
        with pytest.raises(ValueError, match=r"exactly one"):
            model(**inputs, inputs_embeds=embedded["inputs_embeds"])


def test_token_types_are_those_of_the_tokens() -> None:
    model = tiny_model("bert")
    inputs = inputs_for(model, length=40)
    types = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad(), he.patch_attention(model, "etc", **SMALL):
        expected = model(**inputs).logits
        assert torch.equal(model(**inputs, token_type_ids=types).logits, expected)
        types[:, 20:] = 1
        assert (model(**inputs, token_type_ids=types).logits - expected).abs().max() > 1e-3


def test_extra_tokens_do_not_count_as_length() -> None:
    model = tiny_model("bert", positions=40)
    with torch.no_grad(), he.patch_attention(model, "etc", **SMALL):
        assert model(**inputs_for(model, length=40)).logits.isfinite().all()
        with pytest.raises(ValueError, match="41 tokens"):
            model(**inputs_for(model, length=41))


def test_the_pooler_reads_the_first_token_of_the_input() -> None:
    from transformers import BertModel

    source = tiny_model("bert")
    torch.manual_seed(1)
    model = BertModel(source.config).eval()
    inputs = inputs_for(model, length=40)
    with torch.no_grad(), he.patch_attention(model, "etc", **SMALL):
        out = model(**inputs)
        assert out.last_hidden_state.shape[1] == 40
        assert torch.equal(out.pooler_output, model.pooler(out.last_hidden_state))


HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "PreTraining"]


@pytest.mark.parametrize("family, head", [("Bert", h) for h in HEADS] + [("T5", h) for h in HEADS[:3]])
def test_heads_see_the_tokens_of_the_input(family: str, head: str, tmp_path: Any) -> None:
    """A masked language model's checkpoint, global tokens included, under every other head."""
    he.convert(tiny_model(family.lower()), "etc", **SMALL).save(tmp_path / "model")
    cls = getattr(he, f"Efficient{family}For{head}")
    model = cls.from_pretrained(tmp_path / "model").eval()
    stored = AutoModelForSeq2SeqLM if family == "T5" else AutoModelForMaskedLM
    tokens = [
        p for n, p in stored.from_pretrained(tmp_path / "model").named_parameters() if n.endswith("global_tokens")
    ]
    assert torch.equal(next(p for n, p in model.named_parameters() if n.endswith("global_tokens")), tokens[0])
    inputs = inputs_for(tiny_model("bert"), length=40)
    if family == "T5":
        inputs["input_ids"][:, -1] = model.config.eos_token_id
    if head == "MultipleChoice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        out = model(**inputs)
    name = {"QuestionAnswering": "start_logits", "PreTraining": "prediction_logits"}.get(head, "logits")
    per_token = head in ("TokenClassification", "QuestionAnswering", "PreTraining")
    assert getattr(out, name).shape[1] == (40 if per_token else 3 if head == "MultipleChoice" else 2)


def test_generation_reads_the_tokens_only() -> None:
    model = tiny_model("t5")
    inputs = {k: v for k, v in inputs_for(model, length=40).items() if not k.startswith("decoder")}
    with he.patch_attention(model, "etc", **SMALL):
        batch = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            alone = model.generate(inputs["input_ids"][row][real][None], max_new_tokens=6, min_new_tokens=6)
            assert torch.equal(alone[0], batch[row])


# ---- undoing, copying, refusing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_copies_have_global_tokens_of_their_own(family: str) -> None:
    model = tiny_model(family)
    inputs = inputs_for(model, length=40)
    handle = he.patch_attention(model, "etc", **SMALL)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            expected = model(**inputs).logits
            owner = family_of(twin).stacks(twin)[0].layers[0].module.efficient
            owner.global_logits[0] = 0.0
            opened = twin(**inputs).logits
            owner.global_tokens.mul_(-1.0)
            assert (twin(**inputs).logits - opened).abs().max() > 1e-4, "the copy reads the original's tokens"
            assert torch.equal(model(**inputs).logits, expected), "the copy writes to the original"
    handle.undo()


def test_undoing_leaves_hooks_of_others_alone() -> None:
    model = tiny_model("bert")
    calls: list[str] = []
    model.bert.register_forward_hook(lambda *_: calls.append("stack"))
    model.bert.embeddings.register_forward_hook(lambda *_: calls.append("embeddings"))
    he.patch_attention(model, "etc", **SMALL).undo()
    model(**inputs_for(model, length=10))
    assert calls == ["embeddings", "stack"]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (dict(mechanism="etc", layers=[0], **SMALL), r"\[3, 0\]"),
        ([dict(mechanism="etc", layers=[0], **SMALL), dict(mechanism="local", layers=[1])], r"\[3, 0\]"),
        (
            [
                dict(mechanism="etc", layers=[0], **SMALL),
                dict(mechanism="etc", layers=[1], attention_window=8, num_global_tokens=4),
            ],
            r"\[3, 4\]",
        ),
    ],
    ids=["one layer", "two mechanisms", "two numbers"],
)
def test_layers_that_disagree_are_refused(attention: Any, message: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        he.patch_attention(model, attention)
    assert not he.patching.is_installed(model)


def test_layers_may_differ_in_the_rest() -> None:
    model = tiny_model("bert")
    attention = [dict(mechanism="etc", layers=[0], **SMALL), dict(mechanism="etc", layers=[1], **RICH)]
    with torch.no_grad(), he.patch_attention(model, attention):
        assert model(**inputs_for(model, length=40)).logits.shape[1] == 40


@pytest.mark.parametrize(
    "options",
    [
        dict(attention_window=9),
        dict(num_global_tokens=-1),
        dict(sharing="all"),
        dict(relative_labels=5, attention_window=8),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        he.attention_config("etc", **options)


def test_an_adapter_trains_the_tokens(tmp_path: Any) -> None:
    """PEFT puts a copy in the mechanism's place: the hooks must read the copy."""
    result = he.convert(tiny_model("bert"), "etc", tokenizer=None, **SMALL)
    source = copy.deepcopy(result.model)
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["efficient"])
    model = get_peft_model(result.model, config)
    inputs = inputs_for(model, batch=2, length=40)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    name = next(n for n, p in model.named_parameters() if n.endswith("global_tokens") and p.requires_grad)
    before = model.get_parameter(name).detach().clone()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_parameter(name), before)
    model.eval().save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(source, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)


# ---- what other mechanisms with extra tokens can rely on ---------------------------------------------------------


class _Aligned(EfficientAttention):
    """Shows what it was given."""

    left_aligned = True
    seen: Any = None

    @classmethod
    def num_extra_tokens(cls, config: Any) -> int:
        return 2

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Any) -> Tensor:
        self.seen = query[..., 0], context.key_padding_mask, context.hidden_states
        return query


def test_aligned_mechanisms_get_their_extra_tokens_in_front() -> None:
    """Tokens of padded rows move to the left edge behind the extra ones, and back."""
    mechanism = _Aligned.__new__(_Aligned)
    nn.Module.__init__(mechanism)
    mechanism.config = EfficientAttentionConfig()
    keep = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    query = torch.arange(6.0).expand(3, 1, 6)[..., None]
    context = he.AttentionContext(is_causal=False, scaling=1.0, key_padding_mask=keep, hidden_states=query[:, 0])
    out = aligned_call(mechanism, query, query, query, context)
    heads, mask, hidden = mechanism.seen
    assert heads[:, 0].tolist() == [[0, 1, 4, 5, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert torch.equal(hidden[..., 0], heads[:, 0])
    assert mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert torch.equal(out, query)


# ---- BigBird's extra tokens --------------------------------------------------------------------------------------


def bigbird_dense(one: Bench, tokens: Tokens, keep: Tensor) -> Tensor:
    """Pair by pair over [g; x]: blocks count from each row's first real token, random blocks are taken from the pattern."""
    config, geometry = one.mechanism.config, one.mechanism.geometry
    g, size, n, bias = config.num_global_tokens, config.block_size, keep.shape[1], one.relative_bias()
    rows = []
    for b in range(keep.shape[0]):
        real = keep[b, g:].nonzero().flatten().tolist()
        start, end = real[0], (real[-1] - real[0]) // size
        blocks = one.mechanism.pattern.random_blocks(torch.arange(n)[None], torch.tensor([end]), n)[0]
        logits = one.WIDTH**-0.5 * tokens.query[b] @ tokens.key[b].transpose(-1, -2)
        for h in range(geometry.num_heads):
            for i in range(n):
                for j in range(n):
                    # positions count from the first real token, behind the extra ones
                    at, to = (x if x < g else x - start for x in (i, j))
                    u, c = (at - g) // size, (to - g) // size
                    near = abs(u - c) <= 1 or (u >= 0 and c in blocks[h, u].tolist())
                    if min(i, j) >= g and not near:
                        logits[h, i, j] = -math.inf
                    elif j < g <= i:
                        logits[h, i, j] += one.mechanism.global_logits[h]
                    if bias is not None:
                        logits[h, i, j] += bias.at(torch.tensor(to - at))[h]
        rows.append(logits.masked_fill(~keep[b], -math.inf).softmax(-1) @ tokens.value[b])
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_bigbird_with_extra_tokens_equals_the_dense_formula(family: str) -> None:
    options = dict(block_size=4, num_random_blocks=1, form="etc", num_global_tokens=3)
    one = Bench(Pair("bigbird", family, "encoder" if family == "t5" else None, options, "bigbird"))
    with torch.no_grad():
        one.mechanism.global_logits.copy_(one.normal(one.HEADS))
    tokens = one.tokens(3, 40)
    keep = torch.ones(3, 40, dtype=torch.bool)
    keep[1, 30:] = keep[2, 3:9] = False
    with torch.no_grad():
        actual, expected = one(tokens, keep), bigbird_dense(one, tokens, keep)
    assert_close(actual.transpose(1, 2), expected.transpose(1, 2), 1e-9, where=keep)


def test_bigbird_extra_tokens_are_refused_in_causal_layers() -> None:
    with pytest.raises(ValueError, match="form='etc' can't be causal"):
        he.patch_attention(tiny_model("gpt2"), "bigbird", form="etc", num_global_tokens=2)
