# Two commands do everything on a fresh machine: `make figures` and `make test`.
# Both bring up .venv from requirements.lock by themselves; only Python ≥ 3.11, git and make are needed.

PYTHON ?= python3
PRESET ?= quick
ARGS   ?=
DEVICE ?= cpu

BIN        := .venv/bin
READY      := .venv/.ready
UNFINISHED := .venv/.unfinished
LOWEST     := .venv-lowest
UV         := 0.13.9

.PHONY: help install test test-slow test-slurm launch test-lowest lint figures record site test-site notebooks checkpoints bench lock clean
.DEFAULT_GOAL := help

# An environment that was moved, or whose Python is gone, is not ready, whatever its marker says.
ifneq ($(wildcard $(READY)),)
  ifneq ($(shell $(BIN)/python -c 'print(open("$(READY)").read().strip())' 2>/dev/null),$(CURDIR))
    $(shell rm -f $(READY))
  endif
endif

help: ## show these targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY) ## bring up .venv from the lock

# While .unfinished stands, an installation is under way or was killed: half a package looks whole to
# every installer, so the next call makes .venv anew. So it does where Python is too old or pip lacks.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"expected Python 3.11 or newer, got {sys.version.split()[0]}; run: make PYTHON=python3.12 …")'
	@if test -e $(UNFINISHED) || ! $(BIN)/python -c \
	    'import sys, pip._internal.cli.main; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  test ! -e .venv || echo "the .venv here is not whole: making it anew …"; \
	  rm -rf .venv && mkdir .venv && touch $(UNFINISHED) && $(PYTHON) -m venv .venv; \
	fi
	@touch $(UNFINISHED)
	@echo "installing the locked packages into .venv (about two minutes the first time) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch, torchvision.ops'
	@echo "$(CURDIR)" > $(READY) && rm $(UNFINISHED)

test: $(READY) ## run the quick tests, the linter and the type checker
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(READY) ## run the tests that take longer
	$(BIN)/python -m pytest -m slow $(ARGS)

test-slurm: $(READY) ## run a notebook as a job of a SLURM of one node, as root (apt-get install slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py $(ARGS)

launch: $(READY) ## check what Binder and Colab would run, as far as it can be tried here
	$(BIN)/python -m pytest tests/test_editions.py tests/test_first_steps.py \
	  -m "slow or not slow" -k "binder or colab or links" $(ARGS)

test-lowest: $(LOWEST)/.ready ## run the method's tests with the lowest versions that pyproject.toml admits
	$(LOWEST)/bin/python -m pytest $(ARGS)

# Apart from .venv and its lock: UV_TORCH_BACKEND=cpu (CI) spares it CUDA's libraries.
$(LOWEST)/.ready: pyproject.toml
	@echo "installing the lowest admitted versions into $(LOWEST) …"
	@rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python \
	  pyproject.toml --output-file $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python \
	  --requirement $(LOWEST)/lowest.txt 'pytest>=8.3' 'hypothesis>=6.120'
	@touch $@

lint: $(READY) ## check and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

figures: $(READY) ## run all notebooks and make every figure (PRESET=smoke|quick|cifar10|cifar10-ten|imagenette|paper)
	$(BIN)/dsv reproduce --preset $(PRESET) $(ARGS)

record: $(READY) ## maintainers: make the last run's results the committed ones, from a clean commit
	$(BIN)/dsv record --preset $(PRESET) $(ARGS)

site: $(READY) ## build the pages of the recorded runs into build/site/html (PRESET=quick)
	$(BIN)/dsv site --preset $(PRESET) $(ARGS)

test-site: $(READY) ## read the built site in headless Chromium
	DSV_NEEDS_BROWSER=1 $(BIN)/python -m pytest -m site tests/test_site.py $(ARGS)

notebooks: $(READY) ## write the student copies of the notebooks
	$(BIN)/dsv notebooks student

checkpoints: $(READY) ## train shipped classifiers that lack or have another recipe (DEVICE=cuda, ARGS="--root FOLDER")
	$(BIN)/dsv train --all --device $(DEVICE) $(ARGS)

bench: $(READY) ## time the inner loop and the solvers (ratios within one run)
	$(BIN)/python -m pytest benchmarks --benchmark-only -s $(ARGS)

lock: $(READY) ## bring requirements.lock up to pyproject.toml; ARGS=--upgrade takes the newest versions
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --extra dev --extra cluster pyproject.toml --output-file requirements.lock $(ARGS)

clean: ## remove what runs have made (build/), caches, and an environment that was never finished
	@test -e $(READY) || rm -rf .venv
	rm -rf build .snakemake $(LOWEST) .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
