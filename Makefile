# Each target sets up what it needs, and does so again only when the pins or the project file change.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
BENCHABLE := $(VENV)/.benchable

# Names of workloads with spaces between, of implementations with commas between.
WORKLOADS ?=
BY ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-13s %s\n", $$1, $$2 }'

demo: $(READY) ## meta-learn to read letters from one example each (MAML), with every artifact shown
	$(RUN) examples/maml_glyphs.py

# Tests start many processes, which would each compile the package anew if the shell forbade to keep that.
test: export PYTHONDONTWRITEBYTECODE =
test: lint $(TESTABLE) ## everything that must hold: lint, then the tests
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(READY) ## style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(BENCHABLE) ## measure every workload and peer, and write docs/performance.md
	$(RUN) benchmarks/run.py $(WORKLOADS) $(if $(BY),--by "$(BY)")
	$(RUN) benchmarks/report.py

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "unrollc needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	    echo "Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	    exit 1; }
	@echo "Setting up $(VENV): a minute or two the first time."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Models and optimizers of other libraries, which only the tests capture.
$(TESTABLE): requirements-test.txt $(READY)
	@$(RUN) -m pip install -qq --disable-pip-version-check -r requirements-test.txt
	@touch $@

# The peers that measurements compare with.
$(BENCHABLE): requirements-bench.txt $(READY)
	@$(RUN) -m pip install -qq --disable-pip-version-check -r requirements-bench.txt
	@touch $@
