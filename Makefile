PYTHON ?= python3
BIN := .venv/bin
# Workers that spin while they wait steal the cores of the ones that work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test soak check docs bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/opd demo --out outputs/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaigns

check: install docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks all --clock cpu --out outputs/bench

clean:
	rm -rf outputs build dist .pytest_cache .mypy_cache .ruff_cache
