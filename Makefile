# `make help` lists the targets. To use an existing environment: make test PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.toml
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
TOOLS :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
TOOLS := $(VENV)/.installed-tools
endif

.PHONY: train test test-quick test-parallel bench bench-scaling bench-compare lint help
.DEFAULT_GOAL := help

train: $(READY)  ## train CONFIG (default: configs/tiny.toml) with ARGS
	$(PY) -m gptperf.train $(CONFIG) $(ARGS)

# Three workers for two cores, because many tests wait for other processes. All tests of a file go to one worker, which
# makes the fixtures of the file once. Files start in order, so the slow ones in tests/distributed start early.
WORKERS ?= 3
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(TOOLS)  ## run the tests in WORKERS processes (default: 3); ARGS go to pytest
	$(PYTEST) $(ARGS)

test-quick: $(TOOLS)  ## run the tests that are not marked slow
	$(PYTEST) -m "not slow and not matrix" $(ARGS)

test-parallel: $(TOOLS)  ## every strategy on 1, 2 and 4 processes; each saves, and each resumes from every other
	$(PY) -m pytest tests/distributed/test_parallel.py -m "not gpu or gpu" $(ARGS)

bench: $(TOOLS)  ## measure kernels, steps and the loader: ONLY="step/llama_1.36b ops" QUICK=1 ARGS="--fresh"
	$(PY) -m bench $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick) $(ARGS)

bench-scaling: $(TOOLS)  ## measure every strategy on one to eight GPUs: ARGS="--gpus 4 --strong"
	$(PY) -m bench.measure.scaling $(ARGS)

bench-compare: $(TOOLS)  ## compare two results of make bench: A=FOLDER before, B=FOLDER after
	$(if $(and $(A),$(B)),,$(error make bench-compare needs A=FOLDER and B=FOLDER, two results of make bench))
	$(PY) -m bench.report.compare $(A) $(B) $(ARGS)

lint: $(TOOLS)  ## run ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

help:  ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1	/'

# Pins torch and triton: on a machine with a GPU to the pair that every GPU figure was measured with.
CONSTRAINTS = $$(nvidia-smi >/dev/null 2>&1 && echo constraints-gpu.txt || echo constraints.txt)
INSTALL = $(PY) -m pip install --disable-pip-version-check --quiet --constraint "$(CONSTRAINTS)"

$(VENV)/.installed: pyproject.toml constraints.txt constraints-gpu.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "gptperf needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-tools: $(VENV)/.installed
	$(INSTALL) --editable '.[test,lint,bench]'
	touch $@
