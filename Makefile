# make train: the default job. make test: lint, types, the quick tests; test-slow: the others that CI runs; test-all:
# every test. make test-slurm: on a real SLURM. make benchmark: the table of tests/benchmark/README.md, an hour on an
# idle machine. All install into .venv on first use, but test-gpu and test-gpus (one GPU, all GPUs of a node; a dry run
# on the CPU without them) install nothing: they take .venv where it is, and PYTHON as it is otherwise. Their reports
# are in outputs/gpu.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two test processes, a file at a time. They have threads of their own, so what forks runs in a single one, after them.
JOBS := -n 2 --dist loadfile

.PHONY: train test test-slow test-all test-slurm test-gpu test-gpus benchmark lint clean

train: $(VENV)/.train
	$(BIN)/rsotrain

test: lint
	$(BIN)/python -m pytest $(JOBS) -m "not slow and not long and not alone"
	$(BIN)/python -m pytest -m "not slow and not long and alone"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest $(JOBS) -m "slow and not long and not alone"
	$(BIN)/python -m pytest -m "slow and not long and alone"

test-all: lint
	$(BIN)/python -m pytest $(JOBS) -m "not alone"
	$(BIN)/python -m pytest -m alone

# Installs SLURM's Debian packages and starts a SLURM of this one machine for the tests, as root.
test-slurm: $(VENV)/.test
	bash tests/tools/slurm_lab.sh install
	RSOTRAIN_SLURM_LAB=1 $(BIN)/python -m pytest $(PYTEST) tests/parallel/test_slurm_steps.py tests/parallel/test_slurm_cluster.py

INSTALLED := $(if $(wildcard $(VENV)/.test),$(BIN)/python,$(PYTHON))

test-gpu:
	$(INSTALLED) tests/tools/gpu_report.py

test-gpus:
	$(INSTALLED) tests/tools/gpu_report.py --several

benchmark: $(VENV)/.test
	$(BIN)/python tests/benchmark/table.py --run --write

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rsotrain needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build dist
