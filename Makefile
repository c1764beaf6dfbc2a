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
	$(BIN)/pytest -n auto

# Two runs on one thread each: a sparse one that is watched, and beside it, the first time, the dense one to compare with.
DEMO := $(BIN)/rarefy train recipes/demo.yaml --set threads=1
demo: $(STAMP)
	@$(BIN)/python -c "from rarefy.data import fashion_mnist; fashion_mnist.load()"
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S); dense=runs/demo-dense; \
	if [ ! -e $$dense/summary.json ]; then \
	    rm -rf $$dense; $(DEMO) --set 'method={name: dense}' --set name=demo-dense --run $$dense --json >/dev/null 2>&1 & \
	fi; \
	$(DEMO) --run $$run >/dev/null && echo "waiting for the dense run" && wait && \
	$(BIN)/rarefy report $$run --baseline $$dense

bench: $(STAMP)
	$(BIN)/python benchmarks/overhead.py

figures: $(STAMP)
	$(BIN)/python benchmarks/alpha.py

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache
