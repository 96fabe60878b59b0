"""A mistyped name is refused together with what was probably meant."""

from __future__ import annotations

import dataclasses

import pytest

import hf_efficient as he
from hf_efficient.attention.base.suggestions import did_you_mean
from hf_efficient.cli.options import flag, parse_option


def misspellings(name: str) -> list[str]:
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    return [name[:middle] + name[middle + 1 :], swapped, name + "s", name.replace("_", "-").title()]


@pytest.mark.parametrize("mechanism", he.list_mechanisms())
def test_misspelt_mechanisms_and_options(mechanism):
    for word in misspellings(mechanism):
        if word not in he.list_mechanisms():
            with pytest.raises(ValueError, match=rf"unknown mechanism '{word}' \(did you mean .*'{mechanism}'"):
                he.attention_config(word)
    kind = he.get_mechanism(mechanism).Config
    options = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        for word in misspellings(option):
            if word not in options:
                with pytest.raises(ValueError, match=rf"no option '{word}' \(did you mean .*'{option}'"):
                    he.attention_config(mechanism, **{word: 1})
                with pytest.raises(ValueError, match=rf"no option {flag(word)} \(did you mean .*'{flag(option)}'"):
                    parse_option(kind, word, "1")


def test_parts_of_names_and_words_like_none():
    assert did_you_mean("window", ["attention_window", "rank"]) == " (did you mean 'attention_window'?)"
    assert did_you_mean("flash", he.list_mechanisms()) == ""
