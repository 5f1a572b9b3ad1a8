# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a figure that code has drawn is the one that is committed."""

from pathlib import Path

import numpy as np
from PIL import Image


IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def check_figure(path: Path):
    """
    Loosely, in cells of 8 x 8 pixels: other versions of matplotlib set letters and lines elsewhere by a pixel or two.
    Two points of digits-sweeps.png that change places are seen.
    """
    drawn, shown = (Image.open(folder / path.name).convert("RGB") for folder in (path.parent, IMAGES))
    assert drawn.size == shown.size, path.name
    cells = [np.asarray(image.reduce(8), dtype=float) for image in (drawn, shown)]
    difference = np.abs(cells[0] - cells[1])
    others = (difference.max(axis=-1) > 60).mean()
    message = f"{others:.2%} of {path.name} are not as they are committed"
    assert difference.mean() < 5 and others < 0.001, message
