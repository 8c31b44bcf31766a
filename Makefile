# The project's commands. `make demo` and `make test` work on a fresh clone.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help install demo test check format clean

help:
	@echo "make demo     install, then train and solve ARC tasks for about 10 minutes"
	@echo "make test     install, then run the tests"
	@echo "make check    format, lint, types and tests: what must be green before a commit"
	@echo "make install  make .venv with everything; does nothing when it is up to date"
	@echo "make format   put the code into its format"
	@echo "make clean    remove .venv and caches"

# The demo needs the runtime only; the tests need all extras. Both are made once.
.venv/runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or later is needed; try make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/all: .venv/runtime
	$(PIP) --editable '.[dev,bench,tensorboard]'
	@touch $@

install: .venv/all

demo: .venv/runtime
	$(BIN)/tiny-onn solve --config configs/demo.toml --out runs/demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
