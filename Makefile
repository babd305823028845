# `make demo` and `make test` need Python 3.11 or newer and a package index; each sets up what it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow teachers test-gpu coverage lint types docs kernels wheel-smoke demo-smoke check format clean

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready  ## the whole job on embedded images: distill, evaluate, write demo/report.html
	$(BIN)/cgspn demo

test: $(VENV)/.ready  ## the tests, in some minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m 'not slow'

test-slow: $(VENV)/.ready  ## those of whole runs: killed processes, several of them, exporters, programs in small
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m slow

test-gpu: $(VENV)/.ready  ## the tests that need a CUDA GPU
	$(BIN)/pip install --quiet -e '.[cuda]'
	$(BIN)/pytest -m gpu

coverage: $(VENV)/.ready  ## which lines `make test` reaches; writes coverage.xml
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m 'not slow' --cov --cov-report=term --cov-report=xml

lint: $(VENV)/.ready  ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready  ## static types
	$(BIN)/mypy

wheel-smoke: $(VENV)/.ready  ## build the wheel, install it in a clean environment, run the operator and the program
	$(BIN)/python scripts/wheel_smoke.py --torch '$(TORCH)'

demo-smoke: $(VENV)/.ready  ## the demo with a few steps
	$(BIN)/cgspn demo --out $(VENV)/demo-smoke --config.distill.stage1.steps 2 --config.distill.stage2.steps 2 \
	  --config.test-images 100 --config.probe-images 100

kernels: $(VENV)/.ready  ## compile every kernel for sm_80, sm_90 and sm_100, no GPU needed; run Triton's on the CPU
	$(BIN)/pip install --quiet -e '.[cuda]' triton
	$(BIN)/python scripts/check_kernels.py
	$(BIN)/python scripts/check_triton.py
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/ops/test_fused.py tests/layers/test_prepared.py
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/benchmarks/test_host.py

teachers: $(VENV)/.ready  ## every vision transformer that timm knows by name: parity, or a reason
	$(BIN)/pip install --quiet --no-deps timm  # alone, or it would bring another torch
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal tests/teachers/test_timm_sweep.py

docs: $(VENV)/.ready  ## the documentation site in build/site; fails on broken links
	$(BIN)/mkdocs build

check: lint types test test-slow docs kernels wheel-smoke demo-smoke  ## everything that CI runs

format:  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove the environment and what was made
	rm -rf $(VENV) build dist demo runs
