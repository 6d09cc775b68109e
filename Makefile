# make train | test | test-parallel | bench | bench-scaling | bench-compare | lint | help.   An existing environment: make test PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.toml
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

.PHONY: train test test-parallel bench bench-scaling bench-compare lint help
.DEFAULT_GOAL := help

train: $(READY)  ## train CONFIG (default: configs/tiny.toml) with ARGS
	$(PY) -m gptperf.train $(CONFIG) $(ARGS)

test: $(READY)  ## run the tests; ARGS go to pytest
	$(PY) -m pytest $(ARGS)

test-parallel: $(READY)  ## every strategy on 1, 2 and 4 processes, saved by each and resumed by each
	$(PY) -m pytest tests/test_parallel.py -m "not gpu or gpu" $(ARGS)

bench: $(READY)  ## measure kernels, steps, loader: ONLY="step/llama_1.36b ops" QUICK=1 ARGS="--fresh"
	$(PY) -m bench $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick) $(ARGS)

bench-scaling: $(READY)  ## one to eight GPUs, every strategy: ARGS="--gpus 4 --strong"
	$(PY) -m bench.measure.scaling $(ARGS)

bench-compare: $(READY)  ## what got slower: A=FOLDER before, B=FOLDER after
	$(if $(and $(A),$(B)),,$(error make bench-compare needs A=FOLDER and B=FOLDER, results that make bench wrote))
	$(PY) -m bench.report.compare $(A) $(B) $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1	/'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "gptperf needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[test,lint,bench]'
	touch $@
