# clip-train. `make demo` and `make test` do all the set-up on a fresh machine; only Python 3.11 or newer is needed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
UV_BACKEND := $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))

.PHONY: install demo clipart test test-all torture lint type help

install: $(STAMP)  ## make .venv and install everything (TORCH_BACKEND=cpu takes PyTorch's own CPU builds)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clip-train needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(UV_BACKEND) --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

DEMO_ARGS ?=
demo: install  ## draw pictures, train a model on them, evaluate it, write a report (about 5 minutes on 2 CPU cores)
	test -e shards/demo/classes/classnames.txt || $(BIN)/clip-train shards scenes shards/demo
	$(BIN)/clip-train train experiment=demo $(DEMO_ARGS)

clipart: install  ## the same on 5,448 real drawings from Debian's openclipart-png
	test -e shards/clipart/val/index.json || $(BIN)/python scripts/fetch_clipart.py shards/clipart
	$(BIN)/clip-train train experiment=clipart

test: install  ## the tests that take under 3 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-all: install  ## all tests, the slow ones included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile -m 'slow or not slow'

TORTURE_ARGS ?=
torture: install  ## the targets of reliability at full length, many hours; stop it and give it again to go on
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(TORTURE_ARGS)

lint: install  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: install  ## strict type check
	$(BIN)/mypy

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*##/ {printf "%-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
