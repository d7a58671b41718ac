# `make demo` and `make test` set up everything they need in .venv; a second run starts within seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CMAKE_BUILD := build/cmake
CONFIGURE = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DLOFTQ_TESTS=ON \
	-DCMAKE_COMPILE_WARNING_AS_ERROR=ON
# The library with its CUDA kernels, for one architecture: a test compiles them for all of them, and looks at the result.
TEST_CUDA := $(if $(shell command -v nvcc),-DLOFTQ_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90-real)

# The number of compilers that run at once: each needs about 1 GB of memory for a file of kernels.
export MAX_JOBS ?= 2

# Other versions than that of constraints.txt, which make test has: the oldest that we are written for, and the newest.
TRANSFORMERS ?= 5.20.2 5.24.0
HOST_TESTS := python_tests/test_transformers.py python_tests/test_huggingface.py python_tests/test_generate.py \
	python_tests/test_trainer.py python_tests/test_serve.py
GPU_JOBS ?= $(shell nproc)
# Where measurements go. The committed ones are in bench/results: `python -m bench SUBJECT --publish`, and for make gpu
# RESULTS=bench/results.
RESULTS ?= bench-results
SUBJECTS ?= quantize cpu init overhead

SOURCES := setup.py $(shell find csrc -path csrc/tests -prune -o -type f -print)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-python test-cpp test-versions sanitize memcheck lint bench bench-compare gpu gpu-build gpu-test hf-kernel build wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      quantize a real model, print and plot what that does to it"
	@echo "make test      all tests: pytest, and the C++ tests by CTest"
	@echo "make test-versions  the tests of transformers' calls with TRANSFORMERS=\"$(TRANSFORMERS)\""
	@echo "make sanitize  the C++ tests with the address and undefined behaviour sanitizers"
	@echo "make memcheck  the tests of the CPU kernels under valgrind: the scalar instruction set"
	@echo "make lint      check style: ruff, clang-format"
	@echo "make bench     measure SUBJECTS=\"$(SUBJECTS)\" into RESULTS=$(RESULTS); python -m bench lists all subjects"
	@echo "make bench-compare  time the kernels and compare with the last commit that this was done for"
	@echo "make gpu       build, tests and benchmarks on a CUDA device within nine minutes; RESULTS=folder"
	@echo "make gpu-test  the tests that need a CUDA device, with the torch of PYTHON=$(PYTHON)"
	@echo "make hf-kernel the Triton kernels as a kernel of the Hugging Face Hub, in dist/hf-kernel"
	@echo "make build     the C++ extension alone"
	@echo "make wheel     a wheel for every Python on this kind of machine, in dist/"
	@echo "make clean     remove what was built (.venv stays)"

demo: $(VENV)/.demo $(VENV)/.ext
	@echo "==> Running the demo"
	@$(BIN)/loftq-kernels demo --overwrite

test: test-python test-cpp

test-python: $(VENV)/.dev $(VENV)/.ext
	@echo "==> Running the Python tests"
	@$(BIN)/python -m pytest -q python_tests

test-cpp: $(VENV)/.dev
	@echo "==> Building the C++ tests"
	@$(CONFIGURE) -B $(CMAKE_BUILD) $(TEST_CUDA) > $(VENV)/cmake.log || { cat $(VENV)/cmake.log; exit 1; }
	@$(BIN)/cmake --build $(CMAKE_BUILD) --parallel $(MAX_JOBS) -- --quiet
	@echo "==> Running the C++ tests"
	@$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure

