# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a figure that code has drawn is the one that is committed."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from packaging.version import Version
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"


def check_figure(path: Path):
    """
    Loosely, in cells of 8 x 8 pixels: versions of matplotlib set letters and lines elsewhere by a pixel or two. Two
    points of digits-sweeps.png that change places are seen. Skips the rest of the test with another version than that
    of constraints.txt, which may lay out figures in another way.
    """
    pinned = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    if Version(matplotlib.__version__).release[:2] != Version(pinned).release[:2]:
        pytest.skip(f"the figures are drawn by matplotlib {pinned}, and this is {matplotlib.__version__}")
    drawn, shown = (Image.open(folder / path.name).convert("RGB") for folder in (path.parent, IMAGES))
    assert drawn.size == shown.size, path.name
    cells = [np.asarray(image.reduce(8), dtype=float) for image in (drawn, shown)]
    difference = np.abs(cells[0] - cells[1])
    others = (difference.max(axis=-1) > 60).mean()
    message = f"{others:.2%} of {path.name} are not as they are committed"
    assert difference.mean() < 5 and others < 0.001, message
