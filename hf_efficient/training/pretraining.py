"""What the pretraining recipes share: small models from scratch, row lengths, and figures per token and per character."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from hf_efficient.conversion.convert import convert
from hf_efficient.conversion.folders import atomic_folder
from hf_efficient.families import PREFIX, HostModel
from hf_efficient.training.data.collators import IGNORED
from hf_efficient.training.data.texts import load_texts
from hf_efficient.training.loading import load_model, prepared
from hf_efficient.training.metrics import bits_per_character, perplexity
from hf_efficient.training.results import RESULT_NAME, RunRecord
from hf_efficient.training.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SCRATCH = "scratch:"
DEFAULT_LENGTH = 512
# enough to choose a vocabulary from; Unigram takes most of a minute for it
TOKENIZER_CHARACTERS = 2_000_000


@dataclass(kw_only=True)
class PretrainingSettings(Settings):
    """What every pretraining recipe takes."""

    text_column: str = "text"  # column of the dataset that holds the text
    block_length: int = 0  # tokens of a row; 0 = all positions of the model, of T5 as its tokenizer says
    num_train_epochs: float = 1.0
    # ---- from scratch only ----
    hidden_size: int = 256  # width
    layers: int = 4  # number of layers
    heads: int = 4  # attention heads
    vocabulary_size: int = 8000  # entries of the new tokenizer

    def texts(self) -> DatasetDict:
        """The texts of the dataset, as "train" and "validation"."""
        return load_texts(self.dataset, text_column=self.text_column, **self.data_options())


def load_or_start(
    settings: PretrainingSettings, auto_class: Any, kind: str, texts: Dataset, record: RunRecord
) -> tuple[Any, Any]:
    """(model, tokenizer): `load_model`, or for `settings.model = "scratch:{kind}"` a new small model and its own tokenizer.

    The new model has `settings.hidden_size`, `layers`, `heads` and `vocabulary_size`, and positions for
    `settings.max_positions` or `block_length`; its tokenizer is trained on `texts` once and kept in `output_dir/tokenizer`.

    Args:
        kind: "bert", "gpt2" or "t5", what `auto_class` trains.
        texts: with the column "text"; with several processes the first one trains the tokenizer.

    Raises:
        ValueError: another kind, heads that do not divide the hidden size, and what `load_model` refuses.
    """
    if not settings.model.startswith(SCRATCH):
        return load_model(settings, auto_class, record=record)
    if settings.model != SCRATCH + kind:
        raise ValueError(
            f"model={settings.model!r}: this recipe starts {SCRATCH}{kind} from scratch, or loads a checkpoint."
        )
    if settings.hidden_size % settings.heads:
        raise ValueError(f"hidden_size={settings.hidden_size} can't be shared out to heads={settings.heads}.")
    if settings.positions:
        raise ValueError(
            f"positions={settings.positions!r}: a model from scratch has as many as max_positions says; leave it out."
        )
    with settings.main_process_first(desc="tokenizer"):
        tokenizer = _own_tokenizer(settings, kind, texts, record)
    length = settings.max_positions or settings.block_length or DEFAULT_LENGTH
    tokenizer.model_max_length = length
    transformers.set_seed(settings.seed)
    model = auto_class.from_config(_config(settings, kind, tokenizer, length))
    if settings.attention not in ("", "none"):
        result = convert(model, settings.attention, tokenizer=tokenizer)
        model, record.conversion = result.model, result.report.to_dict()
        result.report.history[-1]["within"] = record.recipe
    return prepared(model, settings), tokenizer


def _config(settings: Any, kind: str, tokenizer: Any, length: int) -> Any:
    width, layers, heads = settings.hidden_size, settings.layers, settings.heads
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "bert":
        return transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=length,
            pad_token_id=tokenizer.pad_token_id,
        )
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_positions=length,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        d_kv=width // heads,
        d_ff=4 * width,
        **special | {"decoder_start_token_id": tokenizer.pad_token_id},
    )


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def _own_tokenizer(settings: Any, kind: str, texts: Dataset, record: RunRecord) -> Any:
    folder = Path(settings.output_dir) / "tokenizer"
    if not folder.exists():
        record.write(folder.parent / RESULT_NAME)  # from now on the folder holds a run
        with atomic_folder(folder) as partial:
            train_tokenizer(kind, texts["text"], settings.vocabulary_size).save_pretrained(partial)
    # loaded also where it was just trained, so that a resumed run has the very same
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def train_tokenizer(kind: str, texts: Iterable[str], vocabulary_size: int) -> Any:
    """A new tokenizer of `vocabulary_size` entries, with the class and the rules of its architecture.

    "gpt2": byte-level BPE; "bert": lower-case WordPiece; "t5": Unigram, with 100 sentinels among the entries.

    Raises:
        ValueError: a vocabulary too small for the characters or special tokens alone.
    """
    least = {"gpt2": 258, "bert": 100, "t5": 200}[kind]
    if vocabulary_size < least:
        raise ValueError(f"vocabulary_size={vocabulary_size} is too small for scratch:{kind}; it must be ≥ {least}.")
    return {"gpt2": _bpe, "bert": _wordpiece, "t5": _unigram}[kind](_first_characters(texts), vocabulary_size)


def _first_characters(texts: Iterable[str]) -> Iterator[str]:
    room = TOKENIZER_CHARACTERS
    for text in texts:
        if room <= 0:
            return
        yield text[:room]
        room -= len(text)


def _bpe(texts: Iterator[str], size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    learned = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    return transformers.GPT2Tokenizer(vocab=learned["vocab"], merges=merges)


def _wordpiece(texts: Iterator[str], size: int) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return transformers.BertTokenizer(vocab=backend.get_vocab())


def _unigram(texts: Iterator[str], size: int) -> Any:
    from tokenizers import Tokenizer, models, trainers

    extra = 100
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = transformers.T5Tokenizer().backend_tokenizer.pre_tokenizer
    special = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=size - extra, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    learned: Any = json.loads(backend.to_str())["model"]["vocab"]
    pairs: Any = [tuple(entry) for entry in learned]
    return transformers.T5Tokenizer(vocab=pairs, extra_ids=extra)


# ---- rows and figures ------------------------------------------------------------------------------------------------


def block_length(settings: Any, model: Any, tokenizer: Any) -> int:
    """Tokens of a row: `settings.block_length`, or 0 = as many as the model has positions (T5: as its tokenizer says).

    Raises:
        ValueError: more than the model has positions.
    """
    positions = HostModel.of(model).max_positions
    if positions is not None and settings.block_length > positions:
        raise ValueError(
            f"block_length={settings.block_length}, but the model has {positions} positions: convert it with "
            f"--max_positions {settings.block_length}, or lower the block length."
        )
    told = tokenizer.model_max_length
    return settings.block_length or positions or (told if told < 10**6 else DEFAULT_LENGTH)


def refuse_packing(settings: Any, model: Any) -> None:
    """Refuse `settings.pack` where documents in a row would see each other.

    Raises:
        ValueError: T5, an unconverted encoder (the host looks at no positions), or a compiled model.
    """
    if not settings.pack:
        return
    if model.config.is_encoder_decoder:
        raise ValueError("pack: T5 has no position_ids, which keep the documents of a row apart; leave --pack out.")
    if settings.torch_compile:
        raise ValueError(
            "pack and torch_compile: compiled models can't tell packed rows from plain ones; leave one of them out."
        )
    model_type = model.config.model_type
    if not model_type.startswith(PREFIX) and model_type != "gpt2":
        raise ValueError(
            f"pack: unconverted {model_type} models let the documents of a row see each other; convert with --attention, or "
            "leave --pack out."
        )


def first_position(model: Any) -> int:
    """Position of a text's first token (RoBERTa counts from 2)."""
    return HostModel.of(model).first_position


