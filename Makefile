# `make test` does all its own set-up: a virtual environment in .venv, filled with pip from the pins.

BOOTSTRAP ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test soak lint setup pins builtin
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(INSTALLED)  ## transfer learning on this machine, with pictures and numbers
	$(BIN)/gtl demo

test: lint  ## set up, then style, types and every test but the long ones
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 3

soak: $(INSTALLED)  ## the long tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m soak

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check
	$(BIN)/mypy

setup: $(INSTALLED)  ## the virtual environment only

# The stamp is written last, so that an installation that was cut off is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(BOOTSTRAP)" || { echo "make: no Python from 3.10 to 3.13 found; name one with BOOTSTRAP=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(BOOTSTRAP) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

builtin: $(INSTALLED)  ## make the built-in models from nothing: hours; goes on where it was stopped
	$(BIN)/python -m gtl.builtin_backbone
	$(BIN)/python -m gtl.builtin
	$(BIN)/python -m gtl.builtin gan

pins: $(INSTALLED)  ## write constraints.txt from what is installed
	$(BIN)/python .ci/pins.py > constraints.tmp && mv constraints.tmp constraints.txt && touch $(INSTALLED)