# Each version is installed alone, beside what constraints.txt names: versions of its own dependencies have to fit.
test-versions: $(VENV)/.dev $(VENV)/.ext
	@for version in $(TRANSFORMERS); do \
		[ -d build/transformers-$$version ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
			--no-deps --target build/transformers-$$version transformers==$$version || exit 1; \
		echo "==> Testing with transformers $$version"; \
		PYTHONPATH=build/transformers-$$version $(BIN)/python -m pytest -q $(HOST_TESTS) || exit 1; \
	done

# Finds what reads undefined memory or goes one element too far, even where the results come out right.
sanitize: $(VENV)/.dev
	@$(CONFIGURE) -B $(CMAKE_BUILD)-sanitize -DLOFTQ_SANITIZE=ON > $(VENV)/cmake.log || { cat $(VENV)/cmake.log; exit 1; }
	@$(BIN)/cmake --build $(CMAKE_BUILD)-sanitize --parallel $(MAX_JOBS) -- --quiet
	@$(BIN)/ctest --test-dir $(CMAKE_BUILD)-sanitize --output-on-failure

# valgrind does not support AVX-512, but the scalar kernels share most of their code with the other instruction sets.
memcheck: test-cpp
	@for test in pack half quantize linear refusal; do \
		echo "==> valgrind $${test}_test"; \
		LOFTQ_CPU_ISA=scalar valgrind --quiet --error-exitcode=1 $(CMAKE_BUILD)/csrc/tests/$${test}_test || exit 1; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
		xargs $(BIN)/clang-format --dry-run -Werror

bench: $(VENV)/.dev $(VENV)/.ext
	$(BIN)/python -m bench $(SUBJECTS) --output $(RESULTS)

# pytest-benchmark keeps the figures of each run in .benchmarks, named by commit.
bench-compare: $(VENV)/.dev $(VENV)/.ext
	$(BIN)/python -m pytest -q bench --benchmark-autosave --benchmark-compare --benchmark-columns=min,median,iqr,rounds

build: $(VENV)/.ext

# What is compiled already is not compiled again.
wheel: $(VENV)/.dev $(VENV)/.ext
	@echo "==> Building a wheel"
	@$(BIN)/python tools/wheel.py

# These use the packages that PYTHON has already, because this Makefile cannot choose a CUDA build of torch. Without
# ninja the files are compiled one after another; without nvcc the extension is built without CUDA. Tests that need more
# packages (safetensors, hypothesis, ...) are skipped where those are missing.
# Builds for the architecture of the device only, with as many compilers as there are processors.
gpu-build:
	@for module in torch triton numpy setuptools pytest; do \
		$(PYTHON) -c "import $$module" 2> /dev/null || \
			{ echo "make gpu-build: $(PYTHON) cannot import $$module; it needs torch, triton, numpy, setuptools and pytest"; exit 1; }; \
	done
	@$(PYTHON) -c 'import setuptools; raise SystemExit(int(setuptools.__version__.split(".")[0]) < 77)' || \
		{ echo "make gpu-build: pyproject.toml needs setuptools 77 or newer"; exit 1; }
	@$(PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2> /dev/null || \
		{ echo "make gpu-build: $(PYTHON) has no torch that sees a CUDA device; set PYTHON to one that does"; exit 1; }
	@echo "==> Building the C++ extension for CUDA"
	@TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
		MAX_JOBS=$(GPU_JOBS) $(PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	@echo "==> Running the tests that need a CUDA device"
	@PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu python_tests

# Everything within nine minutes, the build included; see bench/gpu_hour.py. With ARGS=--dry-run it shows the plan.
gpu:
	@PYTHONPATH=. PYTHONUNBUFFERED=1 $(PYTHON) -m bench.gpu_hour --output $(RESULTS) $(ARGS)

hf-kernel:
	@$(PYTHON) hub/build.py dist/hf-kernel
	@echo "dist/hf-kernel: see docs/vendoring.md"

clean:
	rm -rf build dist *.egg-info loftq_kernels/*.so demo-output $(VENV)/.ext

# ---- set-up: a stamp file says that a step has been done for the files that it depends on

$(BIN)/python:
	@$(PYTHON) -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' || \
		{ echo "loftq_kernels needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..."; exit 1; }
	@echo "==> Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed: is the venv module installed?"; rm -rf $(VENV); exit 1; }

# torch comes first and with its exact version: packages that depend on it must not choose another build of it, which
# may be gigabytes larger.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "==> Installing torch (some hundred megabytes) and the build tools"
	@$(PIP) torch numpy setuptools ninja
	@rm -rf build/temp.* loftq_kernels/*.so
	@touch $@

$(VENV)/.ext: $(VENV)/.torch $(SOURCES)
	@echo "==> Building the C++ extension (a minute or two)"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The extension is built above, incrementally. These targets install what the package and its users import.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "==> Installing loftq_kernels (editable) and what the demo needs"
	@LOFTQ_SKIP_EXT=1 $(PIP) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "==> Installing loftq_kernels (editable) and the development tools"
	@LOFTQ_SKIP_EXT=1 $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.demo
