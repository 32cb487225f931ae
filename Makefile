# make demo    trains a small model on real digit scans, evaluates it, predicts a picture
# make test    runs the test suite
# make oldest  runs the tests of models, layers and operators with the oldest PyTorch and timm that are supported
# make lint    checks style
# make clean   removes the environments and the demo's results
#
# Each creates what it needs, the environment included, and skips what is already there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
RUN := runs/demo
PYTEST_ARGS ?= -q -n 2
# Threads that wait by sleeping: by spinning, small models train many times slower on a machine that is shared.
export OMP_WAIT_POLICY := passive
# One thread per test worker: more only compete for the same cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test oldest lint clean

demo: $(VENV)/.demo
	$(BIN)/vla train --model vmamba_atto --data digits --out $(RUN) --resume
	$(BIN)/vla eval --model $(RUN)
	$(BIN)/vla predict examples/digit.png --model $(RUN) --out $(RUN)/prediction.png
	@echo "Results: $(RUN)/curves.png $(RUN)/prediction.png $(RUN)/metrics.jsonl $(RUN)/model.safetensors"

test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

oldest: $(OLDEST)/.dev
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest $(PYTEST_ARGS) tests/layers tests/ops/test_backends.py \
		tests/ops/test_transforms.py tests/models --ignore tests/models/test_contract.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) $(RUN)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.10 or newer, or run 'make PYTHON=/path/to/python'" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is too old; Python 3.10 or newer is needed, run 'make PYTHON=/path/to/python'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot create environments; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamp files: an environment is installed again only when its requirements change.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train,cpu]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo

# As in pyproject.toml.
$(OLDEST)/.dev: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' 'torch==2.5.*' 'timm==1.0.22'
	@touch $@
