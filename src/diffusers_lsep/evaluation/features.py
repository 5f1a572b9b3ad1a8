# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Features of a set of images, extracted by any number of processes and kept by the content of the images."""

import math
import os
import shutil
import uuid
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from ..files import held_folder, make_array, write_rows
from ..progress import make_progress_bar
from ..sampling import DrawnSamples
from .dinov2 import DINOv2Features
from .images import EncodedImages, NpzImages
from .inception import InceptionFeatures


# Widths of a few thousand have covariances that fit into memory; those of photographs do not.
MAX_PIXEL_VALUES = 4096


def process_state() -> PartialState:
    """This process among the others. By itself `PartialState` takes every process on CPUs for the only one."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Some draw a batch more than others, for which ten minutes can be too few.
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=12))


def default_cache_dir() -> Path:
    """Where features are kept if no other place is named: beside the caches of Hugging Face's libraries."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "diffusers_lsep" / "features"


class PixelFeatures:
    """
    The pixels themselves as features, in [0, 1]: for tiny images, which no network was made for.

    Args:
        size (`tuple[int, int]`):
            Height and width.
        channels (`int`):
            3, or 1 for grey images; these are then counted once.

    Attributes:
        widths (`dict[str, int]`): `pixels` and the number of values.
        name (`str`): `pixels` or `pixels-grey`.

    Raises:
        `ValueError`: if an image has more than 4,096 values.
    """

    def __init__(self, size: tuple[int, int], channels: int):
        self.widths = {"pixels": math.prod(size) * channels}
        self.name = "pixels-grey" if channels == 1 else "pixels"
        if self.widths["pixels"] > MAX_PIXEL_VALUES:
            raise ValueError(
                f"`features` 'pixels' is for images of up to {MAX_PIXEL_VALUES:,} values, but those of {size[0]} x "
                f"{size[1]} have {self.widths['pixels']:,}: use 'inception' or 'dinov2'."
            )

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            images (`np.ndarray`): Images `[B, H, W, 3]`, uint8.

        Returns:
            `dict[str, np.ndarray]`: float32 features `[B, width]` under the name `pixels`.
        """
        if self.name == "pixels-grey":
            if (images != images[..., :1]).any():
                raise ValueError("`features` 'pixels' of grey samples need a grey reference, this one has colours.")
            images = images[..., :1]
        return {"pixels": images.reshape(len(images), -1).astype(np.float32) / 255}


def extract_features(
    images: NpzImages | EncodedImages | DrawnSamples,
    extractor: InceptionFeatures | DINOv2Features | PixelFeatures,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """
    Features of all images, read back from the cache where the same images have been through the same network.

    With several processes (accelerate) each takes a contiguous share of the batches, so their number changes nothing.
    All write into the same files, so `cache_dir` has to be one that they share.

    Args:
        images ([`NpzImages`], [`EncodedImages`] or [`DrawnSamples`]):
            The images.
        extractor ([`InceptionFeatures`], [`DINOv2Features`] or [`PixelFeatures`]):
            What makes features of them.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where features are kept, about 20 kB per image for Inception; [`default_cache_dir`] if not given.
        batch_size (`int`, defaults to `64`):
            Images in one pass of the network; another one may change last bits.

    Returns:
        `dict[str, np.ndarray]`: for each of `extractor.widths` a memory-mapped float32 array `[count, width]`.

    Raises:
        `OSError`: if there is no space for them.
    """
    state = process_state()
    folder = Path(default_cache_dir() if cache_dir is None else cache_dir) / extractor.name / images.content_hash[:32]
    # The main process decides for all: a file system may show the others an older view.
    is_cached, partial = broadcast_object_list([folder.is_dir(), f"{folder}.{uuid.uuid4().hex[:8]}.partial"])
    if state.is_main_process:
        for left in folder.parent.glob(f"{folder.name}.*.partial"):
            with held_folder(left) as is_abandoned:  # by a run that was killed
                if is_abandoned:
                    shutil.rmtree(left, ignore_errors=True)
    if not is_cached:
        partial, stack = Path(partial), ExitStack()
        try:
            if state.is_main_process:
                partial.mkdir(parents=True)
                stack.enter_context(held_folder(partial))
                for name, width in extractor.widths.items():
                    make_array(partial / f"{name}.npy", np.float32, (images.count, width))
            state.wait_for_everyone()

            num_batches = math.ceil(images.count / batch_size)
            shares = [rank * num_batches // state.num_processes * batch_size for rank in range(state.num_processes)]
            start, stop = [*shares, images.count][state.process_index : state.process_index + 2]
            description, is_silent = f"{extractor.name}: {images.name}", not state.is_main_process
            with make_progress_bar(total=stop - start, desc=description, unit="img", disable=is_silent) as progress:
                for batch in images.batches(start, stop, batch_size):
                    features = extractor(batch)
                    for name in extractor.widths:
                        write_rows(partial / f"{name}.npy", start, features[name])
                    start += len(batch)
                    progress.update(len(batch))
            state.wait_for_everyone()
            if state.is_main_process and not folder.is_dir():  # else a concurrent run was faster
                partial.rename(folder)
        finally:
            if state.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            stack.close()
        state.wait_for_everyone()
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in extractor.widths}
