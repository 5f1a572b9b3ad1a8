.PHONY: quality style test

check_dirs := .

# Fails on anything that `make style` would change or report.
quality:
	ruff check $(check_dirs)
	ruff format --check $(check_dirs)

style:
	ruff check --fix $(check_dirs)
	ruff format $(check_dirs)

test:
	pytest
