# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors that are reported and do not end the run."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import write_text


@contextmanager
def collect_errors() -> Iterator[list[tuple[str, str]]]:
    """Ends quietly where the block fails: the list then has the error and its traceback."""
    problems: list[tuple[str, str]] = []
    try:
        yield problems
    except Exception as error:
        problems.append((str(error) or type(error).__name__, traceback.format_exc()))


def report_errors(problems: list[tuple[str, str]], missing: str, path: Path):
    """Says what is missing because of some [`collect_errors`], if any, and adds their tracebacks to a file."""
    if not problems:
        return
    path.parent.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, before + "\n".join(trace for _, trace in problems))
    print(f"No {missing}: {problems[0][0]} ({path} has more.)", file=sys.stderr)
