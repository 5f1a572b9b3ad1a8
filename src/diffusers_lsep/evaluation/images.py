# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Sets of images to evaluate: an `.npz` (ADM's reference batches included), a folder of images, or a data set.

A set is inspected once, headers and content hash, before any network runs; its pixels are read in batches after that.
"""

import collections
import concurrent.futures
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..data.archives import ZIP_ERRORS, walk_files
from ..data.images import center_crop, convert_mode, find_split_folders, load_image_dataset
from ..files import hash_file, parse_json
from .inception import InceptionFeatures


IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# ADM's names of mean and covariance, and the features they are of.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
THREADS = min(8, os.cpu_count() or 1)


class NpzImages:
    """
    Images in an `.npz` as ADM's evaluator reads it: `arr_0`, uint8 `[N, H, W, 3]`. Only one batch is in memory.

    Args:
        path (`str` or `os.PathLike`):
            The file. Grey images, `[N, H, W, 1]` or `[N, H, W]`, are repeated to three channels.
        argument (`str`, defaults to `"samples"`):
            What messages call it.

    Attributes:
        name (`str`): The path.
        count (`int`): Number of images; 0 if the file holds statistics alone.
        size (`tuple[int, int]` or `None`): Height and width.
        statistics (`dict[str, tuple[np.ndarray, np.ndarray]]`):
            Mean and covariance that the file brings, under `pool` and `spatial`.
        content_hash (`str`): SHA-256 of the file.
        settings (`dict`): How the samples were drawn, from the `.json` that `examples/sample.py` writes beside them.
        notes (`list[str]`): What makes numbers on these images hard to compare.

    Raises:
        `ValueError`: if the file is damaged, or does not hold what is asked for.
    """

    def __init__(self, path: str | os.PathLike, argument: str = "samples"):
        self.name, self.argument = str(path), argument
        self.notes: list[str] = []
        self.settings = self._read_settings()
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = [name.removesuffix(".npy") for name in archive.namelist()]
                self.statistics = self._read_statistics(archive, arrays)
                self.count, self._data_offset = 0, 0
                self.size: tuple[int, int] | None = None
                if "arr_0" in arrays:
                    self._inspect_images(archive)
                elif not self.statistics:
                    raise self._error(f"has to hold the array `arr_0` of images, but has {arrays}")
            self.content_hash = hash_file(path)
        except (*ZIP_ERRORS, OSError) as error:
            raise self._error(f"cannot be read: {error}") from error

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"`{self.argument}` {self.name!r} {problem}.")

    def _read_settings(self) -> dict[str, Any]:
        path = Path(self.name).with_suffix(".json")
        if not path.is_file():
            return {}
        try:
            settings = parse_json(path.read_bytes())
        except ValueError as error:
            raise self._error(f"has settings in {path} that cannot be read: {error}") from error
        if not isinstance(settings, dict):  # of something else
            return {}
        for name in ("class_ids", "configs"):  # one per image, and what the model itself says
            settings.pop(name, None)
        if str(settings.get("class_labels")).startswith("balanced"):
            self.notes.append(
                f"`{self.argument}`: every class was drawn equally often; the papers draw classes at random, which "
                "gives a higher FID"
            )
        return settings

    def _read_statistics(self, archive: zipfile.ZipFile, arrays: list[str]) -> dict[str, tuple]:
        statistics = {}
        for feature, names in STATISTICS.items():
            if not set(names) & set(arrays):
                continue
            width = InceptionFeatures.widths[feature]
            pair = []
            for name, shape in zip(names, ((width,), (width, width)), strict=True):
                if name not in arrays:
                    raise self._error(f"has only one of the statistics {' and '.join(names)}")
                # Before anything is read: a header may declare more than memory holds.
                with archive.open(f"{name}.npy") as member:
                    found, _, dtype = self._read_header(member, name)
                if found != shape or not np.issubdtype(dtype, np.floating):
                    raise self._error(f"has statistics {name} of {dtype} {found}, not floats {shape}")
                try:
                    with archive.open(f"{name}.npy") as member:
                        array = np.lib.format.read_array(member, allow_pickle=False)
                except ValueError as error:
                    raise self._error(f"has statistics {name} that cannot be read: {error}") from error
                if not np.isfinite(array).all():
                    raise self._error(f"has statistics {name} with NaN or infinity")
                pair.append(array.astype(np.float64))
            statistics[feature] = tuple(pair)
        return statistics

    def _read_header(self, member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Shape, order and type of an array, as its file declares them."""
        versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            return versions[np.lib.format.read_magic(member)](member)
        except (*ZIP_ERRORS, OSError):
            raise
        except Exception as error:  # numpy evaluates the header as Python, which can fail in many ways
            raise self._error(f"has an `{name}` that cannot be read: {error}") from error

    def _inspect_images(self, archive: zipfile.ZipFile):
        with archive.open("arr_0.npy") as member:
            shape, fortran_order, dtype = self._read_header(member, "arr_0")
            self._data_offset = member.tell()
        if dtype != np.uint8:
            raise self._error(
                f"has to hold uint8 images, but `arr_0` is {dtype}; the protocol's conversion from [-1, 1] is "
                "floor(clip(255 * (x + 1) / 2))"
            )
        grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        if not grey and (len(shape) != 4 or shape[3] != 3):
            raise self._error(f"has to hold images [N, H, W, 3], but `arr_0` has shape {list(shape)}")
        if fortran_order:
            raise self._error("has to hold `arr_0` in C order, but it is in Fortran order")
        if min(shape) < 1:
            raise self._error(f"holds no images: `arr_0` has shape {list(shape)}")
        # In Python's integers, which no header makes overflow.
        if archive.getinfo("arr_0.npy").file_size != self._data_offset + math.prod(shape):
            raise self._error(f"has an `arr_0` that does not hold the {list(shape)} values it declares")
        self.count, self.size = shape[0], (shape[1], shape[2])
        self._shape = (*shape[:3], 1 if grey else 3)
        if grey:
            self.notes.append(f"`{self.argument}`: grey images, repeated to three channels")

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images `start` to `stop` as uint8 `[B, H, W, 3]`."""
        image_bytes = int(np.prod(self._shape[1:]))
        with zipfile.ZipFile(self.name) as archive, archive.open("arr_0.npy") as member:
            member.seek(self._data_offset + start * image_bytes)
            for first in range(start, stop, batch_size):
                pixels = np.empty((min(batch_size, stop - first), *self._shape[1:]), dtype=np.uint8)
                try:
                    count = member.readinto(pixels.reshape(-1))  # type: ignore[attr-defined]  # which `ZipExtFile` has
                except ZIP_ERRORS as error:
                    raise self._error(f"is damaged: {error}") from error
                if count != pixels.size:
                    raise self._error("is damaged: it ends before its images do")
                yield pixels if pixels.shape[3] == 3 else pixels.repeat(3, axis=3)


class EncodedImages:
    """
    Images that are stored one by one, as files or in the rows of a data set. Modes are converted as for training:
    grey is repeated to three channels, what is transparent shows white, the image is turned as EXIF says.

    Args:
        name (`str`):
            What the set is called in results.
        image_names (`list[str]`):
            What each image is called in messages.
        read (`Callable[[int], bytes]`):
            Gives the encoded image of an index.
        resolution (`int`, *optional*):
            Side of the square that every image is cut to as ADM prepares ImageNet; not cut if not given, then all have
            to have one size.
        argument (`str`, defaults to `"samples"`):
            What messages call the set.

    Attributes:
        name, count, size, statistics, content_hash, settings, notes: as those of [`NpzImages`].

    Raises:
        `ValueError`: if there are no images, one cannot be read, or sizes differ without `resolution`.
    """

    def __init__(
        self,
        name: str,
        image_names: list[str],
        read: Callable[[int], bytes],
        resolution: int | None = None,
        argument: str = "samples",
    ):
        self.name, self.argument, self.count = name, argument, len(image_names)
        self._image_names, self._read, self._resolution = image_names, read, resolution
        self.statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.settings: dict[str, Any] = {}
        if not image_names:
            raise ValueError(f"`{argument}` {name!r} holds no images.")

        digest = hashlib.sha256(f"crop {resolution}".encode())
        sizes: collections.Counter[tuple[int, int]] = collections.Counter()
        kinds: collections.Counter[str] = collections.Counter()
        first_of_size: dict[tuple[int, int], str] = {}
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, self.count, 1024):
                rows = range(start, min(start + 1024, self.count))
                for row, (row_digest, size, row_kinds) in zip(rows, pool.map(self._inspect, rows), strict=True):
                    digest.update(row_digest)
                    sizes[size] += 1
                    first_of_size.setdefault(size, image_names[row])
                    kinds.update(row_kinds)
        if len(sizes) > 1:
            examples = ", ".join(f"{w} x {h} ({first_of_size[h, w]})" for h, w in list(sizes)[:3])
            raise ValueError(
                f"`{argument}` {name!r} has to hold images of one size, but has {len(sizes)} sizes: {examples}. "
                "A reference is cut to one size by `resolution`."
            )
        self.content_hash = digest.hexdigest()
        (self.size,) = sizes
        self.notes = [f"`{argument}`: {count} of {self.count} images are {kind}" for kind, count in kinds.items()]

    def _inspect(self, row: int) -> tuple[bytes, tuple[int, int], list[str]]:
        """Hash, size (height, width) and peculiarities of an image, by its header."""
        import PIL.ExifTags
        import PIL.Image

        try:
            data = self._read(row)
            with PIL.Image.open(io.BytesIO(data)) as image:
                kinds = []
                if image.mode in ("1", "L", "LA", "I;16", "I"):
                    kinds.append("grey, repeated to three channels")
                if image.has_transparency_data:
                    kinds.append("transparent, put on white")
                if image.format in ("JPEG", "WEBP") and self.argument == "samples":
                    kinds.append(f"{image.format} files, whose compression changes the distances")
                if image.mode == "F":
                    raise ValueError("floating-point pixels have no known range")
                # EXIF may turn the image by 90 degrees. (Without an early `exif`, asking a PNG decodes all of it.)
                exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
                turned = exif.get(PIL.ExifTags.Base.Orientation, 1) >= 5
                size = image.size if turned else image.size[::-1]
        except Exception as error:  # whatever a decoder raises on a broken file
            raise self._unreadable(row, error) from error
        if self._resolution is not None:
            size = (self._resolution, self._resolution)
        return hashlib.sha256(data).digest(), size, kinds

    def _decode(self, row: int) -> np.ndarray:
        import PIL.Image
        import PIL.ImageOps

        try:
            image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(self._read(row))))
            image = convert_mode(image, 3)
            if self._resolution is not None:
                image = center_crop(image, self._resolution)
            if image.size != self.size[::-1]:
                raise ValueError(f"it is {image.width} x {image.height}, its header said otherwise")
        except Exception as error:  # whatever a decoder raises on a broken file
            raise self._unreadable(row, error) from error
        return np.asarray(image)

    def _unreadable(self, row: int, error: Exception) -> ValueError:
        return ValueError(f"`{self.argument}`: the image {self._image_names[row]} cannot be read: {error}")

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images `start` to `stop` as uint8 `[B, H, W, 3]`, decoded by threads a batch ahead."""
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            waiting: collections.deque[list[concurrent.futures.Future]] = collections.deque()
            for first in range(start, stop, batch_size):
                waiting.append([pool.submit(self._decode, row) for row in range(first, min(first + batch_size, stop))])
                if len(waiting) == 2:
                    yield np.stack([image.result() for image in waiting.popleft()])
            for images in waiting:
                yield np.stack([image.result() for image in images])


