PYTHON ?= python3
BIN := .venv/bin
# Workers that spin while they wait steal the cores of the ones that work.
export OMP_WAIT_POLICY ?= PASSIVE

# TORCH_WHEELS: a folder or page with the CPU builds of torch.
TORCH_WHEELS ?= $(or $(PIP_FIND_LINKS),https://download.pytorch.org/whl/cpu/torch/)

.PHONY: install locked lock audit release demo test soak check docs bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The same from the lock files, each package by its hash: CPython 3.11 on x86-64 Linux, with the CPU build of torch.
locked:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes --find-links $(TORCH_WHEELS) --requirement requirements-dev.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch .venv/installed

LOCK := uv pip compile pyproject.toml --quiet --generate-hashes --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --constraint constraints.txt --find-links $(TORCH_WHEELS) \
	--custom-compile-command 'make lock'

lock: install
	$(BIN)/pip install --quiet --editable '.[release]'
	$(BIN)/$(LOCK) --output-file requirements.lock
	$(BIN)/$(LOCK) --extra dev --output-file requirements-dev.lock

audit: install
	$(BIN)/pip install --quiet --editable '.[release]'
	$(BIN)/python scripts/audit.py

release: install
	$(BIN)/pip install --quiet --editable '.[release]'
	$(BIN)/python scripts/release.py dist

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
