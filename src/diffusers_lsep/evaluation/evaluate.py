# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""`diffusers-lsep evaluate`: the metrics of ADM's evaluator, KID and FD-DINOv2, without TensorFlow.

Any number of processes share the network's work: `accelerate launch -m diffusers_lsep.cli evaluate ...`.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpointing import write_text
from ..figures import require_matplotlib
from ..model_card import SavedPipeline, update_evaluation, without_folders
from ..sampling import DrawnSamples
from .checkpoints import milestone_samples, plot_metrics
from .dinov2 import DINOv2Features
from .features import default_cache_dir, extract_features, process_state
from .images import EncodedImages, NpzImages, open_images
from .inception import InceptionFeatures
from .metrics import feature_statistics, frechet_distance, inception_score, kernel_distance, precision_recall


logger = logging.getLogger(__name__)

ImageSet = NpzImages | EncodedImages | DrawnSamples

METRICS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
    "kid": "KID",
    "fd_dinov2": "FD-DINOv2",
}
DEFAULT_METRICS = tuple(name for name in METRICS if name != "fd_dinov2")
HIGHER_IS_BETTER = ("inception_score", "precision", "recall")
# The features that Frechet distances are of, and what can be had of any one kind of features.
FRECHET_FEATURES = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "class_token"}
FEATURE_METRICS = ("fid", "precision", "recall", "kid")

# ADM's protocol (arXiv 2105.05233): numbers in papers are for these.
PROTOCOL_IMAGES = 50_000
PROTOCOL_REFERENCE_IMAGES = 10_000
PROTOCOL_RESOLUTIONS = (256, 512)
PROTOCOL_DINOV2 = "facebook/dinov2-large"
INCEPTION_SCORE_SPLIT = 5000
KID_SUBSET_SIZE = 1000
NEIGHBORHOOD = 3

RESULTS_FILE = "eval_results.json"
CURVES_FILE = "eval_curves.png"


