# The commands of the README. Each sets up .venv from requirements.lock by itself.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/.installed
export PATH := $(BIN):$(PATH)

.PHONY: setup demo test test-slow lint clean

setup: $(READY)

# torch goes first and by pip, which takes a CPU build where a machine offers one; uv then installs the rest in seconds.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock torch uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# The main job: the flow `papo` on the embedded default, with no server to start.
demo: $(READY)
	$(BIN)/python -m flows.pipeline

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

# Real servers, DVC from a fresh clone, learning and collapse over several seeds.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv .papo artifacts data mlflow.db mlartifacts runs
