# What to install: extras of pyproject.toml, as in `make install EXTRAS=gpu,s3`.
EXTRAS ?= dev
VENV ?= .venv
# The first of these that runs; `make install PYTHON=...` names another.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14; do $$name -c '' 2>/dev/null && echo $$name && break; done)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: install demo test test-all coverage check resolve docs clean

## Everything that the commands need, in .venv.
# The pinned torch takes the CPU build where the package index offers one.
install:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 found: install one with its venv module, or name it by PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(MAKE) install

## Trains on the embedded corpus of drawings: six to ten minutes on two cores after set-up.
demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo

## All tests but the slow ones. Most share the cores; those that start Ray or wait for a clock run one after the other.
TOGETHER := $(addprefix tests/,nn data cluster corpora train report predict test_benchmarks.py test_docs.py \
	test_fidelity.py test_mistakes.py test_outputs.py test_published_arithmetic.py)
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n logical --dist loadfile --max-worker-restart 0 $(TOGETHER)
	$(BIN)/python -m pytest -m "not slow" $(addprefix --ignore=,$(TOGETHER))

test-all: $(INSTALLED)
	$(BIN)/python -m pytest

## The share of lines and branches that the tests reach.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term

## Style, types, imports, spelling, documentation, and whether every extra can be installed.
check: $(INSTALLED) docs resolve
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

## Every extra, for every Python, against constraints.txt; asks the package index.
resolve: $(INSTALLED)
	$(BIN)/python .ci/resolve.py

## The documentation as a site, in site/.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) runs mlflow.db mlruns site
