# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-output

.PHONY: demo test check clean help

help:
	@echo "make demo   set up and run the demo (OUT=folder to write to; default demo-output)"
	@echo "make test   set up and run the whole test suite"
	@echo "make check  lint, format and types"
	@echo "make clean  remove the environment and what was built"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "torch_rmt needs Python 3.11 or newer; say which: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp a set of extras: reinstalls when the pins or the metadata change.
$(VENV)/.demo-is-installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	@touch $@

$(VENV)/.test-is-installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,oracles]"
	@# curvlinops brings torchvision, of which PyPI has no build for CPU torch; torchmetrics finds it and Lightning dies.
	$(BIN)/python -c 'import torchvision' 2> /dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $@

demo: $(VENV)/.demo-is-installed
	$(BIN)/torch-rmt demo --out "$(OUT)"

test: $(VENV)/.test-is-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

check: $(VENV)/.test-is-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
