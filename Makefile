# Two commands do everything on a machine that has Python >= 3.11 and pip: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
# Test processes beside each other: 2 take 16 minutes instead of 30 on two cores, but a browser may then lose patience.
WORKERS ?= 0

.PHONY: setup demo test lint schema clean

setup:
	@$(PYTHON) scripts/install.py

demo: setup
	@HF_HUB_OFFLINE=1 $(BIN)/model-composer run recipes/quickstart.yaml --yes

test: setup lint
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

schema: setup
	@$(BIN)/model-composer schema > recipes/recipe.schema.json

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache *.egg-info
