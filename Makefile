# `make demo` and `make test` need nothing but make and Python 3.10 to 3.13: the first call fills .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# what an image with torch and transformers mostly lacks
WHEELS ?= diffusers==0.42.1 fastcore==1.14.5
# where `make gpu-check` writes
OUT ?= runs/gpu_check
# JupyterLab's settings in a virtual environment of one's own, where it need not ask about news
QUIET := $(VENV)/share/jupyter/lab/settings/overrides.json
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
# apart, for its tests alone: diffusers warns on every import where it is installed
TORCHAO := $(shell sed -n '/^torchao==/p' constraints.txt)

# the package hpsv2 lives by itself: its pins are old, and diffusers must not meet torchvision
HPSV2 := .venv-hpsv2

.DEFAULT_GOAL := help
.PHONY: help demo test parity trials gpu-check wheels hpsv2-service lab browser docs notebooks readme

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

demo: $(READY) ## train E-GRPO on the miniature, then show before and after (options: make demo ARGS="--scale smoke")
	$(BIN)/egrpo demo $(ARGS)

test: $(READY) ## everything that must hold: notebooks, tests, lint
	@$(BIN)/python tests/stages.py

parity: $(READY) ## the general policy against the pipelines of diffusers, all families (some: make parity ARGS="z-image sana")
	@$(BIN)/python tests/parity.py $(ARGS)

trials: $(READY) ## faults of machines, files and requests, by hand (some: make trials ARGS="server inputs")
	@$(BIN)/python tests/trials $(ARGS)
	@[ -n "$(ARGS)" ] || $(BIN)/pytest -q --trials -m trial

gpu-check: ## what a borrowed GPU is asked, by its machine's own Python (some: make gpu-check ARGS="--stages about,flux")
	$(PYTHON) tests/gpu_check.py --out $(OUT) $(ARGS)

wheels: ## into .whl, packages for a machine without network (others: make wheels WHEELS="NAME==VERSION")
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(addprefix --platform manylinux,_2_28_x86_64 _2_27_x86_64 _2_17_x86_64 2014_x86_64) --dest .whl $(WHEELS)

hpsv2-service: $(HPSV2)/.ready ## the package hpsv2 as a reward server (weights of your own: make hpsv2-service ARGS="--weights FILE")
	$(HPSV2)/bin/python egrpo/rewards/service.py hpsv2 $(ARGS)

# torch's threads sleep while they wait; spinning, they take the cores from each other on a busy machine
lab: $(READY) $(QUIET) ## JupyterLab on the notebooks (in a container: make lab ARGS="--allow-root --no-browser")
	OMP_WAIT_POLICY=passive $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

browser: $(READY) $(QUIET) ## JupyterLab driven in a real browser: links, Stop, clean saves, widgets (needs Chromium: apt-get install chromium)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright
	@$(BIN)/python tests/browser.py $(ARGS)

docs: $(READY) ## the site, into _site/html: notebooks, claims and a page per public name, to be read without a network
	@$(BIN)/python tests/pages.py

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
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/apart "$(TORCHAO)"
	@touch $@

$(QUIET): $(READY)
	@mkdir -p $(@D)
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' > $@

$(HPSV2)/.ready:
	@echo "installing the package hpsv2 into $(HPSV2), once (some minutes)"
	@$(PYTHON) -m venv $(HPSV2)
	@$(HPSV2)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(HPSV2)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 hpsv2x==1.2.0
	@$(HPSV2)/bin/python -m pip install --quiet --disable-pip-version-check clint ftfy huggingface_hub numpy pillow regex requests tqdm
	@touch $@
