# `make demo` and `make test` work on a fresh clone: they first build .venv, which takes a few minutes, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help docs docs-serve demo test test-vllm test-real test-newest test-package package lint venv clean

help:  ## This list.
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

demo: venv  ## Fit LoRA-Flow on the small world and compare.
	$(BIN)/loraflow demo

# Two workers of one thread each: torch would otherwise start as many threads as there are cores in both.
test: lint  ## Lint, then run all tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-vllm:  ## Test the vLLM plug-in, in an environment of its own.
	scripts/test_vllm.sh

test-real:  ## Go from info to serve on a real model, in an environment of its own.
	scripts/test_real.sh

test-newest:  ## Run the tests on the newest of every dependency, in an environment of its own.
	scripts/test_newest.sh

package:  ## Build wheel and source archive in dist/, and look at both.
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet 'build>=1.2' 'twine>=6.1'
	rm -rf dist
	.venv-package/bin/python -m build
	.venv-package/bin/python -m twine check --strict dist/*
	.venv-package/bin/python scripts/check_package.py

test-package:  ## Install the wheel of dist/ alone, in an environment of its own, and run the quick demo there.
	scripts/test_package.sh

docs: venv  ## Build the documentation site into site/; any warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: venv  ## Show the site while you write.
	$(BIN)/mkdocs serve

lint: venv  ## Style, docstrings against signatures, formatting, types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/flake8 src
	$(BIN)/mypy

venv: $(INSTALLED)  ## Install the library and its tests' tools in .venv.

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:  ## Remove .venv and all caches.
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache
