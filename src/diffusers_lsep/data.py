# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelled images through `datasets`, and the stream of samples that training consumes.

Training is one endless stream of samples with global indices 0, 1, 2, ...: sample `g` belongs to epoch `g // n` and
takes the row at position `g % n` of that epoch's permutation. Everything random about it comes from one generator that
is keyed by `(seed, g)`. So a run can be continued anywhere, on any number of processes, with nothing to restore.
"""

import math
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from .objective import timesteps_from_uniform
from .paths import get_path


if TYPE_CHECKING:
    import datasets
    import PIL.Image


# What a generator is for. It enters the key's counter, so that no two purposes ever share a number.
_SAMPLE, _ORDER, _STEP, _SPLIT, _HELD_OUT, _SHIFT = range(6)


def keyed_generator(seed: int, index: int, purpose: int) -> np.random.Generator:
    """A generator whose numbers depend on nothing but these three integers (Philox, a counter-based generator)."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, purpose]))


# --- Images ---------------------------------------------------------------------------------------------------------


def center_crop(image: "PIL.Image.Image", resolution: int) -> "PIL.Image.Image":
    """
    Cuts the central square out of an image, as ADM (arXiv 2105.05233) prepares ImageNet: halved with a box filter
    while the shorter side is at least twice too large, then scaled with a bicubic filter until it fits, then cropped.

    Args:
        image (`PIL.Image.Image`): The image.
        resolution (`int`): Side of the square in pixels.
    """
    import PIL.Image

    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), resample=PIL.Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, resample=PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def convert_mode(image: "PIL.Image.Image", num_channels: int) -> "PIL.Image.Image":
    """
    Converts an image of any mode to grey or RGB with 8 bits: 16-bit values are divided by 257, and what is transparent
    shows white.

    Args:
        image (`PIL.Image.Image`): The image.
        num_channels (`int`): 1 for grey, 3 for RGB.

    Raises:
        `ValueError`: if the values of the image have no known range.
    """
    import PIL.Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; store 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit pixels from {values.min()} to {values.max()} are outside 0..65535")
        image = PIL.Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # the only way from some modes to grey
    return image.convert({1: "L", 3: "RGB"}[num_channels])


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    streaming: bool = False,
) -> "datasets.DatasetDict | datasets.IterableDatasetDict":
    """
    Loads a data set of labelled images, with all its splits.

    Args:
        dataset_name (`str`, *optional*): Id of a data set on the Hub, or a folder that `datasets.load_dataset` reads.
        dataset_config_name (`str`, *optional*): Its configuration.
        train_data_dir (`str` or `os.PathLike`, *optional*):
            In place of `dataset_name`, a folder of images with one subfolder per class or with a `metadata.jsonl`;
            with subfolders `train/` and `test/` around these it has two splits. Or a folder of Parquet files.
        cache_dir (`str` or `os.PathLike`, *optional*): Where `datasets` keeps its files.
        streaming (`bool`, defaults to `False`): Whether the data are read while they are used, and not kept.

    Raises:
        `ValueError`: if not exactly one source is given, or if there is nothing to read.
    """
    import datasets

    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            "exactly one of `dataset_name` and `train_data_dir` has to be given, but they are"
            f" {dataset_name!r} and {str(train_data_dir) if train_data_dir is not None else None!r}."
        )
    if dataset_name is not None:
        name, path, options = "dataset_name", dataset_name, {"name": dataset_config_name}
    else:
        name, path, options = "train_data_dir", str(train_data_dir), {}
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"`train_data_dir` has to be a folder, but {path!r} is none.")
        if not (folder / "train").is_dir() and not any(folder.rglob("*.parquet")):
            # All files are one split: left to itself, `datasets` takes a name such as `test_1.png` for another one.
            path, options = "imagefolder", {"data_files": {"train": str(folder / "**")}}
        if has_one_class(folder):
            options["drop_labels"] = False  # which `datasets` does with a single label
    try:
        return datasets.load_dataset(path, cache_dir=cache_dir, streaming=streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        value = dataset_name or str(train_data_dir)
        raise ValueError(f"`{name}` {value!r} cannot be read as a data set of images: {error}") from error


def has_one_class(folder: Path) -> bool:
    """Whether all images of a folder, or of its splits, lie in subfolders of one name."""
    import PIL.Image

    extensions, names = PIL.Image.registered_extensions(), set()
    for path in folder.rglob("*"):
        if path.suffix.lower() in extensions:
            if path.parent == folder or path.parent == folder / "train":
                return False
            names.add(path.parent.name)
            if len(names) > 1:
                return False
    return len(names) == 1


def read_labels(
    dataset: "datasets.Dataset",
    label_column: str = "label",
    num_classes: int | None = None,
    names: list[str] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """
    Reads and checks all class labels of a data set.

    Args:
        dataset (`datasets.Dataset`): The data set.
        label_column (`str`, defaults to `"label"`): Column of the labels: class indices, or names.
        num_classes (`int`, *optional*):
            Number of classes `K`; if not given, that of the column's `ClassLabel` feature, or one more than the
            largest index, or the number of different names.
        names (`list[str]`, *optional*): The class names of the training split, for a held-out split.

    Returns:
        `tuple[np.ndarray, list[str]]`: the indices in `0..K-1` (int64, one per row), and the names of the `K` classes.
        String labels are numbered in the sorted order of the names.

    Raises:
        `ValueError`: if there is no such column, or a label is missing or outside the classes.
    """
    import datasets

    if label_column not in dataset.column_names:
        raise ValueError(
            f"`label_column` has to be a column of the data set, but there is no {label_column!r}; the columns are"
            f" {dataset.column_names}. (An image folder has labels if all its images lie in subfolders, one per class,"
            " with none inside these, or if its `metadata.jsonl` gives them.)"
        )
    if len(dataset) == 0:
        raise ValueError("the data set has no rows.")
    feature = dataset.features[label_column]
    column = dataset.select_columns([label_column]).with_format("arrow")[:][label_column]
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise ValueError(f"`label_column` {label_column!r} has no label in row {row}.")

    if feature.dtype in ("string", "large_string"):
        values = column.to_pylist()
        names = sorted(set(values)) if names is None else names
        unknown = sorted(set(values).difference(names))
        if unknown:
            raise ValueError(f"`label_column` {label_column!r} has labels that the training split has not: {unknown}.")
        index_of = {name: index for index, name in enumerate(names)}
        labels = np.array([index_of[value] for value in values], dtype=np.int64)
    elif "int" in feature.dtype:
        labels = column.to_numpy().astype(np.int64)
        if isinstance(feature, datasets.ClassLabel):
            if names is not None and names[: len(feature.names)] != feature.names:
                raise ValueError(f"`label_column` {label_column!r} has other class names than the training split.")
            names = feature.names if names is None else names
        elif names is None:
            names = [str(index) for index in range(max(num_classes or 0, int(labels.max()) + 1))]
    else:
        raise ValueError(
            f"`label_column` has to hold class indices or names, but {label_column!r} holds {feature.dtype}."
        )

    num_classes = len(names) if num_classes is None else num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"`label_column` {label_column!r} has to hold labels in 0..{num_classes - 1}, but row {wrong[0]} has"
            f" {labels[wrong[0]]} ({len(wrong)} such rows)."
        )
    return labels, names + [str(index) for index in range(len(names), num_classes)]


def hash_labels(labels: np.ndarray) -> int:
    """CRC-32 of class indices in their order: what a run records of its training data."""
    return zlib.crc32(np.ascontiguousarray(labels, dtype=np.int64))


class SampleSource(Protocol):
    """What a [`SampleStream`] reads: images, or what a VAE made of them."""

    kind: str
    """`"images"`: pixels in [-1, 1]. `"moments"`: mean and standard deviation of a VAE's posterior, `[2 C, S, S]`."""
    labels: np.ndarray
    """Class indices, int64, one per row."""

    def load(self, rows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """The samples of these rows as one tensor, each mirrored left to right where `flips` says so."""
        ...


def check_image_column(dataset: "datasets.Dataset | datasets.IterableDataset", image_column: str):
    """Raises a `ValueError` if a data set has no column of images of that name."""
    import datasets

    if image_column not in dataset.column_names:
        raise ValueError(
            f"`image_column` has to be a column of the data set, but there is no {image_column!r}; the columns are"
            f" {dataset.column_names}."
        )
    feature = dataset.features[image_column]
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in ("string", "binary"):
        raise ValueError(f"`image_column` has to hold images, but {image_column!r} holds {feature}.")


class UnreadableImageError(ValueError):
    """
    Raised if images cannot be read.

    Args:
        message (`str`): Names the first of them.
        images (`torch.Tensor`, *optional*): All images of the batch; unreadable ones are zero.
        errors (`dict[int, dict]`, *optional*): For those, by their place in the batch, what `unreadable.jsonl` says.
    """

    def __init__(
        self,
        message: str,
        images: torch.Tensor | None = None,
        errors: dict[int, dict[str, str]] | None = None,
    ):
        super().__init__(message)
        self.images, self.errors = images, errors


def damage(error: Exception) -> str:
    """What is wrong with an image that cannot be read, for `unreadable.jsonl`."""
    import PIL

    if isinstance(
        error, PIL.UnidentifiedImageError
    ):  # its message holds an address in memory, another one in each run
        return "not an image that Pillow can read"
    return f"{type(error).__name__}: {error}"


def decode_images(
    rows: np.ndarray, values: list[dict], flips: np.ndarray, resolution: int, num_channels: int
) -> torch.Tensor:
    """
    Turns the files of images into a tensor `[B, C, resolution, resolution]`, float32 in [-1, 1].

    Args:
        rows (`np.ndarray` of shape `[B]`): What to call the images where one cannot be read.
        values (`list[dict]`): The images, as `datasets.Image(decode=False)` gives them.
        flips (`np.ndarray` of shape `[B]`, bool): Which images to mirror left to right.
        resolution (`int`): Side of the square that images are cropped to, in pixels.
        num_channels (`int`): 1 for grey, 3 for RGB; images are converted.

    Raises:
        [`UnreadableImageError`]: if an image cannot be read. Names its row and its file.
    """
    import datasets

    decode = datasets.Image().decode_example  # turns the image as EXIF says
    images = np.zeros((len(rows), resolution, resolution, num_channels), dtype=np.uint8)
    errors, message = {}, ""
    for index, (row, value) in enumerate(zip(rows, values)):
        try:
            image = center_crop(convert_mode(decode(value), num_channels), resolution)
        except Exception as error:  # Whatever a decoder raises on a broken file
            path = (value or {}).get("path")
            message = message or f"the image of row {row}{f' ({path})' if path else ''} cannot be read: {error}"
            errors[index] = {"id": path or f"row {row}", "error": damage(error)}
            continue
        images[index] = np.asarray(image).reshape(images.shape[1:])
    images[flips] = images[flips][:, :, ::-1]
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    if errors:
        raise UnreadableImageError(message, tensor, errors)
    return tensor


class ImageSource:
    """
    Reads images as tensors.

    Args:
        dataset (`datasets.Dataset`): The data set.
        labels (`np.ndarray`): Its labels, by [`read_labels`].
        resolution (`int`): Side of the square that images are cropped to, in pixels.
        num_channels (`int`, defaults to `3`): 1 for grey, 3 for RGB; images are converted.
        image_column (`str`, defaults to `"image"`): Column of the images.

    Raises:
        `ValueError`: if there is no such column, or it holds no images.
    """

    kind = "images"

    def __init__(
        self,
        dataset: "datasets.Dataset",
        labels: np.ndarray,
        resolution: int,
        num_channels: int = 3,
        image_column: str = "image",
    ):
        import datasets

        check_image_column(dataset, image_column)
        # Images are decoded here, to be able to say which one cannot be.
        as_bytes = datasets.Image(decode=False)
        self.dataset = dataset.select_columns([image_column]).cast_column(image_column, as_bytes)
        self.labels = labels
        self.resolution = resolution
        self.num_channels = num_channels
        self.image_column = image_column

    def load(self, rows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """
        Reads images.

        Args:
            rows (`np.ndarray` of shape `[B]`): Row numbers.
            flips (`np.ndarray` of shape `[B]`, bool): Which images to mirror left to right.

        Returns:
            `torch.Tensor` of shape `[B, C, resolution, resolution]`: float32 in [-1, 1].

        Raises:
            [`UnreadableImageError`]: if an image cannot be read. Names its row and its file.
        """
        values = self.dataset[rows.tolist()][self.image_column]
        return decode_images(rows, values, flips, self.resolution, self.num_channels)

    def look(self, num_images: int = 16) -> tuple[list[tuple[int, int]], bool]:
        """Sizes (width, height) of some images, evenly spread over the rows, and whether one of them has colours."""
        import datasets

        decode = datasets.Image().decode_example
        sizes, has_colours = [], False
        for row in np.linspace(0, len(self.labels) - 1, min(num_images, len(self.labels))).astype(int).tolist():
            try:
                image = convert_mode(decode(self.dataset[row][self.image_column]), 3)
            except Exception:  # found again when it is used
                continue
            sizes.append(image.size)
            pixels = np.asarray(image, dtype=np.int16)
            has_colours |= bool((pixels.max(axis=-1) - pixels.min(axis=-1)).mean() > 4)  # more than JPEG makes of grey
        return sizes, has_colours


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


def cut_off(source: SampleSource, fraction: float, seed: int) -> tuple[SourceSubset, SourceSubset]:
    """Divides a source at random into the rows to train on and the `fraction` of all that is held out."""
    order = keyed_generator(seed, 0, _SPLIT).permutation(len(source.labels))
    num_held_out = max(1, round(len(order) * fraction))
    rest, held_out = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
    return SourceSubset(source, rest), SourceSubset(source, held_out)


def open_images(
    splits: "datasets.DatasetDict",
    resolution: int,
    num_channels: int,
    image_column: str = "image",
    label_column: str = "label",
    num_classes: int | None = None,
    validation_split: str | None = None,
) -> tuple[ImageSource, ImageSource | None, list[str]]:
    """
    Opens the training split of a data set, and a held-out one.

    Args:
        splits (`datasets.DatasetDict`): The data set, by [`load_image_dataset`].
        resolution (`int`): Side of the images in pixels.
        num_channels (`int`): 1 for grey, 3 for RGB.
        image_column (`str`, defaults to `"image"`): Column of the images.
        label_column (`str`, defaults to `"label"`): Column of the labels.
        num_classes (`int`, *optional*): Number of classes, if the labels do not show all.
        validation_split (`str`, *optional*): Name of the held-out split.

    Returns:
        `tuple[ImageSource, ImageSource | None, list[str]]`: what to train on, what is held out, the classes' names.

    Raises:
        `ValueError`: if a split or a column is missing or holds something else.
    """
    for split in ("train", validation_split):
        if split is not None and split not in splits:
            flag = "the data set" if split == "train" else "`validation_split`"
            raise ValueError(f"{flag} has no split {split!r}; the splits are {list(splits)}.")
    labels, names = read_labels(splits["train"], label_column, num_classes)
    source = ImageSource(splits["train"], labels, resolution, num_channels, image_column)
    if validation_split is None:
        return source, None, names
    labels, _ = read_labels(splits[validation_split], label_column, len(names), names)
    return source, ImageSource(splits[validation_split], labels, resolution, num_channels, image_column), names


# --- The stream of training samples ---------------------------------------------------------------------------------


@lru_cache(maxsize=2)  # A batch can reach from one epoch into the next.
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows in the order in which an epoch goes through them."""
    return keyed_generator(seed, epoch, _ORDER).permutation(num_rows)


class SampleStream(torch.utils.data.Dataset):
    r"""
    The samples of training, by their global indices, with all their random draws. A list of indices gives a batch:
    `images` or `moments` or both (with `posterior_noise`, which both need where there is a VAE), and the arguments of
    [`LSEPObjective`] of the same names: `class_labels`, `noise`, `timesteps`, `class_dropout_mask`,
    `probe_dropout_mask`, `crop_window`, `separate_rows`, and `probe_rows` if the probe is not trained on all.

    Args:
        source ([`SampleSource`]): Reads images or moments.
        latent_shape (`tuple[int, int, int]`): `[C, S, S]` of what the transformer sees.
        seed (`int`): Key of all draws, not below 0.
        samples_per_step (`int`, defaults to `1`): Samples of an optimiser step on all processes together.
        grid_size (`int`, defaults to `1`): Side of the grid of tokens.
        crop_size_min (`int`, *optional*):
            Smallest side of the probe's window, in tokens; the largest is `grid_size`. Not given, it is `grid_size`.
        class_dropout_prob (`float`, defaults to `0.1`): Probability of the null class in the main stream.
        probe_dropout_prob (`float`, defaults to `0.9`): Probability of the null class in the probe's stream.
        path_type (`str`, defaults to `"linear"`): The path, on which `timestep_sampling="logit_normal"` depends.
        timestep_sampling (`str`, defaults to `"uniform"`): As in [`LSEPObjective`].
        random_flip (`bool`, defaults to `False`): Whether half of the samples are mirrored left to right.
        posterior_noise (`bool`, defaults to `False`): Whether the noise of a VAE's posterior is drawn too.
        image_source ([`SampleSource`], *optional*): Reads the images of the same rows, where `source` reads moments.
        coupled_dropout (`bool`, defaults to `False`):
            Whether the labels of both streams are dropped by one number per sample in place of two. Either stream
            drops as often as before, so that the expected loss is the same, but they agree as often as they can. The
            numbers are spread evenly over the samples of a step, so that all steps cost the same; over the steps each
            of them is uniform.
        probe_fraction (`float`, defaults to `1.0`):
            The part of the samples that the probe is trained on, in (0, 1]: evenly spread over the samples of a step,
            and over the steps each with this probability. A batch may have none.
        replace_unreadable (`bool`, defaults to `False`):
            Whether an image that cannot be read is replaced by the next one of its class, which depends on the data
            alone. Batches then have one more entry where that happened: `unreadable`, a list of dicts with `id` and
            `error`.
    """

    def __init__(
        self,
        source: SampleSource,
        latent_shape: tuple[int, int, int],
        seed: int,
        samples_per_step: int = 1,
        grid_size: int = 1,
        crop_size_min: int | None = None,
        class_dropout_prob: float = 0.1,
        probe_dropout_prob: float = 0.9,
        path_type: str = "linear",
        timestep_sampling: str = "uniform",
        random_flip: bool = False,
        posterior_noise: bool = False,
        image_source: SampleSource | None = None,
        coupled_dropout: bool = False,
        probe_fraction: float = 1.0,
        replace_unreadable: bool = False,
    ):
        self.source = source
        self.image_source = image_source
        self.latent_shape = latent_shape
        self.seed = seed
        self.samples_per_step = samples_per_step
        self.grid_size = grid_size
        self.crop_size_min = grid_size if crop_size_min is None else crop_size_min
        self.class_dropout_prob = class_dropout_prob
        self.probe_dropout_prob = probe_dropout_prob
        self.path_type = path_type
        self.timestep_sampling = timestep_sampling
        self.random_flip = random_flip
        self.posterior_noise = posterior_noise
        self.coupled_dropout = coupled_dropout
        self.probe_fraction = probe_fraction
        self.replace_unreadable = replace_unreadable

    def rows(self, indices: list[int]) -> np.ndarray:
        """The rows of the data set that these samples take."""
        num_rows = len(self.source.labels)
        return np.array([epoch_order(num_rows, self.seed, g // num_rows)[g % num_rows] for g in indices])

    def substitutes(self, row: int) -> Iterable[int]:
        """The rows to try in place of this one, if it cannot be read: the next ones, those of its class first."""
        others = np.roll(np.arange(len(self.source.labels)), -1 - row)[:-1]
        return others[np.argsort(self.source.labels[others] != self.source.labels[row], kind="stable")].tolist()

    def window_sizes(self, indices: list[int]) -> np.ndarray:
        """The side of the probe's window, in tokens: one for all samples of an optimiser step."""
        steps, position = np.unique(np.array(indices) // self.samples_per_step, return_inverse=True)
        low, high = self.crop_size_min, self.grid_size
        sizes = [keyed_generator(self.seed, int(s), _STEP).integers(low, high, endpoint=True) for s in steps]
        return np.array(sizes)[position]

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        draws = self._draw(indices, _SAMPLE)
        size = self.window_sizes(indices)
        start = (draws["crop"] * (self.grid_size - size[:, None] + 1)).astype(np.int64)
        batch = self._load(self.rows(indices), draws, flips=(draws["flip"] < 0.5) & self.random_flip)
        class_dropout, probe_dropout = draws["class_dropout"], draws["probe_dropout"]
        chosen = np.ones(len(indices), dtype=bool)
        if self.coupled_dropout or self.probe_fraction < 1:
            chosen, spread = self._spread(indices)
            if self.coupled_dropout:
                class_dropout = probe_dropout = spread
        drops = (class_dropout < self.class_dropout_prob, probe_dropout < self.probe_dropout_prob)
        batch["class_dropout_mask"], batch["probe_dropout_mask"] = (torch.from_numpy(drop) for drop in drops)
        batch["crop_window"] = torch.from_numpy(np.concatenate([start, size[:, None]], axis=1))

        # Where both streams see the same label the probe reads the main stream's tokens: less work, the same loss.
        batch["separate_rows"] = torch.from_numpy(np.flatnonzero((drops[0] != drops[1]) & chosen))
        if self.probe_fraction < 1:
            batch["probe_rows"] = torch.from_numpy(np.flatnonzero(chosen))
        return batch

    def _spread(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """
        Which samples the probe is trained on, and a number in [0, 1) for each sample: both spread evenly over a step,
        and by the step's two random shifts with the right probability at each place in it (systematic sampling).
        """
        steps, position = np.divmod(np.array(indices), self.samples_per_step)
        unique, inverse = np.unique(steps, return_inverse=True)
        shifts = np.array([keyed_generator(self.seed, int(s), _SHIFT).random(2) for s in unique])
        shift_of_choice, shift = shifts[inverse].T

        def chosen_before(end: np.ndarray | int) -> np.ndarray:
            return np.floor(end * self.probe_fraction + shift_of_choice).astype(np.int64)

        # Chosen samples and others have lattices of their own, so that the work for the chosen ones is even as well.
        before, count = chosen_before(position), chosen_before(self.samples_per_step)
        chosen = chosen_before(position + 1) > before
        rank = np.where(chosen, before, position - before)
        count = np.where(chosen, count, self.samples_per_step - count)
        stride = np.array([_coprime_stride(n) for n in count.tolist()])
        return chosen, (rank * stride % count / count + shift) % 1

    def held_out_batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """
        A batch of these rows with draws that are the same at every call, to measure on: no image is mirrored, the main
        stream is given the label, and the probe's stream, which has to find it in the image, is not.
        """
        batch = self._load(np.array(rows), self._draw(rows, _HELD_OUT), flips=np.zeros(len(rows), dtype=bool))
        batch["class_dropout_mask"] = torch.zeros(len(rows), dtype=torch.bool)
        batch["probe_dropout_mask"] = torch.ones(len(rows), dtype=torch.bool)
        batch["crop_window"] = torch.tensor([[0, 0, self.grid_size]]).repeat(len(rows), 1)
        return batch

    def _draw(self, indices: list[int], purpose: int) -> dict[str, np.ndarray]:
        # The order of the draws is part of the format: a run can be resumed by a later version only if it stays.
        uniform = np.empty((len(indices), 6), dtype=np.float32)
        noise = np.empty((len(indices), *self.latent_shape), dtype=np.float32)
        posterior_noise = np.empty_like(noise) if self.posterior_noise else None
        for i, index in enumerate(indices):
            rng = keyed_generator(self.seed, index, purpose)
            rng.random(out=uniform[i], dtype=np.float32)
            rng.standard_normal(out=noise[i], dtype=np.float32)
            if self.posterior_noise:
                rng.standard_normal(out=posterior_noise[i], dtype=np.float32)
        return {
            "timestep": uniform[:, 0],
            "class_dropout": uniform[:, 1],
            "probe_dropout": uniform[:, 2],
            "crop": uniform[:, 3:5].astype(np.float64),
            "flip": uniform[:, 5],
            "noise": noise,
            "posterior_noise": posterior_noise,
        }

    def _load(self, rows: np.ndarray, draws: dict[str, np.ndarray], flips: np.ndarray) -> dict[str, torch.Tensor]:
        uniform = torch.from_numpy(draws["timestep"].copy())
        samples, rows, unreadable = self._read(rows, flips)
        batch = {
            self.source.kind: samples,
            "class_labels": torch.from_numpy(self.source.labels[rows]),
            "noise": torch.from_numpy(draws["noise"]),
            "timesteps": timesteps_from_uniform(uniform, get_path(self.path_type), self.timestep_sampling),
        }
        if self.image_source is not None:
            batch[self.image_source.kind] = self.image_source.load(rows, flips)
        if self.posterior_noise:
            batch["posterior_noise"] = torch.from_numpy(draws["posterior_noise"])
        if unreadable:
            batch["unreadable"] = unreadable
        return batch

    def _read(self, rows: np.ndarray, flips: np.ndarray) -> tuple[torch.Tensor, np.ndarray, list[dict[str, str]]]:
        """The samples of these rows, the rows that they are of in the end, and what could not be read."""
        try:
            return self.source.load(rows, flips), rows, []
        except UnreadableImageError as error:
            if not self.replace_unreadable:
                raise
            samples, errors = error.images, error.errors
        rows, unreadable = rows.copy(), list(errors.values())
        for position in errors:
            for row in self.substitutes(rows[position]):
                try:
                    samples[position] = self.source.load(np.array([row]), flips[position : position + 1])[0]
                    rows[position] = row
                    break
                except UnreadableImageError as error:
                    unreadable += error.errors.values()
            else:
                raise ValueError("none of the images can be read.")
        return samples, rows, unreadable


def _coprime_stride(count: int) -> int:
    """A stride with which `count` places are visited one by one, and every part of the way visits all regions."""
    stride = round(count * (5**0.5 - 1) / 2)  # steps by the golden ratio
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


class StreamBatches:
    """
    The batches of a [`SampleStream`] as lists of global indices, for all processes: accelerate hands them out in turn,
    so that optimiser step `s` consumes the samples `[s * G, (s + 1) * G)`, where `G` counts the samples of a step on
    all processes together.

    Args:
        batch_size (`int`): Samples per batch.
        start (`int`): Global index of the first sample.
        end (`int`): Global index after the last sample.
    """

    drop_last = True  # Tells accelerate that there is nothing to pad.

    def __init__(self, batch_size: int, start: int, end: int):
        self.batch_size = batch_size
        self.start = start
        self.end = end

    def __len__(self) -> int:
        return (self.end - self.start) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.start, self.end - self.batch_size + 1, self.batch_size):
            yield list(range(first, first + self.batch_size))


def keep_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `collate_fn` of a [`SampleStream`], which makes whole batches itself."""
    return batch


def sample_posterior(
    moments: torch.Tensor, noise: torch.Tensor, scaling_factor: float, shift_factor: float | None = None
) -> torch.Tensor:
    """
    Latents from the moments of a VAE's posterior, `(mean + std * noise - shift_factor) * scaling_factor`.

    Args:
        moments (`torch.Tensor` of shape `[B, 2 C, S, S]`): Mean and standard deviation.
        noise (`torch.Tensor` of shape `[B, C, S, S]`): Standard normal noise.
        scaling_factor (`float`): From the VAE's config.
        shift_factor (`float`, *optional*): From the VAE's config.
    """
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise - (shift_factor or 0.0)) * scaling_factor
