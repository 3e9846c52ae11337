# Everything sets itself up: a virtual environment, the locked dependencies, the package.
#   make train    the default job, configs/countdown_tiny.yaml
#   make test     the tests
# PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder,
# CONFIG and ARGS the job: make train CONFIG=configs/sudoku_tiny.yaml ARGS="train.steps=20"

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/countdown_tiny.yaml
ARGS   ?=
BIN    := $(VENV)/bin

.PHONY: train test smoke lint lock clean
.DEFAULT_GOAL := train

train: $(VENV)/.installed
	$(BIN)/ais-jax train $(CONFIG) $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# The short list of tests, for another Python: make smoke PYTHON=python3.12 VENV=.venv-3.12
smoke: $(VENV)/.installed
	$(BIN)/python -m pytest -m smoke

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ais_jax needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# Renews requirements.lock for all supported Pythons at once (needs uv).
lock:
	uv pip compile --universal --python-version 3.11 --extra dev --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
