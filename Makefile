# make demo    set everything up and run the main job
# make test    set everything up and run the tests
# PYTHON=python3.12 chooses the Python that .venv is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint format gpu-probe clean

demo: $(READY)
	$(BIN)/fastcaps demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# On a machine with a GPU, offline, with the Python that is there (it needs torch, numpy and pytest).
gpu-probe:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_probe.py

clean:
	rm -rf $(VENV) build dist demo fastcaps/*.so fastcaps.egg-info

$(READY): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastcaps needs Python 3.10 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
