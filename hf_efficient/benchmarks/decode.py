"""Time per decoded token over the length of the prompt: full attention with transformers' cache, and ours.

    hf-efficient bench decode --out decode.json     # draws decode.png beside it

Two layers of GPT-2 with random weights, of base and of tiny width, float32, one thread. After the prompt, every model
decodes the same tokens one by one, with a padding mask that grows, as `generate` calls it. All run in turn, a few tokens at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GPT2Config, GPT2Model

from hf_efficient.attention.base.registry import attention_configs
from hf_efficient.families import HostModel
from hf_efficient.models.in_place import convert_in_place
from hf_efficient.profiling.environment import hardware, one_thread, versions
from hf_efficient.profiling.timing import Mark, table_of, timed

FULL = "full attention (DynamicCache)"
WINDOW = 512
CONVERTED: dict[str, dict[str, Any]] = {
    f"local, window {WINDOW}": dict(mechanism="local", attention_window=WINDOW),
    f"longformer, window {WINDOW}, first token global": dict(
        mechanism="longformer", attention_window=WINDOW, global_tokens="first"
    ),
    "performer": dict(mechanism="performer"),
    "hedgehog": dict(mechanism="hedgehog"),
    "linear_transformer": dict(mechanism="linear_transformer"),
}
# hidden size and heads
WIDTHS = {"tiny": (128, 2), "base": (768, 12)}
LENGTHS = (128, 512, 2048, 8192, 16384)
# tokens that are decoded in a row, between the turns of the others
TOKENS = 8


def decoder(width: str, positions: int, attention: dict[str, Any] | None) -> Any:
    """A random model for so many positions."""
    hidden, heads = WIDTHS[width]
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(n_layer=2, n_embd=hidden, n_head=heads, n_positions=positions)
    model = GPT2Model(GPT2Config(vocab_size=1000, bos_token_id=0, eos_token_id=1, **sizes)).eval()
    if attention is not None:
        convert_in_place(HostModel.of(model), attention_configs([attention]))
    return model


class Decoding:
    """A model that goes on from a prompt by itself, token by token; the tokens are random."""

    def __init__(self, model: Any, prompt: torch.Tensor):
        self.model, self.batch, self.seen = model, len(prompt), prompt.shape[1]
        with torch.no_grad():
            self.cache = model(input_ids=prompt, use_cache=True).past_key_values

    def step(self, count: int = TOKENS) -> None:
        for _ in range(count):
            self.seen += 1
            token = torch.full((self.batch, 1), 5 + self.seen % 900)
            mask = torch.ones(self.batch, self.seen, dtype=torch.long)
            with torch.no_grad():
                self.model(input_ids=token, attention_mask=mask, past_key_values=self.cache, use_cache=True)

    def held(self) -> float:
        """Megabytes of keys, values and states in the cache."""
        tensors = {id(x): x for layer in self.cache.layers for x in _tensors(vars(layer))}
        return sum(x.numel() * x.element_size() for x in tensors.values()) / 1e6

    def call(self) -> Callable[[Mark], None]:
        """To be timed: `TOKENS` further tokens."""
        return lambda mark: self.step()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []


def decode_suite(
    lengths: Sequence[int] = LENGTHS,
    widths: Sequence[str] = tuple(WIDTHS),
    batches: Sequence[int] = (1, 8),
    rounds: int = 9,
    seconds: float = 40.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Seconds of one decoded token after prompts of these lengths.

    Args:
        rounds, seconds: of one place: so many rounds of `TOKENS` tokens, or fewer once these seconds are used.
    """
    results = []
    for width in widths:
        for batch in batches:
            for length in lengths:
                where = {"width": width, "batch": batch, "tokens": length}
                results += _place(where, rounds, seconds, progress)
    settings = {"layers": 2, "widths": {w: WIDTHS[w] for w in widths}, "dtype": "float32", "new_tokens": TOKENS}
    return {
        "suite": "decode",
        "settings": settings | {"threads": 1, "rounds": rounds, "seconds": seconds, "seed": 0},
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
    }


def _place(where: dict[str, Any], rounds: int, seconds: float, progress: bool) -> list[dict[str, Any]]:
    """The results of one place."""
    length, width, batch = where["tokens"], where["width"], where["batch"]
    prompt = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    positions = length + TOKENS * (rounds + 3)
    runs = {
        name: Decoding(decoder(width, positions, attention), prompt)
        for name, attention in {FULL: None, **CONVERTED}.items()
    }
    before = {name: run.held() for name, run in runs.items()}
    label = f"{width}, batch {batch}, {length} tokens" if progress else None
    with one_thread():
        times = timed({name: run.call() for name, run in runs.items()}, rounds, seconds, progress=label)
    rows = []
    for name, row in table_of(times, FULL).items():
        row["seconds"] /= TOKENS
        held = {"cache_mb": before[name], "cache_mb_after": runs[name].held()}
        rows.append({"model": name, **where, "rounds": len(times[name]), **row, **held})
    return rows


def decode_rows(document: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows for people: ratios to full attention by length of the prompt."""
    results = document["results"]
    lengths = list(dict.fromkeys(row["tokens"] for row in results))
    rows = []
    for place in dict.fromkeys((row["model"], row["width"], row["batch"]) for row in results):
        found = {row["tokens"]: row for row in results if (row["model"], row["width"], row["batch"]) == place}
        rows.append([*place, *(f"{found[n]['ratio']:.2f}" if n in found else "–" for n in lengths)])
    return ["time per token ÷ full attention", "width", "batch", *map(str, lengths)], rows
