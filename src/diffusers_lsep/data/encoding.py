# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""From labelled images to moments of a VAE's posterior: what `examples/encode_latents.py` is made of."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from accelerate import Accelerator

from ..autoencoders import Autoencoder, encode_moments, get_scale_factor, load_autoencoder
from ..progress import make_progress_bar
from .archives import ImageFiles, open_image_files
from .fingerprint import Fingerprint, fingerprint_images
from .images import METADATA_FILES, center_crop, convert_mode, damage, load_image_dataset, read_labels
from .moments import METADATA_FILE, SETTINGS_FILE, shorten
from .moments_writer import TEMPORARY_SUFFIX, UNREADABLE_FILE, unreadable_in


# Settings that say where something lay; the hashes beside them say what it was, so a moved folder may continue.
PLACES = ("source", "vae", "vae_subfolder", "vae_revision")
FINGERPRINT_FILE = "fingerprint.npy"


def leftovers_in(folder: Path) -> list[Path]:
    """What a killed run has left half-written in its output folder."""
    return list(folder.glob(f".*{TEMPORARY_SUFFIX}"))


class DatasetImages:
    """Images of a `datasets.Dataset`, as [`ImageFiles`]; an image's name is its row."""

    def __init__(self, dataset, image_column: str, label_column: str | None):
        from datasets import Image

        if not isinstance(dataset.features.get(image_column), Image):
            raise ValueError(
                f"`--image_column` has to be a column of images, but is {image_column}; there are {dataset.features}."
            )
        self.labels, names = read_labels(dataset, label_column)
        if label_column is None:
            self.labels = np.zeros_like(self.labels)  # a file has no index for the null class
        self.id2label = dict(enumerate(names))
        self.names = [f"{row:08d}" for row in range(len(dataset))]
        self._images = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        self._column = image_column

    def read(self, row: int) -> bytes:
        image = self._images[row][self._column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def fingerprint(self) -> Fingerprint:
        return fingerprint_images(self._images, self._column)


def open_images_to_encode(
    train_data_dir: Path | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
) -> ImageFiles | DatasetImages:
    """
    Labelled images by row, their bytes as they are stored.

    Args:
        train_data_dir (`Path`, *optional*):
            As for [`open_image_files`], or a folder of Parquet files.
        dataset_name (`str`, *optional*):
            In its place, a data set on the Hub.
        dataset_config_name (`str`, *optional*):
            Its configuration.
        split (`str`, *optional*):
            Its split, or that of the Parquet files, as are the columns; `"train"` if not given.
        image_column (`str`, defaults to `"image"`):
            The column of images.
        label_column (`str`, defaults to `"label"`):
            The column of labels. None for images without labels, whatever they are given as.

    Raises:
        `ValueError`: if there are no images, it is in doubt what their classes are, or there is no such split.
    """
    if train_data_dir is None or (
        train_data_dir.is_dir()
        and any(next(train_data_dir.rglob(pattern), None) for pattern in ("*.parquet", *METADATA_FILES))
    ):
        argument = "--train_data_dir" if dataset_name is None else "--dataset_name"
        splits = load_image_dataset(dataset_name, dataset_config_name, train_data_dir, argument=argument)
        chosen = split or "train"
        if chosen not in splits:
            raise ValueError(f"`--split` has to be one of {', '.join(splits)}, but is {chosen}.")
        return DatasetImages(splits[chosen], image_column, label_column)
    if split is not None:
        raise ValueError(f"`--split {split}` is of data sets, but {train_data_dir} is of files, which have none.")
    return open_image_files(train_data_dir, labelled=label_column is not None)


class ImageBatches(torch.utils.data.Dataset):
    """Batches of images by range of rows: uint8 pixels of constant shape, zeros where an image could not be read."""

    def __init__(
        self,
        images: ImageFiles | DatasetImages,
        shape: tuple[int, int, int, int],
        keep_images: bool,
        apply_exif: bool,
    ):
        self.images, self.shape, self.keep_images, self.apply_exif = images, shape, keep_images, apply_exif

    def __getitem__(self, rows: range) -> dict[str, Any]:
        pixels = np.zeros(self.shape, np.uint8)
        _, resolution, _, num_channels = self.shape
        good, pngs, unreadable = [], [], []
        for position, row in enumerate(rows):
            try:
                image: PIL.Image.Image = PIL.Image.open(io.BytesIO(self.images.read(row)))
                if self.apply_exif:
                    image = PIL.ImageOps.exif_transpose(image)
                image = center_crop(convert_mode(image, num_channels), resolution)
            except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
                unreadable.append({"id": self.images.names[row], "error": damage(error)})
                continue
            pixels[position] = np.asarray(image).reshape(pixels.shape[1:])
            good.append(position)
            if self.keep_images:
                png = io.BytesIO()
                image.save(png, "PNG")
                pngs.append(png.getvalue())
        return {"pixels": torch.from_numpy(pixels), "good": good, "pngs": pngs, "unreadable": unreadable}


def load_vae_to_encode(
    name: str, resolution: int, subfolder: str | None = None, revision: str | None = None
) -> Autoencoder:
    """
    Loads a VAE in float32.

    Args:
        name (`str`): Folder or Hub id.
        resolution (`int`): Side of the images, which it has to halve as often as it does.
        subfolder (`str`, *optional*): Of the folder or repository.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        `ValueError`: if it is no autoencoder of grey or RGB images, or does not fit `resolution`.
    """
    flag = "--pretrained_vae_model_name_or_path"
    vae = load_autoencoder(name, flag, subfolder=subfolder, revision=revision)
    downsampling = get_scale_factor(vae)
    if resolution % downsampling:
        raise ValueError(f"`--resolution` has to be a multiple of {downsampling} for {name}, but is {resolution}.")
    return vae


def check_output_dir(
    folder: Path, settings: dict[str, Any], images: ImageFiles | DatasetImages, fingerprint: Fingerprint
) -> dict[str, Any]:
    """
    The settings to go on with: those of the run that began an output folder, else the given ones.

    Args:
        folder (`Path`): The folder, which need not exist.
        settings (`dict[str, Any]`): Everything that decides the bytes of the result.
        images ([`ImageFiles`] or [`DatasetImages`]): What is to be encoded.
        fingerprint ([`Fingerprint`]): Of them.

    Raises:
        `ValueError`: if the folder holds something else, or was begun with other settings or images.
    """
    begun = [folder / name for name in (METADATA_FILE, SETTINGS_FILE) if (folder / name).is_file()]
    if not begun:
        # What a run that was killed as it began has left is no reason.
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - set(leftovers_in(folder))):
            raise ValueError(f"`--output_dir` has to be new, empty, or begun by this script, but is {folder}.")
        return settings
    # A folder that does not say it is of a version that always turned the images, and did not look at their bytes.
    known_later = {"apply_exif": True, "source_data": settings["source_data"]}
    before = {**known_later, **json.loads(begun[0].read_text(encoding="utf-8"))}
    if before.get("vae_sha256") == settings["vae_sha256"]:  # an older version knew no more
        for name in ("vae_encoder_sha256", "latents_mean", "latents_std"):
            before.setdefault(name, settings[name])
    different = [name for name, value in settings.items() if name not in PLACES and before.get(name) != value]
    if different == ["source_data"]:
        check_changes(folder, images, fingerprint)
        before["source_data"] = settings["source_data"]
        different = []
    if different:
        changes = "; ".join(f"{name}: {shorten(before.get(name))} -> {shorten(settings[name])}" for name in different)
        raise ValueError(
            f"`--output_dir` {folder} was begun with other settings ({changes}). Restore them or take a new folder."
        )
    return {name: before[name] for name in settings}


