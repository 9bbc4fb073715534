# `make check` is what CI runs, no more and no less.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEW_ENOUGH := $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lit-rlhf needs Python 3.11 or newer; try make PYTHON=python3.11')"
# Forked tokenizers would only warn.
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-slow test-newest test-oldest check compatibility rllib format format-check lint types api
.PHONY: docs course figures screenshots build clean torture audit
.PHONY: optimality bench bench-scaling bench-gpu

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m lit_rlhf.demo

test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -q -m "not gpu"

# The ends of pyproject.toml's ranges, each in an environment of its own without constraints.txt: what a user gets today
# and the oldest that may be there. Both bring a CUDA build of torch, 6 GB each; what belongs to agents skips itself.
test-newest test-oldest: export OMP_NUM_THREADS = 1
test-newest:
	$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e ".[test]"
	.venv-newest/bin/python -m pytest -q -n auto

test-oldest:
	$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet -c .venv-oldest/constraints.txt -e ".[test]"
	.venv-oldest/bin/python -m pytest -q -n auto

compatibility: export OMP_NUM_THREADS = 1
compatibility: setup
	$(BIN)/python tests/envs/compatibility.py

# RLlib pins an older Gymnasium, so it lives in an environment of its own; the env's own tests pass there too.
rllib:
	$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv-rllib
	grep -v '^gymnasium==' constraints.txt > .venv-rllib/constraints.txt
	.venv-rllib/bin/pip install --quiet -c .venv-rllib/constraints.txt -e ".[rllib,test]"
	.venv-rllib/bin/python tests/envs/compatibility.py ray
	.venv-rllib/bin/python -m pytest -q tests/envs tests/test_docs.py -k "envs or agents"

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .
	PYTHONPATH=envs $(BIN)/lint-imports --no-logo
	$(BIN)/codespell

types: setup
	$(BIN)/mypy

# Runs killed, starved and broken, an hour of them; the counts go into docs/reliability.md.
torture: setup
	$(BIN)/python -m tests.torture

# Licences of what is needed, offline; known holes of what is installed, which asks pypi.org.
audit: setup
	$(BIN)/python tests/audit.py

check: format-check lint types test docs

# The list of public names, from their docstrings.
api: setup
	PYTHONPATH=. $(BIN)/python tests/api_page.py

# The site of README.md and docs/, in site/; strict: a link that leads nowhere or a page without a place ends it.
docs: export NO_MKDOCS_2_WARNING = 1
docs: setup
	$(BIN)/mkdocs build --strict --quiet

# Run the cells of the course, and write what they print and draw into its pages.
course: setup
	PYTHONPATH=.:envs $(BIN)/python -m website.chapters

figures: setup
	$(BIN)/python -m benchmarks.figures

# The pictures of docs/images, by Chromium, of the runs that `make demo` leaves.
screenshots: setup
	$(BIN)/python -m website.screenshots

build: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# Every algorithm against the optimum that it states, every loss against the exact gradient: hours on one core.
optimality: export OMP_NUM_THREADS = 1
optimality: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not gpu" \
		tests/oracle tests/algorithms/test_policy_gradient.py \
		tests/benchmarks/test_optimality.py tests/benchmarks/test_optimality_family.py tests/benchmarks/test_gradients.py

# Beside every peer whose Python PEER_PYTHON and its siblings name; see docs/performance.md.
PEERS := $(PEER_PYTHON)$(PEER_PPO_PYTHON)$(LITGPT_PYTHON)$(TORCHTUNE_PYTHON)$(LLAMA_CPP_PYTHON)
bench: setup
	$(BIN)/python -m benchmarks.compare $(if $(PEERS),--peer best)
	$(BIN)/python -m benchmarks.compare $(if $(PEERS),--peer best) --task generate --fixed 48

bench-scaling: setup
	$(BIN)/python -m benchmarks.scaling

# With the Python at hand where it has all that is needed, as a machine with a GPU may be without a network.
bench-gpu:
	@if PYTHONPATH=.:envs $(PYTHON) -c "import lit_rlhf.cli" 2> /dev/null; then \
		PYTHONPATH=.:envs $(PYTHON) -m benchmarks.gpu; \
	else \
		make setup PYTHON=$(PYTHON) && $(BIN)/python -m benchmarks.gpu; \
	fi

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-rllib build dist .pytest_cache .mypy_cache .ruff_cache
