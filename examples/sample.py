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
from datetime import timedelta
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from PIL import Image

import diffusers_lsep
from diffusers_lsep import LSEPPipeline
from diffusers_lsep.autoencoders import get_image_channels
from diffusers_lsep.command_line import ArgumentParser, check_writable, number, run_script
from diffusers_lsep.figures import make_labeled_grid
from diffusers_lsep.files import write_text
from diffusers_lsep.image_store import ImageStore, list_differences, read_npz, write_npz, write_png, write_pngs
from diffusers_lsep.labels import describe_classes, find_class_ids
from diffusers_lsep.progress import make_progress_bar, shows_bars
from diffusers_lsep.sampling import (
    DTYPES,
    LABEL_SAMPLINGS,
    add_autoguidance_argument,
    add_guidance_arguments,
    add_pipeline_arguments,
    choose_class_ids,
    describe_models,
    describe_scheduler,
    draw_batch,
    load_guidance_transformer,
    load_pipeline,
)


# Where the model is from. It may be somewhere else when a run goes on: its weights may not be others.
PLACES = ("pretrained_model_name_or_path", "revision", "variant")
# What samples.json says of them.
CLASSES = {name: f"{name} over all classes" for name in LABEL_SAMPLINGS} | {"none": "no class"}
# How an image is drawn, for the call of the pipeline.
CALL = (
    *("num_inference_steps", "guidance_scale", "guidance_interval", "internal_guidance_scale"),
    "autoguidance_scale",
)
# What makes an image, beside the model: a run is only continued if all of it is the same.
IMAGE_SETTINGS = ("scheduler", *CALL, "seed", "batch_size", "dtype", "compile")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_pipeline_arguments(parser)
    parser.add_argument("--output_dir", required=True, help="Folder that the images go to.")
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Discard the images that are there, and those of an unfinished run.",
    )
    group = parser.add_argument_group("what to draw")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--class_labels", nargs="+", metavar="CLASS", help="Class names or ids, to be written as PNGs and a grid."
    )
    what.add_argument(
        "--num_images", type=number(int, 1), help="How many images to write into one samples.npz, for evaluation."
    )
    group.add_argument(
        "--num_images_per_class", type=number(int, 1), default=4, help="With --class_labels: images of each class."
    )
    group.add_argument(
        "--label_sampling",
        choices=LABEL_SAMPLINGS,
        default="random",
        help="With --num_images: classes drawn at random (the papers' protocol), all equally often (lower FID, and to"
        " be reported as such), or none, for images without a class.",
    )
    group.add_argument("--save_images", action="store_true", help="With --num_images: write PNGs as well.")
    add_guidance_arguments(parser)
    parser.add_argument(
        "--internal_guidance_scale",
        type=float,
        default=1.0,
        help="Scale of Internal Guidance, for models that were trained for it; 1 is without.",
    )
    add_autoguidance_argument(parser)
    parser.add_argument(
        "--autoguidance_scale",
        type=float,
        default=1.0,
        help="Scale of autoguidance, away from that model's prediction for the same class; 1 is without.",
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="Of the classes and the noise.")
    parser.add_argument("--batch_size", type=number(int, 1), default=32, help="Images at a time in one process.")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="Compile the transformer's blocks: faster once that is done; last bits may differ.",
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.num_images is None:
        parser.refuse_without("--num_images", args, ("label_sampling", "save_images"))
    else:
        parser.refuse_without("--class_labels", args, "num_images_per_class")
    return args


