# SPDX-License-Identifier: Apache-2.0
# Every target creates the environment when it is missing; see .ci/env.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Nothing here downloads a model, and compiling the rotary embedding on a CPU costs more than it gives.
OFFLINE := HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1
# Tiny models: a second thread spends its time waiting for the first.
TEST := $(OFFLINE) OMP_NUM_THREADS=1
WORKERS := -n 2 --durations=10
PYTHON = python=$$(.ci/env); PATH="$$PWD/.venv/bin:$$PATH"
ARGS ?=
GPU_PYTHON ?=

.PHONY: help which-python dev test test-unit test-families test-long test-compile test-gpu upgrade-check check format demo bench bench-parts quality train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' Makefile

which-python: ## print the interpreter of the environment (use make -s)
	@.ci/env

dev: ## create the environment, about 11 GB and 7 minutes the first time
	@.ci/env >/dev/null
	@echo "Ready: source .venv/bin/activate"

test: test-unit ## unit tests, then real servers on this machine's CPU
	@$(PYTHON); $(TEST) "$$python" -m pytest tests/integration -m "not gpu and not families and not long" -v $(WORKERS) \
	  --dist loadgroup --no-loadscope-reorder $(ARGS)

test-unit: ## the tests that start no server; the kernels run in Triton's interpreter
	@$(PYTHON); $(TEST) TRITON_INTERPRET=1 "$$python" -m pytest tests/unit/kernels -m "not gpu and not slow" $(WORKERS) --dist worksteal $(ARGS)
	@$(PYTHON); $(TEST) "$$python" -m pytest tests/unit --ignore=tests/unit/kernels -m "not gpu" $(WORKERS) --dist worksteal $(ARGS)

test-families: ## every model family beside stock SGLang and Transformers, in all shapes; about an hour
	@$(PYTHON); $(TEST) "$$python" -m pytest tests/integration/test_family_matrix.py -m "not gpu" -v $(WORKERS) \
	  --dist loadgroup --no-loadscope-reorder $(ARGS)

test-long: ## what `make test` leaves out for its time alone
	@$(PYTHON); $(TEST) "$$python" -m pytest tests/integration -m "long and not gpu" -v $(ARGS)

test-compile: ## the kernels in all shapes for all kinds of GPU, without one; half an hour
	@$(PYTHON); $(TEST) "$$python" -m pytest tests/unit/kernels/test_compile.py -m "not gpu" $(WORKERS) --dist worksteal $(ARGS)

# Nothing of pyproject.toml: it asks for plugins that another interpreter may not have.
test-gpu: ## the tests that need an NVIDIA GPU; GPU_PYTHON=python3 where that has torch and triton
	@python="$(GPU_PYTHON)"; [ -n "$$python" ] || python=$$(.ci/env); \
	PYTHONPATH=kernels:. "$$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib \
	  tests/gpu tests/unit/policy -m gpu $(ARGS)

# What it prints and what to do then: docs/upgrading.md.
upgrade-check: ## another SGLang release beside this one, what moved, does it run; VERSION=0.5.24 [DIFF=1]
	@$(PYTHON); $(TEST) "$$python" -m tests.upgrade "$(VERSION)" $(if $(DIFF),--diff) --unit-flags="$(WORKERS) $(ARGS)"

check: ## ruff and mypy
	@$(PYTHON); "$$python" -m ruff check .; "$$python" -m ruff format --check .; "$$python" -m mypy

format: ## let ruff rewrite the sources
	@$(PYTHON); "$$python" -m ruff check --fix .; "$$python" -m ruff format .

demo: ## a small model, with and without compression, on this machine's CPU
	@$(PYTHON); $(OFFLINE) "$$python" -m examples.demo $(ARGS)

bench: ## real servers by batch and prompt length; ARGS=--capacity, ARGS="--preset table3", ARGS=--help
	@$(PYTHON); $(OFFLINE) "$$python" -m benchmarks.throughput $(ARGS)

bench-parts: ## attention, the compression pass and the overhead of a step, without a server
	@$(PYTHON); "$$python" -m benchmarks $(ARGS)

quality: ## what compression does to answers; ARGS="--grid table5", --help
	@$(PYTHON); $(OFFLINE) "$$python" -m benchmarks.quality $(ARGS); "$$python" -m benchmarks.quality report

train: ## train the model that reads pages, about an hour and a half on two cores; ARGS=--help
	@$(PYTHON); $(OFFLINE) "$$python" -m benchmarks.documents.train $(ARGS)

clean: ## remove .venv and caches of this checkout; the shared base environment stays
	@rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
