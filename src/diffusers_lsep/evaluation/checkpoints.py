# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The milestones of a training run: their samples, and their metrics against the step."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpointing import PIPELINE_FOLDER, list_checkpoints
from .features import process_state
from .images import NpzImages


# Where `examples/sample.py --output_dir RUN/checkpoint-N/samples` leaves them.
SAMPLES_FILE = Path("samples", "samples.npz")


class DrawnSamples:
    """
    Samples that a pipeline draws while they are read, so that none are stored: by its own scheduler, without guidance,
    of classes drawn at random (the papers' protocol). Image `i` has a generator with seed `i`.

    Args:
        folder (`str` or `os.PathLike`):
            A saved pipeline.
        num_images (`int`):
            How many images.
        num_inference_steps (`int`, defaults to `250`):
            Steps of the scheduler.

    Attributes:
        name, count, size, statistics, content_hash, settings, notes: as those of [`NpzImages`]; the hash is that of
            the weights and settings that decide the images.
    """

    def __init__(self, folder: str | os.PathLike, num_images: int, num_inference_steps: int = 250):
        from diffusers import DiffusionPipeline

        self.name, self.count = str(folder), num_images
        self.statistics = {}
        self.settings = {"num_inference_steps": num_inference_steps, "guidance_scale": 1.0, "class_labels": "random"}
        self._pipe = DiffusionPipeline.from_pretrained(folder).to(process_state().device)
        self._pipe.set_progress_bar_config(disable=True)
        side = self._pipe.transformer.config.sample_size * self._pipe.vae_scale_factor
        self.size = (side, side)
        is_grey = self._pipe.vae is None and self._pipe.transformer.config.in_channels == 1
        self.notes = ["`samples`: grey images, repeated to three channels"] if is_grey else []
        num_classes = self._pipe.transformer.config.num_classes
        self._class_ids = np.random.Generator(np.random.Philox(key=0)).integers(num_classes, size=num_images)

        digest = hashlib.sha256(f"{num_images} images in {num_inference_steps} steps".encode())
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".safetensors", ".json"):
                with open(path, "rb") as file:
                    digest.update(f"{path.relative_to(folder)}".encode())
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        self.content_hash = digest.hexdigest()

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images `start` to `stop` as uint8 `[B, H, W, 3]`."""
        for first in range(start, stop, batch_size):
            indices = range(first, min(first + batch_size, stop))
            images = self._pipe(
                self._class_ids[indices],
                num_inference_steps=self.settings["num_inference_steps"],
                generator=[torch.Generator().manual_seed(index) for index in indices],
                output_type="pt",
            ).images
            images = (255 * images.float()).clamp(0, 255).to(torch.uint8)  # floors, as the protocol does
            yield images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().contiguous().numpy()


def milestone_samples(
    run: str | os.PathLike, num_images: int, num_inference_steps: int
) -> Iterator[tuple[int, NpzImages | DrawnSamples]]:
    """
    Steps of a run's checkpoints in their order, and samples of each: those in `checkpoint-N/samples/samples.npz` where
    there are any, else drawn from `checkpoint-N/pipeline`.

    Args:
        run (`str` or `os.PathLike`):
            `--output_dir` of the training.
        num_images (`int`):
            How many images to draw from a pipeline.
        num_inference_steps (`int`):
            Steps of the scheduler for that.

    Raises:
        ValueError: before the first one, if there are no checkpoints or one has neither samples nor a pipeline.
    """
    checkpoints = list_checkpoints(Path(run))
    if not checkpoints:
        raise ValueError(f"`checkpoints` must be a folder with `checkpoint-N` folders, {str(run)!r} has none.")
    for _, folder in checkpoints:
        if not (folder / SAMPLES_FILE).is_file() and not (folder / PIPELINE_FOLDER / "model_index.json").is_file():
            raise ValueError(f"`checkpoints`: {folder} has neither {SAMPLES_FILE} nor a pipeline.")
    for step, folder in checkpoints:
        if (folder / SAMPLES_FILE).is_file():
            yield step, NpzImages(folder / SAMPLES_FILE)
        else:
            yield step, DrawnSamples(folder / PIPELINE_FOLDER, num_images, num_inference_steps)


def plot_metrics(path: Path, steps: Sequence[int], values: Sequence[dict[str, float]], titles: dict[str, str]) -> None:
    """
    Draws every metric against the step.

    Args:
        path (`Path`):
            The PNG to write, whole or not at all.
        steps (`Sequence[int]`):
            Training steps.
        values (`Sequence[dict[str, float]]`):
            Metrics at each step.
        titles (`dict[str, str]`):
            Metrics to draw, and their titles.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(titles), 3), layout="constrained")
    axes: Any = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, (name, title) in zip(axes, titles.items()):
        axis.plot(steps, [value[name] for value in values], marker="o")
        axis.set(title=title, xlabel="training step")
        axis.grid(alpha=0.3)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
