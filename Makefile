# `make train` and `make test` need only Python 3.11+ and make: the rest is installed into .venv on first use.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
# Threads per process: the tests run one process a core, everything else may use them all.
CORES := $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
# The GPU targets also run where nothing can be installed, from the checkout.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_ENV := PYTHONPATH=.:kernels:$$PYTHONPATH PYTHONUNBUFFERED=1

.PHONY: train test coverage mutants lint format bench docs gpu-test gpu-bench clean

train: $(VENV)/.ready
	@$(BIN)/python -m grpo_fast.train $(ARGS)

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal --durations 8 $(ARGS)

coverage: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal --cov --cov-report term $(ARGS)

mutants: $(VENV)/.ready-dev
	nice $(BIN)/python -m tests.endurance.mutants $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	@$(BIN)/python tests/audit.py

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready-dev
	for mode in trained frozen forward; do $(BIN)/python -m benchmarks.loss_head --mode $$mode \
		--output benchmarks/results/loss-head-cpu-$$mode.json $(ARGS) || exit 1; done
	$(BIN)/python -m benchmarks.step $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	$(BIN)/python -m benchmarks.history

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)
	@echo "read it: $(BIN)/python -m http.server --bind 127.0.0.1 -d site 8000"

gpu-test:
	$(GPU_ENV) $(GPU_PYTHON) -m pytest tests/gpu -m gpu -p no:cacheprovider $(ARGS)

gpu-bench:
	$(GPU_ENV) $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "grpo_fast needs Python 3.11 or newer: none found (set PYTHON=...)"; exit 2; }
	@$(PYTHON) -m venv $(VENV)

# torch goes in first and alone: its build decides what everything else resolves to.
$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) dist build site .pytest_cache .ruff_cache
