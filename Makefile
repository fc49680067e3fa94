PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
FORM ?= short
.PHONY: help setup demo repro study test test-distributed check format clean

help: ## Lists the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

setup: $(INSTALLED) ## Installs the locked packages into .venv

$(INSTALLED): requirements.lock
	@echo "Installing $$(grep -c == requirements.lock) packages into .venv; this takes some minutes ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

demo: setup ## Trains, evaluates and registers a policy
	@$(BIN)/python -m flows.train_policy

repro: setup ## Brings the DVC stages up to date without Prefect
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro

study: setup ## Compares Stepwise-Flow-GRPO with Flow-GRPO; FORM=long for the long form
	@$(BIN)/python -m flows.study $(FORM)

test: setup ## Runs every test
	@$(BIN)/python -m pytest -m "not distributed"
	@$(MAKE) --no-print-directory test-distributed

test-distributed: setup ## Runs the tests that start several processes
	@$(BIN)/python -m pytest -m distributed

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
