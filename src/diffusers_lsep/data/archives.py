# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelled images in folders and archives, as ImageNet and EDM2/REPA data sets lie on disk; nothing is unpacked."""

import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import parse_json
from ..labels import UNLABELED, check_largest_id, number_names
from .fingerprint import Fingerprint, fingerprint_files, read_piece


IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# In which a damaged .zip may end.
ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(UnicodeDecodeError, OverflowError),
)
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class ImageFiles:
    """
    Images in a folder, or at known places in uncompressed archives.

    Args:
        root (`Path`): The folder, or the archive.
        names (`list[str]`): Of each image, in the order of the rows; relative to `root` where that is a folder.
        labels (`np.ndarray` of int64): Of each image.
        id2label (`dict[int, str]`): Name of each class.
        archives (`list[Path]`): The archives, none for a folder.
        places (`np.ndarray` of int64, `[len(names), 4]`): Archive, offset, size, and whether deflated.
    """

    def __init__(self, root, names, labels, id2label, archives=(), places=None):
        self.root, self.names, self.labels, self.id2label = root, names, labels, id2label
        self.archives, self.places = archives, places

    def read(self, row: int) -> bytes:
        """The file of an image, as it was stored."""
        if self.places is None:
            return (self.root / self.names[row]).read_bytes()
        archive, offset, size, deflated = self.places[row].tolist()
        with open(self.archives[archive], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        try:
            return zlib.decompress(data, -15) if deflated else data
        except zlib.error as error:
            raise ValueError(f"`train_data_dir`: {self.names[row]} is damaged ({error}).") from None

    def fingerprint(self) -> Fingerprint:
        """Of the files of the images, as they are stored."""
        if self.places is None:
            return fingerprint_files([self.root / name for name in self.names])
        places, archives = self.places, self.archives

        def read(row: int, offset: int, length: int) -> bytes:
            return read_piece(archives[places[row, 0]], int(places[row, 1]) + offset, length)

        return Fingerprint(places[:, 2], read, lambda row: f"{self.names[row]} in {archives[places[row, 0]]}")


def open_image_files(train_data_dir: str | os.PathLike, labelled: bool = True) -> ImageFiles:
    """
    Find images and their labels. Rows are in the order of the names; nothing is decoded.

    Args:
        train_data_dir (`str` or `os.PathLike`):
            A folder with one sub-folder of images per class (ImageNet's synsets), the same in an uncompressed .tar or
            in a .zip, a folder with one .tar per class, a .tar of such .tar files (ImageNet as distributed), or an
            `images` folder or zip of EDM2/REPA, whose `dataset.json` gives the labels. Classes are numbered in the
            alphabetical order of their names.
        labelled (`bool`, defaults to `True`):
            Whether they have labels; without, folders mean nothing, and all images are of one class.

    Raises:
        `ValueError`: if there are no images, or it is in doubt what their classes are.
    """
    path = Path(train_data_dir)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if tars and any(_is_image(name) for name in walk_files(path)):
            raise ValueError(
                f"`train_data_dir` has to hold either archives or folders of images, but {path} has both, such as"
                f" {tars[0].name}."
            )
        images = _open_tars(path, tars, labelled) if tars else _open_folder(path, labelled)
    elif path.is_file() and path.suffix == ".tar":
        images = _open_tars(path, [path], labelled)
    elif zipfile.is_zipfile(path):
        images = _open_zip(path, labelled)
    else:
        raise ValueError(f"`train_data_dir` has to be a folder, an uncompressed .tar or a .zip, but is {path}.")
    if not images.names:
        raise ValueError(f"`train_data_dir` holds no images: {path}.")
    return images


def _open_folder(root: Path, labelled: bool) -> ImageFiles:
    names = sorted(name for name in walk_files(root) if _is_image(name))
    if not labelled:
        return ImageFiles(root, names, *_one_class(names))
    if (root / "dataset.json").is_file():
        labels = pair_labels((root / "dataset.json").read_bytes(), names)
        return ImageFiles(root, names, labels, _numbered_classes(labels))
    if (root / "images" / "dataset.json").is_file():
        raise ValueError(f"`train_data_dir` has to be the folder of images itself: {root / 'images'}.")
    if len({name.split("/", 1)[0] for name in names}) == 1 and names[0].count("/") > 1:
        raise ValueError(
            f"`train_data_dir` has to hold the folders of the classes, which seem to be deeper: {names[0]}."
        )
    return ImageFiles(root, names, *_classes_of_folders(names))


def _open_zip(path: Path, labelled: bool) -> ImageFiles:
    try:
        return _index_zip(path, labelled)
    except ZIP_ERRORS as error:
        raise ValueError(f"`train_data_dir` has to be a whole .zip, but {path} is damaged ({error}).") from None


def find_member(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where in a .zip the bytes of a member begin. `BadZipFile` if it is encrypted, or not where the index says."""
    # The local header ends with a name and an extra field whose lengths only the header itself tells.
    file.seek(info.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if file.read(lengths[0]) != name or info.flag_bits & 1:
        raise zipfile.BadZipFile(f"{info.filename} is encrypted, or not where the index says")
    return info.header_offset + 30 + sum(lengths)


def _index_zip(path: Path, labelled: bool) -> ImageFiles:
    places = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            offset = find_member(file, info)  # also of what is no image: a damaged name may have been dataset.json
            name = info.filename.removeprefix("./")
            if _is_image(name):
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"`train_data_dir` has to be a stored or deflated .zip, but {name} is neither.")
                is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
                places[name] = (0, offset, info.compress_size, is_deflated)
        names = sorted(places)
        if not labelled:
            classes = _one_class(names)
        elif "dataset.json" in archive.namelist():
            labels = pair_labels(archive.read("dataset.json"), names)
            classes = labels, _numbered_classes(labels)
        else:
            classes = _classes_of_folders(_without_wrapper(names))
    return ImageFiles(path, names, *classes, [path], np.array([places[name] for name in names], np.int64))


def _open_tars(root: Path, tars: list[Path], labelled: bool) -> ImageFiles:
    """Index of one archive (of folders, or of an archive per class), or of a folder with one archive per class."""
    places = {}
    for index, path in enumerate(tars):
        prefix = f"{path.stem}/" if root.is_dir() else ""
        with open(path, "rb") as file:
            for name, offset, size in _members_of_tar(file, path):
                if name.endswith(".cls"):
                    raise ValueError(
                        f"`train_data_dir` has to hold one .tar per class, but {path} is a WebDataset shard."
                    )
                if name.endswith(".tar"):
                    if prefix:
                        raise ValueError(
                            f"`train_data_dir` has to hold one .tar per class, but {path} holds more: name it."
                        )
                    # A member lies uncompressed in its archive, so places in it are places in the outer file.
                    for inner, inner_offset, inner_size in _members_of_tar(file, path, offset):
                        if _is_image(inner):
                            places[f"{Path(name).stem}/{inner}"] = (index, inner_offset, inner_size, 0)
                elif _is_image(name):
                    places[prefix + name] = (index, offset, size, 0)
    names = sorted(places)
    classes = _classes_of_folders(_without_wrapper(names)) if labelled else _one_class(names)
    return ImageFiles(root, names, *classes, tars, np.array([places[name] for name in names], np.int64))


def _members_of_tar(file, path: Path, start: int = 0) -> list[tuple[str, int, int]]:
    """Name, offset and size of the regular files in the archive that begins at `start`."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            return [(m.name.removeprefix("./"), m.offset_data, m.size) for m in archive if m.isreg()]
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(
            f"`train_data_dir` has to be an uncompressed .tar, but {path} is not ({error}). Unpack it first."
        ) from error


def _is_image(name: str) -> bool:
    # Archives made on a Mac carry "._x.jpg" beside "x.jpg"; hidden folders are left out, as in training.
    *folders, file = name.split("/")
    is_hidden = file.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden


def _numbered_classes(labels: np.ndarray) -> dict[int, str]:
    return dict(enumerate(number_names(int(labels.max(initial=-1)))))


def _one_class(names: list[str]) -> tuple[np.ndarray, dict[int, str]]:
    return np.zeros(len(names), np.int64), dict(enumerate(UNLABELED))


def _without_wrapper(names: list[str]) -> list[str]:
    """Names in an archive without the folders that hold everything else in it."""
    while names and len({name.split("/", 1)[0] for name in names}) == 1 and all(name.count("/") > 1 for name in names):
        names = [name.split("/", 1)[1] for name in names]
    return names


def _classes_of_folders(names: list[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Labels from the first folder in each name; classes are numbered alphabetically, as ImageNet's synsets are."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(f"`train_data_dir` has to hold one folder of images per class, but {loose[0]} lies in none.")
    classes = sorted({name.split("/", 1)[0] for name in names})
    if SPLIT_NAMES & set(classes):
        raise ValueError(
            f"`train_data_dir` has to hold a folder per class, but {', '.join(classes[:5])} look like splits."
        )
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name.split("/", 1)[0]] for name in names], np.int64), dict(enumerate(classes))


def walk_files(folder: str | os.PathLike, argument: str = "train_data_dir") -> Iterable[str]:
    """
    Paths of all files below `folder`, relative to it, with forward slashes; links to folders are followed. What is no
    file, such as a pipe, from which one would read for ever, is left out.

    Raises:
        `ValueError`: if a link leads back to a folder that it lies in.
    """

    def walk(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterable[str]:
        info = os.stat(path)
        place = (info.st_dev, info.st_ino)
        if place in above:
            raise ValueError(f"`{argument}` has to hold no link to a folder that it lies in, but holds {path}.")
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from walk(entry.path, f"{prefix}{entry.name}/", above | {place})
                elif entry.is_file() or not os.path.exists(entry.path):  # a broken link, as who reads it will say
                    yield prefix + entry.name

    return walk(os.fspath(folder), "", frozenset())


def pair_labels(dataset_json: bytes | str, names: Sequence[str]) -> np.ndarray:
    """
    Labels of files from an EDM2 `dataset.json`, paired by name.

    Where the document names other files than `names` (images beside their moments), both sides are paired by the last
    number in the name. Every file must have one label and every label one file.

    Args:
        dataset_json (`bytes` or `str`):
            The document: `{"labels": [[name, class], ...]}`.
        names (sequence of `str`):
            Files, relative to the folder of the document, with forward slashes.

    Returns:
        `np.ndarray` of int64: the label of each of `names`.

    Raises:
        `ValueError`: if the document has no labels or the two sides do not pair one to one.
    """
    try:
        entries = parse_json(dataset_json)["labels"]
        listed: list[Any] = [str(name).replace("\\", "/") for name, _ in entries]
        labels = [label for _, label in entries]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            'dataset.json has to be {"labels": [[file, class], ...]}, with a class for every file.'
        ) from None
    bad = [f"{name}: {label!r}" for name, label in zip(listed, labels) if type(label) is not int or label < 0]
    if bad:
        raise ValueError(f"dataset.json has to give each file a class >= 0, but gives {list_some(bad)}.")

    if {os.path.splitext(name)[1] for name in listed}.isdisjoint({os.path.splitext(name)[1] for name in names}):
        keys: list[Any] = list(map(number_in, names))
        listed = list(map(number_in, listed))
    else:
        keys = list(names)
    for what, side in (("dataset.json names", listed), ("the folder holds", keys)):
        twice = [str(key) for key, count in Counter(side).items() if count > 1]
        if twice:
            raise ValueError(f"{what} more than one file for {list_some(twice)}: files and labels do not pair.")
    label_of = dict(zip(listed, labels))
    without_label = [name for name, key in zip(names, keys) if key not in label_of]
    if without_label:
        raise ValueError(f"dataset.json has no label for {list_some(without_label)}.")
    if len(label_of) > len(keys):
        without_file = [str(key) for key in label_of.keys() - set(keys)]
        raise ValueError(f"dataset.json has labels for files that are not there: {list_some(sorted(without_file))}.")
    # JSON's numbers may be larger than the array's.
    check_largest_id(max(label_of.values(), default=-1), "the labels in dataset.json")
    return np.array([label_of[key] for key in keys], np.int64)


def number_in(name: str) -> int:
    """The last number in a file's name, by which images and moments are paired; folders do not count."""
    digits = re.findall(r"\d+", name.rsplit("/", 1)[-1])
    if not digits:
        raise ValueError(
            f"{name} has no number to pair it by: files pair with dataset.json by name, or else by number."
        )
    return int(digits[-1])


def list_some(names: Sequence[str]) -> str:
    """The first five names and how many more there are, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
