# `make` prints this help. Every target sets itself up: it needs Python 3.11+, pip and the package registry, no more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two test processes with one thread each finish sooner on two cores than one with two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "Installing hf_regvit into $(VENV): torch is large, this takes some minutes the first time."
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing hf_regvit into $(VENV): torch is large, this takes some minutes the first time."
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/installed

demo: $(VENV)/installed ## pretrain a small RegViT on real photographs, score it, draw it (DATA=folder for your own images)
	$(BIN)/python examples/demo.py $(if $(DATA),--data "$(DATA)")

test: $(VENV)/installed-dev ## the fast suite, under 3 minutes: run it all day
	$(PYTEST)

test-all: $(VENV)/installed-dev ## every tier: fast, slow, remote code, the transformers common suite
	$(BIN)/python scripts/dev/get_hf_common_tests.py
	$(PYTEST) -m "not gpu"

check: $(VENV)/installed-dev ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-dev ## the documentation as a site in site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/installed-dev ## time RegViT beside transformers and timm (long; ARGS="--models small" for less)
	$(BIN)/python scripts/bench_inference.py $(ARGS)

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache runs site build dist
