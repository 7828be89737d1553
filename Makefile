# Each target works alone in a fresh clone: it makes .venv with $(PYTHON), 3.10 or newer, and installs
# what settings.ini declares. Nothing is installed again until settings.ini or setup.py changes.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,docs
# What the tests run on: two workers of one thread each use two cores best. WORKERS=1 OMP_NUM_THREADS=2
# runs one notebook after another.
WORKERS ?= 2
NB ?=
ARGS ?=

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
RUN := $(BIN)/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install lab test notebooks export lint site cards clean

help: ## list the targets
	@echo "make lab        open JupyterLab on the course's front page (ARGS=--no-browser, ...)"
	@echo "make test       run every test, each notebook included (ARGS='-k NAME', WORKERS=N)"
	@echo "make notebooks  execute the notebooks that changed (NB='FILE ...' for these)"
	@echo "make export     write vlm_course/ from the notebooks"
	@echo "make lint       list what breaks a rule of CONTRIBUTING.md (NB='FILE ...')"
	@echo "make site       render the site to _site/"
	@echo "make cards      measure time and memory of each chapter (NB='FILE ...' for these)"
	@echo "make clean      delete what these targets made, .venv included"

install: $(STAMP)

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is wanted: make PYTHON=/path/to/python3")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@

lab: $(STAMP)
	$(RUN) -m jupyterlab --ServerApp.ip=127.0.0.1 $(ARGS) nbs/index.ipynb

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(RUN) -m pytest --nbval-lax -n $(WORKERS) --dist loadscope $(ARGS) nbs tests

notebooks: $(STAMP)
	$(RUN) -m tools.notebooks run $(NB) $(ARGS)

export: $(STAMP)
	$(BIN)/nbdev_export

lint: $(STAMP)
	$(RUN) -m tools.notebooks lint $(NB)

site: $(STAMP)
	$(RUN) -m tools.site

cards: $(STAMP)
	$(RUN) -m tools.cards $(NB)

clean:
	rm -rf $(VENV) _site _proc build dist *.egg-info .pytest_cache
	find nbs tests tools vlm_course -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
