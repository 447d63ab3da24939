# Everything runs in .venv, made on first use with the standard library's venv and plain pip.
# PYTHON=/path/to/python chooses the interpreter; STRICT=1 makes a skipped test a failure; WORKERS=0 tests in one process.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet
WORKERS ?= 2
CANDIDATES := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11

# Modules of rules, without I/O: every branch of theirs is run.
PURE := errors.py clock.py freshness.py config.py settings.py settings_errors.py store_url.py tenants.py signature.py judgement.py resolution.py status.py
space := $(subst ,, )
comma := ,
PURE_PATHS := $(subst $(space),$(comma),$(addprefix src/external_oms/,$(PURE)))

.PHONY: help demo test lint format types docs bench soak bare clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.ready-all ## the whole story in ten seconds: read, flip, delivery, read (ARGS=--check ends by itself)
	@$(VENV)/bin/external-oms demo $(ARGS)

test: $(VENV)/.ready-test ## all tests, with coverage
	@$(PY) -m coverage erase
# What fails beside other tests, which start servers and measure times on the same cores, gets one more try alone.
	$(PY) -m coverage run -m pytest -m "not soak" --ignore=tests/benchmarks -p no:benchmark $(if $(STRICT),--no-skips) -n $(WORKERS) --dist loadfile \
	|| $(PY) -m coverage run -m pytest -m "not soak" --ignore=tests/benchmarks -p no:benchmark $(if $(STRICT),--no-skips) --last-failed --last-failed-no-failures=none
	@$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --fail-under=95
	$(PY) -m coverage report --fail-under=100 --include=$(PURE_PATHS)

lint: $(VENV)/.ready-dev ## ruff: the rules and the format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(VENV)/.ready-dev ## ruff: put the format right
	$(PY) -m ruff format
	$(PY) -m ruff check --fix

types: $(VENV)/.ready-dev ## mypy, strict, over the sources, the tests and the examples
	$(PY) -m mypy src tests $(wildcard examples/*.py)

docs: $(VENV)/.ready-docs ## the documentation, into docs/_build/html; a warning is an error
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(VENV)/.ready-test ## the benchmarks, which print what an evaluation costs
	$(PY) -m pytest tests/benchmarks -s

soak: $(VENV)/.ready-test ## the long tests, which `make test` leaves out
	$(PY) -m pytest -m soak --ignore=tests/benchmarks

bare: $(VENV)/.made ## the wheel without extras, in a fresh environment: does it import and evaluate?
	@rm -rf .bare
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir .bare .
	$(PY) -m venv .bare/venv
	.bare/venv/bin/python -m pip install --quiet .bare/*.whl
	.bare/venv/bin/python -I -W error tests/bare.py

clean: ## remove everything that was made here
	rm -rf $(VENV) .bare .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build

# One stamp per set of extras: made anew when pyproject.toml is newer, else nothing is done.
$(VENV)/.ready-%: pyproject.toml | $(VENV)/.made
	@echo "installing into $(VENV): $*"
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $@

$(VENV)/.made:
	@for candidate in $(CANDIDATES); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making $(VENV) with $$candidate"; \
			if ! "$$candidate" -m venv --clear $(VENV); then \
				echo "$$candidate cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; \
			fi; \
			touch $@; exit 0; \
		fi; \
	done; \
	echo "no Python 3.11 or newer among: $(strip $(CANDIDATES)); name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1
