# `make run` and `make test` set themselves up: Python 3.11 is all they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: run test test-long lint digest bench

run: $(VENV)/installed
	@HF_HUB_OFFLINE=1 $(BIN)/ppleval compute --model tiny_model tiny_model/held_out.jsonl

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# What takes many seconds for one answer: by hand, before a release.
test-long: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python .ci/release.py

# Write into perplexity.py which ppleval/ it belongs to.
digest: $(VENV)/installed-dev
	$(BIN)/python .ci/release.py --write-digest

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/bench_nll.py
	$(BIN)/python benchmarks/bench_cpu_kernel.py
	$(BIN)/python benchmarks/bench_text.py
	$(BIN)/python benchmarks/bench_trainer.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e ".[dev]"
	touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(INSTALL) -e ".[bench]"
	touch $@