def check_changes(folder: Path, images: ImageFiles | DatasetImages, fingerprint: Fingerprint):
    """Refuses images that have changed since an output folder was begun, but for those that could not be read."""
    changes = fingerprint.find_changes(folder / FINGERPRINT_FILE)
    listed = {entry["id"] for path in folder.glob("data-*.arrow") for entry in unreadable_in(path)}
    if (folder / UNREADABLE_FILE).is_file():
        listed |= {json.loads(line)["id"] for line in (folder / UNREADABLE_FILE).read_text("utf-8").splitlines()}
    if not changes or not listed.issuperset(images.names[row] for row in changes):
        raise ValueError(
            f"`--output_dir` {folder} was begun with other images: {fingerprint.describe(changes, 'one of them')} has"
            " changed. Restore it or take a new folder. (Compared are the size of every image and a sample of the"
            " bytes, not places or times.)"
        )


def encode_batch(
    vae: Autoencoder,
    batch: dict[str, Any],
    rows: range,
    images: ImageFiles | DatasetImages,
    settings: dict[str, Any],
) -> dict[str, list]:
    """
    Encodes a batch.

    Args:
        vae (an autoencoder of diffusers): Of [`load_vae_to_encode`].
        batch (`dict[str, Any]`): Of [`ImageBatches`].
        rows (`range`): The rows that it is of.
        images ([`ImageFiles`] or [`DatasetImages`]): Where these come from.
        settings (`dict[str, Any]`): With `dtype`, `flip` and `images`.

    Returns:
        `dict[str, list]`: The columns for [`MomentsShardWriter`], without the images that could not be read.

    Raises:
        `ValueError`: if moments are not finite in the dtype that they are stored in.
    """
    pixels = batch["pixels"].to(vae.device, non_blocking=vae.device.type == "cuda")
    pixels = pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    good = batch["good"]
    ids = [images.names[rows[position]] for position in good]
    columns = {"id": ids, "label": [int(images.labels[rows[position]]) for position in good]}
    for name, copy in {"moments": pixels, "moments_flipped": pixels.flip(-1) if settings["flip"] else None}.items():
        if copy is not None:
            with np.errstate(over="ignore"):  # what is not finite is looked for
                moments = encode_moments(vae, copy).cpu().numpy().astype(settings["dtype"])[good]
            finite = np.isfinite(moments).all(axis=(1, 2, 3))
            if not finite.all():
                raise ValueError(
                    f"The moments of {ids[finite.argmin()]} are not finite in {settings['dtype']}: try `--dtype fp32`."
                )
            columns[name] = [row.tobytes() for row in moments]
    if settings["images"]:
        columns["image"] = [{"bytes": png, "path": None} for png in batch["pngs"]]
    return columns


class EncodingProgress:
    """A bar over the images of all processes: finished shards on disk plus what this process has done of its own."""

    def __init__(self, shards: dict[Path, range], accelerator: Accelerator):
        self.rows_in = {path.name: len(rows) for path, rows in shards.items()}
        self.folder = next(iter(shards)).parent
        self.own, self.on_disk, self.checked = 0, self._count(), time.monotonic()
        self.bar = make_progress_bar(
            total=sum(self.rows_in.values()),
            initial=self.on_disk,
            unit=" images",
            smoothing=0,  # the time left from the average rate: shards of other processes arrive in lumps
            disable=not accelerator.is_main_process,
        )

    def _count(self) -> int:
        return sum(self.rows_in.get(entry.name, 0) for entry in os.scandir(self.folder))

    def update(self, images: int) -> None:
        self.own += images
        if time.monotonic() - self.checked > 5:
            self.on_disk, self.checked = self._count(), time.monotonic()
        self.bar.update(self.on_disk + self.own - self.bar.n)

    def shard_done(self) -> None:
        self.own, self.on_disk = 0, self._count()
        self.bar.update(self.on_disk - self.bar.n)

    def close(self) -> None:
        self.bar.update(self._count() - self.bar.n)
        self.bar.close()