def evaluate_images(
    samples: ImageSet,
    reference: NpzImages | EncodedImages,
    metrics: Sequence[str] | None = None,
    inception_weights: str | os.PathLike | None = None,
    dinov2_model: str = PROTOCOL_DINOV2,
    batch_size: int = 64,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """
    Compares samples with a reference as ADM's evaluator does. Whatever makes a number hard to compare with published
    ones is logged as a warning and listed in the result.

    Statistics that an `.npz` brings (ADM's `VIRTUAL_*` files) are used for FID and sFID in place of its images'.

    Args:
        samples ([`NpzImages`], [`EncodedImages`] or [`DrawnSamples`]):
            The samples, by [`open_images`].
        reference ([`NpzImages`] or [`EncodedImages`]):
            The reference, of the same size.
        metrics (`Sequence[str]`, *optional*):
            Any of `fid`, `sfid`, `inception_score`, `precision`, `recall`, `kid`, `fd_dinov2`. If not given: all but
            `fd_dinov2`, without those that the images do not allow.
        inception_weights (`str` or `os.PathLike`, *optional*):
            File of Inception's weights; downloaded if not given.
        dinov2_model (`str`, defaults to `"facebook/dinov2-large"`):
            Id or folder of the model for `fd_dinov2`.
        batch_size (`int`, defaults to `64`):
            Images in one pass of a network.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where features are kept.

    Returns:
        `dict[str, Any]`: `metrics` (with `kid_std` beside `kid`; empty on other than the main process), and beside it
        what they are of: `samples`, `dataset` (the reference), numbers of images, hashes, networks, settings, `notes`.

    Raises:
        ValueError: before any work, if the two do not fit together or a metric cannot be had.
    """
    state = process_state()
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    asked, metrics = metrics, _check_metrics(samples, reference, metrics)
    notes = _comparability_notes(samples, reference, metrics, dinov2_model)
    missing = [METRICS[name] for name in DEFAULT_METRICS if asked is None and name not in metrics]
    if missing:
        notes.append(f"not measured, for want of images: {', '.join(missing)}")
    for note in notes if state.is_main_process else ():
        logger.warning(note)

    # 1. Features, by all processes
    sets = {"samples": samples, "reference": reference}
    features: dict[str, dict[str, np.ndarray]] = {"samples": {}, "reference": {}}
    networks = {}
    jobs = [name for name, images in sets.items() if _needs_inception(name, images, metrics)]
    if jobs:
        with state.main_process_first():  # it may have to download the weights
            inception = InceptionFeatures(inception_weights, device=state.device)
        networks["inception"] = inception.name
        if not inception.is_official:
            notes.append(
                f"the weights {inception.name} are not those of the Inception of 2015: no number compares with a "
                "published one"
            )
            if state.is_main_process:
                logger.warning(notes[-1])
        for name in jobs:
            features[name] |= extract_features(sets[name], inception, cache_dir, batch_size)
        del inception  # makes room on the device
    if "fd_dinov2" in metrics:
        with state.main_process_first():
            dinov2 = DINOv2Features(dinov2_model, device=state.device)
        networks["dinov2"] = dinov2.name
        for name in sets:
            features[name] |= extract_features(sets[name], dinov2, cache_dir, batch_size)
        del dinov2

    # 2. Metrics, by the main process
    values = {}
    if state.is_main_process:
        for name in metrics:
            if name in FRECHET_FEATURES:
                moments = [_moments(images, features[key], FRECHET_FEATURES[name]) for key, images in sets.items()]
                values[name] = frechet_distance(*moments[0], *moments[1])
            elif name == "inception_score":
                values[name] = inception_score(features["samples"]["logits"], INCEPTION_SCORE_SPLIT)
        rest = [name for name in metrics if name not in values]
        if rest:
            pools = [features[name]["pool"] for name in sets]
            values |= compute_feature_metrics(*pools, metrics=rest, device=state.device)
    return {
        "metrics": values,
        "samples": samples.name,
        "samples_hash": samples.content_hash,
        "num_images": samples.count,
        "image_size": list(samples.size),
        "sampling": samples.settings or None,
        "dataset": reference.name,
        "reference_hash": reference.content_hash,
        "num_reference_images": reference.count,
        "stored_reference_statistics": sorted(reference.statistics) or None,
        **networks,
        "batch_size": batch_size,
        "notes": notes,
    }


def compute_feature_metrics(
    samples: np.ndarray,
    reference: np.ndarray,
    metrics: Sequence[str] = FEATURE_METRICS,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """
    The metrics that can be had of features of any network, with ADM's settings.

    Args:
        samples (`np.ndarray`):
            Features `[N, D]` of the samples.
        reference (`np.ndarray`):
            Features `[M, D]` of the reference.
        metrics (`Sequence[str]`, defaults to `("fid", "precision", "recall", "kid")`):
            Some of these.
        device (`str` or `torch.device`, *optional*):
            Where distances are computed; the CPU if not given.

    Returns:
        `dict[str, float]`: the metrics, with `kid_std` beside `kid`.

    Raises:
        ValueError: for features that are not finite floats of equal width, or too few of them.
    """
    values = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(*feature_statistics(samples), *feature_statistics(reference))
    if "precision" in metrics or "recall" in metrics:
        both = precision_recall(samples, reference, NEIGHBORHOOD, device=device)
        values |= {name: value for name, value in zip(("precision", "recall"), both) if name in metrics}
    if "kid" in metrics:
        subset_size = min(KID_SUBSET_SIZE, len(samples), len(reference))
        values["kid"], values["kid_std"] = kernel_distance(samples, reference, subset_size=subset_size)
    return values


def _moments(images: ImageSet, features: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    return images.statistics[name] if name in images.statistics else feature_statistics(features[name])


def _needs_inception(argument: str, images: ImageSet, metrics: Sequence[str]) -> bool:
    """Whether images have to go through Inception, which gives all of its features at once."""
    return any(
        (argument == "samples" or name != "inception_score")
        and name != "fd_dinov2"
        and FRECHET_FEATURES.get(name) not in images.statistics
        for name in metrics
    )


def _check_metrics(
    samples: ImageSet, reference: NpzImages | EncodedImages, metrics: Sequence[str] | None
) -> list[str]:
    """The metrics to compute, in the order of `METRICS`; refuses what cannot be had."""
    unknown = sorted(set(metrics or ()) - set(METRICS))
    if unknown or (metrics is not None and not metrics):
        raise ValueError(f"`metrics` must be some of {list(METRICS)}, got {unknown or 'none'}.")
    if not samples.count:
        raise ValueError(f"`samples` {samples.name!r} holds statistics but no images.")
    if reference.size is not None and samples.size != reference.size:
        raise ValueError(
            f"`samples` and `reference` must be of one size, got {samples.size[0]} x {samples.size[1]} and "
            f"{reference.size[0]} x {reference.size[1]}. (`resolution` cuts the images of a reference.)"
        )
    available = []
    for name in METRICS if metrics is None else [name for name in METRICS if name in metrics]:
        needed = {"inception_score": 0, "precision": NEIGHBORHOOD + 1, "recall": NEIGHBORHOOD + 1}.get(name, 2)
        short = [
            argument
            for argument, images in (("samples", samples), ("reference", reference))
            if images.count < needed and FRECHET_FEATURES.get(name) not in images.statistics
        ]
        if short and metrics is not None:
            raise ValueError(
                f"`metrics` {name!r} cannot be had: it needs {needed} images, but `{short[0]}` holds "
                f"{samples.count if short[0] == 'samples' else reference.count}."
            )
        if not short and (metrics is not None or name in DEFAULT_METRICS):
            available.append(name)
    return available


def _comparability_notes(
    samples: ImageSet, reference: NpzImages | EncodedImages, metrics: Sequence[str], dinov2_model: str
) -> list[str]:
    """What makes the numbers hard to compare with those in papers."""
    notes = [*samples.notes, *reference.notes]
    if samples.count != PROTOCOL_IMAGES:
        notes.append(
            f"`samples` holds {samples.count:,} images, the protocol asks for {PROTOCOL_IMAGES:,}: FID and sFID fall "
            "and Inception Score rises with their number"
        )
    if samples.size[0] != samples.size[1] or samples.size[0] not in PROTOCOL_RESOLUTIONS:
        notes.append(
            f"images are {samples.size[0]} x {samples.size[1]}, published numbers for ImageNet are for "
            f"{' or '.join(f'{size} x {size}' for size in PROTOCOL_RESOLUTIONS)}"
        )
    for name in ("fid", "sfid"):
        if name not in metrics:
            continue
        if FRECHET_FEATURES[name] not in reference.statistics:
            notes.append(
                f"`reference` has no stored statistics for {METRICS[name]}: those of its {reference.count:,} images "
                "are used, where published numbers for ImageNet use the training set's in ADM's file"
            )
        width = InceptionFeatures.widths[FRECHET_FEATURES[name]]
        for argument, images in (("samples", samples), ("reference", reference)):
            if FRECHET_FEATURES[name] not in images.statistics and images.count <= width:
                notes.append(
                    f"`{argument}` holds {images.count:,} images for {METRICS[name]}'s {width:,} features: the "
                    "covariance is singular and the distance far too large"
                )
    if ("precision" in metrics or "recall" in metrics) and reference.count != PROTOCOL_REFERENCE_IMAGES:
        notes.append(
            f"`reference` holds {reference.count:,} images, precision and recall are published against "
            f"{PROTOCOL_REFERENCE_IMAGES:,}"
        )
    subset_size = min(KID_SUBSET_SIZE, samples.count, reference.count)
    if "kid" in metrics and subset_size < KID_SUBSET_SIZE:
        notes.append(f"KID is taken on subsets of {subset_size} images, published numbers on {KID_SUBSET_SIZE:,}")
    if "fd_dinov2" in metrics and dinov2_model != PROTOCOL_DINOV2:
        notes.append(f"FD-DINOv2 is published with {PROTOCOL_DINOV2}, not {dinov2_model}")
    return notes


# --- The command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `diffusers-lsep evaluate`."""
    parser.description = (
        "FID, sFID, Inception Score, precision and recall as ADM's evaluator computes them, KID and FD-DINOv2. "
        "SAMPLES and REF are each an .npz (ADM's VIRTUAL_* files included, whose statistics are used), a folder of "
        "images, or a data set. With several processes: accelerate launch -m diffusers_lsep.cli evaluate ..."
    )
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help="The samples; 50,000 in papers.")
    parser.add_argument("--reference", required=True, metavar="REF", help="What they are compared with.")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help=f"Some of {', '.join(METRICS)} (default: all that REF allows but fd_dinov2).",
    )
    parser.add_argument(
        "--resolution", type=int, help="Cut the images of REF to this side, as ADM prepares ImageNet; never SAMPLES."
    )
    parser.add_argument("--samples_split", metavar="SPLIT", help="Split of SAMPLES, if a data set (default: train).")
    parser.add_argument("--reference_split", metavar="SPLIT", help="Split of REF, if a data set (default: train).")
    parser.add_argument(
        "--image_column", default="image", help="Column of images in a data set (default: %(default)s)."
    )
    parser.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="Weights of Inception as torch-fidelity publishes them (default: that file, downloaded once).",
    )
    parser.add_argument(
        "--dinov2_model",
        default=PROTOCOL_DINOV2,
        metavar="ID_OR_DIR",
        help="Model for fd_dinov2 (default: %(default)s).",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="Images at a time in one process (default: %(default)s)."
    )
    parser.add_argument(
        "--cache_dir", help=f"Where features are kept, 20 kB per image (default: {default_cache_dir()})."
    )
    parser.add_argument("--output_dir", default=".", help=f"Where {RESULTS_FILE} goes (default: %(default)s).")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the results that are there.")
    parser.add_argument(
        "--update_card",
        metavar="DIR",
        help=f"Folder of the pipeline that drew SAMPLES: writes the results into its model card and {RESULTS_FILE}.",
    )
    group = parser.add_argument_group("a whole training run")
    group.add_argument(
        "--checkpoints",
        metavar="DIR",
        help="In place of SAMPLES, the --output_dir of a training run: evaluates every checkpoint-N in it and plots "
        f"the metrics against the step ({CURVES_FILE}). Samples are those of checkpoint-N/samples/samples.npz where "
        "there are any, else those that examples/sample.py would draw from checkpoint-N/pipeline: not stored.",
    )
    group.add_argument(
        "--num_images",
        type=int,
        default=PROTOCOL_IMAGES,
        help="Images to draw from each checkpoint (default: %(default)s).",
    )
    group.add_argument(
        "--num_inference_steps", type=int, default=250, help="Steps for drawing them (default: %(default)s)."
    )


