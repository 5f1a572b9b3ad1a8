#!/usr/bin/env python
# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws figures about a saved LSEP pipeline.

    python examples/figures.py guidance-sweep --pretrained_model_name_or_path lsep-digits \\
        --reference examples/digits --features pixels --num_images 500 --output_dir figures
    python examples/figures.py denoising-strip --pretrained_model_name_or_path lsep-digits \\
        --class_labels 3 7 --output_dir figures

`guidance-sweep` measures the same images (labels and noise) at several scales and intervals of the guidance: Frechet
distance, precision and recall, as a figure and as JSON. What it has drawn is kept as features in `--cache_dir`, so a
sweep that was interrupted, or gets more scales, does not draw it again. With several processes: accelerate launch.

`denoising-strip` shows how images come out of noise, step by step: what the sampler holds, and what the model sees.
"""

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_lsep.evaluation.dinov2 import DINOv2Features
from diffusers_lsep.evaluation.features import PixelFeatures, extract_features, process_state
from diffusers_lsep.evaluation.images import EncodedImages, NpzImages, open_images
from diffusers_lsep.evaluation.inception import InceptionFeatures
from diffusers_lsep.evaluation.metrics import feature_statistics, frechet_distance, precision_recall
from diffusers_lsep.evaluation.protocol import NEIGHBORHOOD, PROTOCOL_DINOV2
from diffusers_lsep.figures import plot_denoising_strip, plot_guidance_sweep, require_matplotlib
from diffusers_lsep.files import write_text
from diffusers_lsep.interpolants import get_interpolant
from diffusers_lsep.labels import describe_classes, find_class_ids
from diffusers_lsep.sampling import DTYPES, LABEL_SAMPLINGS, SAMPLERS, DrawnSamples, choose_class_ids, load_pipeline


logger = logging.getLogger(__name__)

# The features that distances are of, and what the extractors call them.
FEATURES = {"inception": "pool", "dinov2": "class_token", "pixels": "pixels"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="FIGURE", required=True)
    sweep = commands.add_parser("guidance-sweep", help="distance, precision and recall against the guidance")
    strip = commands.add_parser("denoising-strip", help="images on their way out of noise")
    for command in (sweep, strip):
        command.add_argument(
            "--pretrained_model_name_or_path", required=True, help="Folder or Hub id of a saved LSEP pipeline."
        )
        command.add_argument("--revision", help="Revision of the pipeline on the Hub.")
        command.add_argument("--variant", help="Variant of the weight files, such as fp16.")
        command.add_argument(
            "--dtype", choices=DTYPES, default="float32", help="Of the transformer. Default: float32."
        )
        command.add_argument(
            "--scheduler", choices=SAMPLERS, help="Sampler in place of the one that the pipeline was saved with."
        )
        command.add_argument("--num_inference_steps", type=int, default=250, help="Default: 250.")
        command.add_argument("--output_dir", required=True, help="Where the figure goes.")
        command.add_argument("--overwrite_output_dir", action="store_true", help="Replace the figure that is there.")

    sweep.add_argument(
        "--guidance_scales",
        type=float,
        nargs="+",
        metavar="SCALE",
        default=[1.0, 1.25, 1.5, 2.0, 3.0],
        help="Default: 1 1.25 1.5 2 3. At 1 there is no guidance.",
    )
    sweep.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        action="append",
        metavar=("LOW", "HIGH"),
        help="Times t at which guidance acts; may be given several times, each is a line. Default: 0 1 and 0 0.7.",
    )
    sweep.add_argument(
        "--reference",
        required=True,
        metavar="REF",
        help="What the images are compared with, as for `diffusers-lsep evaluate`: an .npz, a folder of images or a"
        " data set. Images are cut to the size that the pipeline draws.",
    )
    sweep.add_argument("--reference_split", metavar="SPLIT", help="Split of REF, if a data set. Default: train.")
    sweep.add_argument("--image_column", default="image", help="Column of images in a data set. Default: image.")
    sweep.add_argument(
        "--features",
        choices=FEATURES,
        default="inception",
        help="What distances are taken of: the network of FID, DINOv2, or for tiny images the pixels themselves."
        " Default: inception.",
    )
    sweep.add_argument("--inception_weights", metavar="FILE", help="Default: torch-fidelity's file, downloaded once.")
    sweep.add_argument(
        "--dinov2_model", default=PROTOCOL_DINOV2, metavar="ID_OR_DIR", help=f"Default: {PROTOCOL_DINOV2}."
    )
    sweep.add_argument("--num_images", type=int, default=5000, help="Images at each setting. Default: 5000.")
    sweep.add_argument(
        "--label_sampling", choices=LABEL_SAMPLINGS, default="random", help="As for sample.py. Default: random."
    )
    sweep.add_argument("--seed", type=int, default=0, help="Default: 0.")
    sweep.add_argument("--batch_size", type=int, default=32, help="Images at a time in one process. Default: 32.")
    sweep.add_argument("--cache_dir", help="Where features are kept. Default: as for `diffusers-lsep evaluate`.")

    strip.add_argument(
        "--class_labels", nargs="+", required=True, metavar="CLASS", help="Class names or ids, of an image each."
    )
    strip.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="Seeds; every class is drawn with each of them. Default: 0."
    )
    strip.add_argument("--guidance_scale", type=float, default=1.0, help="Default: 1.0, no guidance.")
    strip.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help="Times t at which guidance acts. Default: 0 1.",
    )
    strip.add_argument("--num_columns", type=int, default=9, help="Times to show, evenly among the steps. Default: 9.")

    args = parser.parse_args(argv)
    command = sweep if args.command == "guidance-sweep" else strip
    if args.command == "guidance-sweep":
        args.guidance_interval = args.guidance_interval or [[0.0, 1.0], [0.0, 0.7]]
        if not all(map(math.isfinite, args.guidance_scales)):
            command.error(f"--guidance_scales have to be finite, but are {args.guidance_scales}")
        intervals, least = args.guidance_interval, {"num_images": NEIGHBORHOOD + 1, "batch_size": 1, "seed": 0}
    else:
        intervals, least = [args.guidance_interval], {"num_columns": 2}
        if min(args.seeds) < 0:
            command.error(f"--seeds have to be at least 0, but are {args.seeds}")
    for name, minimum in {"num_inference_steps": 1, **least}.items():
        if getattr(args, name) < minimum:
            command.error(f"--{name} has to be at least {minimum}, but is {getattr(args, name)}")
    for low, high in intervals:
        if not 0 <= low <= high <= 1:
            command.error(f"--guidance_interval has to be LOW HIGH with 0 <= LOW <= HIGH <= 1, but is {low} {high}")
    return args


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


def open_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    place = {name: getattr(args, name) for name in ("pretrained_model_name_or_path", "revision", "variant")}
    return load_pipeline(**place, device=process_state().device, dtype=DTYPES[args.dtype], scheduler=args.scheduler)


# --- guidance-sweep ---


def make_extractor(
    args: argparse.Namespace, pipe: DiffusionPipeline
) -> InceptionFeatures | DINOv2Features | PixelFeatures:
    state = process_state()
    if args.features == "pixels":
        is_grey = pipe.vae is None and pipe.transformer.config.in_channels == 1
        side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        return PixelFeatures((side, side), 1 if is_grey else 3)
    with state.main_process_first():  # it may have to download the weights
        if args.features == "dinov2":
            return DINOv2Features(args.dinov2_model, device=state.device)
        return InceptionFeatures(args.inception_weights, device=state.device)


def sweep_guidance(args: argparse.Namespace):
    names = ("guidance-sweep.json", "guidance-sweep.png")
    folder = prepare_output(args, *names)
    state = process_state()

    # 1. Everything that can be refused
    pipe = open_pipeline(args)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    resolution = side if not args.reference.endswith(".npz") else None
    reference = open_images(args.reference, "reference", resolution, args.reference_split, args.image_column)
    if reference.count <= NEIGHBORHOOD:
        raise ValueError(f"`--reference` has to hold {NEIGHBORHOOD + 1} images, but holds {reference.count}.")
    if reference.size != (side, side):
        height, width = reference.size
        raise ValueError(f"`--reference` holds images of {width} x {height}, but the pipeline draws {side} x {side}.")
    extractor, feature = make_extractor(args, pipe), FEATURES[args.features]
    reference_features = extract_features(reference, extractor, args.cache_dir)[feature]

    # 2. The images of every setting, and their distances
    if state.is_main_process:
        num_classes = pipe.transformer.config.num_classes
        class_ids = choose_class_ids(args.num_images, num_classes, args.label_sampling, args.seed)
        print(f"at every setting, {describe_classes(class_ids, pipe.config.id2label)}")
    results, samples = [], None
    for low, high in args.guidance_interval:
        for scale in args.guidance_scales:
            samples = DrawnSamples(
                pipe,
                f"guidance {scale:g} on [{low:g}, {high:g}]",
                args.num_images,
                args.num_inference_steps,
                scale,
                (low, high) if scale > 1 else (0.0, 1.0),  # the same images, whatever the interval
                args.label_sampling,
                args.seed,
                args.batch_size,
            )
            features = extract_features(samples, extractor, args.cache_dir)[feature]
            if state.is_main_process:
                values = measure(features, reference_features, reference, feature)
                results.append({"guidance_scale": scale, "guidance_interval": [low, high], **values})
                described = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
                print(f"{samples.name}: {described}")
    if not state.is_main_process:
        return

    # 3. Results
    notes = [*samples.notes, *reference.notes]
    if extractor.name == "pixels-grey":  # which looks at one channel
        notes = [note for note in notes if "grey" not in note]
    for name, images in (("samples", samples), ("reference", reference)):
        if images.count <= extractor.widths[feature] and feature not in images.statistics:
            notes.append(
                f"`{name}`: {images.count:,} images for {extractor.widths[feature]:,} features: the covariance is"
                " singular and the distance far too large"
            )
    for note in notes:
        logger.warning(note)
    varied = ("guidance_scale", "guidance_interval")
    settings = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        **{name: value for name, value in samples.settings.items() if name not in varied},
        "num_images": args.num_images,
        "dtype": args.dtype,
        "reference": reference.name,
        "reference_hash": reference.content_hash,
        "num_reference_images": reference.count,
        "features": extractor.name,
        "notes": notes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / names[0], json.dumps({**settings, "results": results}, indent=2) + "\n")
    model = Path(args.pretrained_model_name_or_path).name
    title = f"{model}: {args.num_images:,} images in {args.num_inference_steps} steps, features: {args.features}"
    plot_guidance_sweep(folder / names[1], results, title)
    print(f"written: {', '.join(str(folder / name) for name in names)}")


def measure(
    features: np.ndarray, reference_features: np.ndarray, reference: NpzImages | EncodedImages, feature: str
) -> dict[str, float]:
    moments = reference.statistics.get(feature) or feature_statistics(reference_features)
    precision, recall = precision_recall(features, reference_features, NEIGHBORHOOD, device=process_state().device)
    distance = frechet_distance(*feature_statistics(features), *moments)
    return {"frechet_distance": distance, "precision": precision, "recall": recall}


# --- denoising-strip ---


class Recorder:
    """Keeps what a pipeline shows to its `callback_on_step_end`, at steps that are evenly spaced."""

    def __init__(self, class_ids: list[int], args: argparse.Namespace):
        self.class_ids, self.args = class_ids, args
        last = args.num_inference_steps
        self.shown = set(np.linspace(0, last, min(args.num_columns, last + 1)).round().astype(int).tolist())
        self.steps_done = 0
        self.times, self.states, self.predictions = [], [], []

    def __call__(self, pipe: DiffusionPipeline, i: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict:
        # Heun's method passes here twice in a step, first with a point that it does not keep.
        if getattr(pipe.scheduler, "state_in_first_order", True):
            self.steps_done += 1
            if self.steps_done in self.shown:
                self.record(pipe, tensors["latents"], pipe.scheduler.sigmas[i + 1].item())
        return {}

    @torch.no_grad()
    def record(self, pipe: DiffusionPipeline, latents: torch.Tensor, t: float):
        """Keeps the state at a time as an image, and the data that the model predicts from it."""
        velocity = self.predict_velocity(pipe, latents, t)
        data = get_interpolant(pipe.config.path_type).predict_original_sample(velocity, latents, t)
        self.times.append(t)
        for kept, tensor in ((self.states, latents), (self.predictions, data)):
            kept.append(pipe.image_processor.postprocess(pipe.decode_latents(tensor), output_type="np"))

    def predict_velocity(self, pipe: DiffusionPipeline, latents: torch.Tensor, t: float) -> torch.Tensor:
        def predict(class_ids: list[int]) -> torch.Tensor:
            labels = torch.tensor(class_ids, device=latents.device)
            times = torch.full((len(labels),), t, dtype=torch.float32, device=latents.device)
            sample = latents.to(pipe.transformer.dtype)
            return pipe.transformer(sample, timestep=times, class_labels=labels, return_dict=False)[0].float()

        (low, high), scale = self.args.guidance_interval, self.args.guidance_scale
        velocity = predict(self.class_ids)
        if scale > 1 and low <= t <= high:
            null = predict([pipe.transformer.config.num_classes] * len(self.class_ids))
            velocity = null + scale * (velocity - null)
        return velocity


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

    recorder = Recorder(class_ids, args)
    generators = [torch.Generator().manual_seed(seed) for _, seed in rows]
    noise = pipe.prepare_latents(len(rows), pipe.device, generators, None)
    recorder.record(pipe, noise, 1.0)
    pipe(
        class_ids,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        guidance_interval=tuple(args.guidance_interval),
        generator=generators,
        latents=noise,
        output_type="latent",
        callback_on_step_end=recorder,
    )

    labels = [id2label.get(class_id, str(class_id)).split(",")[0] for class_id in class_ids]
    if len(args.seeds) > 1:
        labels = [f"{label}, seed {seed}" for label, (_, seed) in zip(labels, rows)]
    guidance = f", guidance {args.guidance_scale:g}" if args.guidance_scale > 1 else ""
    model = Path(args.pretrained_model_name_or_path).name
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_denoising_strip(
        path,
        np.stack(recorder.states),
        np.stack(recorder.predictions),
        recorder.times,
        labels,
        f"{model}: {args.num_inference_steps} steps{guidance}",
    )
    print(f"written: {path}")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        require_matplotlib(args.command)
        if args.command == "guidance-sweep":
            sweep_guidance(args)
        else:
            draw_strip(args)
    except ImportError as error:
        sys.exit(f"figures.py: error: {error}")


if __name__ == "__main__":
    main()
