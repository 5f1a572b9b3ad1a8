# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures that people look at."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import whole_file
from .pipeline_lsep import LSEPPipeline


def make_labeled_grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, min_size: int = 64
) -> Image.Image:
    """
    Puts images into one, row by row, as people look at them: small images enlarged without smoothing, and with a
    caption under each.

    Args:
        images (`Sequence[PIL.Image.Image]`): Images of one size.
        columns (`int`): Number of images in a row.
        labels (`Sequence[str]`, *optional*): A caption for each image; cut where it is wider than the image.
        min_size (`int`, defaults to `64`):
            Images whose shorter side is below are enlarged by the smallest whole factor that reaches it.

    Returns:
        `PIL.Image.Image`: The grid, on white.

    Raises:
        `ValueError`: if there is no image, if `columns` is below 1, or if the number of captions is another one.
    """
    if not images:
        raise ValueError("`images` has to hold at least one image, but is empty.")
    if columns < 1:
        raise ValueError(f"`columns` has to be at least 1, but is {columns}.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"`labels` has to hold {len(images)} captions, one for each image, but holds {len(labels)}.")

    factor = max(1, -(-min_size // min(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    gap = max(2, width // 32)
    font_size = max(10, width // 9)
    caption_height = round(1.4 * font_size) if labels is not None else 0
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    white = 255 if mode == "L" else (255, 255, 255)
    size = (columns * (width + gap) + gap, rows * (height + caption_height + gap) + gap)
    grid = Image.new(mode, size, white)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(font_size)

    for i, image in enumerate(images):
        left = gap + (i % columns) * (width + gap)
        top = gap + (i // columns) * (height + caption_height + gap)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if labels is not None:
            caption = labels[i]
            while caption and draw.textlength(caption, font) > width:
                caption = caption[:-1]
            draw.text((left + width / 2, top + height + 1), caption, fill=0, font=font, anchor="ma")
    return grid


def require_matplotlib(what: str):
    """Raises an `ImportError` that says how to install matplotlib where it is missing: before work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'diffusers_lsep[eval]' ({error}).") from error


def save_figure(path: str | os.PathLike, figure: Any, dpi: int = 120):
    """Writes a matplotlib `Figure` as a PNG, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)


def plot_guidance_sweep(path: str | os.PathLike, results: Sequence[dict[str, Any]], title: str = ""):
    """
    Draws the Frechet distance against the scale of the guidance, and precision against recall: a line for each
    interval, with the scales beside its points.

    Args:
        path (`str` or `os.PathLike`):
            The PNG to write, whole or not at all.
        results (`Sequence[dict]`):
            With `guidance_scale`, `guidance_interval`, `frechet_distance`, `precision` and `recall` each.
        title (`str`, defaults to `""`):
            Over the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    distance_axis, recall_axis = figure.subplots(1, 2)
    intervals = list(dict.fromkeys(tuple(result["guidance_interval"]) for result in results))
    for (low, high), marker in zip(intervals, "os^Dv<>P*X" * len(intervals)):
        line = [result for result in results if tuple(result["guidance_interval"]) == (low, high)]
        line.sort(key=lambda result: result["guidance_scale"])
        scales, distances, precisions, recalls = (
            [result[name] for result in line] for name in ("guidance_scale", "frechet_distance", "precision", "recall")
        )
        style = {"marker": marker, "markersize": 5, "linewidth": 1.2}
        distance_axis.plot(scales, distances, label=f"t in [{low:g}, {high:g}]", **style)
        (drawn,) = recall_axis.plot(recalls, precisions, **style)
        for scale, recall, precision in zip(scales, recalls, precisions):
            recall_axis.annotate(
                f"{scale:g}",
                (recall, precision),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=drawn.get_color(),
            )
    distance_axis.set(xlabel="guidance scale", ylabel="Fréchet distance", ylim=(0, None))
    recall_axis.set(xlabel="recall", ylabel="precision")
    recall_axis.margins(0.12)
    distance_axis.legend(title="guidance at", fontsize=9, title_fontsize=9)
    for axis in (distance_axis, recall_axis):
        axis.grid(alpha=0.3)
    save_figure(path, figure)


def plot_cache_sweep(path: str | os.PathLike, results: Sequence[dict[str, Any]], title: str = ""):
    """
    Draws what caches do to images against the share of the blocks that they compute: the distance to the images
    without a cache, and the Frechet distance. A row for each interval of the guidance, a line for each cache, with its
    settings beside the points; dashed what there is without a cache.

    Args:
        path (`str` or `os.PathLike`):
            The PNG to write, whole or not at all.
        results (`Sequence[dict]`):
            Of `evaluation.caching.sweep_caches`.
        title (`str`, defaults to `""`):
            Over the figure.
    """
    from matplotlib.figure import Figure

    intervals = list(dict.fromkeys(tuple(result["guidance_interval"]) for result in results))
    figure = Figure(figsize=(11, 0.6 + 3.6 * len(intervals)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    rows = figure.subplots(len(intervals), 2, squeeze=False)
    names = list(dict.fromkeys(result["cache"] for result in results if result["cache"]))
    for (low, high), axes in zip(intervals, rows):
        row = [result for result in results if tuple(result["guidance_interval"]) == (low, high)]
        for axis, value in zip(axes, ("image_distance", "frechet_distance")):
            axis.axhline(next(result[value] for result in row if not result["cache"]), color="0.4", ls="--", lw=1)
            for name, marker in zip(names, "os^Dv<>P*X" * len(names)):
                line = [result for result in row if result["cache"] == name]
                line.sort(key=lambda result: result["share_computed"])
                shares = [100 * result["share_computed"] for result in line]
                heights = [result[value] for result in line]
                (drawn,) = axis.plot(shares, heights, label=name, marker=marker, markersize=5, linewidth=1.2)
                for share, height, result in zip(shares, heights, line):
                    axis.annotate(
                        f"{result['setting']:g}",
                        (share, height),
                        xytext=(4, 4),
                        textcoords="offset points",
                        fontsize=7,
                        color=drawn.get_color(),
                    )
            axis.set(xlabel="share of the blocks computed, %", title=f"guidance on [{low:g}, {high:g}]")
            axis.title.set_fontsize(10)
            axis.grid(alpha=0.3)
        axes[0].set(ylabel="distance to the uncached images", ylim=(0, None))
        axes[1].set(ylabel="Fréchet distance")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    save_figure(path, figure)


class DenoisingRecorder:
    """
    A `callback_on_step_end` that keeps the states of a pipeline at steps that are evenly spaced, and the data that the
    model sees in them: for [`plot_denoising_strip`].

    Args:
        noise (`torch.Tensor` of shape `[N, C, S, S]`): The `latents` that the call starts from.
        num_inference_steps (`int`): Steps of the call.
        num_columns (`int`): How many times to keep, noise and images included; fewer if there are fewer steps.

    Attributes:
        tensor_inputs (`list[str]`): For the call, its `callback_on_step_end_tensor_inputs`.
        times (`list[float]`): The `T` times.
        states (`list[np.ndarray]`): Of each the states as images, `[N, H, W, C]` in [0, 1].
        predictions (`list[np.ndarray]`): Of each the predicted data, likewise.
    """

    tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(self, noise: torch.Tensor, num_inference_steps: int, num_columns: int):
        num_columns = min(num_columns, num_inference_steps + 1)
        self._shown = set(np.linspace(0, num_inference_steps, num_columns).round().astype(int).tolist())
        self._state, self._steps_done, self._begins_step = noise, 0, True
        self.times: list[float] = []
        self.states: list[np.ndarray] = []
        self.predictions: list[np.ndarray] = []

    def __call__(self, pipe: LSEPPipeline, i: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if self._begins_step:
            self._record(pipe, tensors["pred_original_sample"], pipe.scheduler.sigmas[i].item())
        # Heun's method passes here twice in a step, first with a point that it does not keep.
        self._begins_step = getattr(pipe.scheduler, "state_in_first_order", True)
        if self._begins_step:
            self._state = tensors["latents"]
            self._steps_done += 1
            if i + 1 == pipe.num_timesteps:  # at t = 0, where the state is the data
                self._record(pipe, self._state, pipe.scheduler.sigmas[i + 1].item())
        return {}

    def _record(self, pipe: LSEPPipeline, data: torch.Tensor, t: float):
        if self._steps_done not in self._shown:
            return
        self.times.append(t)
        for kept, tensor in ((self.states, self._state), (self.predictions, data)):
            kept.append(pipe.image_processor.postprocess(pipe.decode_latents(tensor), output_type="np"))


def plot_denoising_strip(
    path: str | os.PathLike,
    states: np.ndarray,
    predictions: np.ndarray,
    times: Sequence[float],
    labels: Sequence[str],
    title: str = "",
):
    """
    Draws how images come out of noise: for each of them a row of the states `x_t` and a row of the data that the model
    sees in them.

    Args:
        path (`str` or `os.PathLike`):
            The PNG to write, whole or not at all.
        states (`np.ndarray`):
            The states, `[T, N, H, W, C]` in [0, 1]; grey or RGB.
        predictions (`np.ndarray`):
            The predicted data, likewise.
        times (`Sequence[float]`):
            `T` times, in the order of the columns.
        labels (`Sequence[str]`):
            What the `N` images are.
        title (`str`, defaults to `""`):
            Over the figure.
    """
    from matplotlib.figure import Figure

    # In inches: every image takes one, and the two rows of an image stand together
    gap, left, top = 0.06, 0.75, 0.6
    pitch = 2 * (1 + gap) + 0.1
    width, height = left + len(times) * (1 + gap), top + len(labels) * pitch
    figure = Figure(figsize=(width, height))
    figure.text(0.5, 1 - 0.18 / height, title, ha="center", va="center", fontsize=12)
    for i, label in enumerate(labels):
        middle = height - top - i * pitch - 1 - gap / 2
        rotation = 90 if len(label) > 2 else 0
        figure.text(0.18 / width, middle / height, label, rotation=rotation, ha="center", va="center", fontsize=12)
        for name, images, bottom in (
            ("$x_t$", states, middle + gap / 2),
            (r"$\hat{x}_0$", predictions, middle - gap / 2 - 1),
        ):
            figure.text(0.53 / width, (bottom + 0.5) / height, name, ha="center", va="center", fontsize=12)
            for column, image in enumerate(images[:, i]):
                x = left + column * (1 + gap)
                axis = figure.add_axes((x / width, bottom / height, 1 / width, 1 / height))
                axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
                if i == 0 and images is states:
                    axis.set_title(f"t = {times[column]:.2f}", fontsize=10)
    save_figure(path, figure)
