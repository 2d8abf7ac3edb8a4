# On a machine with Python >= 3.10 and pip, each target first makes .venv and installs what it needs there, once. The native
# ops are built along with it, where a C++ compiler is, and again when their sources have changed.
#   make demo ARGS="..."           run examples/pretrain.py
#   make test PYTEST_ARGS="..."    run the tests, but for the slow ones
#   make test-all                  run all of them, with llama.cpp where npm is
#   make sweep                     build all architectures of transformers, tiny, and run all methods on each (nightly)
#   make coverage                  run them with coverage of lines and branches, child processes included
#   make mutants                   put one fault at a time into the code, and see that the tests of its package catch it
#   make test-oldest               run a third with the oldest transformers, peft, accelerate and trl that setup.py admits
#   make test-newest               run it with the newest ones there are
#   make lint                      ruff, mypy and the warnings of the C++ compiler
#   make kernels                   compile the CUDA sources for all architectures, where nvcc is
#   make install                   .venv for development (what test and lint need)
#   make clean                     remove what builds and tests leave behind; .venv stays
# Another Python: make test PYTHON=python3.12
# Tests run in the order of the files: by their number of tests, xdist would start the long launches last and wait for one.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
NATIVE := hf_galore/native.py $(wildcard hf_galore/csrc/*.h hf_galore/csrc/*/*)
CXX_LINT = -std=c++17 -fvisibility=hidden -Wall -Wextra -Werror -DTORCH_TARGET_VERSION=0x020a000000000000 \
	-isystem $(firstword $(wildcard $(VENV)/lib/python3*/site-packages/torch/include))
TORCH := $(shell grep '^torch==' constraints.txt)
# DeepSpeed is installed without compiling anything: what it needs it compiles when it is first used.
PIP_INSTALL := DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python

.PHONY: demo test test-all coverage mutants test-oldest test-newest sweep llama-cpp lint kernels install clean

demo: $(VENV)/.demo
	$(BIN)/python examples/pretrain.py $(ARGS)

test: $(VENV)/.dev
	$(TEST) -m pytest tests $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	@if command -v npm > /dev/null; then $(MAKE) llama-cpp; else echo "make test-all: there is no npm, and so no llama.cpp"; fi
	$(TEST) -m pytest tests $(PYTEST_ARGS) -m "slow or not slow"

coverage: $(VENV)/.dev
	$(BIN)/coverage erase
	$(TEST) -m coverage run -m pytest tests $(PYTEST_ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --show-missing

mutants: $(VENV)/.dev
	$(TEST) tests/mutants/run.py --jobs 2 $(MUTANTS_ARGS)

sweep: $(VENV)/.dev
	$(TEST) tests/sweep.py --jobs 2 $(SWEEP_ARGS)

# The package carries a llama.cpp that has been built; on other platforms its parts have other names.
llama-cpp: build/llama-cpp/node_modules/node-llama-cpp

build/llama-cpp/node_modules/node-llama-cpp:
	npm install --prefix build/llama-cpp --no-save --ignore-scripts --no-audit --no-fund --omit=optional \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

test-oldest test-newest: test-%: $(VENV)/.dev
	$(TEST) tests/versions.py $* $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for file in hf_galore/csrc/cpu/*.cpp; do $(CXX) -fsyntax-only $(CXX_LINT) $$file || exit; done

kernels: $(VENV)/.dev
	@if command -v nvcc > /dev/null; then $(BIN)/python setup.py -q kernels; \
	else echo "make kernels: there is no nvcc here, so the CUDA sources are not compiled"; fi

install: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("hf_galore needs Python 3.10 or newer, \
	$(PYTHON) is " + sys.version.split()[0] + ": choose another one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP_INSTALL) "$(TORCH)"
	touch $@

$(VENV)/.demo: setup.py pyproject.toml constraints.txt $(NATIVE) $(VENV)/.torch
	$(PIP_INSTALL) -e ".[demo]"
	touch $@

$(VENV)/.dev: setup.py pyproject.toml constraints.txt $(NATIVE) $(VENV)/.torch
	$(PIP_INSTALL) -e ".[test,lint]"
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV)-oldest $(VENV)-newest hf_galore/_native_* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
