# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the Arrow shards of `examples/encode_latents.py`, which [`~data.moments.MomentsDataset`] reads."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..files import whole_file, write_text
from .moments import (
    METADATA_FILE,
    MOMENTS_FORMAT,
    MOMENTS_FORMAT_VERSION,
    SETTINGS_FILE,
    UNREADABLE_KEY,
    scan_shard,
    shard_name,
)


UNREADABLE_FILE = "unreadable.jsonl"

# What a killed run may leave behind; the next run removes it.
TEMPORARY_SUFFIX = ".tmp"

# Opening a set looks at the head of every record batch: few and large ones make that quick.
ROWS_PER_RECORD_BATCH = 1024


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

        self._stack = ExitStack()
        partial = self._stack.enter_context(whole_file(self.path, _temporary_suffix()))
        self._writer = pa.ipc.new_stream(self._stack.enter_context(open(partial, "wb")), self.schema)
        self._stack.push(self._finish)
        self._columns: dict[str, list] = {field.name: [] for field in self.schema}
        self._unreadable: list[dict[str, str]] = []
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

    def _finish(self, error_type, error, traceback) -> None:
        if error_type is None:
            self._flush()
            self._writer.close()

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)


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
    return [entry for batch in scan_shard(path, [], 0) for entry in batch["unreadable"]]


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
        batches = list(scan_shard(folder / shard, [], 0))
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
    state: dict[str, Any] = {
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
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    write_text(path, text, _temporary_suffix())
    return path


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Write a JSON document that appears whole or not at all."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n", _temporary_suffix())


def _temporary_suffix() -> str:
    return f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"  # random, so that no two machines share the name
