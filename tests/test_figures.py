# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image

from diffusers_lsep.figures import make_labeled_grid


def test_small_images_are_enlarged_without_smoothing():
    image = Image.fromarray(np.array([[0, 200], [100, 50]], dtype=np.uint8))
    grid = np.asarray(make_labeled_grid([image] * 3, columns=2, min_size=64))
    assert grid.ndim == 2 and set(np.unique(grid)) == {0, 50, 100, 200, 255}
    gap = (grid.shape[1] - 128) // 3
    np.testing.assert_array_equal(grid[gap : gap + 32, gap : gap + 32], np.zeros((32, 32)))
    assert (grid[-gap - 64 : -gap, -gap - 64 : -gap] == 255).all(), "the place of the fourth image is empty"


def test_captions_stand_under_their_images():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    grid = np.asarray(make_labeled_grid([image, image], columns=2, labels=["", "W" * 50]))
    middle = grid.shape[1] // 2
    assert (grid[:, :middle] == 255).all() and (grid[68:, middle:] < 128).any()
    assert (grid[:66] == 255).all(), "captions keep out of the images"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "`images` has to hold at least one image"),
        ({"columns": 0}, "`columns` has to be at least 1, but is 0"),
        ({"labels": ["a", "b"]}, "`labels` has to hold 1 captions, one for each image, but holds 2"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_labeled_grid(**{"images": [Image.new("L", (8, 8))], "columns": 1, **arguments})
