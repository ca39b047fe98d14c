# A newcomer needs one command: each target makes .venv from pyproject.toml and constraints.txt if it is missing, with what
# it needs. The demonstration takes gapo[cli]; the others add every extra, and the tools, to the same .venv.
PYTHON ?= python3
BIN := .venv/bin
CLI := .venv/installed-cli
INSTALLED := .venv/installed
LOWEST := .venv-lowest
DOCS_ADDRESS ?= 127.0.0.1:8000
# On all cores, in the order of the files, so that a file's fixtures are made once. A worker that is done takes tests from others.
PYTEST := pytest -n auto --dist worksteal --durations=25

# Bytecode is written, whatever the machine says: it halves the time that each process of the tests takes to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo collect test test-all test-lowest test-machines lint bench docs docs-build clean

demo: $(CLI)  ## tune a small language model on noisy pairs; leaves runs/demo/report.html
	$(BIN)/gapo train examples/demo.yaml --overwrite

collect: $(INSTALLED)  ## import every test, so that the bytecode is there when several processes need it
	$(BIN)/pytest --collect-only -qq

test: $(INSTALLED)  ## all tests but those marked slow
	$(BIN)/$(PYTEST) -m "not slow"

test-all: $(INSTALLED)  ## all tests
	$(BIN)/$(PYTEST)

test-lowest: $(LOWEST)/installed  ## all tests, with the lowest versions that pyproject.toml admits
	$(LOWEST)/bin/$(PYTEST)

test-machines: $(INSTALLED)  ## the tests of numbers, with other machines' instruction sets and threads
	.ci/machines

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the cost of a step against SimPO's; writes runs/step_cost.csv
	$(BIN)/python benchmarks/step_cost.py --output runs/step_cost.csv

docs: docs-build  ## the documentation, built and then served with every edit, until Ctrl-C
	$(BIN)/mkdocs serve --strict --dev-addr $(DOCS_ADDRESS)

docs-build: $(INSTALLED)  ## the documentation, in site/; a warning fails
	$(BIN)/mkdocs build --strict

clean:  ## remove what the targets made, except the runs
	rm -rf .venv $(LOWEST) site

$(CLI): pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,cli)

$(INSTALLED): pyproject.toml constraints.txt  # the command line too
	$(call install,.venv,constraints.txt,all$(comma)dev)
	touch $(CLI)

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(call install,$(LOWEST),constraints-lowest.txt,all$(comma)dev)

comma := ,
# What is imported compiles itself then: a third of what pip would compile, on one core for a minute and a half.
define install
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --upgrade pip
$(1)/bin/python -m pip install --no-compile --constraint $(2) --editable ".[$(3)]"
touch $@
endef
