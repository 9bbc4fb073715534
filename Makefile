# `make check` is what CI runs, no more and no less.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Forked tokenizers would only warn.
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-slow check format format-check lint types figures build clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lit-rlhf needs Python 3.11 or newer; try make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m lit_rlhf.demo

test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/python -m pytest -q -n auto

test-slow: setup
	$(BIN)/python -m pytest -q -m "not gpu"

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/codespell

types: setup
	$(BIN)/mypy

check: format-check lint types test

figures: setup
	$(BIN)/python -m benchmarks.figures

build: setup
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
