#!/usr/bin/env python
# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws figures about a saved LSEP pipeline.

    python examples/figures.py guidance-sweep --pretrained_model_name_or_path lsep-digits \\
        --reference examples/digits --features pixels --num_images 500 --output_dir figures
    python examples/figures.py cache-sweep --pretrained_model_name_or_path lsep-digits \\
        --reference examples/digits --features pixels --num_images 500 --output_dir figures
    python examples/figures.py denoising-strip --pretrained_model_name_or_path lsep-digits \\
        --class_labels 3 7 --output_dir figures

`guidance-sweep` measures the same images (labels and noise) at several scales and intervals of the guidance: Frechet
distance, precision and recall, as a figure and as JSON. What it has drawn is kept as features in `--cache_dir`, so a
sweep that was interrupted, or gets more scales, does not draw it again. With several processes: accelerate launch.
With `--guidance_transformer` the same scales of autoguidance are measured too.

`cache-sweep` measures what diffusers' caches leave out and what that does to the same images: their distance to those
without a cache, and the Frechet distance, at several settings and intervals of the guidance.

`denoising-strip` shows how images come out of noise, step by step: what the sampler holds, and what the model sees.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch

from diffusers_lsep import LSEPPipeline
from diffusers_lsep.command_line import ArgumentParser, number, run_script
from diffusers_lsep.evaluation.caching import CACHE_SETTINGS, describe_result, find_largest_saving, sweep_caches
from diffusers_lsep.evaluation.features import default_cache_dir, process_state
from diffusers_lsep.evaluation.guidance import SWEEP_FEATURES, check_reference, make_extractor, sweep_guidance
from diffusers_lsep.evaluation.images import open_images
from diffusers_lsep.evaluation.protocol import NEIGHBORHOOD, PROTOCOL_DINOV2
from diffusers_lsep.figures import (
    DenoisingRecorder,
    plot_cache_sweep,
    plot_denoising_strip,
    plot_guidance_sweep,
    require_matplotlib,
)
from diffusers_lsep.files import write_text
from diffusers_lsep.labels import describe_classes, find_class_ids
from diffusers_lsep.sampling import (
    DTYPES,
    LABEL_SAMPLINGS,
    add_autoguidance_argument,
    add_guidance_arguments,
    add_pipeline_arguments,
    choose_class_ids,
    describe_scheduler,
    load_guidance_transformer,
    load_pipeline,
)


logger = logging.getLogger(__name__)

INTERVALS = [[0.0, 1.0], [0.0, 0.7]]  # of a sweep, if none is given
THRESHOLD_CACHES = ("FirstBlockCache", "MagCache", "SeaCache")
INTERVAL_CACHES = tuple(name for name in CACHE_SETTINGS if name not in THRESHOLD_CACHES)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="FIGURE", required=True)
    sweep = commands.add_parser("guidance-sweep", help="distance, precision and recall against the guidance")
    caches = commands.add_parser("cache-sweep", help="what caches leave out, and what that does to the images")
    strip = commands.add_parser("denoising-strip", help="images on their way out of noise")
    for command in (sweep, caches, strip):
        add_pipeline_arguments(command)
        command.add_argument("--output_dir", required=True, help="Folder that the figure goes to.")
        command.add_argument("--overwrite_output_dir", action="store_true", help="Replace the figure that is there.")

    sweep.add_argument(
        "--guidance_scales",
        type=number(float, 0, 1000),
        nargs="+",
        metavar="SCALE",
        default=[1.0, 1.25, 1.5, 2.0, 3.0],
        help="Scales of classifier-free guidance to measure; 1 is without.",
    )
    add_autoguidance_argument(sweep)
    caches.add_argument(
        "--cache",
        nargs="+",
        action="append",
        metavar=("NAME", "SETTING"),
        help=f"A cache and the settings to measure it at: the threshold of {', '.join(THRESHOLD_CACHES)}, or after how"
        f" many steps {', '.join(INTERVAL_CACHES)} compute anew. May be given several times; all caches if not given.",
    )
    caches.add_argument(
        "--guidance_scale", type=number(float, 0, 1000), default=1.5, help="Scale of the guidance; 1 is without."
    )
    caches.add_argument(
        "--max_distance",
        type=number(float, 0, 1),
        default=0.02,
        help="Print the largest saving whose images are as near as this to the uncached ones: root mean square of the"
        " difference of pixels in [0, 1].",
    )
    for command in (sweep, caches):
        add_measuring_arguments(command)

    strip.add_argument(
        "--class_labels", nargs="+", required=True, metavar="CLASS", help="Class names or ids, of an image each."
    )
    strip.add_argument(
        "--seeds",
        type=number(int, 0),
        nargs="+",
        metavar="SEED",
        default=[0],
        help="Seeds of the noise; every class is drawn with each of them.",
    )
    add_guidance_arguments(strip)
    strip.add_argument(
        "--num_columns", type=number(int, 2), default=9, help="How many times to show, evenly among the steps."
    )
    return parser


