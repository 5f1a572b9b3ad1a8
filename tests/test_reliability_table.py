# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`docs/reliability.md` promises nothing without a test."""

import re
from pathlib import Path

import pytest
from test_diffusers_table import list_tests


PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


def read_rows():
    """The rows of the tables of promises, and of no others."""
    rows, header = [], None
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and header == ["promise", "tested by"] and set(cells[0]) != {"-"}:
            rows.append(cells)
        header = (header or cells) if cells else None
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize("promise, tested_by", read_rows())
def test_every_promise_names_tests_that_exist(promise, tested_by):
    tests = re.findall(r"`([\w/]+\.py)::([\w:]+)`", tested_by)
    assert tests, f"{promise}: no test is named"
    for file, name in tests:
        assert name in list_tests(file), f"{promise}: there is no {file}::{name}"
