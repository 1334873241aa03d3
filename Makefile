# Every developer command. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export QUESTION ?= What is the capital of France?

.DEFAULT_GOAL := help
.PHONY: help install dev run test sim planted-bugs bench bench-kernel lint types imports packaging contract promises check clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("llm-os needs Python 3.11 or newer; set PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing llm-os into $(VENV) (torch is 200 MB: a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed ## create .venv and install llm-os into it

dev: $(VENV)/.dev ## the same, with what development needs

run: install ## pull a small model and answer QUESTION="..."
	@$(BIN)/llm-os run smollm2:135m "$$QUESTION" --temperature 0

test: dev ## run the tests
	@$(BIN)/python -m pytest

sim: dev ## run the kernel in a simulated world full of faults: 300 seeds, some 300,000 steps
	@$(BIN)/llm-os sim --seeds 1..300 --steps 1000 --faults all --jobs 2

planted-bugs: dev ## bugs planted in copies of the kernel: the simulator must find each
	@$(BIN)/python tests/planted_bugs.py

bench: dev ## this project beside llama.cpp, OpenVINO and CTranslate2 (their environments take minutes, once); BENCH=--quick
	@$(BIN)/python tests/benchmarks/peers $(BENCH)

bench-kernel: dev ## what the kernel itself costs: simulated steps a second, time of a step, bytes of tables, hooks
	@$(BIN)/python tests/benchmarks/kernel.py
	@$(BIN)/python tests/benchmarks/hooks.py

lint: dev ## ruff, formatting included
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: dev ## mypy, strict
	@$(BIN)/mypy

imports: dev ## the rooms' import rules
	@$(BIN)/lint-imports

packaging: dev ## the wheel, the facade, and what may not be installed
	@$(BIN)/python -m pytest --quiet tests/test_packaging.py

promises: dev ## whether plugins still get what the contract of this version promises
	@$(BIN)/python tests/contract.py

contract: dev ## write down what the contract promises now; refuses what would break plugins
	@$(BIN)/python tests/contract.py --write

check: lint types imports packaging promises ## what CI runs beside the tests

clean: ## remove caches and build products, not the virtual environment
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