def add_measuring_arguments(command: argparse.ArgumentParser):
    """What images are drawn, and what they are compared with."""
    command.add_argument(
        "--guidance_interval",
        type=number(float, 0, 1),
        nargs=2,
        action="append",
        metavar=("LOW", "HIGH"),
        help="Times t at which guidance acts, 0 is data and 1 is noise; may be given several times, each is a line."
        f" {' and '.join(f'{low:g} {high:g}' for low, high in INTERVALS)} if not given.",
    )
    command.add_argument(
        "--reference",
        required=True,
        metavar="REF",
        help="What the images are compared with, as for `diffusers-lsep evaluate`: an .npz, a folder of images or a"
        " data set. Images are cut to the size that the pipeline draws.",
    )
    command.add_argument("--reference_split", metavar="SPLIT", help="Split of REF, if a data set; train if not given.")
    command.add_argument("--image_column", default="image", help="Column of images in a data set.")
    command.add_argument(
        "--features",
        choices=SWEEP_FEATURES,
        default="inception",
        help="What distances are taken of: the network of FID, DINOv2, or for tiny images the pixels themselves.",
    )
    command.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="Weights of Inception as torch-fidelity publishes them; without it that file is downloaded once.",
    )
    command.add_argument(
        "--dinov2_model", default=PROTOCOL_DINOV2, metavar="ID_OR_DIR", help="Model for the features dinov2."
    )
    command.add_argument(
        "--num_images", type=number(int, NEIGHBORHOOD + 1), default=5000, help="Images at each setting."
    )
    command.add_argument(
        "--label_sampling",
        choices=LABEL_SAMPLINGS,
        default="random",
        help="Classes drawn at random (the papers' protocol) or all equally often.",
    )
    command.add_argument("--seed", type=number(int, 0), default=0, help="Of the classes and the noise.")
    command.add_argument("--batch_size", type=number(int, 1), default=32, help="Images at a time in one process.")
    command.add_argument("--cache_dir", default=str(default_cache_dir()), help="Where features are kept.")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "cache-sweep":
        args.caches = dict(CACHE_SETTINGS) if args.cache is None else {}
        for name, *settings in args.cache or ():
            args.caches[name] = parse_settings(parser, name, settings)
    if args.command in ("guidance-sweep", "cache-sweep"):
        args.guidance_interval = args.guidance_interval or INTERVALS
        for low, high in args.guidance_interval:
            if low > high:
                parser.error(f"--guidance_interval has to be LOW HIGH with 0 <= LOW <= HIGH <= 1, but is {low} {high}")
    return args


def parse_settings(parser: ArgumentParser, name: str, settings: list[str]) -> list[float]:
    if name not in CACHE_SETTINGS:
        parser.error(f"argument --cache: NAME has to be one of {', '.join(CACHE_SETTINGS)}, but is {name}")
    if not settings:
        parser.error(f"argument --cache: {name} has to be followed by a SETTING or several, but is not")
    parse = number(float, 0) if name in THRESHOLD_CACHES else number(int, 1)
    try:
        return [parse(setting) for setting in settings]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --cache: SETTING of {name} {error}")
    except ValueError:
        kind = "a number" if name in THRESHOLD_CACHES else "a whole number"
        parser.error(f"argument --cache: SETTING of {name} has to be {kind}, but is {' '.join(settings)}")


def prepare_output(args: argparse.Namespace, *names: str) -> Path:
    """Refuses to replace a figure unasked."""
    folder = Path(args.output_dir)
    existing = [name for name in names if (folder / name).exists()]
    if existing and not args.overwrite_output_dir:
        raise ValueError(
            f"`--output_dir` {args.output_dir} already has {' and '.join(existing)}. Choose another folder, or give"
            " `--overwrite_output_dir`."
        )
    return folder


def open_pipeline(args: argparse.Namespace) -> LSEPPipeline:
    place = {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision", "variant")}
    return load_pipeline(**place, device=process_state().device, dtype=DTYPES[args.dtype], scheduler=args.scheduler)


def open_measuring(args: argparse.Namespace):
    """What the images are drawn with, what they are compared with, and what makes features of both."""
    pipe = open_pipeline(args)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    resolution = side if not args.reference.endswith(".npz") else None
    reference = open_images(args.reference, "reference", resolution, args.reference_split, args.image_column)
    check_reference(pipe, reference)
    extractor = make_extractor(args.features, pipe, args.inception_weights, args.dinov2_model)
    if process_state().is_main_process:
        num_classes = pipe.transformer.config.num_classes
        class_ids = choose_class_ids(args.num_images, num_classes, args.label_sampling, args.seed)
        print(f"at every setting, {describe_classes(class_ids, pipe.config.id2label)}")
    return pipe, reference, extractor


def draw_sweep(args: argparse.Namespace):
    names = ("guidance-sweep.json", "guidance-sweep.png")
    folder, is_main = prepare_output(args, *names), process_state().is_main_process

    # 1. What the images are drawn with and compared with
    pipe, reference, extractor = open_measuring(args)
    if args.guidance_transformer is not None:
        load_guidance_transformer(pipe, args.guidance_transformer)

    # 2. The images of every setting, and their distances
    sampling = ("num_images", "num_inference_steps", "label_sampling", "seed", "batch_size")
    results, settings = sweep_guidance(
        pipe,
        reference,
        extractor,
        args.guidance_scales,
        args.guidance_interval,
        args.cache_dir,
        autoguidance=pipe.guidance_transformer is not None,
        **{name: getattr(args, name) for name in sampling},
    )
    if not is_main:
        return

    # 3. Results
    for note in settings["notes"]:
        logger.warning(note)
    model = args.pretrained_model_name_or_path
    settings = {"pretrained_model_name_or_path": model, "dtype": args.dtype, **settings, "results": results}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / names[0], json.dumps(settings, indent=2) + "\n")
    title = f"{Path(model).name}: {args.num_images:,} images in {args.num_inference_steps} steps"
    plot_guidance_sweep(folder / names[1], results, f"{title}, features: {args.features}")
    print(f"written: {', '.join(str(folder / name) for name in names)}")


