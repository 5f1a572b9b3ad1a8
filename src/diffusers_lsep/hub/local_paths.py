# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Paths on this machine, of which what is published shows only the names that they end in."""

import os
import re
from collections.abc import Mapping
from typing import Any


def is_local(path: str | None) -> bool:
    """Whether it is a path on this machine, and no id on the Hub."""
    return path is not None and (os.path.isabs(path) or os.path.exists(path))


def without_folders(value: Any) -> Any:
    """A value, or all that is in it, with paths on this machine as the names that they end in."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    path, separator, rest = value.partition(" (")  # as in `folder (train)`
    if os.path.exists(path):
        return os.path.basename(os.path.abspath(path)) + separator + rest
    return re.sub(r"(?<![\w:/.])/(?:[^/\s]+/)+", "", value)
