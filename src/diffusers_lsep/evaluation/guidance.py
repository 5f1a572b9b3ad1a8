# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What guidance does to a model's images: distance, precision and recall at several scales and intervals."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..pipeline_lsep import LSEPPipeline
from ..sampling import DrawnSamples
from .dinov2 import DINOv2Features
from .features import PixelFeatures, extract_features, process_state
from .images import EncodedImages, NpzImages
from .inception import InceptionFeatures
from .metrics import feature_statistics, frechet_distance, precision_recall
from .protocol import NEIGHBORHOOD, PROTOCOL_DINOV2


# The features that distances are of, and what the extractors call them.
SWEEP_FEATURES = {"inception": "pool", "dinov2": "class_token", "pixels": "pixels"}


def make_extractor(
    features: str,
    pipe: LSEPPipeline,
    inception_weights: str | os.PathLike | None = None,
    dinov2_model: str = PROTOCOL_DINOV2,
) -> InceptionFeatures | DINOv2Features | PixelFeatures:
    """
    What makes features of a pipeline's images.

    Args:
        features (`str`): One of `SWEEP_FEATURES`.
        pipe ([`LSEPPipeline`]): Draws the images, which pixels as features depend on.
        inception_weights (`str` or `os.PathLike`, *optional*): As for [`InceptionFeatures`].
        dinov2_model (`str`, defaults to the protocol's): As for [`DINOv2Features`].
    """
    state = process_state()
    if features == "pixels":
        is_grey = pipe.vae is None and pipe.transformer.config.in_channels == 1
        side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        return PixelFeatures((side, side), 1 if is_grey else 3)
    with state.main_process_first():  # it may have to download the weights
        if features == "dinov2":
            return DINOv2Features(str(dinov2_model), device=state.device)
        return InceptionFeatures(inception_weights, device=state.device)


def check_reference(pipe: LSEPPipeline, reference: NpzImages | EncodedImages):
    """Raises a `ValueError` if the reference has too few images to measure with, or is of another size."""
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    if reference.size is None or reference.count <= NEIGHBORHOOD:
        raise ValueError(f"`--reference` has to hold {NEIGHBORHOOD + 1} images, but holds {reference.count}.")
    if reference.size != (side, side):
        height, width = reference.size
        raise ValueError(
            f"`--reference` has to hold images of {side} x {side}, as the pipeline draws them, but they are"
            f" {width} x {height}."
        )


def sweep_guidance(
    pipe: LSEPPipeline,
    reference: NpzImages | EncodedImages,
    extractor: InceptionFeatures | DINOv2Features | PixelFeatures,
    guidance_scales: Sequence[float],
    guidance_intervals: Sequence[Sequence[float]],
    cache_dir: str | os.PathLike | None = None,
    autoguidance: bool = False,
    **sampling,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """
    Measures the same images, by class and noise, at every scale and interval of the guidance. What is drawn is kept as
    features, so that a sweep which was interrupted or gets more scales does not draw it again.

    Args:
        pipe ([`LSEPPipeline`]):
            Draws the images.
        reference ([`NpzImages`] or [`EncodedImages`]):
            What they are compared with.
        extractor ([`InceptionFeatures`], [`DINOv2Features`] or [`PixelFeatures`]):
            Of [`make_extractor`].
        guidance_scales (`Sequence[float]`):
            Scales; at 1 there is no guidance.
        guidance_intervals (`Sequence[Sequence[float]]`):
            Pairs of times between which it acts.
        cache_dir (`str` or `os.PathLike`, *optional*):
            As for [`extract_features`].
        autoguidance (`bool`, defaults to `False`):
            Whether to measure the same scales and intervals of autoguidance too, with the pipeline's
            `guidance_transformer`.
        sampling:
            For [`DrawnSamples`]: `num_images`, and `num_inference_steps`, `label_sampling`, `seed` and `batch_size` if
            they are not its own.

    Returns:
        `tuple[list[dict], dict]`: for every interval and scale `guidance` (which), `guidance_scale`,
        `guidance_interval`, `frechet_distance`, `precision` and `recall`; and what they were measured on, with `notes`
        of what makes the values hard to compare. The list is empty on all processes but the main one.

    Raises:
        `ValueError`: before any image is drawn, if the reference has too few images or is of another size.
    """
    check_reference(pipe, reference)
    (feature,) = set(SWEEP_FEATURES.values()) & set(extractor.widths)
    reference_features = extract_features(reference, extractor, cache_dir)[feature]
    is_main, results = process_state().is_main_process, []
    kinds = ["classifier-free", "autoguidance"] if autoguidance else ["classifier-free"]
    for kind, (low, high) in itertools.product(kinds, guidance_intervals):
        for scale in guidance_scales:
            samples = DrawnSamples(
                pipe,
                f"{kind if autoguidance else 'guidance'} {scale:g} on [{low:g}, {high:g}]",
                guidance_scale=scale if kind == "classifier-free" else 1.0,
                autoguidance_scale=scale if kind == "autoguidance" else 1.0,
                guidance_interval=(low, high) if scale > 1 else (0.0, 1.0),  # the same images, whatever the interval
                **sampling,
            )
            features = extract_features(samples, extractor, cache_dir)[feature]
            if is_main:
                values = measure(features, reference_features, reference.statistics.get(feature))
                results.append({"guidance": kind, "guidance_scale": scale, "guidance_interval": [low, high], **values})
                described = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
                print(f"{samples.name}: {described}")

    notes = [*samples.notes, *reference.notes]
    if extractor.name == "pixels-grey":  # which looks at one channel
        notes = [note for note in notes if "grey" not in note]
    for name, images in (("samples", samples), ("reference", reference)):
        if images.count <= extractor.widths[feature] and feature not in images.statistics:
            notes.append(
                f"`{name}`: {images.count:,} images for {extractor.widths[feature]:,} features: the covariance is"
                " singular and the distance far too large"
            )
    varied = ("guidance_scale", "guidance_interval", "autoguidance_scale")
    return results, {
        **{name: value for name, value in samples.settings.items() if name not in varied},
        "num_images": samples.count,
        "reference": reference.name,
        "reference_hash": reference.content_hash,
        "num_reference_images": reference.count,
        "features": extractor.name,
        "notes": notes,
    }


def measure(
    features: np.ndarray,
    reference_features: np.ndarray,
    reference_moments: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """
    Distance, precision and recall of features.

    Args:
        features (`np.ndarray`): float32 `[N, D]`.
        reference_features (`np.ndarray`): float32 `[M, D]`.
        reference_moments (`tuple[np.ndarray, np.ndarray]`, *optional*):
            Mean and covariance of the reference, in place of those of its features.

    Returns:
        `dict[str, float]`: `frechet_distance`, `precision` and `recall`.
    """
    moments = reference_moments or feature_statistics(reference_features)
    precision, recall = precision_recall(features, reference_features, NEIGHBORHOOD, device=process_state().device)
    distance = frechet_distance(*feature_statistics(features), *moments)
    return {"frechet_distance": distance, "precision": precision, "recall": recall}
