# Every target works first in a fresh clone: what it needs, it sets up.
PYTHON  ?= python3
PROFILE ?= quick
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN     := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup reproduce extend report test bench lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed  ## make .venv with the exact versions of requirements.lock (quick when nothing changed)

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; this is " + sys.version.split()[0] + ". Set PYTHON=python3.11 or newer.")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the packages of requirements.lock into .venv (several GB, minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[dev]"
	@touch $@

reproduce: setup  ## run what is missing of PROFILE (quick) and write results/PROFILE
	@$(BIN)/python scripts/reproduce.py --profile $(PROFILE) --workers $(WORKERS)

extend: setup  ## as reproduce, but take over the runs archived in results/PROFILE: only what they lack is run
	@$(BIN)/python scripts/reproduce.py --profile $(PROFILE) --workers $(WORKERS) --from-archive

report: setup  ## make the report of PROFILE (quick) anew from the archived runs in results/PROFILE alone
	@$(BIN)/python scripts/report.py --profile $(PROFILE) --workers $(WORKERS)

test: setup  ## run the tests
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --quiet

bench: setup  ## measure speed: ratios against peers, into results/bench (minutes; with nothing else running)
	@$(BIN)/python scripts/benchmark.py

lint: setup  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove caches and run folders (results/ and data/ stay)
	rm -rf outputs .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
