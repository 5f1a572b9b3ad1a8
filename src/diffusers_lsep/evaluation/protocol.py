# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""ADM's protocol: which features, statistics and counts make the numbers of the papers."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..sampling import DrawnSamples
from .dinov2 import DINOv2Features
from .features import extract_features, process_state
from .images import EncodedImages, NpzImages
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
        `ValueError`: before any work, if the two do not fit together or a metric cannot be had.
    """
    state = process_state()
    if batch_size < 1:
        raise ValueError(f"`batch_size` has to be at least 1, but is {batch_size}.")
    asked, metrics = metrics, _check_metrics(samples, reference, metrics)
    assert samples.size is not None  # `_check_metrics` refuses what has no images
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
            pools = features["samples"]["pool"], features["reference"]["pool"]
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
        `ValueError`: for features that are not finite floats of equal width, or too few of them.
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
        raise ValueError(f"`metrics` has to be some of {list(METRICS)}, but is {unknown or 'none'}.")
    if not samples.count or samples.size is None:
        raise ValueError(f"`samples` {samples.name!r} holds statistics but no images.")
    if reference.size is not None and samples.size != reference.size:
        raise ValueError(
            f"`samples` and `reference` have to be of one size, but they are {samples.size[0]} x {samples.size[1]} "
            f"and {reference.size[0]} x {reference.size[1]}. (`resolution` cuts the images of a reference.)"
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
    assert samples.size is not None
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