class TokenScores:
    """Loss per token, perplexity and bits per character for the Trainer, without keeping any logits.

        Trainer(compute_metrics=scores, preprocess_logits_for_metrics=scores.losses)

    The loss is the mean over all predicted tokens of the evaluation set, not over batches. Bits per character are
    loss · tokens / (characters · ln 2) with the tokens and characters of the evaluated text: what does not depend on the
    vocabulary.

    Args:
        is_causal: token i is predicted by the logits at i - 1.
        tokens, characters: of the text that the predictions stand for.
    """

    def __init__(self, is_causal: bool, tokens: int, characters: int):
        self.is_causal, self.tokens, self.characters = is_causal, tokens, characters

    def losses(self, logits: Any, labels: Tensor) -> Tensor:
        """(B, 2): sum of the losses of every row, in nats, and how many tokens it predicts."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        if self.is_causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return torch.stack([each.double().sum(1), (labels != IGNORED).double().sum(1)], dim=1)

    def __call__(self, prediction: Any) -> dict[str, float]:
        total, count = prediction.predictions.sum(axis=0).tolist()
        loss = total / count
        return {
            "token_loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_character": bits_per_character(loss, self.tokens, self.characters),
        }


def text_size(rows: Dataset) -> tuple[int, int]:
    """(tokens, characters) of text in rows of `token_blocks`."""
    tokens = sum(mask.count(0) for mask in rows["special_tokens_mask"])
    return tokens, sum(rows["characters"])


def target_size(rows: Dataset, decode: Callable[..., str]) -> tuple[int, int]:
    """(tokens, characters) that the labels of span corruption ask for; sentinels count as tokens, not as text."""
    labels = rows["labels"]
    return sum(map(len, labels)), sum(len(decode(row, skip_special_tokens=True)) for row in labels)
