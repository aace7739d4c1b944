# One command a line; `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help install quickstart test bench bench-quick gpu docs lint format clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tnlayers needs Python >= 3.11; say which one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make the environment in .venv

quickstart: install  ## train, compress and retrain a CNN on the embedded digits (less than a minute)
	$(BIN)/tnlayers quickstart

# Two workers with as many threads each as there are cores would crowd each other out.
test: export OMP_NUM_THREADS ?= 1
test: install  ## run every test, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The profiler, which counts the memory, tells of every start and stop otherwise.
bench bench-quick: export KINETO_LOG_LEVEL ?= 9
bench: install  ## measure what is faster than dense, and by how much, into results/speed/ (under 20 minutes)
	$(BIN)/python -m benchmarks.speed

bench-quick: install  ## the same in under 3 minutes, for the rows that matter most
	$(BIN)/python -m benchmarks.speed --quick

# The pictures and the published net are where TNLAYERS_SHARED says, as for the tests; without them nothing is trained.
gpu: SHARED = $(if $(TNLAYERS_SHARED),--data $(TNLAYERS_SHARED)/data/cifar10-jpeg.tar.xz --checkpoint $(TNLAYERS_SHARED)/checkpoints/resnet20-12fca82f.th)
gpu: install  ## measure on a CUDA card for 8 minutes, into results/gpu/
	$(BIN)/python -m benchmarks.gpu --out results/gpu/gpu.json --seconds 480 $(SHARED)

docs: install  ## build the pages of docs/ as a site in site/
	$(BIN)/mkdocs build --strict

lint: install  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist site
