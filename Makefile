# Every target makes what it needs on a bare machine (Python >= 3.11): `make quickstart`, `make test`.
#   PYTHON=python3.12   the interpreter to build .venv from; for `make test-gpu` it is used as it is, without a venv
#   TORCH='torch==...'  what to install as torch (default: torch==2.13.0 without an NVIDIA GPU, the newest with one)
#   LIBRARIES=newest    all else: tested (constraints.txt, the default), oldest (constraints-oldest.txt) or newest, which are
#                       whatever pyproject.toml allows; each has a venv of its own
#   JOBS=2              parallel test processes

PYTHON ?= python3
JOBS   ?= 2
LIBRARIES ?= tested
CONSTRAINTS_tested := -c constraints.txt
CONSTRAINTS_oldest := -c constraints-oldest.txt
ifeq ($(filter tested oldest newest,$(LIBRARIES)),)
$(error LIBRARIES is '$(LIBRARIES)'; expected tested, oldest or newest)
endif
VENV   ?= .venv$(if $(filter-out tested,$(LIBRARIES)),-$(LIBRARIES))
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH  ?= $(if $(HAS_GPU),torch,torch==2.13.0)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help quickstart test test-full test-gpu lint bench train-args clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   fine-tune a real 135M model on this machine and compare its answers"
	@echo "make test         the test suite (CPU, a few minutes)"
	@echo "make test-full    everything, slower"
	@echo "make test-gpu     the GPU tests; PYTHON=python3 uses that interpreter instead of .venv"
	@echo "make lint         ruff and mypy"
	@echo "make bench        benchmarks (needs a GPU)"
	@echo "make train-args   write train_args/ again"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Pyralis needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.run: $(VENV)/.created pyproject.toml $(wildcard constraints*.txt)
	$(PIP) $(CONSTRAINTS_$(LIBRARIES)) -e '.[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml $(wildcard constraints*.txt)
	$(PIP) $(CONSTRAINTS_$(LIBRARIES)) -e '.[dev]'
	@touch $@ $(VENV)/.run

quickstart: $(VENV)/.run
	$(BIN)/pyralis quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m 'not full and not gpu'

test-full: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m 'not gpu'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

train-args: $(VENV)/.run
	$(BIN)/python -m pyralis.train.config.presets train_args

ifeq ($(origin PYTHON),command line)
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests
bench:
	PYTHONPATH=src $(PYTHON) -m pyralis bench
else
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu tests
bench: $(VENV)/.run
	$(BIN)/pyralis bench
endif

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache build dist
