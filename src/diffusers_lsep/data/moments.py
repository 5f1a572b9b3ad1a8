# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Moments of the VAE posterior on disk: the Arrow shards of `examples/encode_latents.py` and the EDM2/REPA layout.

A row holds the *mean and the standard deviation* of one image's posterior, `[2 * C, h, w]` with the mean first,
unscaled, as the original projects store them. Training draws a new latent from it at every step
([`sample_posterior`]). The two classes are sources of a [`~data.stream.SampleStream`].
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..autoencoders import Autoencoder, encoder_options, get_normalization, normalize_latents
from ..files import hash_weights
from ..labels import number_names
from .archives import list_some, number_in, pair_labels, walk_files
from .fingerprint import Fingerprint, fingerprint_files
from .images import ImageSource


MOMENTS_FORMAT = "diffusers_lsep.moments"
MOMENTS_FORMAT_VERSION = 1
# Present from the first shard on; METADATA_FILE replaces it when all shards are there, so it marks a complete folder.
SETTINGS_FILE = "encoding.json"
METADATA_FILE = "metadata.json"
# The key of a record batch's own metadata that lists the images of that batch which could not be read.
UNREADABLE_KEY = b"unreadable"
# What of a VAE decides the latents, by the key in the metadata.
DECIDES_LATENTS = {
    "vae_encoder_sha256": "SHA-256 of the encoder",
    "scaling_factor": "scaling factor",
    "shift_factor": "shift factor",
    "latents_mean": "mean of the latents",
    "latents_std": "deviation of the latents",
}


def shard_name(index: int, num_shards: int) -> str:
    """File name of shard `index`, the one that `datasets.Dataset.save_to_disk` would give it."""
    return f"data-{index:05d}-of-{num_shards:05d}.arrow"


