# Every target sets up what it needs: a virtual environment in .venv, with this package and its extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-endurance test-mutations test-container check docs clean

demo: $(VENV)/.demo  ## the whole pipeline on speech made on the spot; ends with exp/demo/report.html
	$(BIN)/wavedistill run demo

test: check  ## all checks: format, lint, types, every test
	$(BIN)/python -m pytest

test-fast: check  ## the same without the tests that train
	$(BIN)/python -m pytest -m "not slow"

test-endurance: $(VENV)/.dev  ## a training that is killed a hundred times; minutes
	$(BIN)/python -m pytest -m endurance

test-mutations: $(VENV)/.dev  ## breaks the program in some hundred and fifty ways, and asks whether a test notices; minutes
	$(BIN)/python -m tests.mutations

docs: $(VENV)/.dev  ## the documents as a site: open docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -d docs/_build/cache docs docs/_build/html

test-container: $(VENV)/.dev  ## the Dockerfile's lines without a container engine, as root; minutes
	$(BIN)/python -m tests.container

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e ".[demo,dev,docs,onnx,zoo]"
	touch $@ $(VENV)/.demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "wavedistill needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:  ## remove the environment; experiments stay
	rm -rf $(VENV)
