# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Encode images into moments of a VAE's posterior, for training without decoding an image again.

    accelerate launch examples/encode_latents.py --train_data_dir imagenet/train --output_dir imagenet-256 --flip

Each row of the result holds the mean and the standard deviation of an image's posterior, unscaled, as EDM2 and REPA
store them. `diffusers_lsep.data.moments.MomentsDataset` reads the folder, `datasets.load_from_disk` opens it too.

Which image lies in which shard and batch depends on its position in the input alone, so any number of processes gives
the same files, byte for byte, on one kind of machine (on CPU: with the same number of threads). Killed and started
again with the same arguments, the script keeps the finished shards and continues.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from diffusers_lsep.data.archives import ImageFiles, open_image_files
from diffusers_lsep.data.images import center_crop, convert_mode, damage, load_image_dataset, read_labels
from diffusers_lsep.data.moments import METADATA_FILE, SETTINGS_FILE, describe_vae, shard_name, shorten
from diffusers_lsep.data.moments_writer import (
    TEMPORARY_SUFFIX,
    MomentsShardWriter,
    finish_moments,
    moments_features,
    unreadable_in,
    write_json,
    write_unreadable,
)
from diffusers_lsep.data.stream import keep_batch


# Settings that say where something lay; the hashes beside them say what it was, so a moved folder may continue.
PLACES = ("source", "vae", "vae_subfolder", "vae_revision")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--train_data_dir",
        type=Path,
        help="A folder with one sub-folder of images per class (ImageNet's synsets), the same in a .tar or .zip, a "
        "folder of one .tar per class or a .tar of such .tar files (ImageNet as distributed), an EDM2/REPA images "
        "folder or zip (with dataset.json), or a folder of Parquet files.",
    )
    source.add_argument("--dataset_name", help="A data set on the Hub.")
    parser.add_argument("--dataset_config_name", help="Its configuration.")
    parser.add_argument(
        "--split", default="train", help="Its split, or that of the Parquet files (default: %(default)s)."
    )
    parser.add_argument("--image_column", default="image", help="Its column of images (default: %(default)s).")
    parser.add_argument("--label_column", default="label", help="Its column of labels (default: %(default)s).")
    parser.add_argument(
        "--output_dir", required=True, help="A new folder, or one that this script began with the same arguments."
    )
    parser.add_argument(
        "--pretrained_vae_model_name_or_path",
        default="stabilityai/sd-vae-ft-mse",
        help="Id or folder of an AutoencoderKL (default: %(default)s).",
    )
    parser.add_argument("--vae_subfolder", help="Sub-folder of the VAE, for example vae in a pipeline.")
    parser.add_argument("--vae_revision", help="Branch, tag or commit of the VAE on the Hub.")
    parser.add_argument(
        "--resolution", type=int, default=256, help="Side of the centre crop in pixels (default: %(default)s)."
    )
    parser.add_argument(
        "--apply_exif",
        action="store_true",
        help="Turn images as their EXIF data say: for one's own photographs. Not done by default, as EDM2 and REPA do "
        "not turn ImageNet's.",
    )
    parser.add_argument("--flip", action="store_true", help="Also store the moments of each image's mirror image.")
    parser.add_argument(
        "--dtype", choices=("fp16", "fp32"), default="fp16", help="Type of the stored moments (default: %(default)s)."
    )
    parser.add_argument("--keep_images", action="store_true", help="Also store the cropped images, as PNG.")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="Images per pass of the VAE (default: %(default)s)."
    )
    parser.add_argument("--shard_size", type=int, default=8192, help="Images per shard (default: %(default)s).")
    parser.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=4,
        help="Worker processes that decode, per process (default: %(default)s).",
    )
    parser.add_argument(
        "--allow_tf32", action="store_true", help="Let the VAE's convolutions use TF32 on NVIDIA GPUs: faster."
    )
    parser.add_argument(
        "--max_errors",
        type=int,
        default=0,
        help="How many unreadable images to leave out before giving up; all are listed in unreadable.jsonl "
        "(default: %(default)s).",
    )
    args = parser.parse_args(argv)
    for name, lowest in {
        "resolution": 1,
        "batch_size": 1,
        "shard_size": 1,
        "dataloader_num_workers": 0,
        "max_errors": 0,
    }.items():
        if getattr(args, name) < lowest:
            parser.error(f"`--{name}` has to be at least {lowest}, but is {getattr(args, name)}")
    return args


# 1. The input: names, labels, and the bytes of each image.


class DatasetImages:
    """Images of a `datasets.Dataset`, as [`ImageFiles`]; an image's name is its row."""

    def __init__(self, dataset, image_column: str, label_column: str):
        from datasets import Image

        if not isinstance(dataset.features.get(image_column), Image):
            raise ValueError(
                f"`--image_column` has to be a column of images, but is {image_column}; there are {dataset.features}."
            )
        self.labels, names = read_labels(dataset, label_column)
        self.id2label = dict(enumerate(names))
        self.names = [f"{row:08d}" for row in range(len(dataset))]
        self._images = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        self._column = image_column

    def read(self, row: int) -> bytes:
        image = self._images[row][self._column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def open_input(args: argparse.Namespace) -> ImageFiles | DatasetImages:
    """The images that the arguments name; `ValueError` where there are none or their classes are in doubt."""
    path = args.train_data_dir
    if args.dataset_name or (path.is_dir() and next(path.rglob("*.parquet"), None)):
        splits = load_image_dataset(args.dataset_name, args.dataset_config_name, path)
        if args.split not in splits:
            raise ValueError(f"`--split` has to be one of {', '.join(splits)}, but is {args.split}.")
        return DatasetImages(splits[args.split], args.image_column, args.label_column)
    return open_image_files(path)


# 2. Decoding, in the workers of a DataLoader: a batch at a time, so that its images do not depend on who encodes it.


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
                image = PIL.Image.open(io.BytesIO(self.images.read(row)))
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


# 3. Encoding.


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    where = {"subfolder": args.vae_subfolder, "revision": args.vae_revision}
    name = args.pretrained_vae_model_name_or_path
    flag = "`--pretrained_vae_model_name_or_path`"
    try:
        class_name = AutoencoderKL.load_config(name, **where).get("_class_name")
        if class_name != "AutoencoderKL":
            raise ValueError(f"{flag} has to be an AutoencoderKL, but {name} is {class_name}.")
        vae = AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32, **where)
    except OSError as error:
        raise ValueError(f"{flag} has to be the id or folder of an AutoencoderKL, but is {name} ({error})") from error
    if vae.config.in_channels not in (1, 3):
        raise ValueError(f"{flag} has to encode grey or RGB images, but {name} has {vae.config.in_channels} channels.")
    downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.resolution % downsampling:
        raise ValueError(
            f"`--resolution` has to be a multiple of {downsampling} for {name}, but is {args.resolution}."
        )
    return vae.eval().requires_grad_(False)


def resolve_settings(
    args: argparse.Namespace, images: ImageFiles | DatasetImages, vae: AutoencoderKL
) -> dict[str, Any]:
    """Everything that decides the bytes of the result; kept in the output folder and compared when a run continues."""
    rows = hashlib.sha256()
    rows.update(json.dumps(images.names).encode())
    rows.update(images.labels.tobytes())
    # Training finds the VAE by what is stored here, from wherever it is started.
    places = {"source": args.train_data_dir or args.dataset_name, "vae": args.pretrained_vae_model_name_or_path}
    places = {name: str(Path(place).resolve() if Path(place).exists() else place) for name, place in places.items()}
    side = args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return {
        "source": places["source"],
        "source_sha256": rows.hexdigest(),
        "num_images": len(images.names),
        "id2label": {str(index): name for index, name in images.id2label.items()},
        "vae": places["vae"],
        "vae_subfolder": args.vae_subfolder,
        "vae_revision": args.vae_revision,
        **describe_vae(vae),
        "resolution": args.resolution,
        "crop": "ADM centre crop",
        "apply_exif": args.apply_exif,
        "moments_shape": [2 * vae.config.latent_channels, side, side],
        "dtype": {"fp16": "float16", "fp32": "float32"}[args.dtype],
        "flip": args.flip,
        "images": args.keep_images,
        "tf32": args.allow_tf32,
        "batch_size": args.batch_size,
        "shard_size": args.shard_size,
    }


def check_output(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings to go on with: those of the run that began `folder`, which must agree, else `settings`."""
    begun = [folder / name for name in (METADATA_FILE, SETTINGS_FILE) if (folder / name).is_file()]
    if not begun:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"`--output_dir` has to be new, empty, or begun by this script, but is {folder}.")
        return settings
    # A folder that does not say it is of a version that always turned the images.
    before = {"apply_exif": True, **json.loads(begun[0].read_text(encoding="utf-8"))}
    if before.get("vae_sha256") == settings["vae_sha256"]:  # an older version knew no more
        before.setdefault("vae_encoder_sha256", settings["vae_encoder_sha256"])
    different = [name for name, value in settings.items() if name not in PLACES and before.get(name) != value]
    if different:
        changes = "; ".join(f"{name}: {shorten(before.get(name))} -> {shorten(settings[name])}" for name in different)
        raise ValueError(
            f"`--output_dir` {folder} was begun with other settings ({changes}). Restore them or take a new folder."
        )
    return {name: before[name] for name in settings}


@torch.inference_mode()
def encode(vae: AutoencoderKL, pixels: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """Mean and standard deviation `[B, 2 * C, h, w]` of the posterior of pixels in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    with np.errstate(over="ignore"):  # the caller looks for what is not finite
        return torch.cat([posterior.mean, posterior.std], dim=1).cpu().numpy().astype(dtype)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Processes that finish first wait for the last one: for longer than the ten minutes that NCCL allows by default.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])

    # 1. Refuse what cannot work before anything is written.
    with accelerator.main_process_first():  # one process downloads and builds caches
        images = open_input(args)
        vae = load_vae(args)
    folder = Path(args.output_dir)
    settings = check_output(folder, resolve_settings(args, images, vae))
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
        if accelerator.is_main_process and not settings.items() <= metadata.items():  # of an older version
            write_json(folder / METADATA_FILE, {**metadata, **settings})
        return
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob(f".*{TEMPORARY_SUFFIX}"), *again]:
            leftover.unlink()
        write_json(folder / SETTINGS_FILE, settings)
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
    vae: AutoencoderKL,
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
            (args.batch_size, args.resolution, args.resolution, vae.config.in_channels),
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
    progress = Progress(shards, accelerator)
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


def encode_batch(
    vae: AutoencoderKL,
    batch: dict[str, Any],
    rows: range,
    images: ImageFiles | DatasetImages,
    settings: dict[str, Any],
) -> dict[str, list]:
    """The columns of a record batch."""
    pixels = batch["pixels"].to(vae.device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    good = batch["good"]
    ids = [images.names[rows[position]] for position in good]
    columns = {"id": ids, "label": [int(images.labels[rows[position]]) for position in good]}
    for name, copy in {"moments": pixels, "moments_flipped": pixels.flip(-1) if settings["flip"] else None}.items():
        if copy is not None:
            moments = encode(vae, copy, np.dtype(settings["dtype"]))[good]
            finite = np.isfinite(moments).all(axis=(1, 2, 3))
            if not finite.all():
                raise ValueError(
                    f"The moments of {ids[finite.argmin()]} are not finite in {settings['dtype']}: try `--dtype fp32`."
                )
            columns[name] = [row.tobytes() for row in moments]
    if settings["images"]:
        columns["image"] = [{"bytes": png, "path": None} for png in batch["pngs"]]
    return columns


def give_up(args: argparse.Namespace, paths: Iterable[Path], errors: list[dict[str, str]]) -> None:
    """Stop with a list of what could not be read: in the finished shards, and `errors` of this process."""
    known = {entry["id"]: entry for path in paths if path.exists() for entry in unreadable_in(path)}
    known |= {entry["id"]: entry for entry in errors}
    listed = write_unreadable(args.output_dir, known.values())
    first = next(iter(known.values()))
    raise RuntimeError(
        f"{len(known)} unreadable images, more than `--max_errors {args.max_errors}`; they are listed in {listed} "
        f"(first: {first['id']}: {first['error']}). Repair them, or run again with a higher `--max_errors`: finished "
        "shards are kept."
    )


class Progress:
    """A bar over the images of all processes: finished shards on disk plus what this process has done of its own."""

    def __init__(self, shards: dict[Path, range], accelerator: Accelerator):
        self.rows_in = {path.name: len(rows) for path, rows in shards.items()}
        self.folder = next(iter(shards)).parent
        self.own, self.on_disk, self.checked = 0, self._count(), time.monotonic()
        self.bar = tqdm(
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


if __name__ == "__main__":
    main()
