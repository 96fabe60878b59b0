"""Stock GPT-2, BERT and T5 models whose initial weights hold the recall circuit, so that training takes seconds.

The residual stream has parts: the token, its position (cosines and sines of random frequencies), a copy of the token before.
Layer 0, head 0: a query looks `shift` tokens back by position alone, and writes what stands there into *copy*. Layer 1, head
0: a query looks by its token (masked form: by its *copy*) for an equal *copy*, and adds the token that it finds to its own.
All other weights are small and random; ordinary training follows. So attention is sharp, nearly one-hot, and layer
0 is positional: kernels and low rank meet their worst case.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_efficient.benchmarks.suite.tasks import VOCABULARY, Task

TOKEN, POSITION, HEAD = 48, 32, 64
COPY = TOKEN + POSITION
WIDTH, T5_WIDTH = 2 * HEAD, 3 * HEAD
NOISE, SHARPNESS, FOUND = 0.02, 1.6, 0.6
HEADS = {"gpt2": 0, "bert": 0, "t5": 1}
"""Of the last layer, the head that looks up."""
# GPT-2 adds what is copied to a stream that is not normalised
COPIED = {"gpt2": 0.2, "bert": 1.0}


def constructed(task: Task, seed: int) -> Any:
    """A fresh model for the task."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = {"gpt2": _gpt2, "bert": _bert, "t5": _t5}[task.family](task)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        (_install_in_t5 if task.family == "t5" else _install)(model, task, generator)
    return model.eval()


def _gpt2(task: Task) -> Any:
    sizes: dict[str, Any] = dict(n_positions=task.length, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=2 * WIDTH)
    plain: dict[str, Any] = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, initializer_range=NOISE, **sizes, **plain)
    return transformers.GPT2LMHeadModel(config)


def _bert(task: Task) -> Any:
    sizes: dict[str, Any] = dict(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * WIDTH
    )
    plain: dict[str, Any] = dict(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=task.length
    )
    config = transformers.BertConfig(vocab_size=VOCABULARY, initializer_range=NOISE, **sizes, **plain)
    return transformers.BertForMaskedLM(config)


def _t5(task: Task) -> Any:
    # with two layers the decoder's own attention to the encoder could look everything up
    sizes: dict[str, Any] = dict(
        d_model=T5_WIDTH, d_kv=HEAD, d_ff=2 * T5_WIDTH, num_layers=2, num_decoder_layers=1, num_heads=2
    )
    plain: dict[str, Any] = dict(dropout_rate=0.0, decoder_start_token_id=0)
    config = transformers.T5Config(vocab_size=VOCABULARY, **sizes, **plain)
    return transformers.T5ForConditionalGeneration(config)


def _unit_vectors(generator: torch.Generator) -> Tensor:
    vectors = torch.randn(VOCABULARY, TOKEN, generator=generator)
    return vectors / vectors.norm(dim=1, keepdim=True)


def _install(model: Any, task: Task, generator: torch.Generator) -> None:
    is_gpt2, shift = task.family == "gpt2", task.pairs if task.name == "copy" else 1
    embeddings = model.transformer if is_gpt2 else model.bert.embeddings
    token, position = (
        (embeddings.wte, embeddings.wpe) if is_gpt2 else (embeddings.word_embeddings, embeddings.position_embeddings)
    )
    frequency = torch.rand(POSITION // 2, generator=generator) * math.pi
    token.weight.zero_()[:, :TOKEN] = _unit_vectors(generator)
    angle = torch.arange(task.length)[:, None] * frequency
    waves = torch.stack([angle.cos(), angle.sin()], -1).flatten(1) / math.sqrt(POSITION // 2)
    position.weight.zero_()[:, TOKEN:COPY] = waves
    if not is_gpt2:
        token.weight[1] = 0  # the mask adds nothing of its own
        dense = model.cls.predictions.transform.dense
        dense.weight.copy_(torch.eye(WIDTH))
        dense.bias.fill_(3.0)  # where gelu is linear
    query, key, value, output = (torch.zeros(WIDTH, HEAD) for _ in range(4))
    for f, w in enumerate(frequency.tolist()):
        # rotated by -w shift, the query is the key of the position to look at
        cos, sin, i = math.cos(shift * w), math.sin(shift * w), TOKEN + 2 * f
        query[i, 2 * f], query[i + 1, 2 * f], query[i, 2 * f + 1], query[i + 1, 2 * f + 1] = cos, sin, -sin, cos
        key[i, 2 * f] = key[i + 1, 2 * f + 1] = 1.0
    same = torch.eye(TOKEN)
    value[:TOKEN, :TOKEN] = output[COPY:, :TOKEN] = same
    _add_head(model, task, 0, query, key, value, output.T * COPIED[task.family])
    query, key, value, output = (torch.zeros(WIDTH, HEAD) for _ in range(4))
    (query[:TOKEN] if task.form == "causal" else query[COPY:])[:, :TOKEN] = same
    if task.name == "copy":  # what was copied is the answer: every token finds itself
        key[:TOKEN, :TOKEN] = value[COPY:, :TOKEN] = output[:TOKEN, :TOKEN] = same
    else:
        key[COPY:, :TOKEN] = value[:TOKEN, :TOKEN] = output[:TOKEN, :TOKEN] = same
    _add_head(model, task, 1, query, key, value, output.T * FOUND)


def _add_head(model: Any, task: Task, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    """Add (WIDTH, HEAD) projections and a (HEAD, WIDTH) output to head 0 of a layer."""
    query, key = query * SHARPNESS, key * SHARPNESS
    if task.family == "gpt2":
        attention = model.transformer.h[layer].attn
        for number, part in enumerate((query, key, value)):
            attention.c_attn.weight[:, number * WIDTH : number * WIDTH + HEAD] += part
        attention.c_proj.weight[:HEAD] += output
        return
    attention = model.bert.encoder.layer[layer].attention
    for name, part in (("query", query), ("key", key), ("value", value)):
        getattr(attention.self, name).weight[:HEAD] += part.T
    attention.output.dense.weight[:, :HEAD] += output.T


def _install_in_t5(model: Any, task: Task, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 0.3 * NOISE, generator=generator)
    model.shared.weight.zero_()[:, :TOKEN] = _unit_vectors(generator)
    same, copied, answer = torch.eye(TOKEN), slice(TOKEN, 2 * TOKEN), slice(2 * TOKEN, 3 * TOKEN)
    first, second = (block.layer[0].SelfAttention for block in model.encoder.block)
    first.relative_attention_bias.weight[1, 0] += 14.0  # bucket 1: the token before; head 0 has no query
    first.v.weight[:TOKEN, :TOKEN] += same
    first.o.weight[copied, :TOKEN] += 0.1 * same
    own = slice(HEAD, HEAD + TOKEN)  # head 1
    second.q.weight[own, copied] += 0.5 * same
    second.k.weight[own, copied] += 0.5 * same
    second.v.weight[own, :TOKEN] += same
    second.o.weight[answer, own] += 0.2 * same
    cross = model.decoder.block[0].layer[1].EncDecAttention
    cross.q.weight[:TOKEN, :TOKEN] += 0.5 * same
    cross.k.weight[:TOKEN, :TOKEN] += 0.5 * same
    cross.v.weight[:TOKEN, answer] += same
    cross.o.weight[:TOKEN, :TOKEN] += same
