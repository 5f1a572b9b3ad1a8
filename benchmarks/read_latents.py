# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""How fast one core reads shuffled batches of VAE moments, and how much memory that takes: ours beside `datasets`.

    python benchmarks/read_latents.py

Two synthetic sets are written in the format of `examples/encode_latents.py` and deleted afterwards: a small one, and
one of ImageNet's size (1,281,167 rows of `[8, 32, 32]` float16: 21 GB of disk). Every reader gets a fresh process,
with the set out of the page cache, and has to give the same values. A first pass reads rows that lie scattered over
the whole set from the disk; then come the rates with a warm cache, per second of the clock and per second of the one
core (which is what a machine with other work on it tells reliably). Memory is what is resident.

Last comes the wait of a training step for its data: batches of 256 with all draws of training come from worker
processes, while a GPU that takes `--step_seconds` for a step is played by sleep.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from diffusers_lsep.data.moments import METADATA_FILE, MomentsDataset, shard_name
from diffusers_lsep.data.moments_writer import MomentsShardWriter, finish_moments, moments_features
from diffusers_lsep.data.stream import SampleStream


def write_set(folder: Path, num_rows: int, shape: tuple[int, int, int], shard_size: int, batch_size: int = 64) -> None:
    rng = np.random.default_rng(0)
    id2label = {index: f"class {index}" for index in range(1000)}
    features = moments_features(id2label, flip=False, images=False)
    block = rng.standard_normal((shard_size, *shape), dtype=np.float32).astype(np.float16)
    # Every shard repeats one block of values: they only have to be there.
    values = [row.tobytes() for row in block]
    num_shards = -(-num_rows // shard_size)
    folder.mkdir()
    for shard in range(num_shards):
        rows = range(shard * shard_size, min((shard + 1) * shard_size, num_rows))
        with MomentsShardWriter(folder / shard_name(shard, num_shards), features) as writer:
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                ids = [f"{row:08d}" for row in batch]
                labels = rng.integers(0, 1000, len(batch)).tolist()
                writer.write({"id": ids, "label": labels, "moments": values[first : first + len(batch)]})
    settings = {
        "id2label": id2label,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "moments_shape": shape,
        "dtype": "float16",
        "flip": False,
    }
    finish_moments(folder, settings, features, num_shards)


def memory() -> dict[str, float]:
    """Resident memory of this process in MB: all, and what it maps from files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    values = {words[0]: int(words[1]) / 1e3 for words in lines if words[0] in ("VmRSS:", "RssFile:")}
    return {"resident": values["VmRSS:"], "mapped": values["RssFile:"]}


def open_reader(folder: Path, reader: str) -> Callable[[list[int]], torch.Tensor]:
    """What reads a batch of rows: `[B, 2 C, S, S]`."""
    if reader == "MomentsDataset.load":
        return MomentsDataset(folder).load
    if reader == "MomentsDataset.__getitems__":  # with labels, a dictionary per row
        dataset = MomentsDataset(folder)
        return lambda rows: torch.stack([row["moments"] for row in dataset.__getitems__(rows)])

    # The same folder by `datasets` alone, in one of its formats; it gives bytes.
    metadata = json.loads((folder / METADATA_FILE).read_text())
    shape, dtype = metadata["moments_shape"], metadata["dtype"]
    format_type = reader.rpartition(" ")[2]
    dataset = datasets.load_from_disk(str(folder)).select_columns(["moments"])
    dataset = dataset.with_format(None if format_type == "python" else format_type)

    def read(rows: list[int]) -> torch.Tensor:
        column = dataset[rows]["moments"]
        if format_type == "arrow":  # one buffer, without an object per row
            values = np.frombuffer(column.combine_chunks().buffers()[2], dtype).reshape(len(rows), *shape).copy()
        else:
            values = np.stack([np.frombuffer(value, dtype).reshape(shape) for value in column])
        return torch.from_numpy(values)

    return read


READERS = (
    "MomentsDataset.load",
    "MomentsDataset.__getitems__",
    "datasets, arrow",
    "datasets, python",
    "datasets, numpy",
)


def measure(folder: Path, reader: str, num_read: int, batch_size: int, repeats: int) -> tuple[list[str], int]:
    """Read `num_read` scattered rows in several orders, in this process: cells of the table, and a checksum."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for path in folder.glob("*.arrow"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    num_rows = json.loads((folder / METADATA_FILE).read_text())["num_rows"]
    before = memory()["resident"]
    start = time.perf_counter()
    read = open_reader(folder, reader)
    opened = time.perf_counter() - start
    rng = np.random.default_rng(1)
    rows = rng.permutation(num_rows)[:num_read]
    checksum = zlib.crc32(read(rows[:batch_size].tolist()).numpy())
    rates = []
    for repeat in range(1 + repeats):
        order = rng.permutation(rows).tolist()
        start = np.array([time.perf_counter(), time.process_time()])
        for first in range(0, len(order), batch_size):
            read(order[first : first + batch_size])
        rates.append(len(order) / (np.array([time.perf_counter(), time.process_time()]) - start))
        if repeat == 0:
            after_first = memory()["resident"]
    after = memory()
    cells = [f"{opened:.2f}", f"{rates[0][0]:,.0f}", *(f"{rate:,.0f}" for rate in np.median(rates[1:], axis=0))]
    cells += [f"{value:.0f}" for value in (before, after_first, after["resident"], after["mapped"])]
    return cells, checksum


def measure_wait(folder: Path, step_seconds: float, num_workers: int, batch_size: int = 256, steps: int = 40) -> str:
    """The share of the steps' time that passes before a batch is there; a sentence."""
    dataset = MomentsDataset(folder)
    channels, *size = dataset.moments_shape
    stream = SampleStream(
        dataset, (channels // 2, *size), 0, batch_size, grid_size=16, crop_size_min=12, posterior_noise=True
    )
    warm = 2 * num_workers
    batches = [list(range(step * batch_size, (step + 1) * batch_size)) for step in range(steps + warm)]
    loader = iter(DataLoader(stream, batch_sampler=batches, num_workers=num_workers, collate_fn=lambda batch: batch))
    waits = []
    for _ in batches:
        start = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - start)
        time.sleep(step_seconds)
    waited = sum(waits[warm:])  # the first ones wait for the workers to start
    return (
        f"{len(dataset):,} rows, {steps} steps of {batch_size} samples and {step_seconds} s, {num_workers} workers:"
        f" {waited / (waited + steps * step_seconds):.2%} of the time is waiting for data"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_281_167], help="Sizes of the sets.")
    parser.add_argument("--shape", type=int, nargs=3, default=[8, 32, 32], help="Shape of a row's moments.")
    parser.add_argument("--shard_size", type=int, default=8192, help="Rows per shard.")
    parser.add_argument("--read", type=int, default=200_000, help="Rows to read per pass; they have to fit the cache.")
    parser.add_argument("--batch_size", type=int, default=64, help="Rows per batch.")
    parser.add_argument("--repeats", type=int, default=5, help="Passes with a warm cache.")
    parser.add_argument("--data_dir", type=Path, help="Where to write the sets (default: the temporary folder).")
    parser.add_argument("--step_seconds", type=float, default=0.5, help="SiT-XL/2's 256 images on an H200, estimated.")
    parser.add_argument("--num_workers", type=int, default=2, help="Workers of the loader.")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # the child process: folder and reader
    args = parser.parse_args()
    if args.measure:
        folder, reader = args.measure
        print(json.dumps(measure(Path(folder), reader, args.read, args.batch_size, args.repeats)))
        return

    needed = max(args.rows) * np.prod(args.shape) * 2 * 1.01
    with tempfile.TemporaryDirectory(dir=args.data_dir, prefix="read_latents_") as place:
        free = shutil.disk_usage(place).free
        if needed > free:
            parser.error(
                f"`--rows` {max(args.rows)} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {place}"
            )
        print(
            "| rows | GB | reader | open, s | first pass, rows/s | rows/s | rows/s of the core | MB before | "
            "MB after one pass | MB after all | of it mapped files |"
        )
        print("|---" * 11 + "|", flush=True)
        waits = []
        for num_rows in args.rows:
            folder = Path(place) / "set"
            write_set(folder, num_rows, tuple(args.shape), args.shard_size)
            options = ["--read", args.read, "--batch_size", args.batch_size, "--repeats", args.repeats]
            checksums = set()
            for reader in READERS:
                command = [sys.executable, __file__, "--measure", folder, reader, *options]
                output = subprocess.run(map(str, command), check=True, capture_output=True, text=True).stdout
                cells, checksum = json.loads(output)
                checksums.add(checksum)
                size = num_rows * np.prod(args.shape) * 2 / 1e9
                print("|", " | ".join([f"{num_rows:,}", f"{size:.1f}", f"`{reader}`", *cells]), "|", flush=True)
            if len(checksums) > 1:
                sys.exit("The readers give different values.")
            waits.append(measure_wait(folder, args.step_seconds, args.num_workers))
            shutil.rmtree(folder)
        print("\n".join(["", *waits]))


if __name__ == "__main__":
    main()
