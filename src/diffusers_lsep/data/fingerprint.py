# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether data are still those that a run began with.

What is read: the size of every image (of every file of latents), and 1 KB at four places or more of each, or of ten
thousand of them where there are more. Their order counts; where they lie and when they were written does not, so that
data may be moved and copied. A change that keeps all sizes and lies between these places is not seen.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import whole_file


if TYPE_CHECKING:
    import datasets

NUM_SAMPLED, PIECE = 10_000, 1024


class Fingerprint:
    """
    What is remembered of a sequence of files, or of bytes elsewhere.

    Args:
        sizes (sequence of `int`): Their sizes in bytes.
        read (`Callable`): Gives the bytes of one of them: `read(index, offset, length)`. May raise an `OSError`.
        name_of (`Callable`): What to call one of them, by its index.

    Attributes:
        digests (`np.ndarray` of uint32): A CRC-32 of each.
    """

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        read: Callable[[int, int, int], bytes],
        name_of: Callable[[int], str],
    ):
        self.name_of = name_of
        self.digests = np.array(sizes, np.int64).astype(np.uint32)
        pieces = min(256, max(4, 4096 // max(1, len(sizes))))  # few files are large ones
        for index in np.unique(np.linspace(0, len(sizes) - 1, NUM_SAMPLED).astype(int)) if len(sizes) else ():
            size, digest = int(sizes[index]), int(self.digests[index])
            with suppress(OSError):  # it is gone, which whoever needs it will say
                if size <= pieces * PIECE:
                    digest = zlib.crc32(read(index, 0, size), digest)
                else:
                    for offset in np.linspace(0, size - PIECE, pieces).astype(int).tolist():
                        digest = zlib.crc32(read(index, offset, PIECE), digest)
            self.digests[index] = digest

    @property
    def value(self) -> int:
        """A CRC-32 of it all."""
        return zlib.crc32(self.digests.tobytes())

    def save(self, path: Path):
        """Writes a file for [`find_changes`]."""
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.save(file, self.digests)

    def find_changes(self, path: Path) -> list[int]:
        """Which of them are others than when `path` was written, as far as that is known."""
        with suppress(OSError, ValueError):
            before = np.load(path, allow_pickle=False)
            if before.shape == self.digests.shape:
                return np.flatnonzero(before != self.digests).tolist()
        return []

    def describe(self, changes: list[int], unknown: str) -> str:
        """Names the first of `changes`, for a message, or says `unknown` where there are none."""
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        return f"{self.name_of(changes[0])}{more}" if changes else unknown


def join(*parts: Fingerprint) -> Fingerprint:
    """One fingerprint of several sequences, one after the other."""
    ends = np.cumsum([len(part.digests) for part in parts])

    def name_of(index: int) -> str:
        part = int(np.searchsorted(ends, index, side="right"))
        return parts[part].name_of(index - int(ends[part]) + len(parts[part].digests))

    whole = Fingerprint([], lambda *_: b"", name_of)
    whole.digests = np.concatenate([part.digests for part in parts])
    return whole


def fingerprint_files(paths: Sequence[str | os.PathLike]) -> Fingerprint:
    """The fingerprint of these files."""
    sizes = [_size(path) for path in paths]
    return Fingerprint(sizes, lambda index, *where: read_piece(paths[index], *where), lambda index: str(paths[index]))


def fingerprint_images(dataset: "datasets.Dataset", column: str) -> Fingerprint:
    """
    The fingerprint of the rows of a data set.

    Args:
        dataset (`datasets.Dataset`): The data set.
        column (`str`): Its column of images, cast to `Image(decode=False)`.
    """
    import pyarrow.compute as pc

    images = dataset.data.column(column)  # mapped, in chunks: nothing is copied
    lengths = [pc.binary_length(chunk.field("bytes")).fill_null(-1) for chunk in images.chunks]
    sizes = np.concatenate([np.empty(0, np.int64), *(length.to_numpy(zero_copy_only=False) for length in lengths)])
    for row in np.flatnonzero(sizes < 0).tolist():
        sizes[row] = _size(images[row]["path"].as_py())

    def read(index: int, offset: int, length: int) -> bytes:
        image = images[index]
        if image["bytes"].is_valid:
            return image["bytes"].as_buffer()[offset : offset + length]
        return read_piece(image["path"].as_py() or "", offset, length)

    return Fingerprint(sizes, read, lambda index: images[index]["path"].as_py() or f"row {index}")


def _size(path: str | os.PathLike | None) -> int:
    with suppress(OSError):
        return os.path.getsize(path or "")
    return 0


def read_piece(path: str | os.PathLike, offset: int, length: int) -> bytes:
    """Bytes of a file, fewer where it ends."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(length)
