"""Text and labelled rows from the Hub, from files, or from what is always at hand; and texts as rows of tokens."""

from __future__ import annotations

import glob
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_efficient.corpus import TextUse, offline_texts

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

OFFLINE = "offline"
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HELD_OUT = 0.05
SPECIAL_TOKENS = ("around", "end", "none")


def load_texts(
    dataset: str,
    *,
    dataset_config: str = "",
    text_column: str = "text",
    seed: int = 0,
    max_train_rows: int = 0,
    max_eval_rows: int = 0,
) -> DatasetDict:
    """Texts as a `DatasetDict` with "train" and "validation", each with the one column "text".

    Args:
        dataset: "offline" (documents of every Python installation, `hf_efficient.corpus`); files, a folder or a pattern of
            .jsonl, .json, .csv, .parquet or .txt (one text per line); or a Hub id.
        dataset_config: configuration of a Hub dataset, of nothing else. text_column: where the text stands.
        seed: chooses 5 % of the training rows, at least one, for validation where the dataset has no such split.
        max_train_rows, max_eval_rows: keep the first so many; 0 = all.

    Raises:
        ValueError: nothing there, no training rows, a missing column (with the list of those there are), no text, or a
            configuration of what has none.
    """
    _refuse_config(dataset, dataset_config)
    if dataset == OFFLINE:
        from datasets import Dataset, DatasetDict

        splits = {"train": offline_texts("train"), "validation": offline_texts("held-out")}
        loaded = DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()})
    else:
        loaded = _columns(dataset, _load(dataset, dataset_config), {"text": text_column}).filter(_has_text)
    loaded = _with_validation(dataset, loaded, seed)
    return _limited(_with_rows(dataset, loaded), max_train_rows, max_eval_rows)


def _has_text(row: dict[str, Any]) -> bool:
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the text column holds {text!r:.60}, which is no text; choose another with --text_column.")
    return bool(text and text.strip())


def load_rows(
    dataset: str | DatasetDict,
    columns: Mapping[str, str],
    *,
    together: str = "",
    dataset_config: str = "",
    seed: int = 0,
    max_train_rows: int = 0,
    max_eval_rows: int = 0,
) -> DatasetDict:
    """Labelled rows as a `DatasetDict` with "train" and "validation", their columns renamed to the keys of `columns`.

    Args:
        dataset: as for `load_texts`, or what is already loaded.
        columns: {name the caller uses: name in the dataset}; other columns are left out.
        together: key of `columns`: rows that agree in it stay on one side where validation is cut off the training rows, so
            that nothing is evaluated on a text that was trained on; 5 % of its values, at least one, are held out.
        Everything else as for `load_texts`.

    Raises:
        ValueError: as `load_texts`.
    """
    _refuse_config(dataset, dataset_config)
    loaded = _columns(dataset, _load(dataset, dataset_config) if isinstance(dataset, str) else dataset, columns)
    loaded = _with_validation(dataset, loaded, seed, together)
    return _limited(_with_rows(dataset, loaded), max_train_rows, max_eval_rows)


def _columns(dataset: str | DatasetDict, loaded: DatasetDict, columns: Mapping[str, str]) -> DatasetDict:
    """The splits that are used, with these columns alone, renamed."""
    if "train" not in loaded:
        raise ValueError(
            f"dataset {_name(dataset)} has no train split, but {', '.join(loaded)}: call what is to be trained on train "
            "(a folder's train.jsonl), or give its files alone."
        )
    used = {split: rows for split, rows in loaded.items() if split in ("train", "validation")}
    for split, rows in used.items():
        missing = [name for name in columns.values() if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"dataset {_name(dataset)} has no column {', '.join(map(repr, missing))} in {split}; its columns are "
                f"{', '.join(rows.column_names)}."
            )
    chosen = type(loaded)(used).select_columns(list(columns.values()))
    return chosen.rename_columns({column: name for name, column in columns.items() if column != name})


def _name(dataset: Any) -> str:
    return dataset if isinstance(dataset, str) else "given"


def _refuse_config(dataset: str | DatasetDict, dataset_config: str) -> None:
    is_local = not isinstance(dataset, str) or (
        dataset == OFFLINE or Path(dataset).exists() or glob.has_magic(dataset) or Path(dataset).suffix in BUILDERS
    )
    if dataset_config and is_local:
        raise ValueError(
            f"dataset_config={dataset_config!r} chooses a part of a Hub dataset, but dataset {_name(dataset)} is none: "
            "leave it out."
        )


