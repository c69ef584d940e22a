# Two commands for a fresh machine:
#   make train   sets up .venv and trains the default network on real data
#   make test    sets up .venv and runs every check that CI runs
# Others: make test-slow (checks that take minutes), make docs (docs/_build/index.html), make clean.
#
# constraints.txt pins the tested PyTorch. On Linux, PyPI's build of it carries CUDA; for another build,
# install torch into .venv your way first (see "Set up" in the README).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: train test test-slow docs clean

train: $(VENV)/.installed-train
	$(BIN)/revnet train

test: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

# Without `--no-compile`, pip would compile every installed module, although most of them are never imported.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-train: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed-train

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache
