# `make demo` and `make test` work as the first command on a machine with Python and make.
# PYTHON chooses the interpreter (3.11 or newer), VENV the folder of the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests reach for no network, and waiting threads do not burn the other core.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
test test-core: export HF_HUB_OFFLINE := 1

.DELETE_ON_ERROR:
.PHONY: help demo test test-core lint wheel clean

help:
	@echo "make demo       align the embedded model and write runs/demo/report.html"
	@echo "make test       lint, types, layers, then every test"
	@echo "make test-core  the quick tests only"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make wheel      build dist/*.whl"
	@echo "make clean      remove the environment, builds and caches (not runs/)"

# A second call is instant; a change of the dependencies or of their pins installs again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmalign needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Use: make PYTHON=python3.12 ..."; \
	  exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module here; on Debian: apt install python3-venv"; exit 2; }
	@echo "Installing mmalign into $(VENV): a few minutes and up to 6 GB the first time (torch is most of it) ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/mmalign demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A process per core, each on one thread; a file's tests stay together, for what they share is dear.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: lint
	$(PYTEST)

test-core: $(STAMP)
	$(PYTEST) -m "not slow"

wheel: $(STAMP)
	@rm -rf dist
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
