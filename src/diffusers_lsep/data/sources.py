# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What a stream of samples reads from: rows with labels, all of them or a part."""

import zlib
from typing import Protocol

import numpy as np
import torch

from .draws import Purpose, keyed_generator
from .fingerprint import Fingerprint


def hash_labels(labels: np.ndarray) -> int:
    """CRC-32 of class indices in their order: what a run records of its training data."""
    return zlib.crc32(np.ascontiguousarray(labels, dtype=np.int64).data)


class SampleSource(Protocol):
    """What a [`SampleStream`] reads: images, or what a VAE made of them."""

    kind: str
    """`"images"`: pixels in [-1, 1]. `"moments"`: mean and standard deviation of a VAE's posterior, `[2 C, S, S]`."""
    labels: np.ndarray
    """Class indices, int64, one per row; -1 where they are not known before the row is read."""

    def load(self, rows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """The samples of these rows as one tensor, each mirrored left to right where `flips` says so."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Of what it reads from, all of it."""
        ...


class SourceSubset:
    """
    Some rows of another source.

    Args:
        source ([`SampleSource`]): The other source.
        rows (`np.ndarray`): The rows to take from it.
    """

    def __init__(self, source: SampleSource, rows: np.ndarray):
        self.kind = source.kind
        self.labels = source.labels[rows]
        self.source = source
        self.source_rows = rows

    def load(self, rows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        return self.source.load(self.source_rows[rows], flips)

    def fingerprint(self) -> Fingerprint:
        return self.source.fingerprint()


def parse_split(validation_split: str | None) -> tuple[float | None, str | None]:
    """A fraction, or the name of a split."""
    try:
        fraction = float(validation_split or "")
    except ValueError:
        return None, validation_split
    if not 0 < fraction < 1:
        raise ValueError(f"`--validation_split` has to be a split or a fraction between 0 and 1, but is {fraction}.")
    return fraction, None


def cut_off(source: SampleSource, fraction: float, seed: int) -> tuple[SourceSubset, SourceSubset]:
    """Divides a source at random into the rows to train on and the `fraction` of all that is held out."""
    order = keyed_generator(seed, 0, Purpose.SPLIT).permutation(len(source.labels))
    num_held_out = max(1, round(len(order) * fraction))
    if num_held_out >= len(order):
        raise ValueError(f"`--validation_split` {fraction} leaves none of the {len(order)} images to train on.")
    rest, held_out = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    return SourceSubset(source, rest), SourceSubset(source, held_out)
