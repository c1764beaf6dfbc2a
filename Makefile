# Everything happens in .venv; a changed pyproject.toml or native source installs again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo lint test bench figures clean

setup: $(STAMP)

# The directories of src are here since the editable install knows the modules that were there when it was made.
$(STAMP): pyproject.toml CMakeLists.txt requirements.txt $(shell find native -type f) $(shell find src -type d -not -name __pycache__)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q -e '.[train,dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache
