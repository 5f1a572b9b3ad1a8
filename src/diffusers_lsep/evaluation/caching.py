# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What diffusers' caches do to a model's images, and how much of its blocks they leave out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.utils import logging

from ..pipeline_lsep import LSEPPipeline
from ..sampling import choose_class_ids, draw_batch
from ..transformer_sit import SiTTransformer2DModel
from .dinov2 import DINOv2Features
from .features import PixelFeatures, extract_features
from .guidance import SWEEP_FEATURES
from .images import EncodedImages, NpzImages
from .inception import InceptionFeatures
from .metrics import feature_statistics, frechet_distance


# Of every cache the settings that are measured if none are given: thresholds, or how many steps share a computation.
CACHE_SETTINGS: dict[str, tuple[float, ...]] = {
    "FirstBlockCache": (0.1, 0.2, 0.4),
    "MagCache": (0.02, 0.05, 0.2),
    "SeaCache": (0.2, 0.4, 0.8),
    "TaylorSeer": (2, 3, 6),
    "PyramidAttentionBroadcast": (2, 3, 6),
    "FasterCache": (2, 3, 6),
}


def make_cache_config(pipe: LSEPPipeline, name: str, setting: float, mag_ratios: Sequence[float]) -> Any:
    """
    The config of a cache at one setting, its other settings being diffusers' own.

    Args:
        pipe ([`LSEPPipeline`]): The pipeline that it is for.
        name (`str`): One of `CACHE_SETTINGS`.
        setting (`float`):
            The threshold; of the last three caches the number of steps after which they compute anew.
        mag_ratios (`Sequence[float]`): What [`measure_mag_ratios`] gives.
    """
    shared: dict[str, Any] = {
        "spatial_attention_block_skip_range": int(setting),
        "current_timestep_callback": lambda: pipe.current_timestep,
    }
    makers: dict[str, Callable[[], Any]] = {
        "FirstBlockCache": lambda: FirstBlockCacheConfig(setting),
        "MagCache": lambda: MagCacheConfig(setting, num_inference_steps=len(mag_ratios), mag_ratios=list(mag_ratios)),
        "SeaCache": lambda: SeaCacheConfig(setting, power_exp=2.0),  # the spectrum of images, not of videos
        "TaylorSeer": lambda: TaylorSeerCacheConfig(int(setting), taylor_factors_dtype=torch.float32),
        "PyramidAttentionBroadcast": lambda: PyramidAttentionBroadcastConfig(**shared),
        "FasterCache": lambda: FasterCacheConfig(**shared, attention_weight_callback=lambda module: 0.5),
    }
    return makers[name]()


def measure_mag_ratios(pipe: LSEPPipeline, draw: Callable[[], Any]) -> list[float]:
    """
    How much larger what the blocks add to the tokens is than in the evaluation before, which MagCache wants to know.

    Args:
        pipe ([`LSEPPipeline`]): The pipeline.
        draw (`Callable`): Draws some images with it.

    Returns:
        `list[float]`: A ratio for each evaluation of the network; 1 for the first and where guidance is switched.
    """
    ratios: list[float] = []
    tokens: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []

    def keep(block: nn.Module, args: tuple[torch.Tensor, ...]):
        tokens[:] = args[:1]

    def compare(block: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor):
        norm = (output - tokens[0]).float().norm(dim=-1)
        is_comparable = bool(norms) and norms[0].shape == norm.shape
        ratios.append((norm / norms[0].clamp(min=1e-8)).mean().item() if is_comparable else 1.0)
        norms[:] = [norm]

    blocks = pipe.transformer.transformer_blocks
    handles = [blocks[0].register_forward_pre_hook(keep), blocks[-1].register_forward_hook(compare)]
    try:
        draw()
    finally:
        for handle in handles:
            handle.remove()
    return ratios


