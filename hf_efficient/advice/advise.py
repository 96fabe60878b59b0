"""advise: measure which mechanism suits a checkpoint, on its own weights and on texts of its kind, and say which one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_efficient.advice.advice import SOURCE, TEXTS, Advice, commands
from hf_efficient.advice.bench import CHOOSE, CONFIRM, Bench, OutOfTime, lengthened
from hf_efficient.advice.candidates import Grid
from hf_efficient.advice.losses import Passes
from hf_efficient.advice.material import digest, longest, rows_of
from hf_efficient.advice.record import Record, fingerprint
from hf_efficient.advice.search import Search, conclude
from hf_efficient.conversion.loading import (
    Source,
    load_stock,
    open_source,
    refuse_converted,
    split_options,
)
from hf_efficient.conversion.sentence_transformers import module_folders
from hf_efficient.families import HostModel
from hf_efficient.families.readable import require_model
from hf_efficient.models.in_place import require_convertible
from hf_efficient.patching.exact import eval_mode


def advise(
    source: str | Path | PreTrainedModel,
    length: int = 2048,
    texts: Any = None,
    budget: float = 600.0,
    max_time: float | None = None,
    target: float = 0.95,
    candidates: Any = None,
    *,
    tokenizer: Any = None,
    positions: str | None = None,
    untrained_only: bool = False,
    force: bool = False,
    hybrid: bool | str = True,
    memory: bool = True,
    ignored_tokens: Sequence[int] = (),
    record: str | Path | None = None,
    seed: int = 0,
    **loading: Any,
) -> Advice:
    """Measure which mechanism to convert a checkpoint to; the model is as before afterwards, also after an exception.

    Settings of all mechanisms at equal cost run in the model itself, on one text, two, four, …; after each round those go
    that lose nearly as much as no attention does, and those to which another, no dearer one is preferable. The best are
    refined, and measured again on texts that nothing was chosen by. The choice is the cheapest that loses at most
    `1 - target` of what the control loses, which computes the mean of all values. A loss is the KL divergence of the head's
    distributions from those of full attention at the same length; without a head 1 - cosine of sentence embeddings, where
    the folder says that the model is for them, else the relative error of the last states.

    Args:
        source: Hub id or folder of a checkpoint, or a loaded stock model.
        length: tokens of a text; the model is lengthened to them for the while.
        texts: texts, or batches of inputs such as `{"input_ids": …}`, whose labels are left out; at most 16 rows are used.
            `None` = the corpus; a causal language model without a tokenizer writes its own.
        budget: seconds; checked between passes. When they are over, the advice is from what is there, and `partial`.
        max_time: largest time ratio to full attention; 0.97 at most, and if it is `None`.
        target: share of the control's loss that must be removed, between 0 and 1.
        candidates: mechanisms, whose settings are sought, or settings in any form that `convert` takes; `None` = all.
        tokenizer: for a loaded model, or to use another than the source's.
        positions: how positions are lengthened, as for `convert`; `None` = the usual way.
        untrained_only: leave out mechanisms that need training; with `candidates` that name one it is refused.
        force: measure even where attention takes less than 0.15 of the time.
        hybrid: where the target is missed, look for the layers that must keep full attention, in the order of what each
            loses when it alone is converted; `"greedy"` = each time the one that matters most, in more time.
        memory: also measure the peak memory of the best, in fresh processes.
        ignored_tokens: ids of the vocabulary that have no part in the loss, since the texts were kept from them.
        record: JSON file that every measurement goes to; with one that is there, what it holds is not measured again. It
            must be of the same model, texts, versions and hardware.
        seed: of the texts' order. loading: as for `convert`: `revision`, `subfolder`, `model_class`, `dtype`, ….

    Raises:
        ValueError: an impossible setting, a model that can't be converted or lengthened, no texts, or another run's record.
        OSError: the source can't be found.
    """
    _check(length, budget, max_time, target, hybrid)
    start = time.monotonic()
    require_model(source, "advise on")
    places = _loading(loading)
    opened = open_source(source, tokenizer, load_stock, **places)
    refuse_converted(opened.name, opened.model.config)
    _require_readable(opened.model, ignored_tokens)
    host = HostModel.of(opened.model)
    require_convertible(host, "convert")
    with eval_mode(opened.model), torch.no_grad(), lengthened(host, length, positions) as method:
        rows = rows_of(host, opened.tokenizer, texts, length, seed, ignored_tokens)
        half = (len(rows) + 1) // 2
        tokens = longest(rows)
        grid = Grid(host, tokens, untrained_only)
        settings = _settings(opened, length, rows, method, seed, ignored_tokens)
        kept = Record(record, settings)
        bench = Bench(
            Passes(opened.model, ignored_tokens), tokens, {CHOOSE: rows[:half], CONFIRM: rows[half:]}, kept.rows,
            layers=grid.layers, deadline=start + budget, save=kept.save,
        )  # fmt: skip
        search = Search(bench, grid, target, max_time, _embeds(opened), start + 0.7 * budget)
        named = grid.all() if candidates is None else grid.given(candidates)
        try:
            search.run(named, force=force, hybrid=hybrid, memory=memory)
        except OutOfTime:
            search.partial = True
        found, chosen = conclude(search)
    found.settings = settings | {"target": target, "max_time": max_time, "tokens": tokens}
    found.seconds = time.monotonic() - start
    if chosen is not None:
        lengthening = [] if method is None else ["--max-positions", str(length)]
        lengthening += ["--positions", positions] if positions else []
        read = None if opened.tokenizer is None else "corpus" if texts is None else TEXTS
        words = [*_source(opened, places), *lengthening]
        found.commands = commands(words, chosen, length, read, found.reaches_target)
    kept.finish(found)
    return found


def _check(length: int, budget: float, max_time: float | None, target: float, hybrid: Any) -> None:
    for name, value, fits, rule in (
        ("length", length, type(length) is int and length >= 2, "an integer ≥ 2"),
        ("budget", budget, _is_number(budget) and budget >= 0, "a number of seconds ≥ 0"),
        ("max_time", max_time, max_time is None or (_is_number(max_time) and max_time > 0), "a ratio > 0, or None"),
        ("hybrid", hybrid, hybrid in (True, False, "greedy"), "True, False or 'greedy'"),
        ("target", target, _is_number(target) and 0 < target <= 1, "a share above 0, at most 1"),
    ):
        if not fits:
            raise ValueError(f"{name}={value!r} is not possible; it must be {rule}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _loading(given: dict[str, Any]) -> dict[str, Any]:
    """Options of a checkpoint; raises ValueError for others."""
    known, strange = split_options(given)
    if strange:
        raise ValueError(
            f"advise has no option {', '.join(map(repr, strange))}; options of a mechanism go into candidates=."
        )
    return known


def _require_readable(model: Any, ignored: Sequence[int]) -> None:
    """Refuse models of anything but tokens, and tokens to leave out that are none of a head's."""
    name, read = type(model).__name__, model.main_input_name
    if read != "input_ids":
        raise ValueError(f"{name} reads {read}, and advice is measured on texts: convert it, and use verify.")
    if ignored and model.get_output_embeddings() is None:
        raise ValueError(f"ignored_tokens={list(ignored)}: {name} has no head over the vocabulary; leave them out.")
    size = model.config.vocab_size if ignored else 0
    strange = [one for one in ignored if type(one) is not int or not 0 <= one < size]
    if strange:
        raise ValueError(f"ignored_tokens: {strange} are no ids of a vocabulary of {size}.")


def _source(opened: Source, places: dict[str, Any]) -> list[str]:
    """The checkpoint as `hf-efficient convert` takes it, with the options that say which one it is."""
    is_nameless = opened.folder is None and not opened.model.config._name_or_path
    known = {name: places[name] for name in ("revision", "cache_dir") if places.get(name) is not None} | opened.given
    options = [word for name, value in known.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [SOURCE if is_nameless else opened.name, *options]


def _settings(
    opened: Source, length: int, rows: Sequence[Any], method: str | None, seed: int, ignored: Sequence[int]
) -> dict[str, Any]:
    """What a measurement depends on; a record with others is another run's."""
    model = opened.model
    return {
        "model": opened.name,
        "model_class": type(model).__name__,
        "weights": fingerprint(model),
        "length": length,
        "texts": len(rows),
        "texts_sha256": digest(rows),
        "positions": method,
        "seed": seed,
        "ignored_tokens": list(ignored),
        "attn_implementation": model.config._attn_implementation,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
    }


def _embeds(opened: Source) -> bool:
    """Whether the folder says that the model is for sentence embeddings."""
    return opened.folder is not None and bool(module_folders(opened.folder))