def sample_posterior(
    moments: torch.Tensor,
    noise: torch.Tensor,
    scaling_factor: float = 1.0,
    shift_factor: float | None = None,
    latents_mean: Sequence[float] | torch.Tensor | None = None,
    latents_std: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Latents from the moments of a VAE's posterior, `mean + std * noise`, as the transformer sees them: normalised by
    [`~autoencoders.normalize_latents`], whose arguments the last four are.

    Args:
        moments (`torch.Tensor` of shape `[B, 2 C, S, S]`): Mean and standard deviation.
        noise (`torch.Tensor` of shape `[B, C, S, S]`): Standard normal noise.
        scaling_factor, shift_factor, latents_mean, latents_std: By [`~autoencoders.get_normalization`] of the VAE.
    """
    mean, std = moments.float().chunk(2, dim=1)
    return normalize_latents(mean + std * noise, scaling_factor, shift_factor, latents_mean, latents_std)


class MomentsDataset(torch.utils.data.Dataset):
    """
    The VAE moments that `examples/encode_latents.py` wrote, with random access: a source of a
    [`~data.stream.SampleStream`], and a map-style data set of `{"moments", "label"}` for a `DataLoader` of one's own.

    The shards are Arrow files (`datasets.load_from_disk` opens the folder too, with the ids and the kept images). Only
    the labels and one file offset per record batch are held in memory, 8 bytes a row. Rows are read with `pread` at
    the offsets that Arrow gives, and not by `datasets`, which is as fast but maps the files: after 20,000 scattered
    rows (0.33 GB) of a set of 3.3 GB the process has grown by 9 MB in place of 1,330 MB (`benchmarks/README.md`), and
    a shard that is cut while it is open is an error in place of the end of the process. One file per shard stays open.

    Args:
        folder (`str` or `os.PathLike`):
            The `--output_dir` of `examples/encode_latents.py`.
        name (`str`, defaults to `"folder"`):
            What messages call the folder, such as the flag that named it.

    Attributes:
        metadata (`dict`): What `metadata.json` says: the VAE, the crop, the resolution, counts.
        labels (`np.ndarray` of int64, shape `[len(self)]`): Class of each row.
        id2label (`dict[int, str]`): Name of each class.
        moments_shape (`tuple[int, int, int]`): `(2 * C, h, w)`.
        dtype (`np.dtype`): float16 or float32.
        has_flips (`bool`): Whether each row has the moments of its mirror image too.
        scaling_factor (`float`), shift_factor (`float` or `None`), latents_mean, latents_std (`list` or `None`):
            What the latents are normalised by, of the VAE that encoded them ([`~autoencoders.get_normalization`]).

    Raises:
        `ValueError`: if the folder is not a complete set of moments.
    """

    kind = "moments"

    def __init__(self, folder: str | os.PathLike, name: str = "folder"):
        self.folder, self.name = Path(folder), name
        self.metadata = _read_metadata(self.folder, name)
        self.dtype = np.dtype(self.metadata["dtype"])
        self.moments_shape = tuple(self.metadata["moments_shape"])
        self.has_flips = self.metadata["flip"]
        self.scaling_factor = self.metadata["scaling_factor"]
        self.shift_factor = self.metadata["shift_factor"]
        self.latents_mean = self.metadata.get("latents_mean")  # which older versions did not know
        self.latents_std = self.metadata.get("latents_std")
        self.id2label = {int(index): name for index, name in self.metadata["id2label"].items()}

        self._row_bytes = math.prod(self.moments_shape) * self.dtype.itemsize
        self._columns = ["moments", "moments_flipped"] if self.has_flips else ["moments"]
        rows_per_shard = self.metadata["rows_per_shard"]
        self._paths = [str(self.folder / shard_name(i, len(rows_per_shard))) for i in range(len(rows_per_shard))]
        labels, lengths, shards, offsets = [], [], [], []
        for shard, (path, rows) in enumerate(zip(self._paths, rows_per_shard)):
            batches = list(scan_shard(path, self._columns, self._row_bytes, name))
            found = sum(len(batch["labels"]) for batch in batches)
            if found != rows:
                raise ValueError(
                    f"`{self.name}` has a damaged shard: {path} has {found} rows, {METADATA_FILE} says {rows}."
                )
            labels += [batch["labels"] for batch in batches]
            lengths += [len(batch["labels"]) for batch in batches]
            shards += [shard] * len(batches)
            offsets += [batch["offsets"] for batch in batches]
        self.labels = np.concatenate([np.empty(0, np.int64), *labels])
        self._batch_starts = np.cumsum([0, *lengths])
        self._batch_shards = np.array(shards, np.int64)
        self._batch_offsets = np.array(offsets, np.int64).reshape(len(shards), len(self._columns))
        self._open()

    def _open(self) -> None:
        self._files = [open(path, "rb", buffering=0) for path in self._paths]  # noqa: SIM115

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def num_classes(self) -> int:
        return len(self.id2label)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, rows: Sequence[int] | np.ndarray, flips: Sequence[bool] | np.ndarray | None = None) -> torch.Tensor:
        """
        Moments of a batch of rows, in the type they are stored in.

        Args:
            rows (sequence of `int`, length B):
                Rows in any order, each in `0 .. len(self) - 1`.
            flips (sequence of `bool`, length B, *optional*):
                Where to take the mirror image.

        Returns:
            `torch.Tensor` of shape `[B, 2 * C, h, w]`, float16 or float32.

        Raises:
            `ValueError`: if a mirror image is asked for and there is none.
        """
        rows = np.asarray(rows, np.int64)
        flips = np.zeros(len(rows), np.int64) if flips is None else np.asarray(flips, np.int64)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"`rows` has to lie in 0..{len(self) - 1}, but holds {rows.min()}..{rows.max()}.")
        if flips.any() and not self.has_flips:
            raise ValueError(f"`flips` asks for mirror images, but {self.folder} was encoded without `--flip`.")
        batches = np.searchsorted(self._batch_starts, rows, side="right") - 1
        offsets = self._batch_offsets[batches, flips] + (rows - self._batch_starts[batches]) * self._row_bytes
        moments = np.empty((len(rows), *self.moments_shape), self.dtype)
        target = moments.reshape(-1).data.cast("B")
        start = 0
        for shard, offset in zip(self._batch_shards[batches].tolist(), offsets.tolist()):
            row = os.pread(self._files[shard].fileno(), self._row_bytes, offset)  # not every macOS has `preadv`
            if len(row) != self._row_bytes:
                raise OSError(f"{self._paths[shard]} ends early: it was cut after this data set was opened.")
            target[start : start + len(row)] = row
            start += len(row)
        return torch.from_numpy(moments)

    def fingerprint(self) -> Fingerprint:
        """Of the shards."""
        return fingerprint_files(self._paths)

    def check_vae(self, vae: Autoencoder, name: str) -> None:
        """
        Refuses a VAE whose encoder is not the one that encoded the rows: its latents mean something else. The decoder
        may be another one, as that of sd-vae-ft-ema is for sd-vae-ft-mse.

        Args:
            vae (an autoencoder of diffusers): The VAE.
            name (`str`): What the message calls it.

        Raises:
            `ValueError`: if its encoder or its normalisation is another one, or if the folder does not say enough.
        """
        expected, found = self.metadata, describe_vae(vae)
        encoded = f"{self.folder} was encoded by the VAE {expected['vae']!r}"
        if "vae_encoder_sha256" not in expected and expected.get("vae_sha256") not in (None, found["vae_sha256"]):
            raise ValueError(
                f"{encoded} (SHA-256 of all weights {expected['vae_sha256'][:12]}...), and {name} is another one "
                f"({found['vae_sha256'][:12]}...). Whether the two have one encoder is not known, as the folder is of "
                "an older version: run examples/encode_latents.py again with the same arguments, which completes "
                f"{METADATA_FILE} without encoding anything again."
            )
        for key, what in DECIDES_LATENTS.items():
            if key in expected and expected[key] != found[key]:
                raise ValueError(
                    f"{encoded} ({what} {shorten(expected[key])}), but {name} is another one ({shorten(found[key])})."
                )

    def open_images(self, resolution: int) -> ImageSource:
        """
        The images of the rows, as a source of their own.

        Args:
            resolution (`int`): Their side in pixels.

        Raises:
            `ValueError`: if they were not kept.
        """
        from datasets import load_from_disk

        if not self.metadata["images"]:
            raise ValueError(f"{self.folder} holds no images: it was encoded without `--keep_images`.")
        return ImageSource(load_from_disk(str(self.folder)), self.labels, resolution)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        labels = self.labels[np.asarray(rows, np.int64)].tolist()
        return [{"moments": moments, "label": label} for moments, label in zip(self.load(rows).unbind(), labels)]

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]


def describe_vae(vae: Autoencoder) -> dict[str, Any]:
    """What the metadata of a folder says of the VAE that encoded it."""
    encoder = {**encoder_options(vae), "weights": hash_weights(vae, ("encoder.", "quant_conv."))}
    return {
        "vae_sha256": hash_weights(vae),
        "vae_encoder_sha256": hashlib.sha256(json.dumps(encoder, default=str).encode()).hexdigest(),
        **get_normalization(vae),
    }


def shorten(value: Any) -> str:
    """A value of the metadata, for a message."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


class OriginalMomentsDataset:
    """
    VAE moments in the layout of EDM2 and REPA, a source of a [`~data.stream.SampleStream`]: `vae-sd/` with one
    `img-mean-std-XXXXXXXX.npy` per image, and `dataset.json`.

    Labels are paired with files by name, and the pairing is verified before anything is read: each `.npy` file has
    exactly one label and each label exactly one file. A `dataset.json` that names the images (`img00000000.png`) is
    paired by the number in the names.

    Args:
        folder (`str` or `os.PathLike`):
            The `vae-sd` folder.
        labelled (`bool`, defaults to `True`):
            Whether there are labels to be read; else `dataset.json` may say anything, and all rows have the class 0.
        name (`str`, defaults to `"folder"`):
            What messages call the folder.

    Attributes:
        labels (`np.ndarray` of int64, shape `[len(self)]`): Class of each row; rows are in the order of the names.
        id2label (`dict[int, str]`): The layout has no class names: the numbers as text.
        moments_shape (`tuple[int, int, int]`): `(2 * C, h, w)`.
        dtype (`np.dtype`): Of the first file.
        has_flips (`bool`): False, the layout has no mirror images.

    Raises:
        `ValueError`: if names and labels do not pair, or the first file does not hold moments.
    """

    kind = "moments"
    has_flips = False

    def __init__(self, folder: str | os.PathLike, labelled: bool = True, name: str = "folder"):
        self.folder, self.name = Path(folder), name
        if not (self.folder / "dataset.json").is_file():
            raise ValueError(
                f"`{self.name}` has to hold dataset.json beside the .npy files, but {self.folder} has none."
            )
        names = sorted(name for name in walk_files(self.folder) if name.endswith(".npy"))
        if not names:
            raise ValueError(f"`{self.name}` holds no .npy file: {self.folder}.")
        self.labels = np.zeros(len(names), np.int64)
        if labelled:
            self.labels = pair_labels((self.folder / "dataset.json").read_bytes(), names)
        self.id2label = dict(enumerate(number_names(int(self.labels.max()))))
        # Fixed-width bytes: 1.28 M names take 50 MB, and worker processes share them.
        self._names = np.array([os.fsencode(name) for name in names])
        first = self._read(self.folder / names[0])
        if first.ndim != 3 or first.size == 0 or first.shape[0] % 2:
            raise ValueError(
                f"`{self.name}` has to hold moments [2 * C, h, w], but {names[0]} has shape {first.shape}."
            )
        self._check_values(first, names[0])
        self.moments_shape = first.shape
        self.dtype = first.dtype

    def _read(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, allow_pickle=False)
        except Exception:  # numpy evaluates headers as Python; and its advice is to unpickle what is no array
            raise ValueError(f"`{self.name}` has to hold .npy files of numbers, but {path} cannot be read.") from None

    def _check_values(self, moments: np.ndarray, name: str):
        if moments.dtype.kind != "f":
            raise ValueError(f"`{self.name}` has to hold floating-point numbers, but {name} has {moments.dtype}.")
        if not np.isfinite(moments).all():
            raise ValueError(f"`{self.name}` has to hold finite numbers, but {name} has others.")
        if not moments[len(moments) // 2 :].min() >= 0:
            raise ValueError(
                f"`{self.name}` has to hold the mean and the standard deviation, but the second half of {name} has"
                " negative values: log-variances?"
            )

    @property
    def num_classes(self) -> int:
        return len(self.id2label)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, rows: Sequence[int] | np.ndarray, flips: Sequence[bool] | np.ndarray | None = None) -> torch.Tensor:
        """Moments of a batch of rows, as [`MomentsDataset.load`]; `ValueError` names a file of another shape."""
        if flips is not None and np.any(flips):
            raise ValueError(f"`flips` asks for mirror images, {self.folder} has none.")
        moments = np.empty((len(rows), *self.moments_shape), self.dtype)
        for target, row in zip(moments, rows):
            path = self.folder / os.fsdecode(self._names[row])
            values = self._read(path)
            if values.shape != self.moments_shape:
                raise ValueError(
                    f"`{self.name}` has to hold moments of one shape, but {path} has shape {values.shape}, the first"
                    f" file has {self.moments_shape}."
                )
            self._check_values(values, str(path))
            target[...] = values
        return torch.from_numpy(moments)

    def fingerprint(self) -> Fingerprint:
        """Of the files."""
        return fingerprint_files([self.folder / os.fsdecode(name) for name in self._names])

    def open_images(self, resolution: int) -> ImageSource:
        """
        The images of the rows, as a source of their own: those of the folder `images` beside this one, paired with the
        moments by the number in the names.

        Args:
            resolution (`int`): Their side in pixels.

        Raises:
            `ValueError`: if there is no such folder, or not one image for every row.
        """
        from datasets import Dataset

        folder = self.folder.absolute().parent / "images"
        if not folder.is_dir():
            raise ValueError(f"{self.folder} has no folder of images beside it: {folder}.")
        names = [name for name in walk_files(folder) if name.lower().endswith((".png", ".jpg", ".jpeg"))]
        path_of = {number_in(name): str(folder / name) for name in names}
        if len(path_of) < len(names):
            raise ValueError(f"{folder} has several images of one number: they and the moments do not pair.")
        numbers = [number_in(os.fsdecode(name)) for name in self._names]
        missing = [str(number) for number in numbers if number not in path_of]
        if missing:
            raise ValueError(f"{folder} lacks the images of {list_some(missing)}.")
        dataset = Dataset.from_dict({"image": [path_of[number] for number in numbers]})
        return ImageSource(dataset, self.labels, resolution)


def open_moments_folder(folder: str, labelled: bool, name: str) -> MomentsDataset | OriginalMomentsDataset:
    """The images that a VAE has encoded, in the layout of this package or of EDM2 and REPA."""
    if (Path(folder) / "dataset.json").is_file():
        return OriginalMomentsDataset(folder, labelled, name)
    return MomentsDataset(folder, name)


def _read_metadata(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / METADATA_FILE).is_file():
        if (folder / SETTINGS_FILE).is_file():
            raise ValueError(
                f"`{name}` is not encoded to the end: {folder}. Run examples/encode_latents.py again with the same "
                "arguments; it continues."
            )
        raise ValueError(
            f"`{name}` has to be written by examples/encode_latents.py, but {folder} has no {METADATA_FILE}."
        )
    metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    found = metadata.get("format"), metadata.get("format_version")
    if found != (MOMENTS_FORMAT, MOMENTS_FORMAT_VERSION):
        raise ValueError(
            f"`{name}` has to hold {MOMENTS_FORMAT} version {MOMENTS_FORMAT_VERSION}, but {METADATA_FILE} "
            f"says {found}."
        )
    return metadata


def scan_shard(
    path: str | os.PathLike, columns: Sequence[str], row_bytes: int, name: str = "folder"
) -> Iterable[dict[str, Any]]:
    """For each record batch: labels, unreadable images, and where in the file the values of `columns` begin."""
    import pyarrow as pa

    try:
        with pa.memory_map(os.fspath(path)) as source:
            base = source.read_buffer().address
            source.seek(0)
            for batch, metadata in pa.ipc.open_stream(source).iter_batches_with_custom_metadata():
                unreadable = json.loads(metadata[UNREADABLE_KEY]) if metadata is not None else []
                offsets = []
                for column in columns if batch.num_rows else ():
                    values = batch.column(column)
                    _, ends, data = values.buffers()
                    ends = np.frombuffer(ends, np.int32)[values.offset : values.offset + len(values) + 1]
                    if values.null_count or not (np.diff(ends) == row_bytes).all():
                        raise ValueError(f"{path} has rows in `{column}` of another size than {row_bytes} bytes.")
                    offsets.append(data.address - base + int(ends[0]))
                labels = batch.column("label").to_numpy()
                yield {"labels": labels.copy(), "unreadable": unreadable, "offsets": offsets or [0] * len(columns)}
    except FileNotFoundError:
        raise ValueError(f"`{name}` lacks a shard: {path}.") from None
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise ValueError(f"`{name}` has a damaged shard: {path} ({error}).") from error
