# `make reproduce` and `make test` are all the set-up there is.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# One OpenMP thread a process: several processes that share two cores must not compete for them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: reproduce test test-slow torture docker-test pin lock lock-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make reproduce   train everything at the tiny size and print the tables"
	@echo "make test        lint, types and the fast tests"
	@echo "make test-slow   the tests that train real runs, on several processes too"
	@echo "make torture     kills, full disks, damaged results: half an hour"
	@echo "make docker-test the containers, with a real Docker engine"

$(VENV)/.ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: install it, or name one with make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: name a newer one with make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install your system's python3-venv package" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

reproduce: $(VENV)/.ready
	$(BIN)/dvpo reproduce --recipe tiny

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -m "not slow and not torture"

test-slow: $(VENV)/.ready
	$(BIN)/pytest -m slow

torture: $(VENV)/.ready
	$(BIN)/pytest -s -m torture

docker-test: $(VENV)/.ready
	DVPO_START_ENGINE=1 $(BIN)/pytest -m slow tests/docker

pin: $(VENV)/.ready
	$(BIN)/python container/pin.py

lock:
	$(BIN)/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's|+cpu||' > requirements.lock

lock-gpu:
	grep -vE '^(numpy|setuptools)==' requirements.lock > $(VENV)/constraints.txt
	uv pip compile pyproject.toml --extra gpu --extra serve --extra dev --extra sign -c $(VENV)/constraints.txt --python-platform x86_64-unknown-linux-gnu --python-version 3.12 --no-header --no-annotate -o requirements.gpu.lock

clean:
	rm -rf $(VENV) runs
