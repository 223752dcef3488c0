# Every target sets itself up in $(VENV), from requirements.lock, and leaves the system's Python alone.
VENV := .venv
WORKERS := 2#     pytest processes; 0 runs the tests in one
ARGS :=#          further arguments of pytest

SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))

# The first one that runs and is new enough: the shim of a version that is not activated exists, but fails.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c '$(SUITABLE)' 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin
READY := $(VENV)/.orogen-ready
PEER := $(VENV)/.orogen-peer

.PHONY: help quickstart test test-peer lint lock clean
.DEFAULT_GOAL := help

help:
	@echo 'make quickstart   train a tiny model on this CPU and write samples, into runs/quickstart'
	@echo 'make test         the tests            [WORKERS=2] [ARGS="-k moe"]'
	@echo 'make test-peer    the tests against PyTorch and transformers; the first run installs both'
	@echo 'make lint         ruff and pyright'
	@echo 'make lock         resolve requirements.lock again'
	@echo 'make clean        remove the virtual environment and caches'
	@echo 'Everywhere: PYTHON=python3.12 chooses the interpreter of a new environment, VENV=DIR its folder.'

quickstart: $(READY)
	$(BIN)/orogen train --fake_devices 8 --gin_file gin_configs/recipes/quickstart.gin --run runs/quickstart --resume

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-peer: $(PEER)
	$(BIN)/python -m pytest -m peer -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Installs the locked versions, with hashes checked, then the package itself, editable. uv takes seconds; pip does the
# same where uv cannot run (no wheel for it, or an index that only pip's settings name). Both compile what they install
# to bytecode, and the package is compiled too: where PYTHONDONTWRITEBYTECODE is set, every command would compile its
# imports again.
$(READY): requirements.lock pyproject.toml
	@test -x $(BIN)/python || { \
	  test -n "$(PYTHON)" || { echo 'No Python 3.11 to 3.14 found; name one with PYTHON=/path/to/python3.' >&2; exit 1; }; \
	  $(PYTHON) -c '$(SUITABLE)' || { echo '$(PYTHON) does not run, or is not Python 3.11 to 3.14.' >&2; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' || { echo '$(PYTHON) cannot make a virtual environment: install its venv' \
	    'module (Debian, Ubuntu: apt install python3-venv), or name another with PYTHON=.' >&2; exit 1; }; \
	  echo 'Making $(VENV) with $(PYTHON)'; $(PYTHON) -m venv $(VENV) || { \
	  echo '$(VENV) is broken; remove it with: make clean' >&2; exit 1; }; }
	@$(BIN)/python -c '$(SUITABLE)' || { \
	  echo '$(VENV) does not run, or is not Python 3.11 to 3.14; remove it with: make clean' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip || { \
	  echo '$(VENV) has no pip and cannot get one; remove it with: make clean' >&2; exit 1; }
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock >$(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $(VENV)/uv.lock && \
	  $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock || \
	  $(BIN)/python -m pip install --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m compileall -q src
	@touch $@

# With pip, which unlike uv reads the machine's pip settings: name an index of CPU builds there, because PyPI's Linux
# build of torch brings CUDA libraries along. Packages from the lock satisfy the other requirements and stay.
$(PEER): $(READY)
	$(BIN)/python -m pip install --no-build-isolation --editable '.[peer]'
	@touch $@

lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --generate-hashes --upgrade --quiet \
	  --custom-compile-command 'make lock' --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist src/*.egg-info
