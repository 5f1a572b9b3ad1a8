# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelled images through `datasets`, and what is done to each of them."""

import glob
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..labels import UNLABELED, number_names
from .fingerprint import Fingerprint, fingerprint_images


if TYPE_CHECKING:
    import datasets
    import PIL.Image


METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of a folder of images, as for `datasets`

# What the folders of splits may be called, as for `datasets`; a number or another word may follow, as in `val_small`.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def center_crop(image: "PIL.Image.Image", resolution: int) -> "PIL.Image.Image":
    """
    Cuts the central square out of an image, as ADM (arXiv 2105.05233) prepares ImageNet: halved with a box filter
    while the shorter side is at least twice too large, then scaled with a bicubic filter until it fits, then cropped.

    Args:
        image (`PIL.Image.Image`): The image.
        resolution (`int`): Side of the square in pixels.

    Raises:
        `ValueError`: if it is so narrow that the scaled image has more than 178 million pixels, which is
        where Pillow too takes a file for an attack.
    """
    import PIL.Image

    width, height = image.size
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), resample=PIL.Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if PIL.Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > 2 * PIL.Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too narrow to be scaled to {size[0]} x {size[1]}")
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
    argument: str | None = None,
    labelled: bool = True,
) -> "datasets.DatasetDict | datasets.IterableDatasetDict":
    """
    Loads a data set of labelled images, with all its splits.

    Args:
        dataset_name (`str`, *optional*): Id of a data set on the Hub, or a folder that `datasets.load_dataset` reads.
        dataset_config_name (`str`, *optional*): Its configuration.
        train_data_dir (`str` or `os.PathLike`, *optional*):
            In place of `dataset_name`, a folder of images with one subfolder per class or with a `metadata.jsonl` or
            `metadata.csv`; with subfolders `train/` and `test/` around these it has two splits. Or a folder of Parquet
            files.
        cache_dir (`str` or `os.PathLike`, *optional*): Where `datasets` keeps its files.
        streaming (`bool`, defaults to `False`): Whether the data are read while they are used, and not kept.
        argument (`str`, *optional*): What messages call the source, in place of the two names above.
        labelled (`bool`, defaults to `True`): Whether the labels are going to be read.

    Raises:
        `ValueError`: if not exactly one source is given, or if there is nothing to read.
    """
    import datasets

    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            "exactly one of `dataset_name` and `train_data_dir` has to be given, but they are"
            f" {dataset_name!r} and {str(train_data_dir) if train_data_dir is not None else None!r}."
        )
    options: dict[str, Any]
    if dataset_name is not None:
        name, path, options = argument or "dataset_name", dataset_name, {"name": dataset_config_name}
    else:
        name, path, options = argument or "train_data_dir", str(train_data_dir), {}
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"`{name}` has to be a folder, but {path!r} is none.")
        if labelled and (folder / "dataset.json").is_file():
            raise ValueError(
                f"`{name}` has to hold one folder of images per class, or a metadata.jsonl, but {path} has a"
                " dataset.json, whose labels only examples/encode_latents.py reads."
            )
        splits = find_split_folders(folder)
        if not any(folder.rglob("*.parquet")):
            # Left to itself, `datasets` takes names anywhere, of an image `test_1.png` or a class `train`, for splits.
            root = glob.escape(os.path.abspath(path))
            path = path if splits else "imagefolder"
            patterns = {split: [f"{root}/{child}/**" for child in children] for split, children in splits.items()}
            options = {"data_files": patterns or {"train": f"{root}/**"}}
        options |= _label_options(folder, name, class_depth=2 if splits else 1)
    try:
        return datasets.load_dataset(path, cache_dir=cache_dir, streaming=streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        value = dataset_name or str(train_data_dir)
        raise ValueError(f"`{name}` {value!r} cannot be read as a data set of images: {error}") from error


def find_split_folders(folder: Path) -> dict[str, list[str]]:
    """
    The folders of the splits of a folder of images, by the names of `datasets`; none if it has none for training, or
    if that is a class among others.
    """
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not _is_hidden(child.name))
    found: dict[str, list[str]] = {}
    for split, names in SPLIT_FOLDERS.items():
        pattern = re.compile(rf"({'|'.join(names)})([-._ 0-9].*)?")
        if chosen := [child.name for child in children if pattern.fullmatch(child.name)]:
            found[split] = chosen
    inside = [child for name in found.get("train", ()) for child in (folder / name).iterdir()]
    is_split = any(child.name in METADATA_FILES or child.is_dir() and not _is_hidden(child.name) for child in inside)
    has_others = len(children) > sum(map(len, found.values()))
    return found if "train" in found and (is_split or not has_others) else {}


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # as for `datasets`


