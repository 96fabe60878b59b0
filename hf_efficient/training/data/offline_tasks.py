"""Small labelled datasets that need no download: the offline defaults of the finetuning recipes.

All come from what every Python brings: the sources of its standard library, its language reference, and the texts of
`hf_efficient.corpus`. Rows are split by document, so nothing of a validation row was seen in training. What is installed
decides what is there, so record versions beside results.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from hf_efficient.corpus import KINDS, drawn_pictures, offline_documents, split_documents

Row = dict[str, Any]

# ---- sizes: minutes on a CPU, and longer than 512 tokens where length is the point ----
LIBRARIES = ("asyncio", "email", "importlib", "multiprocessing", "xml")
PIECE_CHARACTERS, PIECES = 4000, {"train": 48, "validation": 12}
TAGS = ("O", "B-CODE", "I-CODE", "B-TERM", "I-TERM")
ROW_WORDS = 256
QUESTIONS, CONTEXT_CHARACTERS, FACTS = {"train": 512, "validation": 64}, 6000, 4
SUMMARIES, SUMMARIES_PER_FILE, SOURCE_CHARACTERS = {"train": 320, "validation": 48}, 12, (1000, 20_000)
PICTURES = {"train": 512, "validation": 128}
PASSAGES, PASSAGE_WORDS, DOCUMENT_CHARACTERS = {"train": 8, "validation": 4}, 30, 20_000


def offline_task(task: str, seed: int = 0) -> Any:
    """A labelled `datasets.DatasetDict` with "train" and "validation", rows in a seeded order.

    * `"classification"`: `text`, `label`: which package of the standard library a piece of source code comes from.
    * `"token_classification"`: `tokens`, `tags`: what Python's language reference sets as code (CODE) and in italics
      (TERM), in B-/I-/O tags; the marks themselves are taken out.
    * `"question_answering"`: `question`, `context`, `answers` (`text`, `answer_start`): one of several look-alike facts
      hidden in a long text.
    * `"summarisation"`: `document`, `summary`: a definition of the standard library, and the sentence that opens its
      docstring, which the document lacks.
    * `"pictures"`: `image`, `label`: which shape is drawn on noise.
    * `"pairs"`: `anchor`, `positive`: a short passage, and the long document that it was cut from.

    Raises:
        ValueError: an unknown task, or a Python without the sources of its standard library.
    """
    if task not in _TASKS:
        raise ValueError(f"offline task {task!r} is not known; it must be one of {', '.join(_TASKS)}.")
    import datasets

    rows, features = _TASKS[task]
    splits = {}
    for split in ("train", "validation"):
        chosen = random.Random(f"{task} {split} {seed}")
        made = list(rows(split, chosen))
        chosen.shuffle(made)
        splits[split] = datasets.Dataset.from_list(made, features=features())
    return datasets.DatasetDict(splits)


# ---- documents ---------------------------------------------------------------------------------------------------


_TESTS = {"test", "tests"}


def _digest(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def _sources(pattern: str, split: str) -> Iterator[str]:
    """Source files of the standard library, in an order that their names scatter; a quarter of them is held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(folder).as_posix() for file in folder.glob(pattern) if not _TESTS & {*file.parts}]
    if len(names) < 4:
        raise ValueError(f"this Python lacks the sources {folder / pattern}: name a dataset of your own.")
    names.sort(key=_digest)
    held_out = len(names) // 4
    for name in names[:held_out] if split == "validation" else names[held_out:]:
        yield folder.joinpath(name).read_text(encoding="utf-8", errors="replace")


# what the corpus calls the splits of a task
CORPUS_SPLITS = {"train": "train", "validation": "held-out"}


def _topics(split: str) -> list[str]:
    from pydoc_data.topics import topics

    return list(split_documents(dict(sorted(topics.items())), CORPUS_SPLITS[split]).values())


@cache
def _documents() -> dict[str, str]:
    return offline_documents()


# ---- tasks: (split, randomness) → rows ---------------------------------------------------------------------------