def is_image_file(path: str | os.PathLike) -> bool:
    """Whether a name is that of an image, and not hidden."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES and not Path(path).name.startswith(".")


def open_images(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    argument: str = "samples",
    resolution: int | None = None,
    split: str | None = None,
    image_column: str = "image",
) -> NpzImages | EncodedImages:
    """
    Opens and inspects a set of images.

    Args:
        source (`str`, `os.PathLike` or a sequence of these):
            An `.npz`; a folder of images, read with all its subfolders in the order of their paths; a data set: a
            folder of images with a subfolder `train/`, a `.parquet` file, a folder of such or one written by
            `save_to_disk`, or an id on the Hub; or image files.
        argument (`str`, defaults to `"samples"`):
            What messages call it.
        resolution (`int`, *optional*):
            Side of the square to cut images to as ADM prepares ImageNet; those of an `.npz` cannot be cut.
        split (`str`, *optional*):
            Split of a data set; `train` if not given, or the only one.
        image_column (`str`, defaults to `"image"`):
            Column of a data set's images.

    Raises:
        `ValueError`: if the source is nothing of the above, is empty or damaged, or an argument does not fit it.
    """
    if resolution is not None and resolution < 1:
        raise ValueError(f"`resolution` has to be at least 1, but is {resolution}.")

    def refuse_split():
        if split is not None:
            raise ValueError(f"`split` is {split!r}, but `{argument}` {str(source)!r} has no splits.")

    if not isinstance(source, (str, os.PathLike)):
        refuse_split()
        return _open_files(f"{len(source)} files", [Path(file) for file in source], resolution, argument)
    path = Path(source)
    if path.suffix == ".npz":
        if not path.is_file():
            raise ValueError(f"`{argument}` has to exist, but there is no file {str(source)!r}.")
        refuse_split()
        images = NpzImages(path, argument)
        if images.size is not None and resolution is not None and images.size != (resolution, resolution):
            raise ValueError(
                f"`resolution` {resolution} cannot be used with `{argument}` {str(source)!r}, whose images are "
                f"{images.size[0]} x {images.size[1]} already."
            )
        return images
    is_of_files = path.is_dir() and not _is_saved_dataset(path) and not find_split_folders(path)
    if is_of_files and not any(path.rglob("*.parquet")):
        refuse_split()
        files = sorted(path / name for name in walk_files(path, argument))
        return _open_files(str(source), list(filter(is_image_file, files)), resolution, argument)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(
            f"`{argument}` has to be an .npz, a folder of images or a data set (a .parquet file, a folder of such, an "
            f"id on the Hub), but is the file {str(source)!r}."
        )
    return _open_dataset(source, argument, resolution, split, image_column)


def _open_files(name: str, files: list[Path], resolution: int | None, argument: str) -> EncodedImages:
    return EncodedImages(name, [str(file) for file in files], lambda i: files[i].read_bytes(), resolution, argument)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _open_dataset(
    source: str | os.PathLike, argument: str, resolution: int | None, split: str | None, image_column: str
) -> EncodedImages:
    import datasets

    path = Path(source)
    try:
        if path.is_file():
            splits = datasets.load_dataset("parquet", data_files={"train": str(path)})
        elif _is_saved_dataset(path):
            splits = datasets.load_from_disk(str(path))
            splits = {"train": splits} if isinstance(splits, datasets.Dataset) else splits
        elif path.is_dir():
            splits = load_image_dataset(train_data_dir=path)
        else:
            splits = load_image_dataset(dataset_name=str(source))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"`{argument}` has to be an .npz, a folder of images or a data set, but {str(source)!r} is neither a file "
            f"nor a folder and cannot be read as a data set: {error}"
            if not path.exists()
            else f"`{argument}` {str(source)!r} cannot be read as a data set: {error}"
        ) from error
    if split is None:
        split = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
    if split not in splits:
        raise ValueError(f"`split` has to be one of {list(splits)} for {str(source)!r}, but is {split!r}.")
    dataset = splits[split]
    if not isinstance(dataset.features.get(image_column), datasets.Image):
        raise ValueError(
            f"`image_column` has to be a column of images of {str(source)!r}, but is {image_column!r}; there are "
            f"{dataset.features}."
        )
    dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def read(row: int) -> bytes:
        image = dataset[row][image_column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    name = f"{source} ({split})"
    return EncodedImages(name, [f"{name} row {row}" for row in range(len(dataset))], read, resolution, argument)
