# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Moments of the VAE posterior on disk: the Arrow shards of `examples/encode_latents.py` and the EDM2/REPA layout.

A row holds the *mean and the standard deviation* of one image's posterior, `[2 * C, h, w]` with the mean first,
unscaled, as the original projects store them. Training draws a new latent from it at every step
([`~data.sample_posterior`]). The two classes are sources of a [`~data.SampleStream`].
"""

import hashlib
import json
import math
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpointing import hash_weights
from .data import ImageSource


MOMENTS_FORMAT = "diffusers_lsep.moments"
MOMENTS_FORMAT_VERSION = 1
# Present from the first shard on; METADATA_FILE replaces it when all shards are there, so it marks a complete folder.
SETTINGS_FILE = "encoding.json"
METADATA_FILE = "metadata.json"
UNREADABLE_FILE = "unreadable.jsonl"
# What a killed run may leave behind; the next run removes it.
TEMPORARY_SUFFIX = ".tmp"
# The key of a record batch's own metadata that lists the images of that batch which could not be read.
UNREADABLE_KEY = b"unreadable"
# Opening a set looks at the head of every record batch: few and large ones make that quick.
ROWS_PER_RECORD_BATCH = 1024


# What of a VAE decides the latents, by the key in the metadata.
DECIDES_LATENTS = {
    "vae_encoder_sha256": "SHA-256 of the encoder",
    "scaling_factor": "scaling factor",
    "shift_factor": "shift factor",
}
# Of the encoder's config what its weights do not show: neither their names nor their shapes.
ENCODER_OPTIONS = ("act_fn", "down_block_types", "norm_num_groups")


def shard_name(index: int, num_shards: int) -> str:
    """File name of shard `index`, the one that `datasets.Dataset.save_to_disk` would give it."""
    return f"data-{index:05d}-of-{num_shards:05d}.arrow"


class MomentsDataset(torch.utils.data.Dataset):
    """
    The VAE moments that `examples/encode_latents.py` wrote, with random access: a source of a [`~data.SampleStream`],
    and a map-style data set of `{"moments", "label"}` for a `DataLoader` of one's own.

    The shards are Arrow files (`datasets.load_from_disk` opens the folder too, with the ids and the kept images). Only
    the labels and one file offset per record batch are held in memory, 8 bytes a row. Rows are read with `pread` at
    the offsets that Arrow gives: as fast as a memory map, but the pages stay with the kernel, so that the process does
    not grow with what it has read, and a cold read fetches one row instead of a read-ahead window. Values keep the
    type they are stored in (the formatters of `datasets` turn float16 into float32). One file per shard stays open.

    Args:
        folder (`str` or `os.PathLike`):
            The `--output_dir` of `examples/encode_latents.py`.

    Attributes:
        metadata (`dict`): What `metadata.json` says: the VAE, the crop, the resolution, counts.
        labels (`np.ndarray` of int64, shape `[len(self)]`): Class of each row.
        id2label (`dict[int, str]`): Name of each class.
        moments_shape (`tuple[int, int, int]`): `(2 * C, h, w)`.
        dtype (`np.dtype`): float16 or float32.
        has_flips (`bool`): Whether each row has the moments of its mirror image too.
        scaling_factor (`float`), shift_factor (`float` or `None`): From the VAE's config.

    Raises:
        ValueError: If the folder is not a complete set of moments.
    """

    kind = "moments"

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.metadata = _read_metadata(self.folder)
        self.dtype = np.dtype(self.metadata["dtype"])
        self.moments_shape = tuple(self.metadata["moments_shape"])
        self.has_flips = self.metadata["flip"]
        self.scaling_factor = self.metadata["scaling_factor"]
        self.shift_factor = self.metadata["shift_factor"]
        self.id2label = {int(index): name for index, name in self.metadata["id2label"].items()}

        self._row_bytes = math.prod(self.moments_shape) * self.dtype.itemsize
        self._columns = ["moments", "moments_flipped"] if self.has_flips else ["moments"]
        rows_per_shard = self.metadata["rows_per_shard"]
        self._paths = [str(self.folder / shard_name(i, len(rows_per_shard))) for i in range(len(rows_per_shard))]
        labels, lengths, shards, offsets = [], [], [], []
        for shard, (path, rows) in enumerate(zip(self._paths, rows_per_shard)):
            batches = list(_scan_shard(path, self._columns, self._row_bytes))
            found = sum(len(batch["labels"]) for batch in batches)
            if found != rows:
                raise ValueError(
                    f"`folder` has a damaged shard: {path} has {found} rows, {METADATA_FILE} says {rows}."
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
            ValueError: If a mirror image is asked for and there is none.
        """
        rows = np.asarray(rows, np.int64)
        flips = np.zeros(len(rows), np.int64) if flips is None else np.asarray(flips, np.int64)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"`rows` must be in 0 .. {len(self) - 1}, got {rows.min()} .. {rows.max()}.")
        if flips.any() and not self.has_flips:
            raise ValueError(f"`flips` asks for mirror images, but {self.folder} was encoded without `--flip`.")
        batches = np.searchsorted(self._batch_starts, rows, side="right") - 1
        offsets = self._batch_offsets[batches, flips] + (rows - self._batch_starts[batches]) * self._row_bytes
        moments = np.empty((len(rows), *self.moments_shape), self.dtype)
        target = memoryview(moments.reshape(-1)).cast("B")
        start = 0
        for shard, offset in zip(self._batch_shards[batches].tolist(), offsets.tolist()):
            row = os.pread(self._files[shard].fileno(), self._row_bytes, offset)  # not every macOS has `preadv`
            if len(row) != self._row_bytes:
                raise OSError(f"{self._paths[shard]} ends early: it was cut after this data set was opened.")
            target[start : start + len(row)] = row
            start += len(row)
        return torch.from_numpy(moments)

    def check_vae(self, vae: torch.nn.Module, name: str) -> None:
        """
        Refuses a VAE whose encoder is not the one that encoded the rows: its latents mean something else. The decoder
        may be another one, as that of sd-vae-ft-ema is for sd-vae-ft-mse.

        Args:
            vae (`AutoencoderKL`): The VAE.
            name (`str`): What the message calls it.

        Raises:
            ValueError: If its encoder or its scale is another one, or if the folder does not say enough to know.
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
            ValueError: If they were not kept.
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


def describe_vae(vae: torch.nn.Module) -> dict[str, Any]:
    """What the metadata of a folder says of the VAE (`AutoencoderKL`) that encoded it."""
    encoder = {name: vae.config[name] for name in ENCODER_OPTIONS}
    encoder["weights"] = hash_weights(vae, ("encoder.", "quant_conv."))
    return {
        "vae_sha256": hash_weights(vae),
        "vae_encoder_sha256": hashlib.sha256(json.dumps(encoder).encode()).hexdigest(),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor,
    }


def shorten(value: Any) -> str:
    """A value of the metadata, for a message."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


