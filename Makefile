.PHONY: quality style test test-fast upstream

check_dirs := .
DIFFUSERS ?= ../diffusers

# Fails on anything that `make style` would change or report, and on wrong types.
quality:
	ruff check $(check_dirs)
	ruff format --check $(check_dirs)
	mypy

style:
	ruff check --fix $(check_dirs)
	ruff format $(check_dirs)

test:
	pytest

test-fast:
	pytest -m "not slow"

# diffusers' own tests on our classes. Only the tests are taken from the checkout.
upstream:
	@test -f "$(DIFFUSERS)/tests/__init__.py" -a -d "$(DIFFUSERS)/src/diffusers" || \
		{ echo "make upstream: $(DIFFUSERS) is not a checkout of diffusers: make upstream DIFFUSERS=path/to/it" >&2; exit 1; }
	PYTHONPATH="$(abspath $(DIFFUSERS))$${PYTHONPATH:+:$$PYTHONPATH}" pytest tests/upstream
