# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Training on a data set that is not downloaded: `datasets` streams it while the run goes on."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..labels import UNLABELED
from .fingerprint import Fingerprint, fingerprint_files
from .images import check_image_column, decode_images
from .stream import SampleStream


if TYPE_CHECKING:
    import datasets


class StreamedImages:
    """
    Images of a streamed data set, for a [`StreamedSamples`]. It knows neither labels nor images ahead: both are
    checked when they arrive.

    The order is only nearly random. Every epoch shuffles the shards, and the rows inside a buffer. Still it depends on
    nothing but the seed: each process reads everything and decodes its own part, and a run that is continued skips
    what was used, so that any number of processes sees the same samples, at the price of reading. A `DataLoader` must
    not have worker processes: `datasets` would deal the shards out to them. Its `labels` are all -1: [`labels_of`]
    gives those of what was read.

    Args:
        dataset (`datasets.IterableDataset`): The data set.
        seed (`int`): Of the order.
        num_images (`int`): How many images it has: the length of an epoch.
        resolution (`int`): Side of the square that images are cropped to, in pixels.
        num_channels (`int`, defaults to `3`): 1 for grey, 3 for RGB.
        image_column (`str`, defaults to `"image"`): Column of the images.
        label_column (`str`, defaults to `"label"`): Column of the labels. None where all rows are the null class.
        num_classes (`int`, *optional*): Number of classes; not needed if the column is a `ClassLabel`.
        buffer_size (`int`, defaults to `10000`): Size of the buffer, in rows.

    Raises:
        `ValueError`: if a column or the number of classes is missing.
    """

    kind = "images"

    def __init__(
        self,
        dataset: "datasets.IterableDataset",
        seed: int,
        num_images: int,
        resolution: int,
        num_channels: int = 3,
        image_column: str = "image",
        label_column: str | None = "label",
        num_classes: int | None = None,
        buffer_size: int = 10_000,
    ):
        import datasets

        if dataset.features is None:
            raise ValueError("the data set does not declare its columns, and can only be used without streaming.")
        if label_column is not None and label_column not in dataset.features:
            raise ValueError(
                f"`label_column` has to be a column of the data set, but there is no {label_column!r}; the columns are"
                f" {dataset.column_names}."
            )
        check_image_column(dataset, image_column)
        feature = dataset.features.get(label_column)
        names = feature.names if isinstance(feature, datasets.ClassLabel) else []
        if label_column is None:
            names = list(UNLABELED)
        if not names and num_classes is None:
            raise ValueError(f"`num_classes` has to be given: the streamed column {label_column!r} does not say it.")
        if num_classes is not None and num_classes < len(names):
            raise ValueError(f"`num_classes` has to be at least {len(names)}, but is {num_classes}.")
        self.names = names + [str(index) for index in range(len(names), num_classes or 0)]

        self.labels = np.broadcast_to(np.int64(-1), num_images)
        self.resolution = resolution
        self.num_channels = num_channels
        self.image_column = image_column
        self.label_column = label_column
        as_bytes = datasets.Image(decode=False)
        columns = [image_column] if label_column is None else [image_column, label_column]
        dataset = dataset.select_columns(columns).cast_column(image_column, as_bytes)
        self.dataset = dataset.shuffle(seed=seed, buffer_size=buffer_size)
        self._iterator: Iterator[dict] | None = None
        self._position = 0  # the sample that it gives next
        self._kept: dict[int, dict] = {}  # the samples from the first one that was asked for last

    def load(self, rows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """
        Reads the samples with these global indices, which have to grow from call to call (else it starts anew).

        Raises:
            [`~data.images.UnreadableImageError`]: if an image cannot be read.
            `ValueError`: if a label is outside the classes, or the data set ends too early.
        """
        values = []
        self._kept = {row: sample for row, sample in self._kept.items() if row >= min(rows)}
        for row in rows.tolist():
            sample = self._kept[row] = self._kept.get(row) or self._seek(row)
            label = self._label(sample)
            if self.label_column is not None and not (isinstance(label, int) and 0 <= label < len(self.names)):
                raise ValueError(
                    f"`label_column` {self.label_column!r} has to hold labels in 0..{len(self.names) - 1}, but sample"
                    f" {row} of the stream has {label!r}."
                )
            values.append(sample[self.image_column])
        return decode_images(rows, values, flips, self.resolution, self.num_channels, is_stream=True)

    def fingerprint(self) -> Fingerprint:
        """Of nothing: what comes is not known ahead."""
        return fingerprint_files([])

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """The class indices of rows that the last call of `load` was for, whether or not it could read them all."""
        return np.array([self._label(self._kept[row]) for row in rows.tolist()], dtype=np.int64)

    def _label(self, sample: dict) -> int:
        return len(self.names) if self.label_column is None else sample[self.label_column]

    def _seek(self, row: int) -> dict:
        if torch.utils.data.get_worker_info() is not None:
            raise ValueError("`num_workers` has to be 0 for a streamed data set: `datasets` would share it out.")
        epoch, offset = divmod(row, len(self.labels))
        same_epoch = epoch == self._position // len(self.labels) and self._position % len(self.labels) > 0
        if self._iterator is None or row < self._position or not same_epoch:
            dataset = self.dataset.skip(offset) if offset else self.dataset
            dataset.set_epoch(epoch)
            self._iterator, self._position = iter(dataset), row
        try:
            while True:
                sample = next(self._iterator)
                self._position += 1
                if self._position > row:
                    return sample
        except StopIteration:
            raise ValueError(
                f"`num_train_images` says that the data set has {len(self.labels)} images, but it ended after"
                f" {self._position % len(self.labels)}."
            ) from None


class StreamedSamples(SampleStream):
    """A [`SampleStream`] that takes its samples in the order in which a [`StreamedImages`] gives them."""

    source: StreamedImages

    def rows(self, indices: list[int]) -> np.ndarray:
        return np.array(indices)

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        return self.source.labels_of(rows)

    def substitutes(self, row: int) -> Iterable[int]:
        """The samples to try in place of this one, of whatever class: the next ones of the stream."""
        return range(row + 1, row + 1 + len(self.source.labels))


def open_stream(
    splits: "datasets.IterableDatasetDict", seed: int, num_images: int | None, *arguments
) -> StreamedImages:
    """
    Opens the training split of a streamed data set.

    Args:
        splits (`datasets.IterableDatasetDict`): The data set, by [`~data.images.load_image_dataset`].
        seed (`int`): Of the order.
        num_images (`int`, *optional*): How many images it has, if it does not say it.
        arguments: More arguments of [`StreamedImages`].

    Raises:
        `ValueError`: if there is no training split, or if the number of its images is not known.
    """
    if "train" not in splits:
        raise ValueError(f"the data set has no split 'train'; the splits are {list(splits)}.")
    info = (splits["train"].info.splits or {}).get("train")
    num_images = num_images or (info.num_examples if info is not None else None)
    if not num_images:
        raise ValueError("`num_train_images` has to be given: the streamed data set does not say how many it has.")
    return StreamedImages(splits["train"], seed, num_images, *arguments)