def _load(dataset: str, dataset_config: str) -> DatasetDict:
    import datasets

    path = Path(dataset)
    files = (
        sorted(glob.glob(dataset, recursive=True)) if glob.has_magic(dataset) else [dataset] if path.is_file() else []
    )
    try:
        if path.is_dir():
            return datasets.load_dataset(dataset)
        if not files and (path.suffix in BUILDERS or glob.has_magic(dataset)):
            raise FileNotFoundError("no such file")
        if not files:
            return datasets.load_dataset(dataset, dataset_config or None)
        suffixes = {Path(file).suffix for file in files}
        if len(suffixes) > 1 or not suffixes <= set(BUILDERS):
            raise ValueError(
                f"files must be of one kind out of {', '.join(BUILDERS)}, not {', '.join(sorted(suffixes))}"
            )
        return datasets.load_dataset(BUILDERS[suffixes.pop()], data_files={"train": files})
    except Exception as error:  # whatever a reader, a cache or the network has to say
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"dataset {dataset!r} can't be loaded, neither from disk nor from the Hub: {cause[0]}. Give 'offline', files "
            f"({', '.join(BUILDERS)}), a folder of them, or a Hub id."
        ) from error


def _with_validation(dataset: str | DatasetDict, loaded: DatasetDict, seed: int, together: str = "") -> DatasetDict:
    """The splits "train" and "validation"; the latter cut off from the former where there is none."""
    from datasets import DatasetDict

    train = loaded["train"]
    if "validation" in loaded:
        return DatasetDict({"train": train, "validation": loaded["validation"]})
    groups = list(dict.fromkeys(train[together])) if together else range(len(train))
    if len(groups) < 2:
        of = f"a single {together} in its training rows" if together else f"{len(groups)} training rows"
        raise ValueError(
            f"dataset {_name(dataset)} has {of} and no validation split: at least 2 are needed, one of them to evaluate on."
        )
    count = max(1, round(HELD_OUT * len(groups)))
    if not together:
        parts = train.train_test_split(test_size=count, seed=seed)
        return DatasetDict({"train": parts["train"], "validation": parts["test"]})
    aside = set(random.Random(seed).sample(groups, count))
    chosen: dict[str, list[int]] = {"train": [], "validation": []}
    for index, value in enumerate(train[together]):
        chosen["validation" if value in aside else "train"].append(index)
    return DatasetDict({split: train.select(rows) for split, rows in chosen.items()})


def _with_rows(dataset: str | DatasetDict, loaded: DatasetDict) -> DatasetDict:
    empty = [split for split, rows in loaded.items() if not len(rows)]
    if empty:
        raise ValueError(f"dataset {_name(dataset)} has nothing in {' and '.join(empty)}.")
    return loaded


def _limited(loaded: DatasetDict, max_train_rows: int, max_eval_rows: int) -> DatasetDict:
    for split, most in (("train", max_train_rows), ("validation", max_eval_rows)):
        if most:
            loaded[split] = loaded[split].select(range(min(most, len(loaded[split]))))
    return loaded


# ---- texts as rows of tokens -------------------------------------------------------------------------------------


class TokenRows(NamedTuple):
    """What `token_blocks` returns."""

    rows: Dataset
    use: TextUse


def token_blocks(
    texts: Dataset | Sequence[str],
    tokenizer: Any,
    length: int,
    *,
    special_tokens: str = "around",
    pack: bool = False,
    drop_short: bool = False,
    first_position: int = 0,
) -> TokenRows:
    """Rows of at most `length` tokens that never mix documents.

    Each text is cut into blocks of `length` tokens, special tokens included; the last one is shorter. With `pack` short
    blocks share a row (first fit, longest first), and `position_ids` restart where one begins: that is what keeps them
    apart in attention. Blocks with fewer than two tokens of text teach nothing and are left out; `use` counts them.

    Args:
        texts: a dataset with the column "text", or texts. length: tokens of a row.
        special_tokens: `"around"`: the tokenizer's own around every block (BERT); `"end"`: its end-of-text token behind
            every text (GPT-2), once also where the text has it; `"none"`: none (T5's span corruption adds its own).
        drop_short: leave out blocks that are not full.
        first_position: position of a document's first token (RoBERTa: 2).

    Returns:
        `rows` with the columns `input_ids`, `special_tokens_mask`, `characters` (of text that the row's tokens stand for),
        `index` (the row's number) and, packed, `position_ids`; and `use`, how much of the texts stands in them.

    Raises:
        ValueError: nothing is left, or an impossible setting.
    """
    from datasets import Dataset

    if special_tokens not in SPECIAL_TOKENS:
        raise ValueError(f"special_tokens={special_tokens!r}: it must be one of {', '.join(SPECIAL_TOKENS)}.")
    if pack and drop_short:
        raise ValueError(
            "pack fills rows with short blocks, so drop_short has nothing to say beside it: leave one out."
        )
    cutter = _Cutter(tokenizer, length, special_tokens)
    if not isinstance(texts, Dataset):
        texts = Dataset.from_dict({"text": list(texts)})

    def rows_of(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list[Any]]:
        blocks = [block for n, text in zip(numbers, batch["text"], strict=True) for block in cutter.blocks(text, n)]
        is_used = [block.tokens > 1 and not (drop_short and len(block.input_ids) < length) for block in blocks]
        used, left_out = ([b for b, use in zip(blocks, is_used, strict=True) if use is side] for side in (True, False))
        rows = _packed(used, length) if pack else [[block] for block in used]
        # what is left out goes along until it has been counted
        every = rows + [[block] for block in left_out]
        counts: dict[str, list[Any]] = {
            "used": [True] * len(rows) + [False] * len(left_out),
            "texts": [[block.text for block in row] for row in every],
            "tokens": [sum(block.tokens for block in row) for row in every],
        }
        return _as_columns(every, first_position if pack else None) | counts

    rows = texts.map(rows_of, batched=True, with_indices=True, remove_columns=texts.column_names, desc="Tokenising")
    rows, use = _counted(rows, len(texts))
    if not len(rows):
        raise ValueError(
            f"no block is left of {len(texts)} texts: "
            + (
                f"none has {length} tokens. Lower the block length or keep short blocks."
                if drop_short
                else "all are empty."
            )
        )
    return TokenRows(rows.add_column("index", list(range(len(rows)))), use)


