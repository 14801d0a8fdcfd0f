# make demo   compress a real model and serve it, dense against 2:4, in one table
# make test   everything CI checks
# make report write docs/performance.md and the README's digest from benchmarks/results
# make venv   only the virtual environment with the package built in place
PYTHON ?= python3
VENV ?= .venv
# Where the CPU build of torch comes from when the configured package index does not have it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
MODEL ?=
DEMO_OUT ?= demo-out

BIN := $(VENV)/bin
# Most of what is installed is never imported, so it is compiled when it is.
PIP := $(BIN)/pip install -q --no-compile
DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
SOURCES := $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*) CMakeLists.txt cmake/cuda.cmake setup.py pyproject.toml

.PHONY: venv demo test lint format report clean
venv: $(VENV)/.dev

$(VENV)/.installed: requirements/build.txt requirements/$(DEVICE).txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(DEVICE),cpu)
	$(PIP) torch==2.13.0+cpu || $(PIP) torch==2.13.0+cpu --extra-index-url $(TORCH_INDEX)
endif
	$(PIP) -r requirements/build.txt -r requirements/$(DEVICE).txt
ifeq ($(DEVICE),cpu)
	# Not needed for text, and their CUDA builds beside a CPU torch break `import transformers`.
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
endif
	touch $@

# Without a GPU the CUDA part is compiled only for `make test`, which checks that it compiles.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(if $(filter cpu,$(DEVICE)),VLLM_SPARSE_CUDA=0) $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.cuda: $(VENV)/.built
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/.dev: $(VENV)/.built requirements/dev.txt requirements/oracle.txt
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/oracle -r requirements/oracle.txt
	touch $@

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py --out $(DEMO_OUT) $(if $(MODEL),--model $(MODEL))

test: lint $(VENV)/.cuda
	VLLM_SPARSE_ORACLE=$(VENV)/oracle $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h csrc/cuda/*.cuh tests/csrc/*.c*)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h csrc/cuda/*.cuh tests/csrc/*.c*)

report: $(VENV)/.dev
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf build $(VENV) $(DEMO_OUT) vllm_sparse/*.so *.egg-info
