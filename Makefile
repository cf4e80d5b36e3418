# Every target sets up what it needs: .venv is made once and brought up to date when
# pyproject.toml changes. `make PYTHON=/path/to/python3.12 train` chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.13 python3.12 python3.11 python3
NPROC ?= auto
EXPERIMENT ?= quickstart
ARGS ?=
ROWS ?=
N ?=
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2

BIN := .venv/bin
STAMP := .venv/.installed
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
SAME_TORCH := import importlib.metadata as m; print("torch==" + m.version("torch"))
PYTEST := $(BIN)/python -m pytest -q -n 3

.PHONY: help train test test-exhaustive test-emulated test-slurm check check-static reliability bench \
  bench-peers zoo \
  gpu-check clean

help: ## show the targets
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@echo '  Variables of train: NPROC=$(NPROC) EXPERIMENT=$(EXPERIMENT) ARGS="key=value ..."'

train: $(STAMP) ## run the main job: CIFAR-10 on NPROC ranks; run it again to continue
	$(BIN)/dist-train run --nproc $(NPROC) experiment=$(EXPERIMENT) $(ARGS)

test: $(STAMP) ## run every test that needs no GPU and no cluster, but for the exhaustive ones
	$(PYTEST) -m "not exhaustive and not emulated and not slurm"

test-exhaustive: $(STAMP) ## every place of a failure in a step, many restarts, verify-resume: minutes each
	$(PYTEST) -m exhaustive

test-emulated: $(STAMP) ## what trains on the CPU in the other tests, on GPUs that are emulated
	$(PYTEST) -m emulated

test-slurm: $(STAMP) ## start a real SLURM cluster here and train on it
	@if [ "$$(id -u)" = 0 ] && ! PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); fi
	$(PYTEST) -m slurm

check: check-static ## before every commit: format, lint, types, fast tests
	$(PYTEST) -m "not slow and not exhaustive and not emulated and not slurm"

check-static: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

reliability: $(STAMP) ## inject faults and append what came of them: ROWS="R1 R8" N=100 (N=small: a few minutes)
	$(BIN)/python -m benchmarks.reliability run $(ROWS) $(if $(N),--n $(N)) $(ARGS)

bench: $(STAMP) ## this repository's measurements, on an idle machine: two hours (ARGS=scaling: one)
	failed=0; $(if $(ARGS),,$(MAKE) bench-peers || failed=$$?;) \
	  $(BIN)/python -m benchmarks run $(ARGS) || failed=$$?; \
	  $(BIN)/python -m benchmarks table --write; exit $$failed

bench-peers: .venv-peers/.installed ## what a step costs here, by hand and in other frameworks: an idle machine, an hour
	$(BIN)/python -m benchmarks.peers run $(ARGS) || failed=$$?; \
	  $(BIN)/python -m benchmarks.peers table --write; exit $${failed:-0}

zoo: $(STAMP) .venv-zoo/.installed ## train, stop and continue the networks of torchvision and timm: an hour, and it goes on
	failed=0; PYTHONPATH=.venv-zoo $(BIN)/python -m benchmarks.zoo run $(ARGS) || failed=$$?; \
	  $(BIN)/python -m benchmarks.zoo table --write; exit $$failed

gpu-check: ## on a GPU machine: a page of what it passes and reaches (PYTHON= an environment with torch)
	@python=; \
	if [ "$(origin PYTHON)" != file ] && $(PYTHON) -c 'import torch, hydra' 2>/dev/null; \
	then python=$(PYTHON); else $(MAKE) $(STAMP); python=$(BIN)/python; fi; \
	"$$python" -m benchmarks.gpu_check $(ARGS)

clean: ## delete the environment, caches and build products; runs/ stays
	rm -rf .venv .venv-peers .venv-zoo build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-peers/.installed: $(STAMP) benchmarks/peers/requirements.txt
	$(BIN)/python -m venv --clear .venv-peers
	$(BIN)/python -c '$(SAME_TORCH)' > .venv-peers/constraints.txt
	.venv-peers/bin/python -m pip install --quiet --constraint .venv-peers/constraints.txt \
	  --editable . -r benchmarks/peers/requirements.txt
	@touch $@

.venv-zoo/.installed: $(STAMP) benchmarks/zoo/requirements.txt # without what it depends on: torch stays
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-zoo \
	  -r benchmarks/zoo/requirements.txt
	@touch $@

$(STAMP): pyproject.toml
	@if ! $(BIN)/python -c '$(RECENT)' 2>/dev/null; then \
	  found=; \
	  for name in $(PYTHON); do \
	    if "$$name" -c '$(RECENT)' 2>/dev/null; then found=$$name; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'make: error: none of $(PYTHON) is a Python of version 3.11 or newer:' \
	      'install one, or name it: make PYTHON=/path/to/python3.12 ...' >&2; exit 1; \
	  fi; \
	  echo "making .venv with $$found ($$("$$found" --version))"; \
	  if ! "$$found" -m venv --clear .venv; then \
	    echo "make: error: $$found makes no virtual environment: install its venv package" \
	      "(on Debian and Ubuntu: python3-venv)" >&2; exit 1; \
	  fi; \
	fi
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
