# Two commands do everything on a fresh machine: `make figures` and `make test`.
# Both bring up .venv from requirements.lock by themselves; only Python ≥ 3.11, git and make are needed.

PYTHON ?= python3
PRESET ?= quick
ARGS   ?=

BIN   := .venv/bin
READY := .venv/.ready
UV    := 0.13.9

.PHONY: help install test test-slow lint figures site test-site notebooks checkpoints bench lock clean
.DEFAULT_GOAL := help

help: ## show these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY) ## bring up .venv from the lock

# The marker is written last: an interrupted installation is taken up again, never taken for whole.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"expected Python 3.11 or newer, got {sys.version.split()[0]}; run: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the locked packages into .venv (about two minutes the first time) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch, torchvision.ops'
	@touch $(READY)

test: $(READY) ## run the quick tests, the linter and the type checker
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(READY) ## run the tests that take longer
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY) ## check and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

figures: $(READY) ## run all notebooks and make every figure (PRESET=smoke|quick|cifar10|cifar10-ten|imagenette|paper)
	$(BIN)/dsv reproduce --preset $(PRESET) $(ARGS)

site: $(READY) ## build the pages of the recorded runs into build/site/html (PRESET=quick)
	$(BIN)/dsv site --preset $(PRESET) $(ARGS)

test-site: $(READY) ## read the built site in headless Chromium
	DSV_NEEDS_BROWSER=1 $(BIN)/python -m pytest -m site tests/test_site.py $(ARGS)

notebooks: $(READY) ## put the outputs of the last quick run into the committed notebooks, write student copies
	$(BIN)/dsv notebooks refresh
	$(BIN)/dsv notebooks student

checkpoints: $(READY) ## train the shipped classifiers anew
	$(BIN)/dsv train --all $(ARGS)

bench: $(READY) ## time the inner loop and the solvers (ratios within one run)
	$(BIN)/python -m pytest benchmarks --benchmark-only -s $(ARGS)

lock: $(READY) ## resolve the newest allowed versions into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --upgrade --extra dev --extra cluster pyproject.toml --output-file requirements.lock

clean: ## remove what runs have made, but not the environment or committed figures
	rm -rf build .snakemake figures/smoke figures/.staging figures/seeds/*/.staging .pytest_cache .mypy_cache .ruff_cache .benchmarks
