# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Images in folders."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image


def save_images(folder: Path, pixels: Iterable[np.ndarray], **options) -> Path:
    """Writes images of uint8, `[H, W, 3]` or `[H, W]`, as PNG files whose names sort in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / f"{i:03d}.png", **options)
    return folder


def save_class_folders(folder: Path, names: list[str], sizes: Iterable[tuple[int, int]]) -> Path:
    """Writes random colour images of these heights and widths, which go round the folders of the classes."""
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        path = folder / names[i % len(names)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return folder
