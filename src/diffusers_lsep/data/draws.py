# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on a seed, an index and a purpose alone, and on nothing that was drawn before."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a generator is for, a part of its key, so that no two purposes share a number. The values are a format."""

    SAMPLE = 0
    ORDER = 1
    STEP = 2
    SPLIT = 3
    HELD_OUT = 4
    SHIFT = 5
    REGULARIZERS = 6
    HELD_OUT_REGULARIZERS = 7
    # of linear probing
    TRAINING_FEATURES = 100
    HELD_OUT_FEATURES = 101
    HALVES = 102
    LIKELIHOOD = 200


def keyed_generator(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    """A generator whose numbers depend on nothing but these three integers (Philox, a counter-based generator)."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, purpose]))
