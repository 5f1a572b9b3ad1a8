# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Encode images into moments of a VAE's posterior, for training without decoding an image again.

    accelerate launch examples/encode_latents.py --train_data_dir imagenet/train --output_dir imagenet-256 --flip

Each row of the result holds the mean and the standard deviation of an image's posterior, not normalised, as EDM2 and
REPA store them; the deviation is 0 where an autoencoder has no posterior. `diffusers_lsep.data.moments.MomentsDataset`
reads the folder, `datasets.load_from_disk` opens it too.

Which image lies in which shard and batch depends on its position in the input alone, so any number of processes gives
the same files, byte for byte, on one kind of machine (on CPU: with the same number of threads). Killed and started
again with the same arguments, the script keeps the finished shards and continues.
"""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diffusers_lsep.autoencoders import Autoencoder, get_image_channels, get_latent_channels, get_scale_factor
from diffusers_lsep.command_line import ArgumentParser, number, run_script
from diffusers_lsep.data.archives import ImageFiles
from diffusers_lsep.data.encoding import (
    FINGERPRINT_FILE,
    DatasetImages,
    EncodingProgress,
    ImageBatches,
    check_output_dir,
    encode_batch,
    leftovers_in,
    load_vae_to_encode,
    open_images_to_encode,
)
from diffusers_lsep.data.fingerprint import Fingerprint
from diffusers_lsep.data.moments import METADATA_FILE, SETTINGS_FILE, describe_vae, shard_name
from diffusers_lsep.data.moments_writer import (
    MomentsShardWriter,
    finish_moments,
    moments_features,
    unreadable_in,
    write_json,
    write_unreadable,
)
from diffusers_lsep.data.stream import keep_batch


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--train_data_dir",
        type=Path,
        help="A folder with one sub-folder of images per class (ImageNet's synsets), the same in a .tar or .zip, a "
        "folder of one .tar per class or a .tar of such .tar files (ImageNet as distributed), an EDM2/REPA images "
        "folder or zip (with dataset.json), or a folder of Parquet files.",
    )
    source.add_argument("--dataset_name", help="Id of a data set of images on the Hub.")
    parser.add_argument("--dataset_config_name", help="Configuration of --dataset_name, if it has several.")
    parser.add_argument("--split", help="Split of the data set or the Parquet files; train if not given.")
    parser.add_argument("--image_column", default="image", help="Column of images there.")
    parser.add_argument("--label_column", default="label", help="Column of labels there.")
    parser.add_argument(
        "--unconditional",
        action="store_true",
        help="The images have no labels, or these are not to be read; for the flag of this name in training.",
    )
    parser.add_argument(
        "--output_dir", required=True, help="A new folder, or one that this script began with the same arguments."
    )
    parser.add_argument(
        "--pretrained_vae_model_name_or_path",
        default="stabilityai/sd-vae-ft-mse",
        help="Id or folder of an AutoencoderKL or another autoencoder of diffusers.",
    )
    parser.add_argument("--vae_subfolder", help="Sub-folder of the VAE, for example vae in a pipeline.")
    parser.add_argument("--vae_revision", help="Branch, tag or commit of the VAE on the Hub.")
    parser.add_argument("--resolution", type=number(int, 1), default=256, help="Side of the centre crop in pixels.")
    parser.add_argument(
        "--apply_exif",
        action="store_true",
        help="Turn images as their EXIF data say: for one's own photographs. Not done by default, as EDM2 and REPA do "
        "not turn ImageNet's.",
    )
    parser.add_argument("--flip", action="store_true", help="Also store the moments of each image's mirror image.")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="Type of the stored moments.")
    parser.add_argument("--keep_images", action="store_true", help="Also store the cropped images, as PNG.")
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="Images per pass of the VAE.")
    parser.add_argument("--shard_size", type=number(int, 1), default=8192, help="Images per file of the result.")
    parser.add_argument(
        "--dataloader_num_workers", type=number(int, 0), default=4, help="Workers of each process that decode images."
    )
    parser.add_argument(
        "--allow_tf32", action="store_true", help="Let the VAE's convolutions use TF32 on NVIDIA GPUs: faster."
    )
    parser.add_argument(
        "--max_errors",
        type=number(int, 0),
        default=0,
        help="How many unreadable images to leave out before giving up; all are listed in unreadable.jsonl.",
    )
    return parser


def resolve_settings(
    args: argparse.Namespace, images: ImageFiles | DatasetImages, fingerprint: Fingerprint, vae: Autoencoder
) -> dict[str, Any]:
    """Everything that decides the bytes of the result; kept in the output folder and compared when a run continues."""
    rows = hashlib.sha256()
    rows.update(json.dumps(images.names).encode())
    rows.update(images.labels.tobytes())
    # Training finds the VAE by what is stored here, from wherever it is started.
    places = {"source": args.train_data_dir or args.dataset_name, "vae": args.pretrained_vae_model_name_or_path}
    places = {name: str(Path(place).resolve() if Path(place).exists() else place) for name, place in places.items()}
    side = args.resolution // get_scale_factor(vae)
    return {
        "source": places["source"],
        "source_sha256": rows.hexdigest(),
        "source_data": fingerprint.value,
        "num_images": len(images.names),
        "id2label": {str(index): name for index, name in images.id2label.items()},
        "vae": places["vae"],
        "vae_subfolder": args.vae_subfolder,
        "vae_revision": args.vae_revision,
        **describe_vae(vae),
        "resolution": args.resolution,
        "crop": "ADM centre crop",
        "apply_exif": args.apply_exif,
        "moments_shape": [2 * get_latent_channels(vae), side, side],
        "dtype": {"fp16": "float16", "fp32": "float32"}[args.dtype],
        "flip": args.flip,
        "images": args.keep_images,
        "tf32": args.allow_tf32,
        "batch_size": args.batch_size,
        "shard_size": args.shard_size,
    }


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.dataset_name is None:
        parser.refuse_without("--dataset_name", args, "dataset_config_name")
    if args.unconditional and args.label_column != parser.get_default("label_column"):
        parser.error("--unconditional reads no labels: leave out --label_column")
    # Processes that finish first wait for the last one: for longer than the ten minutes that NCCL allows by default.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])

    # 1. Refuse what cannot work before anything is written.
    with accelerator.main_process_first():  # one process downloads and builds caches
        images = open_images_to_encode(
            args.train_data_dir,
            args.dataset_name,
            args.dataset_config_name,
            args.split,
            args.image_column,
            None if args.unconditional else args.label_column,
        )
        vae_name = args.pretrained_vae_model_name_or_path
        vae = load_vae_to_encode(vae_name, args.resolution, args.vae_subfolder, args.vae_revision)
    folder = Path(args.output_dir)
    fingerprint = images.fingerprint()
    settings = check_output_dir(folder, resolve_settings(args, images, fingerprint, vae), images, fingerprint)
    num_images, num_shards = len(images.names), math.ceil(len(images.names) / args.shard_size)
    shards = {
        folder / shard_name(index, num_shards): range(start, min(start + args.shard_size, num_images))
        for index, start in enumerate(range(0, num_images, args.shard_size))
    }
    errors_in = {path: len(unreadable_in(path)) for path in shards if path.exists()}
    # Too many errors ended the run before: the images may have been repaired since.
    again = [path for path, errors in errors_in.items() if errors and sum(errors_in.values()) > args.max_errors]
    todo = [path for path in shards if path not in errors_in or path in again]
    row_bytes = math.prod(settings["moments_shape"]) * np.dtype(settings["dtype"]).itemsize * (1 + args.flip)
    needed = row_bytes * sum(len(shards[path]) for path in todo)
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(f"`--output_dir` needs {needed / 1e9:.1f} GB for the moments, {free / 1e9:.1f} GB are free.")
    complete = (folder / METADATA_FILE).is_file() and not todo
    accelerator.print(
        f"{num_images:,} images in {len(images.id2label):,} classes -> {num_shards:,} shards of {settings['dtype']} "
        f"moments {tuple(settings['moments_shape'])} in {folder}; {num_shards - len(todo):,} are there already, "
        + ("nothing is left to do." if complete else f"{needed / 1e9:.2f} GB are to be written.")
    )
    accelerator.wait_for_everyone()  # everybody has seen the same folder before somebody writes to it
    if complete:
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        if accelerator.is_main_process:
            (folder / SETTINGS_FILE).unlink(missing_ok=True)  # of a run that was killed as it ended
            if not settings.items() <= metadata.items():  # of an older version
                write_json(folder / METADATA_FILE, {**metadata, **settings})
        return
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*leftovers_in(folder), *again]:
            leftover.unlink()
        write_json(folder / SETTINGS_FILE, settings)  # first, as it says whose folder this is
        fingerprint.save(folder / FINGERPRINT_FILE)
    accelerator.wait_for_everyone()

    # 2. Encode whole shards, dealt out to the processes.
    features = moments_features(images.id2label, args.flip, args.keep_images)
    mine = {path: shards[path] for path in todo[accelerator.process_index :: accelerator.num_processes]}
    encode_shards(args, accelerator, images, vae, settings, features, shards, mine)
    accelerator.wait_for_everyone()

    # 3. Complete the folder.
    if accelerator.is_main_process:
        if sum(len(unreadable_in(path)) for path in shards) > args.max_errors:
            give_up(args, shards, [])
        metadata = finish_moments(folder, settings, features, num_shards)
        print(
            f"{metadata['num_rows']:,} rows are in {folder}; {metadata['num_unreadable']:,} unreadable images are "
            f"left out{' and listed in unreadable.jsonl' if metadata['num_unreadable'] else ''}."
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()


def encode_shards(
    args: argparse.Namespace,
    accelerator: Accelerator,
    images: ImageFiles | DatasetImages,
    vae: Autoencoder,
    settings: dict[str, Any],
    features,
    shards: dict[Path, range],
    mine: dict[Path, range],
) -> None:
    """Write the shards `mine`, by file and rows; `shards` are those of all processes."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    vae.to(accelerator.device)
    batches_of = {
        path: [range(first, min(first + args.batch_size, rows.stop)) for first in rows[:: args.batch_size]]
        for path, rows in mine.items()
    }
    loader = torch.utils.data.DataLoader(
        ImageBatches(
            images,
            (args.batch_size, args.resolution, args.resolution, get_image_channels(vae)),
            args.keep_images,
            args.apply_exif,
        ),
        batch_size=None,
        collate_fn=keep_batch,
        sampler=[batch for batches in batches_of.values() for batch in batches],
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    decoded = iter(loader)
    progress = EncodingProgress(shards, accelerator)
    errors_before = sum(len(unreadable_in(path)) for path in shards if path.exists() and path not in mine)
    errors = []
    for path, batches in batches_of.items():
        with MomentsShardWriter(path, features) as writer:
            for rows in batches:
                batch = next(decoded)
                errors += batch["unreadable"]
                if errors_before + len(errors) > args.max_errors:
                    give_up(args, shards, errors)
                writer.write(encode_batch(vae, batch, rows, images, settings), batch["unreadable"])
                progress.update(len(rows))
        progress.shard_done()
    accelerator.wait_for_everyone()
    progress.close()


def give_up(args: argparse.Namespace, paths: Iterable[Path], errors: list[dict[str, str]]) -> None:
    """Stop with a list of what could not be read: in the finished shards, and `errors` of this process."""
    known = {entry["id"]: entry for path in paths if path.exists() for entry in unreadable_in(path)}
    known |= {entry["id"]: entry for entry in errors}
    listed = write_unreadable(args.output_dir, known.values())
    first = next(iter(known.values()))
    raise ValueError(
        f"{len(known)} unreadable images, more than `--max_errors {args.max_errors}`; they are listed in {listed} "
        f"(first: {first['id']}: {first['error']}). Repair them, or run again with a higher `--max_errors`: finished "
        "shards are kept."
    )


if __name__ == "__main__":
    run_script(main)
