# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelled images or latents for measuring a pipeline on them."""

from pathlib import Path

import numpy as np
import torch

from ..autoencoders import encode_moments, get_image_channels, get_normalization
from ..data.images import ImageSource, load_image_dataset, read_labels
from ..data.moments import (
    METADATA_FILE,
    MomentsDataset,
    OriginalMomentsDataset,
    open_moments_folder,
    sample_posterior,
)
from ..data.sources import SampleSource
from ..pipeline_lsep import LSEPPipeline


VALIDATION_SPLITS = ("validation", "valid", "val", "test")


def holds_latents(data: str) -> bool:
    """Whether a folder has latents, in the layout of this package or of EDM2 and REPA."""
    return any((Path(data) / name).is_file() for name in (METADATA_FILE, "dataset.json"))


def open_latents(
    flag: str, data: str, pipeline: str, pipe: LSEPPipeline, labelled: bool = True
) -> tuple[MomentsDataset | OriginalMomentsDataset, list[str]]:
    """
    Latents that a pipeline understands, and the names of their classes, if they are `labelled`.

    Raises:
        `ValueError`: if they are of another size or VAE, in words with the `flag` that named the `data`.
    """
    if pipe.vae is None:
        raise ValueError(f"`{flag}` {data!r} holds latents, but `PIPELINE` {pipeline!r} has no VAE.")
    source = open_moments_folder(data, labelled, flag)
    config = pipe.transformer.config
    expected = (2 * config.in_channels, config.sample_size, config.sample_size)
    if source.moments_shape != expected:
        raise ValueError(f"`{flag}` {data!r} holds moments {source.moments_shape}, `PIPELINE` needs {expected}.")
    if isinstance(source, MomentsDataset):
        source.check_vae(pipe.vae, f"that of `PIPELINE` {pipeline!r}")
    return source, [source.id2label[index] for index in range(len(source.id2label))]


def load_splits(flag: str, data: str):
    """All splits of a folder of images, or of a data set on the Hub, which messages call by its flag."""
    if Path(data).is_dir():
        return load_image_dataset(train_data_dir=data, argument=flag)
    return load_image_dataset(data, argument=flag)


def image_size(pipe: LSEPPipeline) -> tuple[int, int]:
    """Side and channels of the images that a pipeline makes."""
    config = pipe.transformer.config
    channels = config.in_channels if pipe.vae is None else get_image_channels(pipe.vae)
    return config.sample_size * pipe.vae_scale_factor, channels


def open_validation_data(
    flag: str,
    data: str,
    split_flag: str,
    split: str | None,
    pipeline: str,
    pipe: LSEPPipeline,
    image_column: str,
    label_column: str | None,
) -> tuple[SampleSource, list[str], str | None]:
    """
    Images or latents to measure a pipeline on, the names of their classes, and of which split they are: the one that
    is asked for, else one of `VALIDATION_SPLITS`, or the only one that there is. Without a `label_column` labels are
    not read.

    Raises:
        `ValueError`: if there is no such split, or if the latents are of another size or VAE, in words with the flags
        that named them.
    """
    if holds_latents(data):
        if split is not None:
            raise ValueError(f"`{split_flag}` is {split!r}, but `{flag}` {data!r} has no splits.")
        return *open_latents(flag, data, pipeline, pipe, label_column is not None), None
    splits = load_splits(flag, data)
    candidates = [split] if split is not None else [*VALIDATION_SPLITS, *(splits if len(splits) == 1 else ())]
    name = next((name for name in candidates if name in splits), None)
    if name is None:
        raise ValueError(f"`{split_flag}` has to name a split of `{flag}`, one of {list(splits)}, but is {split!r}.")
    labels, names = read_labels(splits[name], label_column)
    return ImageSource(splits[name], labels, *image_size(pipe), image_column), names, name


@torch.no_grad()
def load_latents(
    pipe: LSEPPipeline, source: SampleSource, rows: np.ndarray, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Latents `[B, C, S, S]` of rows of a source, on the pipeline's device, as the transformer sees them; pixels in
    [-1, 1] without a VAE.

    Args:
        pipe ([`LSEPPipeline`]): The model.
        source (`SampleSource`): Images or moments.
        rows (`np.ndarray`): Which of them.
        noise (`torch.Tensor` of shape `[B, C, S, S]`, *optional*):
            Draws from the VAE's posterior; its means if not given.
    """
    batch = source.load(rows, np.zeros(len(rows), dtype=bool)).to(pipe.device)
    if pipe.vae is None:
        return batch
    if source.kind == "images":
        batch = encode_moments(pipe.vae, batch)
    noise = torch.zeros(()) if noise is None else noise
    return sample_posterior(batch, noise.to(pipe.device), **get_normalization(pipe.vae))