def run(args: argparse.Namespace) -> None:
    """Runs `diffusers-lsep evaluate` with the arguments of [`add_arguments`]."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # 1. What can be refused at once
    if (args.samples is None) == (args.checkpoints is None):
        raise ValueError(
            f"exactly one of `SAMPLES` and `--checkpoints` must be given, got {args.samples!r} and "
            f"{args.checkpoints!r}."
        )
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if args.update_card is not None and args.checkpoints is not None:
        raise ValueError("`--update_card` needs `SAMPLES`: a card is about one model, not about `--checkpoints`.")
    if args.update_card is not None and not (Path(args.update_card) / "model_index.json").is_file():
        raise ValueError(f"`--update_card` must be the folder of a saved pipeline, got {args.update_card!r}.")
    output_dir = Path(args.output_dir)
    output_files = [output_dir / name for name in (RESULTS_FILE, CURVES_FILE)[: 2 if args.checkpoints else 1]]
    existing = [str(path) for path in output_files if path.exists()]
    if existing and not args.overwrite_output_dir:
        raise ValueError(f"`--output_dir` already holds {', '.join(existing)}; `--overwrite_output_dir` replaces it.")
    if args.checkpoints is not None:
        require_matplotlib(CURVES_FILE)

    # 2. The work
    reference = open_images(args.reference, "reference", args.resolution, args.reference_split, args.image_column)
    options = {
        "metrics": args.metrics,
        "inception_weights": args.inception_weights,
        "dinov2_model": args.dinov2_model,
        "batch_size": args.batch_size,
        "cache_dir": args.cache_dir,
    }
    is_main = process_state().is_main_process
    if args.checkpoints is not None:
        results = {"checkpoints": []}
        for step, samples in milestone_samples(args.checkpoints, args.num_images, args.num_inference_steps):
            results["checkpoints"].append({"step": step, **evaluate_images(samples, reference, **options)})
        rows = {f"step {entry['step']}": entry["metrics"] for entry in results["checkpoints"]}
    else:
        samples = open_images(args.samples, "samples", None, args.samples_split, args.image_column)
        weights = _weights_of(args.update_card, samples) if args.update_card is not None else {}
        results = {**evaluate_images(samples, reference, **options), **weights}
        rows = {results["samples"]: results["metrics"]}
    if not is_main:
        return

    # 3. Results
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    write_text(output_dir / RESULTS_FILE, text)
    if args.checkpoints is not None:
        steps = [entry["step"] for entry in results["checkpoints"]]
        values = list(rows.values())
        plot_metrics(
            output_dir / CURVES_FILE, steps, values, {name: _title(name) for name in METRICS if name in values[0]}
        )
    if args.update_card is not None:
        # This one goes to the Hub.
        write_text(Path(args.update_card) / RESULTS_FILE, json.dumps(without_folders(results), indent=2) + "\n")
        update_evaluation(args.update_card)
    print(format_table(rows))
    print(f"\nwritten: {', '.join(str(path) for path in output_files)}")


def _weights_of(pipeline: str, samples: ImageSet) -> dict[str, Any]:
    """Hashes of the weights of a saved pipeline, for the results; refuses samples that others drew."""
    saved = SavedPipeline(Path(pipeline))
    drawn_by = samples.settings.get("weights")
    if not isinstance(drawn_by, dict):
        if process_state().is_main_process:
            logger.warning(f"`samples` {samples.name!r} do not say which weights drew them, {pipeline!r} is believed")
        return {"weights": saved.hashes}
    others = saved.find_differences(drawn_by)
    if others:
        raise ValueError(
            f"`--update_card` must be the pipeline that drew `SAMPLES`, but {samples.name!r} was drawn by other "
            f"weights ({', '.join(others)}) than those in {pipeline!r}."
        )
    return {"weights": saved.hashes}


def _title(name: str) -> str:
    return f"{METRICS[name]} {'↑' if name in HIGHER_IS_BETTER else '↓'}"


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Metrics as a Markdown table, one line for each set of samples; arrows point to the better side."""
    names = [name for name in METRICS if any(name in values for values in rows.values())]
    table = [["samples", *(_title(name) for name in names)]]
    for row, values in rows.items():
        cells = [f"{values[name]:.{2 if name == 'inception_score' else 4}f}" for name in names]
        if "kid" in names:
            cells[names.index("kid")] = f"{values['kid']:.6f} ± {values['kid_std']:.6f}"
        table.append([row, *cells])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