def draw(args: argparse.Namespace, accelerator: Accelerator, pipe: LSEPPipeline, store: ImageStore, class_ids):
    """Draws the batches of this process."""
    pending = store.pending()
    done = min(len(class_ids), (store.num_batches - len(pending)) * args.batch_size)
    progress = make_progress_bar(
        total=len(class_ids), initial=done, unit="image", disable=not accelerator.is_main_process
    )
    # The others read what is pending too, before anybody changes it.
    accelerator.wait_for_everyone()
    call = {name: getattr(args, name) for name in CALL}
    shows_steps = accelerator.is_main_process and shows_bars()
    pipe.set_progress_bar_config(disable=not shows_steps, desc="Steps", leave=False)
    for batch in pending[accelerator.process_index :: accelerator.num_processes]:
        images = draw_batch(pipe, class_ids, batch, args.batch_size, args.seed, **call)
        store.write(batch, images)
        progress.update(min(len(images) * accelerator.num_processes, progress.total - progress.n))
    progress.close()
    accelerator.wait_for_everyone()


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    # Others wait while one writes what may be 40 GB, for which ten minutes can be too few.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    output_dir = Path(args.output_dir)
    check_writable("--output_dir", output_dir)
    result = output_dir / ("samples.npz" if args.num_images is not None else "grid.png")
    settings_file = output_dir / "samples.json"

    # 1. Pipeline and classes
    place = {name: getattr(args, name) for name in PLACES}
    pipe = load_pipeline(**place, device=accelerator.device, dtype=DTYPES[args.dtype], scheduler=args.scheduler)
    if args.guidance_transformer is not None:
        load_guidance_transformer(pipe, args.guidance_transformer)
    pipe.check_inputs(batch_size=1, **{name: getattr(args, name) for name in CALL})
    if args.compile:
        # Fixed sizes: a batch, and twice as much under guidance.
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    num_classes, id2label = pipe.transformer.config.num_classes, pipe.config.id2label or {}
    if args.num_images is not None:
        class_ids = choose_class_ids(args.num_images, num_classes, args.label_sampling, args.seed)
    else:
        class_ids = find_class_ids(args.class_labels, id2label, num_classes, "--class_labels")
        class_ids = np.repeat(class_ids, args.num_images_per_class)
        args.batch_size = min(args.batch_size, len(class_ids))  # smaller batches are filled up

    # 2. Settings, which are stored beside the images
    place["guidance_transformer"] = args.guidance_transformer if args.autoguidance_scale > 1 else None
    settings = place | {name: getattr(args, name) for name in IMAGE_SETTINGS}
    settings["num_images"] = len(class_ids)
    settings["class_labels"] = args.class_labels or CLASSES[args.label_sampling]
    settings |= describe_scheduler(pipe.scheduler)
    settings["class_ids"] = class_ids.tolist()
    settings["quantization"] = "floor(255 * (x + 1) / 2)"
    settings["diffusers_lsep_version"] = diffusers_lsep.__version__

    # 3. Images
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    channels = get_image_channels(pipe.vae) if pipe.vae is not None else pipe.transformer.config.in_channels
    store = ImageStore(output_dir / ".unfinished", len(class_ids), (side, side, channels), args.batch_size)
    models = describe_models(pipe, args.autoguidance_scale > 1)
    settings |= models
    if result.exists() and not store.is_begun and not args.overwrite_output_dir:
        differing = list_differences(settings_file, settings, may_differ=tuple(place))
        if differing:
            raise ValueError(
                f"`--output_dir` {args.output_dir} already has {result.name}, with other settings:"
                f" {', '.join(differing)}. Choose another folder, or give `--overwrite_output_dir`."
            )
        share = (accelerator.process_index, accelerator.num_processes)
        if args.num_images is not None and args.save_images:  # which may not have been asked for before
            write_pngs(output_dir / "images", read_npz(result)[..., :channels], class_ids, *share)
        if accelerator.is_main_process:
            store.delete()  # of a run that was killed as it ended
            print(f"{len(class_ids)} images with these settings are in {result} already.")
        accelerator.wait_for_everyone()
        return
    other = output_dir / ("grid.png" if args.num_images is not None else "samples.npz")
    if other.exists() and not args.overwrite_output_dir:  # samples.json is about one of the two
        raise ValueError(
            f"`--output_dir` {args.output_dir} already has {other.name}, of another run. Choose another folder, or"
            " give `--overwrite_output_dir`."
        )
    accelerator.wait_for_everyone()  # everybody has seen the same folder before somebody writes to it
    if accelerator.is_main_process:
        if args.overwrite_output_dir:
            store.delete()
            # There may have been more images.
            for path in (result, other, settings_file, *(output_dir / "images").glob("*-class-*.png")):
                path.unlink(missing_ok=True)
        store.create(settings, may_differ=tuple(place))
        print(describe_classes(class_ids, {**id2label, num_classes: "no class"}))
    accelerator.wait_for_everyone()
    draw(args, accelerator, pipe, store, class_ids)

    # 4. Results. The processes share the PNGs, which take longest: minutes for 50,000 of them
    if args.num_images is None or args.save_images:
        share = (accelerator.process_index, accelerator.num_processes)
        paths = write_pngs(output_dir / "images", store.read(), class_ids, *share)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if args.num_images is not None:
            write_npz(result, store.read(), class_ids)
        write_text(settings_file, json.dumps(settings, indent=2) + "\n")
        if args.num_images is None:
            captions = [id2label.get(class_id, str(class_id)).split(",")[0] for class_id in class_ids.tolist()]
            grid = make_labeled_grid([Image.open(path) for path in paths], args.num_images_per_class, captions)
            write_png(result, grid)
        store.delete()
        where = result if args.num_images is not None else output_dir
        print(f"{len(class_ids)} images in {where}, drawn by {accelerator.num_processes} process(es)")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_script(main)
