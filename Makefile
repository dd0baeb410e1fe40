# make test: lint and tests. make demo: the main job on real images. make lowest: tests with the lower bounds of all
# dependencies. make docs: the site. make notebooks: docs/notebooks with new outputs. make release: the archives, tried in
# an empty environment. Each installs into an environment of its own first; a CPU is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
DOCS := .venv-docs
RELEASE := .venv-release
NOTEBOOKS := .venv-notebooks
TORCH := torch==2.13.0
# three at a time on two cores: many tests wait for a process, a server or a kill
RUN := -m pytest -n 3 --dist loadgroup -m "not network and not gpu"
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# commands that tests start share the cores
tests lowest: export OMP_NUM_THREADS = 1

.PHONY: test tests lint bounds lowest demo docs notebooks release clean

# torch first and by version: the newest one of the registry would bring gigabytes of CUDA along
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# torch stays at the version above: its older ones in the registry bring CUDA along. A workflow tests its lower bound.
$(LOWEST)/.installed: pyproject.toml tests/lower_bounds.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet $(TORCH)
	$(LOWEST)/bin/python tests/lower_bounds.py torch > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet $(TORCH) -r $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

tests: $(VENV)/.installed
	$(BIN)/python $(RUN)

test: lint tests

# whether the lower bounds can be installed together; installs nothing
bounds: $(VENV)/.installed
	$(BIN)/python tests/lower_bounds.py torch > $(VENV)/lower_bounds.txt
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed $(TORCH) -r $(VENV)/lower_bounds.txt

lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python $(RUN)

demo: $(VENV)/.installed
	$(BIN)/python training/studies/demo.py --output demo

# no torch here: the reference is read from the files
$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

# writes site/; needs no network once the packages are installed
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(NOTEBOOKS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NOTEBOOKS)
	$(NOTEBOOKS)/bin/python -m pip install --quiet --upgrade pip
	$(NOTEBOOKS)/bin/python -m pip install --quiet $(TORCH)
	$(NOTEBOOKS)/bin/python -m pip install --quiet -e '.[demo,onnx]' --group notebooks
	touch $@

# runs docs/notebooks and keeps their outputs; needs no network once the packages are installed
notebooks: $(NOTEBOOKS)/.installed
	$(NOTEBOOKS)/bin/python docs/run_notebooks.py

$(RELEASE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --upgrade pip
	$(RELEASE)/bin/python -m pip install --quiet --group release
	touch $@

# writes dist/: the wheel is built from the source archive, not from this checkout, and is tried without it
release: $(RELEASE)/.installed
	rm -rf dist build
	$(RELEASE)/bin/python -m build .
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(RELEASE)/bin/python tests/wheel_smoke.py dist/*.whl $(TORCH)

clean:
	rm -rf $(VENV) $(LOWEST) $(DOCS) $(RELEASE) $(NOTEBOOKS) build dist demo site