@contextmanager
def count_block_work(pipe: LSEPPipeline) -> Iterator[Callable[[], int]]:
    """Counts the multiplications of the linear layers in the blocks: what is yielded gives their number so far."""
    count = 0

    def add(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor):
        nonlocal count
        count += args[0].numel() * output.shape[-1]

    layers = [layer for layer in pipe.transformer.transformer_blocks.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield lambda: count
    finally:
        for handle in handles:
            handle.remove()


def sweep_caches(
    pipe: LSEPPipeline,
    reference: NpzImages | EncodedImages,
    extractor: InceptionFeatures | DINOv2Features | PixelFeatures,
    caches: Mapping[str, Sequence[float]],
    guidance_scale: float,
    guidance_intervals: Sequence[Sequence[float]],
    num_images: int,
    num_inference_steps: int = 250,
    label_sampling: str = "random",
    seed: int = 0,
    batch_size: int = 32,
    cache_dir: Any = None,
) -> list[dict[str, Any]]:
    """
    Measures the same images, by class and noise, without a cache and with every cache at every setting.

    Args:
        pipe ([`LSEPPipeline`]):
            Draws the images. A cache that it has is disabled.
        reference ([`NpzImages`] or [`EncodedImages`]):
            What the Frechet distances are to.
        extractor ([`InceptionFeatures`], [`DINOv2Features`] or [`PixelFeatures`]):
            Of [`make_extractor`].
        caches (`Mapping[str, Sequence[float]]`):
            Settings by the names of the caches, see `CACHE_SETTINGS`.
        guidance_scale (`float`):
            Scale of the guidance; off if not above 1.
        guidance_intervals (`Sequence[Sequence[float]]`):
            Pairs of times between which it acts.
        num_images, num_inference_steps, label_sampling, seed, batch_size:
            As for [`DrawnSamples`].
        cache_dir (`str` or `os.PathLike`, *optional*):
            As for [`extract_features`], for the reference.

    Returns:
        `list[dict]`: for every interval first without a cache, then for each of them `cache` (None without),
        `setting`, `guidance_interval`, `share_computed` (of the multiplications in the blocks, 1 without a cache),
        `image_distance` (root mean square of the difference to the images without a cache, whose values lie in
        [0, 1]) and `frechet_distance`.
    """
    (feature,) = set(SWEEP_FEATURES.values()) & set(extractor.widths)
    moments = reference.statistics.get(feature)
    if moments is None:
        moments = feature_statistics(extract_features(reference, extractor, cache_dir)[feature])
    class_ids = choose_class_ids(num_images, pipe.transformer.config.num_classes, label_sampling, seed)
    settings = [(None, 0.0), *((name, value) for name, values in caches.items() for value in values)]
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()

    results = []
    for low, high in guidance_intervals:
        call: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        call["guidance_interval"] = (low, high)
        ratios = measure_mag_ratios(pipe, partial(draw_batch, pipe, class_ids, 0, batch_size, seed, **call))
        work, squares = np.zeros(len(settings)), np.zeros(len(settings))
        features: list[list[np.ndarray]] = [[] for _ in settings]
        for batch in range(math.ceil(num_images / batch_size)):
            plain = None
            for i, (name, value) in enumerate(settings):
                if name is not None:
                    _enable_quietly(pipe.transformer, make_cache_config(pipe, name, value, ratios))
                try:
                    with count_block_work(pipe) as work_done:
                        images = draw_batch(pipe, class_ids, batch, batch_size, seed, **call)
                finally:
                    if name is not None:
                        pipe.transformer.disable_cache()
                plain = images if plain is None else plain
                work[i] += work_done()
                squares[i] += np.square((images.astype(np.float64) - plain) / 255).mean(axis=(1, 2, 3)).sum()
                rgb = np.broadcast_to(images, (*images.shape[:3], 3))
                features[i].append(extractor(np.ascontiguousarray(rgb))[feature])
        for i, (name, value) in enumerate(settings):
            distance = frechet_distance(*feature_statistics(np.concatenate(features[i])), *moments)
            result = {
                "cache": name,
                "setting": None if name is None else value,
                "guidance_interval": [low, high],
                "share_computed": float(work[i] / work[0]),
                "image_distance": float(np.sqrt(squares[i] / num_images)),
                "frechet_distance": distance,
            }
            results.append(result)
            print(describe_result(result))
    return results


def _enable_quietly(transformer: SiTTransformer2DModel, config: Any):
    """FasterCache says every time that it is experimental."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        transformer.enable_cache(config)
    finally:
        logging.set_verbosity(verbosity)


def find_largest_saving(results: Sequence[dict[str, Any]], max_distance: float) -> dict[str, Any] | None:
    """The result that computes the least of those whose images are at most `max_distance` from the uncached ones."""
    near = [result for result in results if result["cache"] and result["image_distance"] <= max_distance]
    near = [result for result in near if result["share_computed"] < 1]
    return min(near, key=lambda result: result["share_computed"], default=None)


def describe_result(result: Mapping[str, Any]) -> str:
    """One line about a result of [`sweep_caches`]."""
    name = f"{result['cache']} {result['setting']:g}" if result["cache"] else "no cache"
    low, high = result["guidance_interval"]
    return (
        f"guidance on [{low:g}, {high:g}], {name}: {result['share_computed']:.1%} of the blocks computed, distance to"
        f" the uncached images {result['image_distance']:.4f}, frechet distance {result['frechet_distance']:.4f}"
    )
