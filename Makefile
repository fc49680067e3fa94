PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
S3_INSTALLED := .venv-s3/.installed
INFRA_INSTALLED := .venv-infra/.installed
TOOLS_INSTALLED := .venv-supply/.installed
SUPPLY := infra/supply

# Processes that share the tests, a module at a time: one more than two cores, since some always wait for a server.
JOBS ?= 3
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
FORM ?= short
.PHONY: help bench setup s3-server infra-tools lock audit sbom images stack stack-down stack-status deploy demo repro study test test-distributed \
	test-stack soak check format clean

help: ## Lists the targets
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 18

setup: $(INSTALLED) ## Installs the locked packages into .venv; TORCH=cpu or TORCH=pypi chooses the build of torch

$(INSTALLED): requirements.lock $(SUPPLY)/build.lock $(SUPPLY)/torch.lock $(SUPPLY)/torch-cpu.lock
	@echo "Installing $$(grep -c == requirements.lock) packages into .venv; this takes some minutes ..."
	@$(PYTHON) -m venv .venv
	@TORCH=$(TORCH) $(SUPPLY)/install_product.sh .venv
	@touch $@

s3-server: $(S3_INSTALLED) ## Installs the local S3 server into .venv-s3

$(S3_INSTALLED): infra/s3_server/requirements.lock
	@echo "Installing $$(grep -c == infra/s3_server/requirements.lock) packages into .venv-s3 ..."
	@$(PYTHON) -m venv .venv-s3
	@$(SUPPLY)/install.sh .venv-s3 infra/s3_server/requirements.lock
	@touch $@

infra-tools: $(INFRA_INSTALLED) ## Installs the tools that validate infra into .venv-infra

$(INFRA_INSTALLED): infra/requirements.lock
	@echo "Installing $$(grep -c == infra/requirements.lock) packages into .venv-infra ..."
	@$(PYTHON) -m venv .venv-infra
	@$(SUPPLY)/install.sh .venv-infra infra/requirements.lock
	@touch $@

$(TOOLS_INSTALLED): $(SUPPLY)/tools.lock
	@echo "Installing $$(grep -c == $(SUPPLY)/tools.lock) packages into .venv-supply ..."
	@$(PYTHON) -m venv .venv-supply
	@$(SUPPLY)/install.sh .venv-supply $(SUPPLY)/tools.lock
	@touch $@

lock: $(TOOLS_INSTALLED) ## Makes the locks from requirements.in and the others; OPTIONS=--upgrade takes the newest versions
	@.venv-supply/bin/python -m infra.supply.lock $(OPTIONS)

audit: $(TOOLS_INSTALLED) ## Looks the locked packages up in PyPI's list of known vulnerabilities
	@.venv-supply/bin/python -m infra.supply.audit

sbom: setup $(TOOLS_INSTALLED) ## Writes what is in .venv to sbom.cdx.json, a CycloneDX bill of materials
	@.venv-supply/bin/cyclonedx-py environment --output-reproducible --output-file sbom.cdx.json .venv/bin/python

images: ## Pins every image to the digest that its registry has now; needs Docker
	@$(PYTHON) -m infra.supply.images --pin

bench: setup ## Times an update beside its bare arithmetic; on a GPU, SD3.5-M with random weights
	@$(BIN)/python -m benchmarks.update

stack: setup s3-server ## Starts PostgreSQL, S3, MLflow, Prefect and a worker on this machine
	@$(BIN)/python -m infra.stack up

stack-down: setup ## Stops them; their data are kept
	@$(BIN)/python -m infra.stack down

stack-status: setup ## Shows how they are
	@$(BIN)/python -m infra.stack status

# What the last line of a program that was stopped says to start again. Exported here and not in a recipe's line, whose
# shell would not wait for the program after Ctrl-C.
demo: export STARTED_BY := make demo
demo: setup ## Trains, evaluates and registers a policy
	@$(BIN)/python -m flows.train_policy

repro: export PATH := $(CURDIR)/$(BIN):$(PATH)
repro: setup ## Brings the DVC stages up to date without Prefect
	@$(BIN)/dvc repro

deploy: setup ## Registers the deployments at the Prefect server of PREFECT_API_URL
	@$(BIN)/python -m flows.deploy

study: export STARTED_BY := make study$(if $(filter-out short,$(FORM)), FORM=$(FORM))
study: setup ## Compares Stepwise-Flow-GRPO with Flow-GRPO; FORM=long for the long form
	@$(BIN)/python -m flows.study $(FORM)

test: setup s3-server infra-tools ## Runs every test but those of test-stack
	@$(PYTEST) -m "not stack"

test-distributed: setup ## Runs the tests that start several processes
	@$(BIN)/python -m pytest -m distributed

test-stack: setup s3-server ## Runs the tests of the local stack, which need PostgreSQL
	@$(BIN)/python -m pytest -m stack

soak: setup s3-server ## Trains under fire: kills, outages and preemptions for half an hour
	@$(BIN)/python -m benchmarks.soak

check: setup ## Checks format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup ## Formats the code and applies safe lint fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Removes caches, logs and resumable state; keeps .venv, results and the MLflow store
	@rm -rf .scratch .mypy_cache .pytest_cache .ruff_cache logs
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
