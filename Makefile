# make test: lint and tests. make demo: the main job on real photos. Both install into .venv first; CPU is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: test lint demo clean

# torch first and by version: the newest one of the registry would bring gigabytes of CUDA along
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

demo: $(VENV)/.installed
	$(BIN)/python training/demo.py --output demo

clean:
	rm -rf $(VENV) build dist demo
