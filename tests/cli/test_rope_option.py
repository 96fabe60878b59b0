"""Longer rotary positions on the command line, in the report, and in the card that makes them again."""

from __future__ import annotations

import json
import shlex

import pytest
from command_line import document, error, run
from decoders import save_decoder

from hf_efficient.cards.checkpoint import checkpoint_card

OPTIONS = ["--attention", "local", "--attention-window", 400, "--max-positions", 640, "--positions", "yarn"]


def test_rope_on_the_command_line_is_made_again_by_the_card(tmp_path):
    source, out, again = save_decoder(tmp_path / "source", "llama"), tmp_path / "out", tmp_path / "again"
    told = document("convert", source, out, *OPTIONS, "--rope", '{"beta_fast": 64}')
    assert (told["positions"], told["rope"], told["short_inputs"]) == ("yarn", {"beta_fast": 64}, "changed")
    parameters = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert (parameters["rope_type"], parameters["factor"], parameters["beta_fast"]) == ("yarn", 4.0, 64)
    card = checkpoint_card(str(out)).text
    assert "Lengthened by positions=yarn; short inputs: changed." in card
    for text in (card, run("inspect", out).stdout.replace("\n", " ")):
        assert "any length, made for 640" in text
    (command,) = [line for line in card.splitlines() if line.startswith("hf-efficient convert")]
    words = shlex.split(command)
    words[3] = str(again)
    run(*words[1:])
    assert json.loads((again / "config.json").read_text())["rope_parameters"] == parameters


@pytest.mark.parametrize("rope", ["{", "[4]", "4"])
def test_rope_that_is_no_object_is_refused(rope: str, tmp_path):
    assert f"--rope {rope!r} can't be read" in error("convert", "source", tmp_path / "out", *OPTIONS, "--rope", rope)
