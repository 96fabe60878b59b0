# Everything runs in one virtual environment, made on first use; only Python ≥ 3.11 and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test suite lint bench docs clean

demo: $(INSTALLED)  ## convert a real checkpoint, prove it, and show what it is for
	$(BIN)/python recipes/demo.py

test: $(INSTALLED)  ## lint beside the whole suite, on the CPU, offline
	$(MAKE) --jobs=2 lint suite

suite: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## record time and memory under model_cards/results/
	$(BIN)/hf-efficient bench attention --out model_cards/results/attention.json
	$(BIN)/python -m hf_efficient.benchmarks.attention model_cards/results/attention.json
	$(BIN)/hf-efficient bench content --out model_cards/results/content.json
	$(BIN)/hf-efficient bench encoder --out model_cards/results/encoder.json
	$(BIN)/hf-efficient bench memory --out model_cards/results/memory.json
	$(BIN)/hf-efficient bench fidelity --out model_cards/results/fidelity.json

docs: $(INSTALLED)  ## rewrite the generated tables of README.md and the model cards
	$(BIN)/python model_cards/generate.py

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo-output
