# `make` prints the help. Every target installs what it needs; only Python 3.11+, pip and a package index are required.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On two cores, two test processes with one thread each are faster than one process with two threads.
PYTEST_OPTIONS := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)
# ONNX Runtime and OpenVINO, in a process that had run thousands of other tests, ended it without a trace (seen twice, at
# the same test); alone the same tests pass. Therefore they have a process of their own. Export needs transformers 5.24.
ENGINES := tests/hub/test_export.py
# Tests compare numbers. These are the tests of the rooms and those against golden files; all others start whole runs.
NUMERIC := $(addprefix tests/,models data evaluation diagnosis figures training pretraining finetuning parity)
# An error has to stay below this share of its tolerance, so that another order of summation does not matter.
ERROR_SHARE := --max-error-share 0.2
# Computing as on a processor without AVX-512, and as on one without AVX2.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
NO_AVX2 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
# The lowest supported version of transformers and the last two with which the package was developed.
TRANSFORMERS := 5.15.0 5.23.0 5.24.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-attacks test-processors test-transformers check format docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 26

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "Installing hf_regvit into $(VENV): torch is large, so the first installation takes some minutes."
	$(BIN)/python -m pip install --quiet -e ".[train,samples]"
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing hf_regvit into $(VENV): torch is large, so the first installation takes some minutes."
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/installed

# Threads that wait for each other sleep: when other programs use the cores, waiting in a loop takes most of the time.
demo: $(VENV)/installed ## pretrain a small RegViT and write a page about it, in 2 minutes (DATA=folder for your own images)
	@echo "About 2 minutes on two idle cores. The libraries take the first seconds."
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/python examples/demo.py $(if $(DATA),--data "$(DATA)")

test: $(VENV)/installed-dev ## run the fast tests (about 3 minutes on two cores)
	$(PYTEST) --ignore $(ENGINES)
	$(PYTEST) --dist load $(ENGINES)

test-all: $(VENV)/installed-dev ## run all tests: fast, slow, remote code, the common suite of transformers
	$(BIN)/python scripts/dev/get_hf_common_tests.py
	$(PYTEST) -m "not gpu" $(ERROR_SHARE) --ignore $(ENGINES)
	$(PYTEST) --dist load -m "not gpu" $(ERROR_SHARE) $(ENGINES)

test-attacks: $(VENV)/installed-dev ## run the attacks: full disks, killed writers, hostile files (under 5 minutes on two idle cores)
	$(PYTEST) -m attacks tests/attacks

test-processors: $(VENV)/installed-dev ## run the numeric tests as on processors without AVX-512 and without AVX2
	$(AVX2) $(PYTEST) $(ERROR_SHARE) $(NUMERIC)
	$(NO_AVX2) $(PYTEST) $(ERROR_SHARE) $(NUMERIC)

test-transformers: $(VENV)/installed-dev ## run the fast tests with other versions of transformers, each as on another processor
	set -e; installed=$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("transformers"))'); \
	processor="$(AVX2)"; \
	for version in $(TRANSFORMERS); do \
	    if [ $$version = $$installed ]; then echo "transformers $$version is the installed one (make test)"; continue; fi; \
	    folder=.cache/environments/transformers-$$version; \
	    [ $$folder/installed -nt pyproject.toml ] || $(BIN)/python scripts/dev/make_environment.py $$version; \
	    touch $$folder/installed; \
	    env $$processor OMP_NUM_THREADS=1 $$folder/bin/python -m pytest $(PYTEST_OPTIONS) $(ERROR_SHARE) --ignore $(ENGINES); \
	    processor="$(NO_AVX2)"; done

check: $(VENV)/installed-dev ## check lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The page in the documentation needs a model, trained here in two minutes, and npm, which downloads its runtime.
.cache/docs_page: | $(VENV)/installed-dev
	$(BIN)/regvit pretrain --config examples/photos_cpu.yaml --hidden_size 96 --max_steps 200 \
	    --resume_from_checkpoint last --output_dir .cache/docs_run
	$(BIN)/regvit export --model .cache/docs_run --format web --size 160 --output_dir $@

docs: $(VENV)/installed-dev ## build the documentation in site/ (warnings are errors; with npm, it shows an exported model)
	@[ -d .cache/docs_page ] || ! command -v npm >/dev/null || $(MAKE) .cache/docs_page
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/installed-dev ## compare the speed of RegViT, transformers and timm (slow; ARGS="--models small" is faster)
	$(BIN)/python benchmarks/bench_inference.py $(ARGS)

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache runs site build dist
