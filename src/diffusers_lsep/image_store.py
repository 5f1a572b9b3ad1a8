# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Many images on disk: those of a run that is not finished, and the files that they become."""

import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .data.archives import find_member
from .files import make_array, whole_file, write_rows, write_text


class ImageStore:
    """
    The images of a run, in a folder that lasts until all of them are there: one uncompressed array on disk, a byte for
    each finished batch, and the settings. Any number of processes writes into it, each batch at its own place.

    Args:
        folder (`Path`): The folder, which [`~ImageStore.create`] makes.
        num_images (`int`): How many images the run has.
        image_shape (`tuple[int, int, int]`): `[H, W, C]` of each.
        batch_size (`int`): Images in every batch but the last one.
    """

    def __init__(self, folder: Path, num_images: int, image_shape: tuple[int, int, int], batch_size: int):
        self.folder = folder
        self.array_path = folder / "images.npy"
        self.done_path = folder / "done"
        self.shape = (num_images, *image_shape)
        self.batch_size = batch_size
        self.num_batches = math.ceil(num_images / batch_size)

    @property
    def settings_path(self) -> Path:
        return self.folder / "settings.json"

    @property
    def is_begun(self) -> bool:
        """Whether there is a run to go on with; else what is there is of one that ended before its first batch."""
        return self.settings_path.is_file() and any(self.done_path.read_bytes())

    def create(self, settings: dict[str, Any], may_differ: Sequence[str] = ()):
        """
        Makes the folder, or checks that the one from an earlier run has the same settings.

        Args:
            settings (`dict[str, Any]`): What decides the images, for JSON.
            may_differ (`Sequence[str]`, defaults to `()`): Those that may be others when a run goes on.

        Raises:
            `ValueError`: if the folder is that of a run with other settings.
            `OSError`: if there is no space for the images.
        """
        if self.is_begun:
            differing = list_differences(self.settings_path, settings, may_differ)
            if differing:
                raise ValueError(
                    f"{self.folder} holds an unfinished run with other settings: {', '.join(differing)}. Finish that"
                    " run, or give `--overwrite_output_dir` to discard it."
                )
            return
        self.delete()
        self.folder.mkdir(parents=True)
        try:
            make_array(self.array_path, np.uint8, self.shape)
            self.done_path.write_bytes(bytes(self.num_batches))
            # Last, as it says that the rest is there.
            write_text(self.settings_path, json.dumps(settings, indent=2) + "\n")
        except BaseException:
            self.delete()
            raise

    def pending(self) -> list[int]:
        """The batches that are still to be drawn."""
        return [batch for batch, done in enumerate(self.done_path.read_bytes()) if not done]

    def write(self, batch: int, images: np.ndarray):
        """Stores the images of a batch, then the fact that it is there."""
        write_rows(self.array_path, batch * self.batch_size, images, durable=True)
        with open(self.done_path, "r+b") as file:
            file.seek(batch)
            file.write(b"\1")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> np.ndarray:
        """All images as a memory-mapped uint8 array `[num_images, H, W, C]`."""
        return np.load(self.array_path, mmap_mode="r")

    def delete(self):
        """Deletes the folder, if there is one."""
        self.settings_path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def list_differences(path: Path, settings: dict[str, Any], may_differ: Sequence[str] = ()) -> list[str]:
    """Where settings are others than those in a file, for people to read."""
    try:
        before = dict(_flatten(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, AttributeError) as error:
        return [f"{path.name} cannot be read: {error}"]
    now = dict(_flatten(json.loads(json.dumps(settings))))
    return [
        f"{name} ({before.get(name)!s:.40} before, {now.get(name)!s:.40} now)"
        for name in before | now
        if name not in may_differ and before.get(name) != now.get(name)
    ]


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as names and values."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write_npz(path: Path, images: np.ndarray, class_ids: np.ndarray):
    """
    Writes an uncompressed .npz in the layout of ADM's sample files, whole or not at all and without holding it in
    memory.

    Args:
        path (`Path`): The file.
        images (`np.ndarray`): uint8 `[N, H, W, 3]`, memory-mapped for example; grey ones `[N, H, W, 1]` are repeated.
        class_ids (`np.ndarray`): int64 `[N]`.
    """
    if images.shape[-1] == 1:  # ADM's protocol, and everything that reads its files, has three channels
        images = np.broadcast_to(images, (*images.shape[:-1], 3))
    with whole_file(path) as partial, open(partial, "wb") as file:  # `savez` would give a name its own suffix
        np.savez(file, arr_0=images, arr_1=class_ids)


def read_npz(path: Path) -> np.ndarray:
    """The images of a file that [`write_npz`] wrote, as a memory-mapped uint8 array `[N, H, W, 3]`."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member, open(path, "rb") as file:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        offset = find_member(file, archive.getinfo("arr_0.npy")) + member.tell()
    return np.memmap(path, dtype, "r", offset, shape)


def write_pngs(
    folder: Path, images: np.ndarray, class_ids: np.ndarray, process_index: int = 0, num_processes: int = 1
) -> list[Path]:
    """
    Writes images as `INDEX-class-ID.png` each, whole or not at all.

    Args:
        folder (`Path`): Where.
        images (`np.ndarray`): uint8 `[N, H, W, C]`, memory-mapped for example.
        class_ids (`np.ndarray`): int64 `[N]`.
        process_index, num_processes (`int`): This process among those that share the work.

    Returns:
        `list[Path]`: the paths of all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(images) - 1))
    paths = [folder / f"{index:0{digits}d}-class-{class_id}.png" for index, class_id in enumerate(class_ids)]
    for index in range(process_index, len(images), num_processes):
        image = images[index]
        write_png(paths[index], Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
    return paths


def write_png(path: Path, image: Image.Image):
    """Writes a PNG that appears whole or not at all."""
    with whole_file(path, durable=False) as partial:  # there may be 50,000 of them
        image.save(partial, format="png")
