# Every target does its own set-up, in .venv beside this file. PYTHON=python3.12 chooses another
# interpreter, VENV=... another place.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# tests wait more than they compute; JOBS=0 runs them one after the other
JOBS ?= 4
# the message of benchmarks/large_body.py in memory, which takes 23 GB of it and as much disk
LARGE ?= --directory /dev/shm --warm .

.PHONY: help demo test lint types bench docs fuzz clean

help:
	@echo "make demo    see it work"
	@echo "make test    run the tests (PYTEST_ARGS=... adds arguments, JOBS=0 without processes)"
	@echo "make lint    ruff and import-linter    make types   mypy"
	@echo "make docs    rewrite the generated parts of README and docs"
	@echo "make bench   run the benchmarks        make fuzz    search longer for surprises"

demo: $(VENV)/.run-stamp
	@$(BIN)/lonelypsc demo

test: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.dev-stamp
	$(BIN)/mypy

docs: $(VENV)/.dev-stamp
	$(BIN)/python docs/generate.py

bench: $(VENV)/.dev-stamp
	@test -f benchmarks/run.py || { echo "no benchmarks/run.py yet; see benchmarks/"; exit 1; }
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/run.py --suite websocket
	$(BIN)/python benchmarks/start.py --write
	$(BIN)/python benchmarks/subscriptions.py --write
	$(BIN)/python benchmarks/large_body.py --write $(LARGE)

fuzz: $(VENV)/.dev-stamp
	LONELYPS_FUZZ=1 $(BIN)/python -m pytest -q -p no:cacheprovider --hypothesis-seed=random \
		tests/test_wire.py tests/test_bodies.py tests/test_signing.py tests/test_globs.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lonelyps needs Python 3.11 or newer; $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@test -e $(VENV)/.dev-stamp || \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[standard]'
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
