# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`docs/reliability.md` promises nothing without a test."""

import re
from pathlib import Path

import pytest
from test_diffusers_table import list_tests


PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


def read_rows():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if row[0] != "promise" and set(row[0]) != {"-"}]


@pytest.mark.parametrize("promise, tested_by", read_rows())
def test_every_promise_names_tests_that_exist(promise, tested_by):
    tests = re.findall(r"`([\w/]+\.py)::([\w:]+)`", tested_by)
    assert tests, f"{promise}: no test is named"
    for file, name in tests:
        assert name in list_tests(file), f"{promise}: there is no {file}::{name}"
