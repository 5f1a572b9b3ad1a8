# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Refuses arguments of the wrong type, in words that name them."""

import math
import operator
from typing import Any


def check_finite(name: str, value: Any):
    """Raises a `ValueError` if the argument `name` is no finite number."""
    try:
        is_finite = math.isfinite(value)
    except TypeError:
        is_finite = False
    if not is_finite:
        raise ValueError(f"`{name}` has to be a finite number, but is {value!r}.")


def check_count(name: str, value: Any):
    """Raises a `ValueError` if the argument `name` is no integer, of whatever library, or below 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"`{name}` has to be an integer, but is {value!r}.") from None
    if count < 1:
        raise ValueError(f"`{name}` has to be at least 1, but is {count}.")


def check_type(name: str, value: Any, allowed: Any, description: str):
    """Raises a `ValueError` if the argument `name` is neither None nor `allowed`, which the description says."""
    if value is not None and not isinstance(value, allowed):
        raise ValueError(f"`{name}` has to be {description}, but is of type {type(value).__name__}.")