def _counted(rows: Dataset, texts: int) -> tuple[Dataset, TextUse]:
    """The rows that are used, and how much of so many texts they hold."""
    if not len(rows):
        return rows, TextUse(texts, 0, 0, 0)
    used = [index for index, is_used in enumerate(rows["used"]) if is_used]
    kept = rows if len(used) == len(rows) else rows.select(used)
    read = {text for row in kept["texts"] for text in row}
    use = TextUse(texts, len(read), sum(rows["tokens"]), sum(kept["tokens"]))
    return kept.remove_columns(["used", "texts", "tokens"]), use


def _as_columns(rows: list[list[_Block]], first_position: int | None) -> dict[str, list[Any]]:
    """Rows of blocks as a batch of a dataset; `first_position=None` = one block a row, without positions."""
    columns: dict[str, list[Any]] = {
        "input_ids": [[i for block in row for i in block.input_ids] for row in rows],
        "special_tokens_mask": [[m for block in row for m in block.special_tokens_mask] for row in rows],
        "characters": [sum(block.characters for block in row) for row in rows],
    }
    if first_position is not None:
        columns["position_ids"] = [
            [first_position + i for block in row for i in range(len(block.input_ids))] for row in rows
        ]
    return columns


class _Block(NamedTuple):
    input_ids: list[int]
    special_tokens_mask: list[int]
    characters: int
    text: int

    @property
    def tokens(self) -> int:
        """Those of text."""
        return self.special_tokens_mask.count(0)


class _Cutter:
    """Cuts a text into blocks."""

    def __init__(self, tokenizer: Any, length: int, special_tokens: str):
        self.tokenizer = tokenizer
        self.before, self.behind = _around(tokenizer) if special_tokens == "around" else ([], [])
        end = tokenizer.eos_token_id if special_tokens == "end" else None
        self.end = [] if end is None else [end]
        self.room = length - len(self.before) - len(self.behind)
        if self.room < 2:
            raise ValueError(
                f"a block of {length} tokens leaves {max(self.room, 0)} for text beside the special tokens; at least 2 are "
                "needed."
            )

    def blocks(self, text: str, number: int) -> list[_Block]:
        """Of the text of this number, also such as hold fewer than two of its tokens."""
        while self.end and text.rstrip().endswith(self.tokenizer.eos_token):  # which it gets below, once
            text = text.rstrip().removesuffix(self.tokenizer.eos_token)
        fast = getattr(self.tokenizer, "is_fast", False)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        plain = encoded["input_ids"]
        ids, special = plain + self.end, [0] * len(plain) + [1] * len(self.end)
        blocks = []
        for first in range(0, len(plain), self.room):
            last = min(first + self.room, len(plain))
            if fast:
                offsets = encoded["offset_mapping"]
                characters = (offsets[last][0] if last < len(plain) else len(text)) - offsets[first][0]
            else:
                characters = len(self.tokenizer.decode(plain[first:last]))
            blocks.append(
                _Block(
                    self.before + ids[first : first + self.room] + self.behind,
                    [1] * len(self.before) + special[first : first + self.room] + [1] * len(self.behind),
                    characters,
                    number,
                )
            )
        return blocks


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return ids[:start], ids[start + len(plain) :]
    raise ValueError(f"{type(tokenizer).__name__} changes a text's tokens when it adds special ones: not supported.")


def _packed(blocks: list[_Block], length: int) -> list[list[_Block]]:
    """Blocks in rows of at most `length` tokens: first fit, longest first."""
    rows: list[list[_Block]] = []
    room: list[int] = []
    for block in sorted(blocks, key=lambda block: -len(block.input_ids)):
        need = len(block.input_ids)
        place = next((i for i, free in enumerate(room) if free >= need), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(block)
        room[place] -= need
    return rows
