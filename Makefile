# `make demo` and `make test` need nothing but Python (3.11 or newer), pip and make.
PYTHON ?= python3
# Processes that run tests at once.
JOBS ?= 2
# Options of `uv pip compile` for `make pins`.
WORDS ?=
# Which versions VENV gets: pinned by constraints.txt, the floors of pyproject.toml, or the newest.
VERSIONS ?= pinned
VENV ?= .venv
BIN := $(VENV)/bin
# What Python has compiled is kept, beside the libraries: where the shell forbids it, each process that a test starts would
# compile PyTorch again, for five seconds.
BYTECODE = env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX="$(CURDIR)/$(VENV)/bytecode"
PYTEST = $(BYTECODE) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
SAY = echo "lint and types: $$lint; tests: $$tests"; [ "$$lint$$tests" = okok ]

.PHONY: demo test test-slow test-floors test-newest parity lint pins notebooks clean

demo: $(VENV)/installed
	$(BIN)/funmatch demo

# Lint, types, and every test that is not slow: all of them run, whichever fails.
test: $(VENV)/installed-test
	@lint=ok; tests=ok; $(MAKE) -s lint || lint=failed; $(PYTEST) -m "not slow" || tests=failed; $(SAY)

# Every test.
test-slow: $(VENV)/installed-test
	@lint=ok; tests=ok; $(MAKE) -s lint || lint=failed; $(PYTEST) || tests=failed; $(SAY)

# The quick tests with the oldest versions that pyproject.toml allows, and with the newest there are.
# Old libraries beside new ones warn of each other, so with the oldest a warning does not fail a test.
test-floors: BIN := .venv-floors/bin
test-floors:
	@$(MAKE) -s VENV=.venv-floors VERSIONS=floors .venv-floors/installed-test
	$(PYTEST) -W default -m "not slow"

test-newest: BIN := .venv-newest/bin
test-newest:
	@rm -f .venv-newest/installed*
	@$(MAKE) -s VENV=.venv-newest VERSIONS=newest .venv-newest/installed-test
	$(PYTEST) -m "not slow"

# Our numbers beside those of TensorFlow, JAX, flax and optax, in an environment of their own; writes the table.
parity: BIN := .venv-parity/bin
parity:
	@$(MAKE) -s VENV=.venv-parity .venv-parity/installed-parity
	FUNMATCH_PARITY_TABLE=benchmarks/results/parity-cpu.md TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python -m pytest -m slow \
	tests/parity tests/models/test_savedmodel.py tests/models/test_keras_files.py tests/data/test_tensorflow.py \
	tests/shipping/test_tensorflow_export.py

lint: $(VENV)/installed-test
	@code=0; \
	$(BIN)/ruff format --check . || code=1; \
	$(BIN)/ruff check . || code=1; \
	$(BIN)/pyrefly check || code=1; \
	exit $$code

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "funmatch needs Python 3.11 or newer; say PYTHON=python3.12"'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt scripts/install.py | $(VENV)/bin/python
	@$(BIN)/python scripts/install.py --versions $(VERSIONS)
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt scripts/install.py | $(VENV)/bin/python
	@$(BIN)/python scripts/install.py --versions $(VERSIONS) --extras test
	@touch $(VENV)/installed $@

$(VENV)/installed-parity: tests/parity/requirements.txt $(VENV)/installed-test
	@$(BIN)/python -m pip install -q -r tests/parity/requirements.txt
	@touch $@

# The newest versions of everything into constraints.txt, and of the tools that check into pyproject.toml.
pins:
	@test -x .venv-pins/bin/uv || { $(PYTHON) -m venv .venv-pins && .venv-pins/bin/python -m pip install -qq uv packaging; }
	.venv-pins/bin/python scripts/pins.py $(WORDS)

# The notebooks, from the texts beside them, with the outputs of a run.
notebooks: $(VENV)/installed-test
	$(BIN)/python scripts/notebooks.py --run

clean:
	rm -rf .venv .venv-parity .venv-floors .venv-newest .venv-pins
