# `make demo` and `make test` need nothing but Python (3.11 or newer), pip and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint notebooks clean

demo: .venv/installed
	$(BIN)/funmatch demo

# Lint, types, and every test that is not slow.
test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

# Every test.
test-slow: lint
	$(BIN)/python -m pytest -n 2

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

.venv/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "funmatch needs Python 3.11 or newer; say PYTHON=python3.12"'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# The notebooks, from the texts beside them.
notebooks: .venv/installed-test
	$(BIN)/python scripts/notebooks.py

clean:
	rm -rf .venv
