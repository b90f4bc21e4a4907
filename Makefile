# Every command a person or CI runs. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Which torch, and from which index. Empty: the index that pip is configured with.
# CPU only, from PyTorch's own index: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
CORPUS ?= tests/corpus/clips
KEEP ?=
SEED ?= 1
MINUTES ?= 20
BUDGET ?= 4
ALL ?=
AIRFLOW ?=
KUBECONFIG_FILE ?=
OUT ?= .train-nano
RANKS ?= 2
TRACKING ?=
SET ?=
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-stop demo-clean images helm-package test test-slow test-chaos test-cluster lint types layers check clean chaos bench bench-gpu bench-dataset train-nano

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make the environment in .venv (pinned; TORCH_INDEX=... chooses the source of torch)

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): Airflow, torch ($(TORCH)), pyiceberg, Great Expectations and the development tools,"
	@echo "about 230 packages, versions pinned in constraints.txt. On disk: 2.5 GB with a CPU build of torch,"
	@echo "6.5 GB with the CUDA build that the package index gives on Linux (TORCH_INDEX chooses, see above)."
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or run make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[airflow,worker,train,dev]"
	$(BIN)/python -m tests.helm.tools
	@du -sh $(VENV) | awk '{print "Installed: " $$1}'
	@touch $(STAMP)

demo: $(STAMP) ## Corpus -> bucket -> Airflow -> published token dataset (CORPUS=folder, KEEP=1 leaves it running)
	@$(BIN)/python -m hcodec_airflow.demo --corpus "$(CORPUS)" --state .demo --dags dags $(if $(KEEP),--keep)

demo-stop: $(STAMP) ## End a demo that was left running with KEEP=1
	@$(BIN)/python -m hcodec_airflow.demo --state .demo --stop

demo-clean: demo-stop ## Remove everything the demo wrote
	rm -rf .demo

test: $(STAMP) ## Run the tests, with one end-to-end run through a real Airflow and a real S3 endpoint
	$(BIN)/python -m pytest -m "not slow and not gpu and not chaos and not cluster"

test-slow: $(STAMP) ## Run the longer suites
	$(BIN)/python -m pytest -m "slow and not gpu and not chaos and not cluster"

test-chaos: $(STAMP) ## Run all named faults as tests, those of a real Airflow too (half an hour; ten of them are in make test-slow)
	$(BIN)/python -m pytest -m chaos

test-cluster: $(STAMP) ## Images, chart and DAG on a real Kubernetes (root; needs tests/cluster/build.sh once; KUBECONFIG_FILE=... for another cluster)
	HCODEC_CLUSTER_KUBECONFIG="$(KUBECONFIG_FILE)" $(BIN)/python -m pytest -m cluster -v tests/cluster

images: ## Build the worker and the Airflow image (docker/build.sh names the settings)
	docker/build.sh worker
	docker/build.sh airflow

helm-package: $(STAMP) ## Package the chart into dist/ (AIRFLOW=1 with Airflow's own chart as a dependency)
	$(BIN)/python -m tests.helm.package $(if $(AIRFLOW),--with-airflow)

chaos: $(STAMP) ## Break the pipeline on purpose and count rows: every named fault, and random ones for MINUTES (SEED=1 MINUTES=20)
	$(BIN)/python -m tests.chaos.harness --seed $(SEED) --minutes $(MINUTES)

bench-dataset: $(STAMP) ## Measure how the dataset layer scales; writes docs/benchmarks/dataset.md (minutes)
	$(BIN)/python -m tests.benchmarks.bench_dataset

bench: $(STAMP) ## Measure how fast codecs encode on the CPU, beside a plain loop and peers, and what feeds them; writes docs/benchmarks (8 minutes; BUDGET=1 less, ALL=1 every codec)
	$(BIN)/hcodec bench --device cpu --budget $(BUDGET) --feed $(if $(ALL),--all) --out docs/benchmarks

bench-gpu: $(STAMP) ## The same on a GPU, in ten minutes; fails where there is none
	$(BIN)/hcodec bench --device cuda --budget $(BUDGET) --out docs/benchmarks

train-nano: $(STAMP) ## Train hcodec-nano unattended (DATA=folder of audio, OUT=.train-nano, EVAL=folder to score on, SET="steps=8000 ..."); goes on where it stopped
	@[ -n "$(DATA)" ] || { echo "Name a folder of audio: make train-nano DATA=/audio/speech [OUT=folder] [EVAL=folder]"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m hcodec_core.training.launch --standalone --nproc-per-node $(RANKS) -m hcodec_core.cli train \
	  --recipe nano --data "$(DATA)" --data tests/corpus/clips --out "$(OUT)" --scratch "$(OUT)/scratch"$(if $(TRACKING), --tracking $(TRACKING)) \
	  --licence Apache-2.0 --resume $(foreach entry,$(SET),--set $(entry))
	$(if $(EVAL),$(BIN)/hcodec evaluate --codec "$(OUT)/codec" --audio "$(EVAL)" --against hcodec-nano --out "$(OUT)/evaluation")

lint: $(STAMP) ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy dags

layers: $(STAMP) ## import-linter: who may import whom
	$(BIN)/lint-imports

check: lint types layers ## All static checks

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
