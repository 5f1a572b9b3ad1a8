# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The milestones of a training run: their samples, and their metrics against the step."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..figures import figure_style, save_figure
from ..sampling import DrawnSamples, load_pipeline
from ..training.checkpoints import PIPELINE_FOLDER, list_checkpoints
from .features import process_state
from .images import NpzImages


# Where `examples/sample.py --output_dir RUN/checkpoint-N/samples` leaves them.
SAMPLES_FILE = Path("samples", "samples.npz")


def milestone_samples(
    run: str | os.PathLike,
    num_images: int,
    num_inference_steps: int,
    dtype: torch.dtype = torch.float32,
    allow_tf32: bool | None = None,
) -> Iterator[tuple[int, NpzImages | DrawnSamples]]:
    """
    Steps of a run's checkpoints in their order, and samples of each: those in `checkpoint-N/samples/samples.npz` where
    there are any, else drawn from `checkpoint-N/pipeline` as `examples/sample.py` does by default.

    Args:
        run (`str` or `os.PathLike`):
            `--output_dir` of the training.
        num_images (`int`):
            How many images to draw from a pipeline.
        num_inference_steps (`int`):
            Steps of the scheduler for that.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            In which the transformer computes.
        allow_tf32 (`bool`, *optional*):
            Of [`~sampling.float32_products`].

    Raises:
        `ValueError`: before the first one, if there are no checkpoints or one has neither samples nor a pipeline.
    """
    checkpoints = list_checkpoints(Path(run))
    if not checkpoints:
        raise ValueError(f"`checkpoints` has to be a folder with `checkpoint-N` folders, but {str(run)!r} has none.")
    for _, folder in checkpoints:
        if not (folder / SAMPLES_FILE).is_file() and not (folder / PIPELINE_FOLDER / "model_index.json").is_file():
            raise ValueError(f"`checkpoints`: {folder} has neither {SAMPLES_FILE} nor a pipeline.")
    for step, folder in checkpoints:
        if (folder / SAMPLES_FILE).is_file():
            yield step, NpzImages(folder / SAMPLES_FILE)
        else:
            pipe = load_pipeline(folder / PIPELINE_FOLDER, process_state().device, dtype)
            name = str(folder / PIPELINE_FOLDER)
            yield step, DrawnSamples(pipe, name, num_images, num_inference_steps, allow_tf32=allow_tf32)


@figure_style()
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

    figure = Figure(figsize=(max(4, 2.6 * len(titles)), 3))
    axes: Any = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, (name, title) in zip(axes, titles.items()):
        axis.plot(steps, [value[name] for value in values], marker="o")
        axis.set(title=title, xlabel="training step")
    save_figure(path, figure)
