# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on a seed, an index and a purpose alone, and on nothing that was drawn before."""

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    pass

# What a generator is for. It enters the key's counter, so that no two purposes ever share a number.
_SAMPLE, _ORDER, _STEP, _SPLIT, _HELD_OUT, _SHIFT = range(6)


def keyed_generator(seed: int, index: int, purpose: int) -> np.random.Generator:
    """A generator whose numbers depend on nothing but these three integers (Philox, a counter-based generator)."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, purpose]))
