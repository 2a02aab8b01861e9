# `make demo` and `make test` need nothing but make and Python 3.10 to 3.13: the first call fills .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test trials lab notebooks readme

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z]*\):.*## /  make \1: /p' Makefile

demo: $(READY) ## train E-GRPO on the miniature, then show before and after (options: make demo ARGS="--scale smoke")
	$(BIN)/egrpo demo $(ARGS)

test: $(READY) ## everything that must hold: notebooks, tests, lint
	@$(BIN)/python tests/stages.py

trials: $(READY) ## faults of machines, files and requests, by hand (some: make trials ARGS="server inputs")
	@$(BIN)/python tests/trials $(ARGS)

lab: $(READY) ## JupyterLab on the notebooks (in a container: make lab ARGS="--allow-root --no-browser")
	$(BIN)/jupyter lab nbs $(ARGS)

notebooks: $(READY) ## after editing: clean the notebooks, write egrpo/*.py, README.md and PAPERS.md
	@$(BIN)/python tests/sync.py write

readme: $(READY) ## README.md alone, from nbs/index.ipynb
	@$(BIN)/python tests/sync.py readme

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo "egrpo needs Python 3.10 to 3.13 as $(PYTHON); name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(READY): settings.ini setup.py pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), once: $(TORCH) first, then the rest of constraints.txt (some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@
