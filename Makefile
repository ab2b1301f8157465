# The virtual environment .venv, installed once and again when the dependencies change.
#   make demo      install, then train one small run, scale it, kill one of its workers, and print a summary
#   make test      install the test dependencies, then run the tests; those of the architecture are in make check
#   make test-emulated  the tests of code that holds tensors once more, on an emulated GPU
#   make journeys  whole runs on a real cluster, as users run them
#   make test-all  all tests, slow ones, several hosts and injected faults included
#   make check     format, lint, types and architecture: what CI runs first
#   make dist      a source distribution and a wheel, in dist/
#   make check-dist  the wheel in an empty environment elsewhere, where it runs the demo
#   make bench     every benchmark but those that take long, as benchmarks/README.md says, and gpu, which needs one

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BENCHMARKS = $(patsubst benchmarks/%.py,benchmarks.%,$(filter-out $(addprefix benchmarks/,__init__.py harness.py false_alarms.py exact.py balance.py routers.py lora.py distillation.py pruning.py exits.py inference.py compute_to_target.py gpu.py),$(wildcard benchmarks/*.py)))

# Compiled modules are kept, whatever the environment says: else each process of the tests compiles all of them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-emulated journeys test-all check types architecture dist check-dist bench install clean

demo: $(VENV)/run.stamp
	$(BIN)/orchestrator demo

test: $(VENV)/dev.stamp
	$(BIN)/pytest -n 4 --dist worksteal tests/unit -m "not slow"
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder tests/integration -m "not slow and not journey"

test-emulated: $(VENV)/dev.stamp
	$(BIN)/pytest -n 2 --device emulated tests/unit
	$(BIN)/pytest -n 2 --dist loadfile --device emulated tests/integration -m "not slow and not journey and not long_emulated"

journeys: $(VENV)/dev.stamp
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration -m "journey and not slow"

test-all: $(VENV)/dev.stamp
	$(BIN)/pytest
	$(BIN)/pytest -n 2 --device emulated tests/unit
	$(BIN)/pytest -n 2 --dist loadfile --device emulated tests/integration

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory --jobs 2 types architecture

types: $(VENV)/dev.stamp
	$(BIN)/mypy

architecture: $(VENV)/dev.stamp
	$(BIN)/pytest -q tests/architecture

dist: $(VENV)/dev.stamp
	rm -rf build dist
	$(BIN)/python -m build --outdir dist

check-dist: dist
	.ci/check-dist dist/*.whl $(BIN)/python

bench: $(VENV)/dev.stamp
	@set -e; for module in $(BENCHMARKS); do echo "== $$module"; $(BIN)/python -m $$module; done

install: $(VENV)/run.stamp

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
