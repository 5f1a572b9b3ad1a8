# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`docs/diffusers.md` claims nothing without a test."""

import ast
import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "diffusers.md"


def read_rows():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if row[0] != "feature" and set(row[0]) != {"-"}]


def list_tests(file):
    """Names of the tests of a file and of its classes, `test_a`, `TestB` and `TestB::test_c`."""
    names = set()
    for node in ast.parse((TESTS / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.lower().startswith("test"):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("feature, works, tested_by", read_rows())
def test_every_row_names_tests_that_exist(feature, works, tested_by):
    assert re.fullmatch(r"yes|in part: .+|no: .+", works), f"{feature}: {works!r} is not yes, in part: ... or no: ..."
    tests = re.findall(r"`([\w/]+\.py)::([\w:]+)`", tested_by)
    assert tests or works.startswith("no: "), f"{feature}: no test is named"
    for file, name in tests:
        assert name in list_tests(file), f"{feature}: there is no {file}::{name}"
