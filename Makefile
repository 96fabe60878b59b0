# Everything runs in one virtual environment, made on first use; only Python ≥ 3.11 and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS ?= .venv-docs
SITE := mkdocs mkdocs-material 'mkdocstrings[python]'
INSTALLED := $(VENV)/.installed
# style needs ruff alone, and takes it from the full environment where there is one
FORMATTER := $(VENV)/.formatter

.PHONY: help demo test test-fast suite lint format typecheck coverage bench sweep docs docs-site lint-and-site clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(INSTALLED)  ## convert a real checkpoint, prove it, and show what it is for
	$(BIN)/python recipes/demo.py

test: $(INSTALLED)  ## lint and the documentation site beside the whole suite, on the CPU, offline
	$(MAKE) --jobs=2 lint-and-site suite

lint-and-site: lint docs-site

FAST := layers repository
FAST_FOLDERS := attention contract models ops patching patterns

test-fast: $(INSTALLED)  ## one case of every quick test of mechanisms and patching, under 3 minutes
	$(BIN)/python -m pytest -n auto --dist worksteal --first-cases $(FAST:%=tests/test_%.py) $(FAST_FOLDERS:%=tests/%)

suite: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)  ## format, style and types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(FORMATTER)  ## rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED)  ## types alone
	$(BIN)/mypy

coverage: $(INSTALLED)  ## lines that the suite does not reach (takes longer than `test`)
	$(BIN)/python -m pytest -n auto --dist worksteal --cov=hf_efficient --cov-report=term-missing:skip-covered

bench: $(INSTALLED)  ## record time and memory under model_cards/results/
	$(BIN)/hf-efficient bench attention --out model_cards/results/attention.json
	$(BIN)/hf-efficient bench content --out model_cards/results/content.json
	$(BIN)/hf-efficient bench encoder --out model_cards/results/encoder.json
	$(BIN)/hf-efficient bench decode --out model_cards/results/decode.json
	$(BIN)/hf-efficient bench memory --out model_cards/results/memory.json
	$(BIN)/hf-efficient bench fidelity --out model_cards/results/fidelity.json
	$(BIN)/hf-efficient bench suite --quick --out model_cards/results/suite.json

sweep: $(INSTALLED)  ## every model type of the installed transformers, recorded under model_cards/results/; goes on where it was
	$(BIN)/python -m hf_efficient.benchmarks.sweep --out model_cards/results/model_types.json

docs: $(INSTALLED)  ## rewrite the generated tables of README.md, docs/ and the model cards
	$(BIN)/python model_cards/generate.py

# an environment of its own, as the texts that come with its packages would change what tests and benchmarks read
docs-site: $(DOCS)/.installed  ## build the documentation into site/; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --clean

$(DOCS)/.installed: setup.cfg constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt $(SITE)
	touch $@

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[demo,test,dev]"
	touch $@ $(FORMATTER)

$(FORMATTER): constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt ruff
	touch $@

clean:  ## remove the environment and what was built
	rm -rf $(VENV) $(DOCS) build *.egg-info demo-output site
