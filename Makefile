# make study   set up, run the default study, print its table      make lab      JupyterLab
# make test    set up, run the unit tests (test-all: all)          make figures  figures from data/study
# make bench   time ours against the published packages            make lint     what CI checks beside the tests
# make explore the explorer as an app (Voilà)                      make docs     the book, in build/docs
# make gpu-check  a folder that checks a CUDA card elsewhere (DRY=1: the check itself, on this CPU)
# make clean   forget the environment

PYTHON ?= python3
BIN := .venv/bin
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
NOTEBOOKS := $(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb)

.PHONY: study test test-notebooks test-browser test-slow test-all lab explore figures docs bench gpu-check lint clean
.DELETE_ON_ERROR:

study: .venv/installed
	$(BIN)/lowrank-lab study quick

# The folder is the tier: unit is what a contributor runs; minutes of each are in CONTRIBUTING.md.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: .venv/installed-dev
	$(PYTEST) tests/unit

test-notebooks test-browser test-slow: test-%: .venv/installed-dev
	$(PYTEST) tests/$*

test-all: .venv/installed-dev
	$(PYTEST) tests

lab: .venv/installed
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=. $(AS_ROOT) \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

# A copy with headless = False.
EXPLORER ?= 07_explorer
explore: .venv/installed-explore
	mkdir -p build
	$(BIN)/papermill --prepare-only -p headless False \
		notebooks/$(EXPLORER).ipynb build/$(EXPLORER).ipynb
	$(BIN)/voila --Voila.ip=127.0.0.1 --Voila.auto_token=True --show_tracebacks=True $(VOILA) \
		build/$(EXPLORER).ipynb

figures: .venv/installed
	$(BIN)/lowrank-lab report

# Notebooks that have changed are executed first. Warnings, broken links and silent pictures are errors.
docs: .venv/installed-docs
	$(BIN)/python docs/chapters.py
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs || \
		{ rm -rf build/doctrees; exit 1; }  # a page that is not read again would not warn again
	$(BIN)/python docs/links.py build/docs
	@echo "the book: build/docs/index.html"

bench: .venv/installed-dev
	$(BIN)/lowrank-lab bench

gpu-check: .venv/installed-dev
	$(BIN)/python -m $(if $(DRY),benchmarks.gpu --dry-run,benchmarks.gpu_checks.prepare build/gpu-check)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify $(NOTEBOOKS)

clean:
	rm -rf .venv *.egg-info

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-explore: .venv/installed pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[explore]'
	touch $@

.venv/installed-docs: .venv/installed pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs,quant]'
	touch $@

.venv/installed-dev: .venv/installed pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers,dev,quant,hub,explore,dask,tensorboard,docs]'
	touch $@
