# `make run` and `make test` set themselves up: Python 3.11 is all they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint bench

run: $(VENV)/installed
	@HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1 $(BIN)/python cli.py --model tiny_model \
	    tiny_model/held_out.jsonl

test: $(VENV)/installed-ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-ray
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/bench_nll.py
	$(BIN)/python benchmarks/bench_cpu_kernel.py
	$(BIN)/python benchmarks/bench_text.py
	$(BIN)/python benchmarks/bench_trainer.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -r requirements-dev.txt
	touch $@

$(VENV)/installed-ray: requirements-ray.txt $(VENV)/installed-dev
	$(BIN)/python -m pip install -q -c constraints.txt -r requirements-ray.txt
	touch $@

$(VENV)/installed-bench: requirements-bench.txt $(VENV)/installed-dev
	$(BIN)/python -m pip install -q -c constraints.txt -r requirements-bench.txt
	touch $@
