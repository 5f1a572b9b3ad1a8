.PHONY: docs quality style test test-fast test-oldest faults fuzz upstream

check_dirs := .
DIFFUSERS ?= ../diffusers
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OLDEST ?= build/oldest
EXAMPLES ?= 10000
SITE ?= build/site

# Fails on anything that `make style` would change or report, and on wrong types.
quality:
	ruff check $(check_dirs)
	ruff format --check $(check_dirs)
	mypy

style:
	ruff check --fix $(check_dirs)
	ruff format $(check_dirs)

# The pages of docs/ as a site. Fails on links that lead nowhere, and on pages that are not in its menu.
docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir "$(abspath $(SITE))"

test:
	pytest -n 2

test-fast:
	pytest -n 2 -m "not slow"

# Generated input of every kind, and how it ends: docs/reliability.md.
fuzz:
	PYTHONPATH="tests$${PYTHONPATH:+:$$PYTHONPATH}" python -m fuzz.run --examples $(EXAMPLES)

# With the oldest version of every requirement that setup.py allows, in an environment of its own, which is kept.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "setuptools>=77"
	$(OLDEST)/bin/python .ci/oldest_pins.py > $(OLDEST)/pins.txt
	$(OLDEST)/bin/pip install -c $(OLDEST)/pins.txt -e ".[test]"
	PATH="$(abspath $(OLDEST))/bin:$$PATH" pytest $(PYTEST_FLAGS)

# Kills every command at each of its changes on disk, and runs it where the disk is too small.
faults:
	python tests/faults/run.py --all
	python tests/faults/run.py --disks 10

# diffusers' own tests on our classes. Only the tests are taken from the checkout.
upstream:
	@test -f "$(DIFFUSERS)/tests/__init__.py" -a -d "$(DIFFUSERS)/src/diffusers" || \
		{ echo "make upstream: $(DIFFUSERS) is not a checkout of diffusers: make upstream DIFFUSERS=path/to/it" >&2; exit 1; }
	PYTHONPATH="$(abspath $(DIFFUSERS))$${PYTHONPATH:+:$$PYTHONPATH}" pytest tests/upstream
