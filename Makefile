# make train    set up .venv, then train the default model     (make train ARGS="--steps 200")
# make test     set up .venv, then run the checks and the tests (minutes)
# make prove    the slow proofs; writes tests/proof.json, which `make test` holds against the sources

# The first Python that the project supports; name another with make PYTHON=python3.12
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: train test check prove clean

train: .venv/.core
	$(BIN)/python train.py $(ARGS)

test: check
	$(BIN)/python -m pytest -n auto $(ARGS)

# Style, types of the public surface, and which package may import which.
check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

prove: .venv/.dev
	$(BIN)/python -m tests.prove $(ARGS)

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "minillm needs Python 3.11, 3.12 or 3.13; none was found. Name one: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.core: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $@ .venv/.core

clean:
	rm -rf .venv