class OriginalMomentsDataset:
    """
    VAE moments in the layout of EDM2 and REPA, a source of a [`~data.SampleStream`]: `vae-sd/` with one
    `img-mean-std-XXXXXXXX.npy` per image, and `dataset.json`.

    Labels are paired with files by name, and the pairing is verified before anything is read: each `.npy` file has
    exactly one label and each label exactly one file. A `dataset.json` that names the images (`img00000000.png`) is
    paired by the number in the names.

    Args:
        folder (`str` or `os.PathLike`):
            The `vae-sd` folder.

    Attributes:
        labels (`np.ndarray` of int64, shape `[len(self)]`): Class of each row; rows are in the order of the names.
        id2label (`dict[int, str]`): The layout has no class names: the numbers as text.
        moments_shape (`tuple[int, int, int]`): `(2 * C, h, w)`.
        dtype (`np.dtype`): Of the first file.
        has_flips (`bool`): False, the layout has no mirror images.

    Raises:
        ValueError: If names and labels do not pair, or the first file does not hold moments.
    """

    kind = "moments"
    has_flips = False

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / "dataset.json").is_file():
            raise ValueError(f"`folder` must hold dataset.json beside the .npy files, got {self.folder}.")
        names = sorted(name for name in walk_files(self.folder) if name.endswith(".npy"))
        if not names:
            raise ValueError(f"`folder` holds no .npy file: {self.folder}.")
        self.labels = pair_labels((self.folder / "dataset.json").read_bytes(), names)
        self.id2label = {index: str(index) for index in range(int(self.labels.max()) + 1)}
        # Fixed-width bytes: 1.28 M names take 50 MB, and worker processes share them.
        self._names = np.array([os.fsencode(name) for name in names])
        first = np.load(self.folder / names[0], allow_pickle=False)
        if first.ndim != 3 or first.shape[0] % 2 or first.dtype.kind != "f":
            raise ValueError(f"`folder` must hold moments [2 * C, h, w], {names[0]} has {first.dtype} {first.shape}.")
        if first[len(first) // 2 :].min() < 0:
            raise ValueError(
                f"`folder` must hold the mean and the standard deviation, the second half of {names[0]} has negative "
                "values: log-variances?"
            )
        self.moments_shape = first.shape
        self.dtype = first.dtype

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
            values = np.load(path, allow_pickle=False)
            if values.shape != self.moments_shape:
                raise ValueError(f"{path} has shape {values.shape}, the first file has {self.moments_shape}.")
            target[...] = values
        return torch.from_numpy(moments)

    def open_images(self, resolution: int) -> ImageSource:
        """
        The images of the rows, as a source of their own: those of the folder `images` beside this one, paired with the
        moments by the number in the names.

        Args:
            resolution (`int`): Their side in pixels.

        Raises:
            ValueError: If there is no such folder, or not one image for every row.
        """
        from datasets import Dataset

        folder = self.folder.absolute().parent / "images"
        if not folder.is_dir():
            raise ValueError(f"{self.folder} has no folder of images beside it: {folder}.")
        names = [name for name in walk_files(folder) if name.lower().endswith((".png", ".jpg", ".jpeg"))]
        path_of = {_number(name): str(folder / name) for name in names}
        if len(path_of) < len(names):
            raise ValueError(f"{folder} has several images of one number: they and the moments do not pair.")
        numbers = [_number(os.fsdecode(name)) for name in self._names]
        missing = [str(number) for number in numbers if number not in path_of]
        if missing:
            raise ValueError(f"{folder} lacks the images of {_some(missing)}.")
        dataset = Dataset.from_dict({"image": [path_of[number] for number in numbers]})
        return ImageSource(dataset, self.labels, resolution)


def walk_files(folder: str | os.PathLike) -> Iterable[str]:
    """Paths of all files below `folder`, relative to it, with forward slashes; links to folders are followed."""

    def refuse(error: OSError) -> None:  # by default, a folder that cannot be read is passed over in silence
        raise error

    for root, _, files in os.walk(folder, onerror=refuse, followlinks=True):
        prefix = os.path.relpath(root, folder).replace(os.sep, "/")
        for name in files:
            yield name if prefix == "." else f"{prefix}/{name}"


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
        ValueError: If the document has no labels or the two sides do not pair one to one.
    """
    try:
        entries = json.loads(dataset_json)["labels"]
        listed = [str(name).replace("\\", "/") for name, _ in entries]
        labels = [label for _, label in entries]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            'dataset.json must be {"labels": [[file, class], ...]}, with a class for every file.'
        ) from None
    bad = [f"{name}: {label!r}" for name, label in zip(listed, labels) if type(label) is not int or label < 0]
    if bad:
        raise ValueError(f"dataset.json must give each file a class >= 0, got {_some(bad)}.")

    if {os.path.splitext(name)[1] for name in listed}.isdisjoint({os.path.splitext(name)[1] for name in names}):
        keys, listed = [_number(name) for name in names], [_number(name) for name in listed]
    else:
        keys = names
    for what, side in (("dataset.json names", listed), ("the folder holds", keys)):
        twice = [str(key) for key, count in Counter(side).items() if count > 1]
        if twice:
            raise ValueError(f"{what} more than one file for {_some(twice)}: files and labels do not pair.")
    label_of = dict(zip(listed, labels))
    without_label = [name for name, key in zip(names, keys) if key not in label_of]
    if without_label:
        raise ValueError(f"dataset.json has no label for {_some(without_label)}.")
    if len(label_of) > len(keys):
        without_file = [str(key) for key in label_of.keys() - set(keys)]
        raise ValueError(f"dataset.json has labels for files that are not there: {_some(sorted(without_file))}.")
    return np.array([label_of[key] for key in keys], np.int64)


def _number(name: str) -> int:
    digits = re.findall(r"\d+", name.rsplit("/", 1)[-1])
    if not digits:
        raise ValueError(
            f"dataset.json names other files than the folder holds, and {name} has no number to pair them by."
        )
    return int(digits[-1])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class MomentsShardWriter:
    """
    Writes one Arrow shard; the file appears whole when the `with` block ends without an error, else not at all.

    Args:
        path (`str` or `os.PathLike`):
            The shard; a file of this name is replaced.
        features (`datasets.Features`):
            The columns, from [`moments_features`].
    """

    def __init__(self, path: str | os.PathLike, features):
        self.path = Path(path)
        self.schema = features.arrow_schema

    def __enter__(self) -> "MomentsShardWriter":
        import pyarrow as pa

        self._file = _open_temporary(self.path)
        self._writer = pa.ipc.new_stream(self._file, self.schema)
        self._columns = {field.name: [] for field in self.schema}
        self._unreadable = []
        return self

    def write(self, columns: dict[str, list], unreadable: Sequence[dict[str, str]] = ()) -> None:
        """Append rows (`columns`: lists of equal length) and list images that could not be read."""
        for name, values in self._columns.items():
            values += columns[name]
        self._unreadable += unreadable
        if len(self._columns["id"]) >= ROWS_PER_RECORD_BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        arrays = [pa.array(self._columns[field.name], field.type) for field in self.schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        self._writer.write_batch(batch, {UNREADABLE_KEY: json.dumps(self._unreadable)} if self._unreadable else None)
        self._columns = {name: [] for name in self._columns}
        self._unreadable = []

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None:
                self._flush()
                self._writer.close()
                _publish(self._file, self.path)
        finally:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)


def moments_features(id2label: dict[int, str], flip: bool, images: bool):
    """The columns of a shard as `datasets.Features`: id, label, moments, mirrored moments and images if asked for."""
    from datasets import ClassLabel, Features, Image, Value

    names = [id2label[index] for index in range(len(id2label))]
    # Human-readable names of ImageNet repeat ("crane"), which ClassLabel does not allow.
    label = ClassLabel(names=names) if len(set(names)) == len(names) else Value("int64")
    columns = {"id": Value("string"), "label": label, "moments": Value("binary")}
    if flip:
        columns["moments_flipped"] = Value("binary")
    if images:
        columns["image"] = Image()
    return Features(columns)


def unreadable_in(path: str | os.PathLike) -> list[dict[str, str]]:
    """The images that a shard's encoder could not read: dicts with `id` and `error`, in the order of the input."""
    return [entry for batch in _scan_shard(path, [], 0) for entry in batch["unreadable"]]


def finish_moments(folder: str | os.PathLike, settings: dict[str, Any], features, num_shards: int) -> dict[str, Any]:
    """
    Complete a folder whose shards are all written: the list of unreadable images, the files by which
    `datasets.load_from_disk` opens it and, last, `metadata.json`. Returns the metadata.
    """
    from datasets import DatasetInfo

    folder = Path(folder)
    shards = [shard_name(index, num_shards) for index in range(num_shards)]
    unreadable, rows_per_shard = [], []
    for shard in shards:
        batches = list(_scan_shard(folder / shard, [], 0))
        rows_per_shard.append(sum(len(batch["labels"]) for batch in batches))
        unreadable += [entry for batch in batches for entry in batch["unreadable"]]
    write_unreadable(folder, unreadable)
    metadata = {
        "format": MOMENTS_FORMAT,
        "format_version": MOMENTS_FORMAT_VERSION,
        "moments": "mean, then standard deviation of the VAE posterior, unscaled, stacked along the channels",
        **settings,
        "num_rows": sum(rows_per_shard),
        "num_unreadable": len(unreadable),
        "rows_per_shard": rows_per_shard,
    }
    state = {
        "_data_files": [{"filename": shard} for shard in shards],
        "_fingerprint": hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(folder / "state.json", state)
    DatasetInfo(features=features).write_to_directory(str(folder))
    write_json(folder / METADATA_FILE, metadata)
    (folder / SETTINGS_FILE).unlink(missing_ok=True)
    return metadata


def write_unreadable(folder: str | os.PathLike, entries: Iterable[dict[str, str]]) -> Path:
    """Write `unreadable.jsonl`: one line per image, with `id` and `error`."""
    path = Path(folder) / UNREADABLE_FILE
    _write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    return path


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Write a JSON document that appears whole or not at all."""
    _write_text(Path(path), json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with _open_temporary(path) as file:
        try:
            file.write(text.encode())
            _publish(file, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _open_temporary(path: Path):
    # Beside the target, so that the rename stays on one file system; a random name, so that no two machines share it.
    return open(path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"), "xb")


def _publish(file, path: Path) -> None:
    """Give an open temporary file its name, on disk before the name is (a power cut leaves no empty shard)."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read_metadata(folder: Path) -> dict[str, Any]:
    if not (folder / METADATA_FILE).is_file():
        if (folder / SETTINGS_FILE).is_file():
            raise ValueError(
                f"`folder` is not encoded to the end: {folder}. Run examples/encode_latents.py again with the same "
                "arguments; it continues."
            )
        raise ValueError(f"`folder` must be written by examples/encode_latents.py, {folder} has no {METADATA_FILE}.")
    metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    found = metadata.get("format"), metadata.get("format_version")
    if found != (MOMENTS_FORMAT, MOMENTS_FORMAT_VERSION):
        raise ValueError(
            f"`folder` must hold {MOMENTS_FORMAT} version {MOMENTS_FORMAT_VERSION}, {METADATA_FILE} says {found}."
        )
    return metadata


def _scan_shard(path: str | os.PathLike, columns: Sequence[str], row_bytes: int) -> Iterable[dict[str, Any]]:
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
        raise ValueError(f"`folder` lacks a shard: {path}.") from None
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise ValueError(f"`folder` has a damaged shard: {path} ({error}).") from error
