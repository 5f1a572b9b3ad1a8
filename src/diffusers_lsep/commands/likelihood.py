# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep likelihood`: how likely a model finds images, and what class it takes them for."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..command_line import check_writable, number
from ..data.sources import SourceSubset
from ..evaluation.features import process_state
from ..evaluation.labelled_data import VALIDATION_SPLITS, open_validation_data
from ..evaluation.likelihood import TRACES, measure_likelihood
from ..files import write_text
from ..labels import UNLABELED, find_class_ids
from ..sampling import float32_products, open_pipeline


RESULTS_FILE = "likelihood_results.json"


def add_arguments(parser: argparse.ArgumentParser):
    """Adds the arguments of `diffusers-lsep likelihood`."""
    parser.description = (
        "Log likelihood of labelled images under a model, by the ODE that its samples follow: bits per dimension of "
        "pixels with 256 levels; for a model with a VAE nats per dimension of its latents. With --classify also what "
        "class the model takes each image for."
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="Folder or Hub id of a saved LSEP pipeline.")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="Labelled images, which the model should not have been trained on: a folder with one subfolder per class,"
        " a folder of Parquet files, or the id of a data set; or latents, as for `diffusers-lsep probe`.",
    )
    parser.add_argument(
        "--split",
        help=f"Split of DATA; if not given one of {', '.join(VALIDATION_SPLITS)}, or the only one that there is.",
    )
    parser.add_argument("--image_column", default="image", help="Column of images in a data set.")
    parser.add_argument("--label_column", default="label", help="Column of labels in a data set.")
    parser.add_argument("--num_images", type=number(int, 1), help="So many images, drawn at random; all if not given.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--unconditional", action="store_true", help="Do not tell the model the classes, which it is told otherwise."
    )
    what.add_argument(
        "--classify",
        action="store_true",
        help="Ask for the likelihood under every class in turn, with the same noise, and so for the class: as many"
        " times the work as there are classes.",
    )
    parser.add_argument(
        "--trace",
        choices=TRACES,
        default="hutchinson",
        help="How the divergence is computed: by Hutchinson's estimate, which has no bias, or exactly, with a backward"
        " pass for each dimension.",
    )
    parser.add_argument(
        "--num_directions", type=number(int, 1), default=1, help="Random directions that the estimate averages."
    )
    parser.add_argument(
        "--num_steps", type=number(int, 2), default=50, help="Steps of the solver, each with four evaluations."
    )
    parser.add_argument("--batch_size", type=number(int, 1), default=64, help="Images at a time.")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="Of the noise and of the images that are drawn."
    )
    parser.add_argument("--output_dir", required=True, help=f"Folder that {RESULTS_FILE} goes to.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the results that are there.")


def run(args: argparse.Namespace):
    """Does the work of `diffusers-lsep likelihood`."""
    # 1. What can be refused at once
    if args.trace == "exact":
        args.parser.refuse_without("--trace hutchinson", args, "num_directions")
    path = Path(args.output_dir) / RESULTS_FILE
    check_writable("--output_dir", args.output_dir)
    if path.exists() and not args.overwrite_output_dir:
        raise ValueError(f"`--output_dir` already holds {path}; `--overwrite_output_dir` replaces it.")
    state = process_state()
    if state.num_processes > 1:
        raise ValueError(
            f"`diffusers-lsep likelihood` has to run in one process, but there are {state.num_processes}."
        )

    # 2. Model and data
    pipe = open_pipeline(args.pipeline, "PIPELINE").to(state.device)
    pipe.transformer.requires_grad_(False)
    flags = ("--data", args.data, "--split", args.split)
    num_classes, id2label = pipe.transformer.config.num_classes, pipe.config.id2label
    is_unconditional = args.unconditional or id2label == dict(enumerate(UNLABELED))
    if is_unconditional and args.classify:
        raise ValueError(f"`--classify` needs a model with classes, but `PIPELINE` {args.pipeline!r} has none.")
    columns = (args.image_column, None if is_unconditional else args.label_column)
    source, names, split = open_validation_data(*flags, args.pipeline, pipe, *columns)
    if is_unconditional:
        class_ids = np.full(len(source.labels), num_classes)
    else:
        class_ids = np.array(find_class_ids(names, id2label, num_classes, "--data"))[source.labels]
    if args.num_images is not None and args.num_images < len(class_ids):
        rows = np.sort(np.random.default_rng(args.seed).permutation(len(class_ids))[: args.num_images])
        source, class_ids = SourceSubset(source, rows), class_ids[rows]

    # 3. The work
    with float32_products(allow_tf32=False):
        found = measure_likelihood(
            pipe,
            source,
            class_ids,
            not is_unconditional,
            args.classify,
            args.trace,
            args.num_directions,
            args.num_steps,
            args.batch_size,
            args.seed,
        )
    results: dict[str, Any] = {"pipeline": args.pipeline, "data": args.data, "split": split, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=2) + "\n")
    names_of_values = ["bits_per_dim"] if "bits_per_dim" in results else []
    for name in (*names_of_values, "nats_per_dim"):
        spread = results[f"{name}_standard_error"]
        spread = "" if spread is None else f" ± {spread:.4f}"
        print(f"{name.replace('_', ' ')}, given {results['given']}: {results[name]:.4f}{spread}")
    print(
        f"of {results['num_images']:,} images, in {results['space']}; the solver's error {results['solver_error']:.1g}"
    )
    if args.classify:
        of_classes = results["classifier"]
        print(
            f"taken for their class: {of_classes['accuracy']:.4f} (chance {of_classes['chance']:.4f}), cross entropy"
            f" {of_classes['cross_entropy']:.4f} nats"
        )
    print(f"written: {path}")
