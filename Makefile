# make setup   virtual environment, pinned requirements, build
# make test    set-up, then the tests
# make bench   set-up, then the comparison with torch: tables, CSV and PNG in bench-results/
# make docs    the documentation site in build/site
# make profile where the cycles of a tile go, piece by piece, for each instruction set
# make check   everything else that must hold: linters, layering, symbols, sanitizers, every ISA, packages, documents
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup test bench docs profile check check-docs check-lint check-native check-simt check-cuda cuda-module \
	check-isa check-package check-torch check-arm format clean help

VENV := .venv
PYTHON := $(VENV)/bin/python
# Test processes; each limits torch to one thread unless a test says otherwise (tests/conftest.py).
JOBS ?= 2
# Every variant below the best one, which `make test` runs. The binary knows what this machine has.
LOWER_ISAS = $$($(PYTHON) -c 'from attnfast._ext import _C; print(*_C.available_isas()[:-1])')
# Tests that use whatever variant is in force; the semantics tests go through all variants by themselves.
ISA_TESTS := tests/test_isa.py tests/test_autograd.py tests/test_opinfo.py tests/test_threads.py
# A change of one of these builds again; Ninja then compiles only what it concerns.
CPP_SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(shell find csrc tests/native tests/simt tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(VENV)/.built

$(VENV)/.created:
	tools/make_venv.sh $(VENV)
	touch $@

$(VENV)/.requirements: requirements-dev.txt requirements-no-deps.txt $(VENV)/.created
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	$(PYTHON) -m pip install --disable-pip-version-check --quiet --no-deps -r requirements-no-deps.txt
	touch $@

$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.requirements
	$(PYTHON) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.built: $(CPP_SOURCES) $(VENV)/.installed
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

test: setup
	$(PYTHON) -m pytest -n $(JOBS) -q

bench: setup
	$(PYTHON) -m attnfast bench --out bench-results

# Broken links, unknown anchors and pages outside of the navigation are errors (mkdocs.yml), but not with --quiet, under
# which mkdocs counts no warnings. The variable keeps the theme from advertising its successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

profile: setup
	$(PYTHON) tools/profile_kernels.py

check: check-lint check-docs check-native check-simt cuda-module check-cuda check-isa check-package
	@echo "make check: all good"

check-lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	$(PYTHON) -m pytest -q tests/test_layering.py
	$(PYTHON) tools/check_symbols.py

# The site as a browser would see it: nothing loaded from elsewhere, every public name in its place.
check-docs: docs
	$(PYTHON) tools/check_site.py

# The kernels in a program of their own, once per sanitizer.
check-native: setup
	$(PYTHON) tools/native_tests.py address thread

# The same program for 64-bit ARM under QEMU. Not part of `make check`: it needs a cross compiler and the emulator (Debian:
# g++-aarch64-linux-gnu, qemu-user-static).
check-arm: setup
	$(PYTHON) tools/native_tests.py none --cross aarch64-linux-gnu --emulator qemu-aarch64-static --cases 150

# The CUDA kernels on the CPU, under the SIMT emulator, and the proof that its checks find bugs.
check-simt: setup
	$(PYTHON) tools/simt_tests.py none address thread

# Where nvcc is: attnfast._cuda, built apart and loaded, for every GPU if kernels or compiler are not those of the budget.
# Nothing runs on a GPU.
cuda-module: setup
	$(PYTHON) tools/cuda_module.py

# What the compiler made of the kernels in it: registers, memory, occupancy, instructions; and the page that quotes them.
check-cuda: setup
	$(PYTHON) tools/cuda_budget.py
	$(PYTHON) tools/roofline.py

# The variable itself, and the lower variants in tests that do not choose one.
check-isa: setup
	for isa in $(LOWER_ISAS); do \
	  echo "ATTNFAST_ISA=$$isa"; ATTNFAST_ISA=$$isa $(PYTHON) -m pytest -n $(JOBS) -q $(ISA_TESTS); \
	done

# sdist, wheel from the sdist in an isolated build, installed and used outside the repository.
check-package: setup
	$(PYTHON) tools/check_package.py

# One wheel under the ends of the range of torch versions. Not part of `make check`: the first time it downloads 1.5 GB,
# which stay in build/torch-versions.
check-torch: setup
	$(PYTHON) tools/check_torch_versions.py

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info attnfast/_C*.so attnfast/_cuda*.so $(VENV)/.installed $(VENV)/.built
