# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads `.pt` and `.safetensors` files as data."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def load_checkpoint(path: Path) -> Any:
    """
    Reads a file of `torch.save` or of safetensors and runs no code from it: only tensors, plain containers and
    `argparse.Namespace`, which holds the training arguments in the files of LSEP, REPA and SiT, are allowed. Where the
    format of the file permits, the tensors stay mapped to it and come into memory when they are used.

    Args:
        path (`Path`): The file.

    Raises:
        `ValueError`: if the file is damaged, would run code, or has tensors that claim more than it holds.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"the file is damaged, or is no safetensors file ({error}).") from None
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"

    storages: dict[int, int] = {}

    def keep_on_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
        return storage

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Its annotation is of the storages before torch 2.
            checkpoint = torch.load(
                path,
                map_location=keep_on_cpu,  # type: ignore[arg-type]
                weights_only=True,
                mmap=is_zip,
            )
        if is_zip:
            _check_storages(path, storages)
    # None is chained: torch's own messages tell how to load such a file with its code.
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                "the file is refused, because it could run code: besides tensors and plain values it refers to"
                f" `{refused[1]}`. Nothing of it was run."
            ) from None
        operand = re.search(r"Unsupported operand \d+", str(error))
        raise ValueError(
            "the file is refused, because it is damaged or holds more than tensors and plain values"
            f" ({operand[0] if operand else 'weights only load failed'}). Nothing of it was run."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        if re.search("resize storage|out of bounds for storage", reason):
            reason = "a tensor claims more elements than its storage holds"
        raise ValueError(f"the file is damaged, or is not one that `torch.save` wrote ({reason}).") from None
    return checkpoint


def _check_storages(path: Path, storages: dict[int, int]):
    """
    Compares what the pickle claims with what the archive has. A mapped storage begins where its record begins, but its
    length is the pickle's claim, which `torch.load` does not check: it could reach into other records. Nor does it
    look at the records' checksums.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its record {damaged} does not have the checksum that the archive says")
        records = [info for info in archive.infolist() if info.filename.partition("/")[2].startswith("data/")]
    if any(info.compress_type != zipfile.ZIP_STORED for info in records):
        raise ValueError("its records are compressed")
    sizes = [info.file_size for info in sorted(records, key=lambda info: info.header_offset) if info.file_size > 0]
    claims = [nbytes for _, nbytes in sorted(storages.items()) if nbytes > 0]
    if len(sizes) != len(claims):
        raise ValueError(f"it has {len(sizes)} records of data, but its tensors use {len(claims)}")
    if any(claim > size for claim, size in zip(claims, sizes)):
        raise ValueError("a tensor claims more elements than its storage holds")