def _label_options(folder: Path, name: str, class_depth: int) -> dict[str, bool]:
    """
    What `datasets` has to be told about the labels of a folder of images: it drops those of a single class, and takes
    the last folder for the class, however deep it lies. Where images lie deeper than in folders of classes, or beside
    these, there are no labels, unless metadata give them.

    Raises:
        `ValueError`: if there is a link to a folder, which `datasets` would leave out.
    """
    import PIL.Image

    extensions, classes, depths = PIL.Image.registered_extensions(), set(), set()
    for parent, folders, files in os.walk(folder):
        folders[:] = (child for child in folders if not _is_hidden(child))
        for path in (Path(parent, child) for child in folders):
            if path.is_symlink():
                raise ValueError(
                    f"`{name}` has to hold no links to folders, which are not followed, but holds {path}."
                )
        if not set(METADATA_FILES).isdisjoint(files):
            return {}
        if any(os.path.splitext(file)[1].lower() in extensions for file in files):
            classes.add(Path(parent).name)
            depths.add(len(Path(parent).relative_to(folder).parts))
    if not depths:
        return {}
    if depths != {class_depth}:
        return {"drop_labels": True}
    return {"drop_labels": False} if len(classes) == 1 else {}


def read_labels(
    dataset: "datasets.Dataset",
    label_column: str | None = "label",
    num_classes: int | None = None,
    names: list[str] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """
    Reads and checks all class labels of a data set.

    Args:
        dataset (`datasets.Dataset`): The data set.
        label_column (`str`, defaults to `"label"`):
            Column of the labels: class indices, or names. None where all rows are the null class, `UNLABELED`.
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

    if label_column is None:
        return np.full(len(dataset), len(UNLABELED), dtype=np.int64), list(UNLABELED)
    if label_column not in dataset.column_names:
        raise ValueError(
            f"`label_column` has to be a column of the data set, but there is no {label_column!r}; the columns are"
            f" {dataset.column_names}. (An image folder has labels if all its images lie in subfolders, one per class,"
            " with none inside these and no metadata file among them, or if its `metadata.jsonl` gives them.)"
        )
    if len(dataset) == 0:
        raise ValueError("the data set has no rows.")
    feature = dataset.features[label_column]
    column = dataset.select_columns([label_column]).with_format("arrow")[:][label_column]
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise ValueError(f"`label_column` {label_column!r} has no label in row {row}.")

    dtype = getattr(feature, "dtype", str(feature))  # lists and structs have none
    if dtype in ("string", "large_string"):
        values = column.to_pylist()
        names = sorted(set(values)) if names is None else names
        unknown = sorted(set(values).difference(names))
        if unknown:
            raise ValueError(f"`label_column` {label_column!r} has labels that the training split has not: {unknown}.")
        index_of = {name: index for index, name in enumerate(names)}
        labels = np.array([index_of[value] for value in values], dtype=np.int64)
    elif dtype.lower().startswith(("int", "uint")):
        labels = column.to_numpy().astype(np.int64)
        if isinstance(feature, datasets.ClassLabel):
            if names is not None and names[: len(feature.names)] != feature.names:
                raise ValueError(f"`label_column` {label_column!r} has other class names than the training split.")
            names = feature.names if names is None else names
        elif names is None:
            names = number_names(max((num_classes or 0) - 1, int(labels.max())))
    else:
        raise ValueError(f"`label_column` has to hold class indices or names, but {label_column!r} holds {dtype}.")

    num_classes = len(names) if num_classes is None else num_classes
    if num_classes < len(names) and isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"`num_classes` has to be at least {len(names)}, the number of classes of `label_column` {label_column!r},"
            f" but is {num_classes}."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"`label_column` {label_column!r} has to hold labels in 0..{num_classes - 1}, but row {wrong[0]} has"
            f" {labels[wrong[0]]} ({len(wrong)} such rows)."
        )
    return labels, names + [str(index) for index in range(len(names), num_classes)]


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

    if isinstance(error, PIL.UnidentifiedImageError):  # whose message holds an address in memory
        return "not an image that Pillow can read"
    return f"{type(error).__name__}: {error}"


def decode_images(
    rows: np.ndarray,
    values: list[dict],
    flips: np.ndarray,
    resolution: int,
    num_channels: int,
    is_stream: bool = False,
) -> torch.Tensor:
    """
    Turns the files of images into a tensor `[B, C, resolution, resolution]`, float32 in [-1, 1].

    Args:
        rows (`np.ndarray` of shape `[B]`): What to call the images where one cannot be read.
        values (`list[dict]`): The images, as `datasets.Image(decode=False)` gives them.
        flips (`np.ndarray` of shape `[B]`, bool): Which images to mirror left to right.
        resolution (`int`): Side of the square that images are cropped to, in pixels.
        num_channels (`int`): 1 for grey, 3 for RGB; images are converted.
        is_stream (`bool`, defaults to `False`):
            Whether the same images have other rows in every epoch, and so are told by checksums.

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
            path: str | None = (value or {}).get("path")
            message = message or f"the image of row {row}{f' ({path})' if path else ''} cannot be read: {error}"
            content = (value or {}).get("bytes")
            if path and content is None:
                name = path
            else:  # the names of images in a table may be all the same
                name = f"crc32 {zlib.crc32(content or b''):08x}" if is_stream else f"row {row}"
                name += f" ({path})" if path else ""
            errors[index] = {"id": name, "error": damage(error)}
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

    def fingerprint(self) -> Fingerprint:
        return fingerprint_images(self.dataset, self.image_column)

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


def open_images(
    splits: "datasets.DatasetDict",
    resolution: int,
    num_channels: int,
    image_column: str = "image",
    label_column: str | None = "label",
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
        label_column (`str`, defaults to `"label"`): Column of the labels; None where there are none, or none are read.
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
