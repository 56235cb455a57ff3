# make demo   build everything and show a tri-mode model at work
# make test   build everything and run the tests
# Both create .venv and install torch into it if need be; only Python >= 3.10 and a C++ compiler must be there before.
#   PYTHON=python3.12   which Python makes .venv
#   JOBS=4              how many tests run side by side (default 2)
#   TORCH=torch==2.12.0 which torch to install (default: a CPU build where no NVIDIA GPU is found)

PYTHON ?= python3
TORCH ?=
JOBS ?= 2
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadscope
PIP := $(PY) -m pip --disable-pip-version-check
CSRC := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test emulated build lint kernels wheel-check clean

demo: build
	@.venv/bin/nld compare --demo

test: build
	@$(if $(PYTEST_ARGS),,$(MAKE) --no-print-directory emulated)
	@$(PYTEST) $(PYTEST_ARGS)

# The CUDA kernels on the CPU, a few cases of every test: under every order of threads and landing of copies, under the
# race checker, under AddressSanitizer and UBSan (whose libraries must be there before Python; torch leaks on purpose;
# --capture=sys, so that the report of a sanitizer that ends the process is seen).
ASAN := LD_PRELOAD="$(shell c++ -print-file-name=libasan.so) $(shell c++ -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0
emulated: build
	@$(PYTEST) --emulated plain --emulated-schedules --emulated-sample 1
	@$(PYTEST) --emulated checked --emulated-sample 1
	@$(ASAN) $(PYTEST) --capture=sys --emulated asan --emulated-sample 1 $(foreach op,attention attention_sm90 attention_cluster fp8 kv_cache sampler shards verify,tests/test_$(op).py)

build: .venv/.built

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "nld_cuda: Python >= 3.10 is needed, got " + sys.version.split()[0] + "; use make PYTHON=...")'
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "nld_cuda: a C++ compiler is needed, found none (Debian and Ubuntu: apt install g++)"; exit 1; }
	$(PYTHON) -m venv .venv

# Without a GPU a CPU build of torch saves gigabytes: first one that pip can see (a wheel folder), then PyTorch's own index.
.venv/.torch: | .venv/bin/python
	@$(PIP) install -q "setuptools>=64" wheel pybind11 cmake ninja
	@if $(PY) -c 'import torch; v = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])); assert v >= (2, 11)' 2>/dev/null; then :; \
	elif [ -n "$(TORCH)" ]; then $(PIP) install "$(TORCH)"; \
	elif nvidia-smi -L >/dev/null 2>&1; then $(PIP) install "torch>=2.11"; \
	else $(PIP) install -q "torch==2.13.0+cpu" 2>/dev/null \
	  || $(PIP) install -q --retries 1 --index-url https://download.pytorch.org/whl/cpu "torch>=2.11" 2>/dev/null \
	  || $(PIP) install "torch>=2.11"; fi
	@touch $@

.venv/.built: .venv/.torch $(CSRC)
	$(PIP) install -q --no-build-isolation -e ".[test,cli]"
	@$(PIP) install -q --no-deps nvidia-cutlass==4.2.0.0  # headers: tests/test_ptx.py compares our layouts with CuTe's
	@touch $@

.venv/.dev: .venv/.built
	@$(PIP) install -q -e ".[dev]" --no-build-isolation
	@touch $@

# Formatting and types.
lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs .venv/bin/clang-format --dry-run --Werror
	$(PY) -m mypy
	$(PY) scripts/readme_numbers.py --check

# Machine code of the CUDA kernels: no spills, the intended instructions and occupancy.
kernels: .venv/.dev
	$(PY) scripts/check_kernels.py

# Builds the wheel a user would get and checks its symbols and its manylinux tag.
wheel-check: .venv/.dev
	$(PY) scripts/check_wheel.py

clean:
	rm -rf build dist .venv python/*.egg-info python/nld_cuda/*.so
