# make demo      set everything up and run the main job
# make test      set everything up and run the tests
# make quick     linters and the tests that need no compiler, no further process and no training
# make test-all  make test, and the GPU kernels without a GPU, lesser instruction sets, sanitizers
# PYTHON=python3.12 chooses the Python that .venv is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

CXX ?= g++
SANITIZE := build/sanitize
INSTRUCTION_SETS := baseline $(if $(filter x86_64,$(shell uname -m)),avx2 avx512 avx512bf16)

.PHONY: demo quick test test-all test-rest lint format docs bench sanitize gpu-static gpu-probe gpu-test gpu-sanitize gpu-bench gpu-conversion gpu-tune clean

demo: $(READY)
	$(BIN)/fastcaps demo

# Two processes, whose threads wait asleep: on two cores they would otherwise take each other's time.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
ROUTING_TESTS := tests/core/test_dynamic_routing.py tests/core/test_masks_and_priors.py

quick: lint
	$(PYTEST) -m "not (compiler or process or train or exhaustive or emulated or static or slow)"

test: $(READY)
	$(PYTEST) -m "not (emulated or static or slow)"

test-all: test test-rest sanitize

# What takes long. The GPU kernels without a GPU: their machine code, the CUDA ones in an emulation, the Triton ones in an
# interpreter. Then the CPU kernels for each instruction set below the best one that the processor has.
LESSER := default $(if $(shell grep -m1 avx512vl /proc/cpuinfo),avx2) $(if $(shell grep -m1 avx512_bf16 /proc/cpuinfo),avx512)

test-rest: $(READY)
	$(PYTEST) -m "emulated or slow"
	$(PYTEST) -m static --dist loadfile
	FASTCAPS_EMULATE_CUDA=1 $(PYTEST) $(ROUTING_TESTS)
	TRITON_INTERPRET=1 $(PYTEST) $(ROUTING_TESTS) tests/core/test_contracts.py
	for level in $(LESSER); do ATEN_CPU_CAPABILITY=$$level $(PYTEST) -m native $(ROUTING_TESTS) || exit 1; done

SOURCES := $(foreach kind,h cpp cu,$(wildcard csrc/*.$(kind) csrc/*/*.$(kind) tests/*/*.$(kind) benchmarks/*.$(kind)))

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python benchmarks/report.py --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

# The site, in build/site; a warning is an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/docs: requirements-docs.txt $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

# Every contestant at every size: about half an hour, on a machine that does nothing else.
bench: $(READY)
	$(BIN)/python -m pytest benchmarks --timeout 3600 \
	  --benchmark-json=benchmarks/results/cpu-$$($(BIN)/python benchmarks/machine.py)-2threads.json
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/report.py

# 10,000 random cases through the CPU kernels, built without Python under the address and undefined-behaviour sanitizers;
# 120 through the CUDA kernels in their emulation under the address sanitizer.
sanitize: sanitize-emulated_cuda $(INSTRUCTION_SETS:%=sanitize-%)

.PRECIOUS: $(SANITIZE)/%

sanitize-emulated_cuda: $(SANITIZE)/emulated_cuda
	$< 120

sanitize-%: $(SANITIZE)/%
	$< 2500

$(SANITIZE)/emulated_cuda: tests/support/kernels.cpp $(wildcard tests/support/*emulat* csrc/cuda/* csrc/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g1 -Wno-unknown-pragmas -fsanitize=address,alignment,bounds -fno-sanitize-recover=all \
	  --param asan-stack=0 -Icsrc -Itests/support -DFASTCAPS_SOURCE='"emulated_cuda.cpp"' $< -o $@

$(SANITIZE)/%: tests/support/kernels.cpp $(wildcard csrc/cpu/* csrc/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O0 -g1 -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all -DFASTCAPS_CHECK -Icsrc \
	  -DFASTCAPS_SOURCE='"cpu/$*.cpp"' $< -o $@

# What the compiler makes of the GPU kernels; needs no GPU.
gpu-static: $(READY)
	$(BIN)/python benchmarks/gpu_static.py --write
	$(BIN)/python benchmarks/cuda_static.py --write
	$(BIN)/python benchmarks/gpu_cycles.py --write

# On a machine with a GPU, offline, with the Python that is there (torch, triton, numpy, pytest); each at most 8 minutes.
GPU_PYTHON := PYTHONPATH=. timeout 480 $(PYTHON)
IF_THERE = $(shell $(PYTHON) -c 'import importlib.util as u; print("$(2)" if u.find_spec("$(1)") else "")')

gpu-probe:
	$(GPU_PYTHON) benchmarks/gpu_probe.py

# Twelve processes compile kernels at the same time, where pytest-xdist is installed.
gpu-test:
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(GPU_PYTHON) -m pytest $(call IF_THERE,xdist,-n 12) tests/gpu \
	  $(ROUTING_TESTS) $(addprefix tests/core/test_,contracts.py transforms.py tracing.py) \
	  tests/api/test_layers.py tests/api/test_trace.py -k "cuda or gpu"

gpu-sanitize:
	$(GPU_PYTHON) benchmarks/gpu_sanitize.py

# SHAPES="paper,J=1000" for some of them
gpu-bench:
	$(GPU_PYTHON) benchmarks/gpu_bench.py --shapes "$(SHAPES)"

# Published capsule layers before and after replace_capsules.
gpu-conversion:
	$(GPU_PYTHON) benchmarks/conversion.py --device cuda

# SIZES="B I J D_in D_out", e.g. the paper's layer
SIZES ?= 128 1152 10 8 16
gpu-tune:
	$(GPU_PYTHON) -m fastcaps tune $(SIZES)

clean:
	rm -rf $(VENV) build dist demo fastcaps/*.so fastcaps.egg-info

# A warning in a CUDA kernel is an error here, and so is a toolkit whose kernels end up missing.
$(READY): export NVCC_APPEND_FLAGS += -Werror all-warnings
$(READY): export FASTCAPS_CUDA ?= $(if $(shell command -v nvcc),1,auto)
$(READY): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastcaps needs Python 3.10 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