def _classification(split: str, chosen: random.Random) -> Iterator[Row]:
    for label, package in enumerate(LIBRARIES):
        pieces = [
            text[start : start + PIECE_CHARACTERS]
            for text in _sources(f"{package}/**/*.py", split)
            for start in range(0, max(1, len(text) - PIECE_CHARACTERS // 2), PIECE_CHARACTERS)
            if len(text) >= PIECE_CHARACTERS // 2
        ]
        chosen.shuffle(pieces)
        yield from ({"text": piece, "label": label} for piece in pieces[: PIECES[split]])


# code in double back-ticks or, as it is printed, in double quotes; terms between asterisks
_MARKED = re.compile(
    r'``(?P<code>[^`]+)``|"(?P<printed>[^"]{1,80})"|(?<![*\w])\*(?P<term>[^*\s][^*]{0,40})\*(?![*\w])'
)
_WORD = re.compile(r"\w+|[^\w\s]")


def _token_classification(split: str, chosen: random.Random) -> Iterator[Row]:
    for text in _topics(split):
        tokens: list[str] = []
        tags: list[int] = []
        for paragraph in text.split("\n\n"):
            # grammar, examples and headings are set otherwise
            if paragraph.startswith("   ") or "::=" in paragraph or re.search(r"^([*=~^-])\1+$", paragraph, re.M):
                continue
            words = list(_tagged(paragraph))
            if any(word in '"`' for word, _ in words):
                continue
            tokens += [word for word, _ in words]
            tags += [TAGS.index(tag) for _, tag in words]
            if len(tokens) >= ROW_WORDS:
                yield {"tokens": tokens[:ROW_WORDS], "tags": tags[:ROW_WORDS]}
                tokens, tags = [], []
        if len(tokens) >= ROW_WORDS // 8:
            yield {"tokens": tokens, "tags": tags}


def _tagged(paragraph: str) -> Iterator[tuple[str, str]]:
    """(word, tag) of a paragraph; words are runs of word characters, or single punctuation marks."""
    end = 0
    for match in _MARKED.finditer(paragraph):
        yield from ((word, "O") for word in _WORD.findall(paragraph[end : match.start()]))
        name = "TERM" if match["term"] else "CODE"
        for index, word in enumerate(_WORD.findall(match["term"] or match["code"] or match["printed"])):
            yield word, f"{'I' if index else 'B'}-{name}"
        end = match.end()
    yield from ((word, "O") for word in _WORD.findall(paragraph[end:]))


_COLOURS = ("amber", "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
_THINGS = ("bridge", "cabinet", "door", "engine", "garden", "harbour", "lamp", "mirror", "piano", "tower", "wagon")


def _question_answering(split: str, chosen: random.Random) -> Iterator[Row]:
    text = "\n\n".join(_topics(split))
    names = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    for _ in range(QUESTIONS[split]):
        start = chosen.randrange(len(text) - CONTEXT_CHARACTERS)
        words = text[start : start + CONTEXT_CHARACTERS].split()
        facts = [(name, f"{chosen.randrange(1000, 10_000)}") for name in chosen.sample(names, FACTS)]
        places = sorted(chosen.sample(range(len(words) + 1), FACTS), reverse=True)
        for (name, code), place in zip(facts, places, strict=True):
            words[place:place] = ["The", "code", "of", "the", *name.split(), "is", f"{code}."]
        context, (name, code) = " ".join(words), chosen.choice(facts)
        sentence = f"The code of the {name} is "
        answers = {"text": [code], "answer_start": [context.index(sentence) + len(sentence)]}
        yield {"question": f"What is the code of the {name}?", "context": context, "answers": answers}


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _summarisation(split: str, chosen: random.Random) -> Iterator[Row]:
    found = (row for text in _sources("*.py", split) for row in islice(_summaries(text), SUMMARIES_PER_FILE))
    yield from islice(found, SUMMARIES[split])


def _summaries(source: str) -> Iterator[Row]:
    """Every documented definition of a source file, with the summary that its docstring opens with taken out."""
    lines, (shortest, longest) = source.splitlines(), SOURCE_CHARACTERS
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if docstring is None:
            continue
        first, _, rest = docstring.partition("\n\n")
        summary = " ".join(first.split())
        quoted = node.body[0]  # type: ignore[attr-defined]
        begin, end = (0, len(lines)) if isinstance(node, ast.Module) else (node.lineno - 1, node.end_lineno)  # type: ignore[attr-defined]
        code = [*lines[begin : quoted.lineno - 1], *lines[quoted.end_lineno : end]]
        document = "\n".join([rest, *code])[:longest].strip()
        is_sentence = summary.endswith(".") and 4 <= len(summary.split()) <= 30
        if is_sentence and len(document) >= shortest and summary not in document:
            yield {"document": document, "summary": summary}


def _pairs(split: str, chosen: random.Random) -> Iterator[Row]:
    for name, text in split_documents(_documents(), CORPUS_SPLITS[split]).items():
        # passages of licences stand in many of them
        if name.startswith("licence/"):
            continue
        document = text[:DOCUMENT_CHARACTERS]
        words = list(re.finditer(r"\S+", document))
        for _ in range(PASSAGES[split]):
            first = chosen.randrange(len(words) - PASSAGE_WORDS)
            passage = document[words[first].start() : words[first + PASSAGE_WORDS - 1].end()]
            yield {"anchor": passage, "positive": document}


# ---- features: made when asked for, since datasets is slow to import ----------------------------------------------


def _classes() -> Any:
    from datasets import ClassLabel, Features, Value

    return Features({"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES))})


def _pictures(split: str, chosen: random.Random) -> Iterator[Row]:
    from PIL import Image

    pictures, kinds = drawn_pictures(PICTURES[split], seed=chosen.randrange(2**32))
    for picture, kind in zip((pictures * 255).byte().permute(0, 2, 3, 1).numpy(), kinds.tolist(), strict=True):
        yield {"image": Image.fromarray(picture), "label": kind}


def _kinds() -> Any:
    from datasets import ClassLabel, Features, Image

    return Features({"image": Image(), "label": ClassLabel(names=list(KINDS))})


def _tags() -> Any:
    from datasets import ClassLabel, Features, List, Value

    return Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=list(TAGS)))})


def _no_names() -> None:
    return None


_TASKS: dict[str, tuple[Callable[[str, random.Random], Iterator[Row]], Callable[[], Any]]] = {
    "classification": (_classification, _classes),
    "token_classification": (_token_classification, _tags),
    "question_answering": (_question_answering, _no_names),
    "summarisation": (_summarisation, _no_names),
    "pairs": (_pairs, _no_names),
    "pictures": (_pictures, _kinds),
}