def draw_cache_sweep(args: argparse.Namespace):
    names = ("cache-sweep.json", "cache-sweep.png")
    folder = prepare_output(args, *names)
    if process_state().num_processes > 1:
        raise ValueError(f"`cache-sweep` has to run in one process, but there are {process_state().num_processes}.")

    # 1. What the images are drawn with and compared with
    pipe, reference, extractor = open_measuring(args)

    # 2. The images of every setting, and their distances
    sampling = {name: getattr(args, name) for name in ("num_images", "num_inference_steps", "label_sampling", "seed")}
    sampling |= {"batch_size": args.batch_size, "guidance_scale": args.guidance_scale}
    results = sweep_caches(
        pipe,
        reference,
        extractor,
        args.caches,
        guidance_intervals=args.guidance_interval,
        cache_dir=args.cache_dir,
        **sampling,
    )

    # 3. Results
    for interval in args.guidance_interval:
        inside = [result for result in results if result["guidance_interval"] == list(interval)]
        best = find_largest_saving(inside, args.max_distance)
        what = describe_result(best) if best is not None else "none"
        print(f"largest saving with a distance of at most {args.max_distance:g}: {what}")
    model = args.pretrained_model_name_or_path
    settings = {"pretrained_model_name_or_path": model, "dtype": args.dtype, "features": extractor.name, **sampling}
    settings |= {**describe_scheduler(pipe.scheduler), "reference": reference.name, "results": results}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / names[0], json.dumps(settings, indent=2) + "\n")
    title = f"{Path(model).name}: {args.num_images:,} images in {args.num_inference_steps} steps"
    title += f", guidance {args.guidance_scale:g}, features: {args.features}"
    plot_cache_sweep(folder / names[1], results, title)
    print(f"written: {', '.join(str(folder / name) for name in names)}")


def draw_strip(args: argparse.Namespace):
    path = prepare_output(args, "denoising-strip.png") / "denoising-strip.png"
    if process_state().num_processes > 1:
        raise ValueError(
            f"`denoising-strip` has to run in one process, but there are {process_state().num_processes}."
        )
    pipe = open_pipeline(args)
    id2label = pipe.config.id2label or {}
    classes = find_class_ids(args.class_labels, id2label, pipe.transformer.config.num_classes, "--class_labels")
    rows = [(class_id, seed) for class_id in classes for seed in args.seeds]
    class_ids = [class_id for class_id, _ in rows]
    print(describe_classes(class_ids, id2label))

    call = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "guidance_interval")}
    generators = [torch.Generator().manual_seed(seed) for _, seed in rows]
    noise = pipe.prepare_latents(len(rows), pipe.device, generators, None)
    recorder = DenoisingRecorder(noise, args.num_inference_steps, args.num_columns)
    pipe(
        class_ids,
        **call,
        generator=generators,
        latents=noise,
        output_type="latent",
        callback_on_step_end=recorder,
        callback_on_step_end_tensor_inputs=recorder.tensor_inputs,
    )

    labels = [id2label.get(class_id, str(class_id)).split(",")[0] for class_id in class_ids]
    if len(args.seeds) > 1:
        labels = [f"{label}, seed {seed}" for label, (_, seed) in zip(labels, rows)]
    guidance = f", guidance {args.guidance_scale:g}" if args.guidance_scale > 1 else ""
    title = f"{Path(args.pretrained_model_name_or_path).name}: {args.num_inference_steps} steps{guidance}"
    path.parent.mkdir(parents=True, exist_ok=True)
    states, predictions = np.stack(recorder.states), np.stack(recorder.predictions)
    plot_denoising_strip(path, states, predictions, recorder.times, labels, title)
    print(f"written: {path}")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    require_matplotlib(args.command)
    {"guidance-sweep": draw_sweep, "cache-sweep": draw_cache_sweep, "denoising-strip": draw_strip}[args.command](args)


if __name__ == "__main__":
    run_script(main)
