"""Rules of the repository: every mechanism has its case and its card, files stay small, imports stay light."""

from __future__ import annotations

import re

import generate
import pytest
from cases import CASES
from formulas import FORMULAS
from pairs import BASE, MAIN, PLACES, REFUSED, mostly_skipped
from paths import ROOT
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import hf_efficient as he

FOLDERS = ("hf_efficient", "tests", "recipes", "conversion_scripts")
MECHANISM_LINES, FILE_LINES, KERNEL_LINES, TEST_LINES = 250, 400, 500, 700


def test_every_mechanism_has_a_case_and_every_case_a_mechanism():
    assert he.list_mechanisms() == sorted(CASES)


def test_the_support_table_agrees_with_the_cases():
    """What is printed as refused must be refused, and what is tested must be printed as supported."""
    needs = {"BERT, RoBERTa": "E", "GPT-2": "C", "T5 encoder": "E T5", "T5 decoder": "C T5"}
    for name, case in CASES.items():
        supported = {place for place, reasons in generate.refusals(name).items() if not reasons}
        assert supported == {place for place, letters in needs.items() if set(letters.split()) <= case.sides}, name


@pytest.mark.parametrize("name", he.list_mechanisms())
def test_every_mechanism_has_a_file_and_a_card_of_its_name(name: str):
    assert he.get_mechanism(name).__module__ == f"hf_efficient.attention.{name}"
    card = ROOT / "model_cards" / f"{name}.md"
    assert card.is_file(), f"{card.relative_to(ROOT)} is missing; start from model_cards/TEMPLATE.md"
    assert len(card.read_text().split()) > 100, f"{card.relative_to(ROOT)} says nearly nothing"


def test_every_mechanism_describes_itself():
    for name in he.list_mechanisms():
        facts = he.describe(name)
        assert all(facts[key] for key in ("title", "paper", "time", "memory", "exact_when", "training")), name
        assert he.get_mechanism(name).__doc__, name
        assert he.get_mechanism(name).Config.__doc__, name


def test_cases_agree_with_the_classes():
    """What a case says of causality and bias is what the class says, so that nothing supported goes untested."""
    for name, case in CASES.items():
        cls = he.get_mechanism(name)
        assert ("C" in case.sides) == (cls.causal_refusal is None), name
        assert ("T5" in case.sides) == (cls.relative_bias_refusal is None), name
        assert case.exact != bool(case.error_law), f"{name}: an exact limit, or a law of its error"
        assert case.exact or case.finer or name in FORMULAS, f"{name}: its law of error is not tested"
        pairs = [pair for pair in MAIN if pair.mechanism == name]
        assert len({pair.family for pair in pairs}) >= 2, f"{name} runs in too few families"
    # every place either runs or is refused; "both" runs as a variant and is refused like the others
    for name in CASES:
        places = {(p.family, p.side) for p in MAIN + REFUSED if p.mechanism == name and p.family in BASE}
        assert places | {("t5", "both")} == {place for place in PLACES if place[0] in BASE}, name


def test_every_further_family_runs_with_mechanisms_of_several_kinds():
    for place in PLACES:
        found = {pair.mechanism for pair in MAIN if (pair.family, pair.side) == place}
        assert place[0] in BASE or place[1] == "both" or len(found) >= 3, f"{place}: {found}"


def test_files_stay_small():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 20
    too_long = {}
    for path in files:
        lines = len(path.read_text().splitlines())
        folder = str(path.parent.relative_to(ROOT))
        limits = {"hf_efficient/attention": MECHANISM_LINES, "hf_efficient/kernels": KERNEL_LINES}
        limit = TEST_LINES if folder.startswith("tests") else limits.get(folder, FILE_LINES)
        if lines > limit:
            too_long[str(path.relative_to(ROOT))] = f"{lines} lines, at most {limit}"
    assert not too_long


def test_mechanisms_name_no_family_and_families_no_mechanism():
    models = ("bert", "roberta", "gpt2", "transformers.models")
    for path in (ROOT / "hf_efficient" / "attention").glob("*.py"):
        code = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not any(model in line.lower() for line in code for model in models), path.name
    for path in (ROOT / "hf_efficient" / "families").glob("*.py"):
        code = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        named = [line for line in code if ".attention." in line and ".attention.base." not in line]
        assert not named, f"{path.name}: {named}"


# programs of their own, whose output it is
PRINTING = {"benchmarks/sweep.py", "profiling/memory.py", "training/recipe.py", "visualize/show.py"}


def test_all_that_is_said_obeys_the_verbosity_of_transformers():
    package = ROOT / "hf_efficient"
    for path in sorted(package.rglob("*.py")):
        name, text = str(path.relative_to(package)), path.read_text()
        assert "warnings.warn(" not in text, name
        assert (
            text.count("getLogger(") == text.count('getLogger(f"transformers.{__name__}")') or name == "cli/common.py"
        )
        assert name in PRINTING or name.startswith("cli/") or not re.search(r"(?<![.\w])print\(", text), name


def test_a_mechanism_that_is_mostly_skipped_is_reported():
    name = sorted(CASES)[0]
    half = [(f"t.py::t[{name}-bert]", "passed")] * 6 + [(f"t.py::t[{name}-bert-1-2]", "skipped")] * 6
    assert mostly_skipped(half) == {}
    assert mostly_skipped([*half, (f"t.py::t[{name}-gpt2]", "skipped")]) == {name: (7, 13)}


def test_generated_tables_are_what_registry_and_records_say():
    assert generate.main(["--check"]) == 0, "README.md, docs/ or a model card is out of date: run `make docs`"


def test_no_model_family_is_claimed_outside_the_table():
    names = {name.replace("_", "-").lower() for name in CONFIG_MAPPING_NAMES if len(name) > 2}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r"(?s)<!-- generated: .*?<!-- end -->", "", page.read_text())
        for line in text.splitlines():
            named = names & {word.lower() for word in re.findall(r"[\w-]+", line)}
            assert len(named) < 5, f"{page.name} lists {sorted(named)}: `make docs` says which models work"


# what a native reader stumbles on, with the plain words for it
STUMBLES = {
    r"proof ladder|\brungs?\b": "checks",
    r"the (whole )?road\b": "the pipeline",
    r"batch mates": "the other rows of a batch",
    r"by itself\b": "automatically",
    r"never falls back": "there is no fallback",
    r"is no (converted|number)": "is not …",
    r"whole or not there": "written completely or not at all",
    r"always at hand": "say what it is and where it comes from",
    r"accounted for": "say where each came from",
}


def test_pages_are_in_plain_english():
    pages = [path for folder in ("docs", "recipes", "model_cards") for path in sorted((ROOT / folder).glob("*.md"))]
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages):
        for pattern, plain in STUMBLES.items():
            found = re.search(pattern, page.read_text(), flags=re.IGNORECASE)
            assert found is None, f"{page.name}: {found[0]!r}: write {plain!r}"


def test_the_first_page_stays_short_and_its_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_changed_figure_makes_a_generated_table_stale():
    text = (ROOT / "model_cards" / "local.md").read_text()
    assert generate.fill(text) == text
    tampered = text.replace("| `dilation` | `1` |", "| `dilation` | `2` |")
    assert tampered != text
    assert generate.fill(tampered) == text
