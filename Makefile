# `make demo` and `make test` set everything up themselves and may be run again at any time.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help install install-training install-test demo figures gpu-check peers test test-minimum mutants lint

# For targets that have run setup_env.sh. Quoted: a checkout's path may hold spaces.
PYTHON_IN_ENV = "$$(scripts/setup_env.sh path)/bin/python"
DEMO := logs/demo
export MINIMUM_ENV ?= .venv-minimum

help:  ## This list
	@echo "LoTLIP: long text-image pre-training and retrieval"
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo "Environment: $$(scripts/setup_env.sh path) (an active virtualenv or conda environment is taken first)"

install: install-training  ## Same as install-training

install-training:  ## Install the package and what evaluation and training need
	@scripts/setup_env.sh training

install-test:  ## Install that and what the tests need
	@scripts/setup_env.sh test

demo:  ## Train a small LoTLIP and one on short captions only, compare them (minutes)
	@scripts/setup_env.sh demo
	$(PYTHON_IN_ENV) scripts/demo.py $(DEMO)

figures: install-training  ## Draw the figures from the recorded results in figures/
	$(PYTHON_IN_ENV) scripts/figures.py
	$(PYTHON_IN_ENV) scripts/method_figure.py
	$(PYTHON_IN_ENV) scripts/studies/report.py figures/{flickr8k,flickr8k_3epochs,flickr8k_2000,scenes,corner_probes}.json --out figures

gpu-check: install-test  ## Measure on one NVIDIA GPU within nine minutes (CPU=1: the same steps, shrunken)
	$(PYTHON_IN_ENV) -m benchmarks.gpu_check $(if $(CPU),--cpu --out logs)

peers: install-test  ## Time our commands beside open_clip's trainer and CLIP_benchmark
	$(PYTHON_IN_ENV) -m benchmarks.peers

test: install-test  ## Run all tests (CPU; GPU tests run where there is one)
	$(PYTHON_IN_ENV) -m pytest

test-minimum:  ## Run all tests with the oldest stated versions (7 GB in .venv-minimum, or MINIMUM_ENV=DIR)
	@scripts/setup_env.sh minimum
	"$(MINIMUM_ENV)/bin/python" -m pytest

mutants: install-test  ## Change loss, metrics, captions, packing and the CSV reader, each time run their tests (an hour)
	$(PYTHON_IN_ENV) -m mutmut run
	$(PYTHON_IN_ENV) -m mutmut results

lint: install-test  ## Check style and types
	$(PYTHON_IN_ENV) -m ruff format --check .
	$(PYTHON_IN_ENV) -m ruff check .
	$(PYTHON_IN_ENV) -m mypy
