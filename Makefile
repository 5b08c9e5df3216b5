# Everything is set up on first use in .venv, by the versions in requirements.lock; a second call installs nothing.
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BENCH := benchmarks/.venv
PY := $(VENV)/bin/python
LOCK := requirements.lock
PLUGINS := $(patsubst plugins/%/plugin.toml,%,$(wildcard plugins/*/plugin.toml))
comma := ,

# torch is worth its gigabytes to the server only where there is a GPU; the tests always need it.
RUN_EXTRAS := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo vision-torch || echo vision)
DEV_EXTRAS := vision-torch-dev

BUILD := hatchling editables setuptools # the lock's: without isolation; setuptools is for what comes as source only

.PHONY: help run test check coverage docs bench bench-faults lock clean

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /make \1|/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

run: $(VENV)/.ready-$(RUN_EXTRAS) ## start the server with the bundled plugins; ARGS="--port 9000" passes more
	@$(VENV)/bin/holdfast serve --data var $(ARGS)

test: $(VENV)/.ready-$(DEV_EXTRAS) ## run the tests; ARGS="-k name" passes more
	@$(PY) -m pytest $(ARGS)

check: $(VENV)/.ready-$(DEV_EXTRAS) ## lint, format, types, import directions
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy --strict
	@set -e; for plugin in $(PLUGINS); do MYPYPATH=plugins/$$plugin $(VENV)/bin/mypy --strict plugins/$$plugin; done
	@$(VENV)/bin/lint-imports

coverage: $(VENV)/.ready-$(DEV_EXTRAS) ## what no test reaches of verdict and wire code; ARGS="tests/test_x.py" runs others
	@PYTHONPATH=tests $(PY) -m branches $(ARGS)

docs: $(VENV)/.ready-$(DEV_EXTRAS) ## write the pages that are made from the code
	@$(PY) -m engine.lifecycle.diagram > docs/lifecycle.md
	@$(PY) -m engine.settings_page > docs/settings.md

bench: $(BENCH)/.ready ## speed, side by side with peers; ARGS="--quick --only http-run" passes more
	@$(BENCH)/bin/python -m benchmarks.speed $(ARGS)

bench-faults: $(BENCH)/.ready ## ten faults against Holdfast and its peers, side by side; ARGS="--fault segfaults" passes more
	@$(BENCH)/bin/python -m benchmarks.faults $(ARGS)

lock: $(PY) ## resolve the newest versions that pyproject.toml allows into requirements.lock
	@sh .ci/lock $(PY) $(LOCK)

clean: ## remove the virtual environment, builds and caches; never var/, which is data
	@rm -rf $(VENV) $(BENCH) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@sh .ci/venv $(VENV)

# Invariant: .venv/.ready-A-B exists iff the extras A and B are installed by the present lock and pyproject.toml.
# Built without isolation, so that the lock pins the build too.
$(VENV)/.ready-%: $(LOCK) pyproject.toml | $(PY)
	@echo "installing holdfast [$(subst -,$(comma) ,$*)] into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c $(LOCK) $(BUILD)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c $(LOCK) -e '.[$(subst -,$(comma),$*)]'
	@touch $@

# Holdfast as it is in this checkout, and its peers, in an environment of their own.
$(BENCH)/.ready: benchmarks/requirements.txt $(LOCK) pyproject.toml
	@echo "installing holdfast and its peers into $(BENCH)"
	@test -x $(BENCH)/bin/python || sh .ci/venv $(BENCH)
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -r benchmarks/requirements.txt $(BUILD)
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c $(LOCK) -e '.[vision]'
	@touch $@
