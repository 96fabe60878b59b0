"""Peak memory in processes of their own: figures in order, failures named."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

import hf_efficient as he
from hf_efficient.evaluation.cost import peak_memory
from hf_efficient.profiling.memory import growth_of, peaks
from hf_efficient.testing import tiny_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


def growth_of_arrays(count: int, size: int) -> float:
    return growth_of(lambda: [bytearray(b"x") * size for _ in range(count)])


def test_peak_memory_grows_with_length(tmp_path: Path):
    options = dict(attention_window=8, max_positions=4096, tokenizer=tiny_tokenizer("bert"))
    model = he.convert(tiny_model("bert"), "local", **options).model
    model.save_pretrained(tmp_path)
    short, long = peak_memory([(tmp_path, 256), (tmp_path, 4096)])
    assert short is not None and long is not None
    assert long > 2 * short


def test_growth_is_what_a_call_holds_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the other process finds this module
    held = 64 << 20
    growth = peaks(growth_of_arrays, [[2, held], [0, held]])  # here the heap may hold free pages that count already
    assert growth[0] is not None and 2 * 64 - 8 < growth[0] < 2 * 64 + 16  # the kernel counts in batches of pages
    assert growth[1] is not None and growth[1] < 1


def test_growth_forgets_the_mark_before():
    high = [bytearray(b"x") * (64 << 20) for _ in range(2)]
    del high
    assert growth_of(lambda: None) < 1


def test_a_failed_figure_is_named_with_what_its_process_wrote(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"memory of \('.*', 8\) failed:(?s:.*)config.json(?s:.*)exit code 1"):
        peak_memory([(tmp_path, 8)])


def test_a_process_that_dies_is_no_endless_wait():
    with pytest.raises(RuntimeError, match="exit code -6"):
        peaks(os.abort, [[]])


def test_nothing_to_measure_starts_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "no such python")
    assert peaks(os.abort, []) == []
