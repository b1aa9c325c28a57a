# Every target builds the environment it needs; nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# Two stamps, so that the demo of a newcomer does not wait for the peers that only tests and benchmarks need.
$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@ $(VENV)/.run

demo: $(VENV)/.run ## Train, search and verify on real handwritten digits; writes vitembed-demo/report.html
	$(BIN)/vitembed demo

# A process a core: the networks are so small that threads would only wait for each other.
test: $(VENV)/.dev ## Run the whole test suite and print the line coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/.dev ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# benchmarks/merging.py is not among them: it needs a trained model and images.
bench: $(VENV)/.dev ## Compare results, speed and memory with the peers (minutes; merging.py needs a trained model)
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/files.py

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage
