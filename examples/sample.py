#!/usr/bin/env python
# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws images from a saved LSEP pipeline: a few to look at, or 50,000 to evaluate.

    python examples/sample.py --pretrained_model_name_or_path lsep-digits --class_labels 3 7 --output_dir samples
    accelerate launch examples/sample.py --pretrained_model_name_or_path lsep/sit-xl-256 --num_images 50000 ...

Every image is decided by `--seed`, its index and the batch it is in, and which images make a batch is fixed by their
indices. So any number of processes writes the same files, and a run that was killed goes on where it was, but not if
weights or settings have changed.
"""

import argparse
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

import diffusers_lsep
from diffusers_lsep.figures import make_labeled_grid
from diffusers_lsep.labels import describe_classes, find_class_ids
from diffusers_lsep.sampling import (
    DTYPES,
    LABEL_SAMPLINGS,
    SAMPLERS,
    choose_class_ids,
    describe_models,
    describe_scheduler,
    draw_batch,
    load_pipeline,
)


# Where the model is from. It may be somewhere else when a run goes on: its weights may not be others.
PLACES = ("pretrained_model_name_or_path", "revision", "variant")
# What makes an image, beside the model: a run is only continued if all of it is the same.
IMAGE_SETTINGS = (
    "scheduler",
    "num_inference_steps",
    "guidance_scale",
    "guidance_interval",
    "seed",
    "batch_size",
    "dtype",
    "compile",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Folder or Hub id of a saved LSEP pipeline."
    )
    parser.add_argument("--revision", help="Revision of the pipeline on the Hub.")
    parser.add_argument("--variant", help="Variant of the weight files, such as fp16.")
    parser.add_argument("--output_dir", required=True, help="Where the images go.")
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Discard the images that are there, and those of an unfinished run.",
    )

    what = parser.add_argument_group("what to draw (one of the first two)")
    what.add_argument(
        "--class_labels", nargs="+", metavar="CLASS", help="Class names or ids, to be written as PNGs and a grid."
    )
    what.add_argument("--num_images", type=int, help="How many images to write into one samples.npz, for evaluation.")
    what.add_argument(
        "--num_images_per_class", type=int, default=4, help="With --class_labels: images of each class. Default: 4."
    )
    what.add_argument(
        "--label_sampling",
        choices=LABEL_SAMPLINGS,
        default="random",
        help="With --num_images: classes drawn at random (the papers' protocol) or all equally often (lower FID, and"
        " to be reported as such). Default: random.",
    )
    what.add_argument("--save_images", action="store_true", help="With --num_images: write PNGs as well.")

    how = parser.add_argument_group("how to draw")
    how.add_argument(
        "--scheduler",
        choices=SAMPLERS,
        help="Sampler in place of the one that the pipeline was saved with.",
    )
    how.add_argument("--num_inference_steps", type=int, default=250, help="Default: 250.")
    how.add_argument("--guidance_scale", type=float, default=1.0, help="Default: 1.0, no guidance.")
    how.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help="Times t at which guidance acts. Default: 0 1.",
    )
    how.add_argument("--seed", type=int, default=0, help="Default: 0.")
    how.add_argument("--batch_size", type=int, default=32, help="Images at a time in one process. Default: 32.")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="The transformer's. Default: float32.")
    how.add_argument(
        "--compile",
        action="store_true",
        help="Compile the transformer's blocks: faster once that is done; last bits may differ.",
    )

    args = parser.parse_args(argv)
    if (args.class_labels is None) == (args.num_images is None):
        parser.error("exactly one of --class_labels and --num_images has to be given")
    for name in ("num_images", "num_images_per_class", "batch_size", "num_inference_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    if args.seed < 0:
        parser.error(f"--seed has to be at least 0, but is {args.seed}")
    low, high = args.guidance_interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--guidance_interval has to be LOW HIGH with 0 <= LOW <= HIGH <= 1, but is {low} {high}")
    if args.label_sampling == "balanced" and args.num_images is None:
        parser.error("--label_sampling goes with --num_images")
    return args


class ImageStore:
    """
    The images of a run, in a folder that lasts until all of them are there: one uncompressed array on disk, a byte for
    each finished batch, and the settings. Any number of processes writes into it, each batch at its own place.
    """

    def __init__(self, folder: Path, num_images: int, image_shape: tuple[int, int, int], batch_size: int):
        self.folder = folder
        self.array_path = folder / "images.npy"
        self.done_path = folder / "done"
        self.shape = (num_images, *image_shape)
        self.batch_size = batch_size
        self.num_batches = math.ceil(num_images / batch_size)

    def create(self, settings: dict):
        """Makes the folder, or checks that the one from an earlier run has the same settings."""
        settings_path = self.folder / "settings.json"
        if settings_path.is_file():
            before = dict(flatten(json.loads(settings_path.read_text())))
            now = dict(flatten(json.loads(json.dumps(settings))))
            differing = [
                f"{name} ({before.get(name)!s:.40} before, {now.get(name)!s:.40} now)"
                for name in before | now
                if name not in PLACES and before.get(name) != now.get(name)
            ]
            if differing:
                raise ValueError(
                    f"{self.folder} holds an unfinished run with other settings: {', '.join(differing)}. Finish that"
                    " run, or give `--overwrite_output_dir` to discard it."
                )
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        np.lib.format.open_memmap(self.array_path, mode="w+", dtype=np.uint8, shape=self.shape).flush()
        self.done_path.write_bytes(bytes(self.num_batches))
        # Last, as it says that the rest is there.
        write_json(settings_path, settings)

    def pending(self) -> list[int]:
        """The batches that are still to be drawn."""
        return [batch for batch, done in enumerate(self.done_path.read_bytes()) if not done]

    def write(self, batch: int, images: np.ndarray):
        """Stores the images of a batch, then the fact that it is there."""
        array = np.load(self.array_path, mmap_mode="r+")
        array[batch * self.batch_size : batch * self.batch_size + len(images)] = images
        array.flush()
        with open(self.done_path, "r+b") as file:
            file.seek(batch)
            file.write(b"\1")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> np.ndarray:
        return np.load(self.array_path, mmap_mode="r")


def flatten(settings: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as names and values."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write_json(path: Path, content: dict):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def draw(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    store: ImageStore,
    class_ids: np.ndarray,
):
    """Draws the batches of this process."""
    pending = store.pending()
    progress = tqdm(
        total=len(class_ids),
        initial=min(len(class_ids), (store.num_batches - len(pending)) * args.batch_size),
        unit="image",
        disable=not accelerator.is_main_process,
    )
    # The others read what is pending too, before anybody changes it.
    accelerator.wait_for_everyone()
    for batch in pending[accelerator.process_index :: accelerator.num_processes]:
        images = draw_batch(
            pipe,
            class_ids,
            batch,
            args.batch_size,
            args.seed,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            guidance_interval=tuple(args.guidance_interval),
        )
        store.write(batch, images)
        progress.update(min(len(images) * accelerator.num_processes, progress.total - progress.n))
    progress.close()


def write_npz(path: Path, images: np.ndarray, class_ids: np.ndarray):
    """An uncompressed npz in the layout of ADM's sample files, array by array and without holding one in memory."""
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in (("arr_0", images), ("arr_1", class_ids)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(array), 256):
                    file.write(np.ascontiguousarray(array[start : start + 256]).tobytes())
    os.replace(temporary, path)


def write_pngs(folder: Path, images: np.ndarray, class_ids: np.ndarray) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(images) - 1))
    paths = []
    for index, (image, class_id) in enumerate(zip(images, class_ids)):
        path = folder / f"{index:0{digits}d}-class-{class_id}.png"
        temporary = path.with_suffix(".tmp")
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, format="png")
        os.replace(temporary, path)
        paths.append(path)
    return paths


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    accelerator = Accelerator()
    output_dir = Path(args.output_dir)
    store_dir = output_dir / ".unfinished"
    result = output_dir / ("samples.npz" if args.num_images is not None else "grid.png")
    if result.exists() and not args.overwrite_output_dir:
        raise ValueError(
            f"`--output_dir` {args.output_dir} already has {result.name}. Choose another folder, or give"
            " `--overwrite_output_dir`."
        )

    # 1. Pipeline
    place = {name: getattr(args, name) for name in PLACES}
    pipe = load_pipeline(**place, device=accelerator.device, dtype=DTYPES[args.dtype], scheduler=args.scheduler)
    if args.compile:
        # Fixed sizes: a batch, and twice as much under guidance.
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    num_classes, id2label = pipe.transformer.config.num_classes, pipe.config.id2label or {}
    if args.num_images is not None:
        class_ids = choose_class_ids(args.num_images, num_classes, args.label_sampling, args.seed)
    else:
        class_ids = find_class_ids(args.class_labels, id2label, num_classes, "--class_labels")
        class_ids = np.repeat(class_ids, args.num_images_per_class)

    # 2. Settings, which are stored beside the images
    settings = place | {name: getattr(args, name) for name in IMAGE_SETTINGS}
    settings["guidance_interval"] = list(args.guidance_interval)
    settings["num_images"] = len(class_ids)
    settings["class_labels"] = args.class_labels or f"{args.label_sampling} over all classes"
    settings |= describe_scheduler(pipe.scheduler)
    settings["class_ids"] = class_ids.tolist()
    settings["quantization"] = "floor(255 * (x + 1) / 2)"
    settings["diffusers_lsep_version"] = diffusers_lsep.__version__

    # 3. Images
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    channels = pipe.vae.config.out_channels if pipe.vae is not None else pipe.transformer.config.in_channels
    store = ImageStore(store_dir, len(class_ids), (side, side, channels), args.batch_size)
    if accelerator.is_main_process:
        models = describe_models(pipe)
        settings["weights"] = models["weights"]
        if args.overwrite_output_dir:
            shutil.rmtree(store_dir, ignore_errors=True)
            result.unlink(missing_ok=True)
            for path in (output_dir / "images").glob("*-class-*.png"):  # there may have been more of them
                path.unlink()
        store.create({**settings, **models})
        print(describe_classes(class_ids, id2label))
    accelerator.wait_for_everyone()
    draw(args, accelerator, pipe, store, class_ids)
    accelerator.wait_for_everyone()

    # 4. Results
    if accelerator.is_main_process:
        images = store.read()
        if args.num_images is not None:
            # ADM's protocol, and everything that reads its files, has three channels.
            write_npz(result, np.broadcast_to(images, (*images.shape[:-1], max(3, channels))), class_ids)
        if args.num_images is None or args.save_images:
            paths = write_pngs(output_dir / "images", images, class_ids)
        write_json(output_dir / "samples.json", settings)
        if args.num_images is None:
            captions = [id2label.get(class_id, str(class_id)).split(",")[0] for class_id in class_ids.tolist()]
            grid = make_labeled_grid([Image.open(path) for path in paths], args.num_images_per_class, captions)
            temporary = result.with_name(f".{result.name}.tmp")
            grid.save(temporary, format="png")
            os.replace(temporary, result)
        shutil.rmtree(store_dir)
        where = result if args.num_images is not None else output_dir
        print(f"{len(class_ids)} images in {where}, drawn by {accelerator.num_processes} process(es)")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
