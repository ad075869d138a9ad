# One front door; every target sets up what it needs in .venv. CI runs `make check test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-unit test-cluster check crd docs clean

setup: $(VENV)/.installed

# uv, because only it honours the overrides in pyproject.toml; it is installed in the same environment.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --group dev -e '.[learner,sampler-cpu,operator,plot]'
	touch $@

quickstart: setup
	$(BIN)/heterorl run examples/quickstart.yaml

test: setup
	$(BIN)/python -m pytest tests/unit tests/contract tests/system

test-unit: setup
	$(BIN)/python -m pytest tests/unit tests/contract

# A real API server and more, built from Go modules on first use (a quarter of an hour), cached afterwards.
test-cluster: setup
	$(BIN)/python -m pytest tests/cluster

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/heterorl crd --check
	$(BIN)/heterorl docs --check

crd: setup
	$(BIN)/heterorl crd

docs: setup
	$(BIN)/heterorl docs

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
