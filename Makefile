# Two commands do everything: `make demo` raises a model from nothing, `make test` checks the whole house.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/hatch.yaml
WORKERS ?= 2

# What to hand to pip for PyTorch. The default is the CPU build, from PyTorch's own page of wheels where pip's index has
# none (a page that cannot be reached is only a warning). For a GPU: make demo TORCH=torch
TORCH ?= torch==2.13.0 --find-links https://download.pytorch.org/whl/cpu/torch/

BIN := $(VENV)/bin
# Only its errors: a few minutes of silence are normal.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# The tests' workers share the cores: one thread each.
CHECK := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo install install-test lint types browser test nightly clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install ## install everything, raise a model from nothing, say where it is and how to chat with it
	$(BIN)/fledge run $(RECIPE)

test: install-test browser lint types ## install everything; lint, import rules, types and the whole test suite
	$(CHECK) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

nightly: install-test browser ## the long tests: random kills, both recipes whole, other engines
	$(CHECK) $(BIN)/python -m pytest -m nightly

lint: install-test ## ruff, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install-test ## mypy --strict on core/ and records/
	$(BIN)/mypy

install: $(VENV)/.fledge $(VENV)/.demo ## the environment, with the demonstration's data
install-test: install $(VENV)/.test ## the same with what the tests need

# A step of the installation is repeated when the file it depends on is newer than its stamp.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fledge needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --retries 2 $(TORCH)
	@touch $@

$(VENV)/.fledge: $(VENV)/.torch pyproject.toml
	$(PIP) install --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.torch requirements/demo.txt
	$(PIP) install --no-deps --require-hashes --requirement requirements/demo.txt
	@touch $@

$(VENV)/.test: $(VENV)/.fledge
	$(PIP) install --editable '.[test]'
	@touch $@

BROWSERS := chromium chromium-browser google-chrome
browser: ## Chromium for the test of the chat page, where this machine lets us install it
	@command -v $(BROWSERS) >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Chromium for the browser test"; \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } </dev/null >/dev/null 2>&1; \
	fi; \
	command -v $(BROWSERS) >/dev/null || echo "no Chromium here: the browser test will be skipped (on Debian: apt-get install chromium)"

clean: ## remove the environment and the caches (what was made, in .fledge, stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
