# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures that people look at."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import whole_file
from .labels import in_one_line
from .pipeline_lsep import LSEPPipeline


# Okabe and Ito's colours, which the colour-blind tell apart; a marker of its own goes with each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>P*X" * 5


@contextmanager
def figure_style() -> Iterator[None]:
    """
    The look of all figures: for a `with` block, or as a decorator of what draws. Figures that are 8 inches wide have
    letters of ordinary size where a web page shows them 800 pixels wide. Needs matplotlib.
    """
    from cycler import cycler  # comes with matplotlib
    from matplotlib import rc_context

    style: dict[Any, Any] = {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.use": True,
        "figure.titlesize": 11,
        "font.size": 10,
        "grid.color": "0.9",
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
    }
    with rc_context(style):
        yield


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
            caption = in_one_line(labels[i])
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


def save_figure(path: str | os.PathLike, figure: Any, dpi: int = 160):
    """Writes a matplotlib `Figure` as a PNG, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)


@figure_style()
def plot_guidance_sweep(path: str | os.PathLike, results: Sequence[dict[str, Any]], title: str = ""):
    """
    Draws the Frechet distance against the scale of the guidance, and precision against recall: a line for each
    interval, with the scales beside its points.

    Args:
        path (`str` or `os.PathLike`):
            The PNG to write, whole or not at all.
        results (`Sequence[dict]`):
            With `guidance_scale`, `guidance_interval`, `frechet_distance`, `precision` and `recall` each, and
            `guidance`, which one it is, if there are several.
        title (`str`, defaults to `""`):
            Over the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.7))
    figure.suptitle(title)
    distance_axis, recall_axis = figure.subplots(1, 2)
    lines: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        lines.setdefault((result.get("guidance"), *result["guidance_interval"]), []).append(result)
    several = len({kind for kind, _, _ in lines}) > 1
    for number, (((kind, low, high), line), marker) in enumerate(zip(lines.items(), MARKERS)):
        line.sort(key=lambda result: result["guidance_scale"])
        scales, distances, precisions, recalls = (
            [result[name] for result in line] for name in ("guidance_scale", "frechet_distance", "precision", "recall")
        )
        label = f"{kind}, " if several else ""
        distance_axis.plot(scales, distances, label=f"{label}t from {low:g} to {high:g}", marker=marker)
        (drawn,) = recall_axis.plot(recalls, precisions, marker=marker)
        # The scales of one line below its points, those of the next above: both begin in the same point.
        offset, side = ((-5, -10), "right") if number % 2 == 0 else ((4, 4), "left")
        for x, y, scale in zip(recalls, precisions, scales):
            options = {"textcoords": "offset points", "ha": side, "fontsize": 8, "color": drawn.get_color()}
            recall_axis.annotate(f"{scale:g}", (x, y), xytext=offset, **options)
    distance_axis.set(xlabel="scale of the guidance (1: none)", ylabel="Fréchet distance (0: like the data)")
    distance_axis.set_ylim(0, None)
    recall_axis.set(xlabel="recall: how much of the data is drawn", ylabel="precision: how much looks like data")
    recall_axis.margins(0.12)
    recall_axis.set_title("beside the points: the scale")
    distance_axis.legend(title="guided at times")
    save_figure(path, figure)


@figure_style()
def plot_cache_sweep(path: str | os.PathLike, results: Sequence[dict[str, Any]], title: str = ""):
    """
    Draws what caches do to images against the share of the blocks that they compute: the distance to the images
    without a cache, and the Frechet distance. A row for each interval of the guidance, a line for each cache, with its
    settings in the legend; dashed what there is without a cache.

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
    figure = Figure(figsize=(8, 0.9 + 3.1 * len(intervals)))
    figure.suptitle(title)
    rows = figure.subplots(len(intervals), 2, squeeze=False, sharex=True)
    names = list(dict.fromkeys(result["cache"] for result in results if result["cache"]))
    for (low, high), axes in zip(intervals, rows):
        row = [result for result in results if tuple(result["guidance_interval"]) == (low, high)]
        for axis, value in zip(axes, ("image_distance", "frechet_distance")):
            axis.axhline(next(result[value] for result in row if not result["cache"]), color="0.4", ls="--", lw=1)
            for name, marker in zip(names, MARKERS):
                line = [result for result in row if result["cache"] == name]
                line.sort(key=lambda result: result["setting"], reverse=True)  # from left to right
                shares = [100 * result["share_computed"] for result in line]
                settings = ", ".join(f"{result['setting']:g}" for result in line)
                axis.plot(shares, [result[value] for result in line], label=f"{name}: {settings}", marker=marker)
            axis.set_title(f"guided at t from {low:g} to {high:g}")
        axes[0].set(ylabel="distance to the uncached images", ylim=(0, None))
        axes[1].set(ylabel="Fréchet distance (dashed: no cache)")
    for axis in rows[-1]:
        axis.set_xlabel("blocks that are computed, %")
    handles = rows[0][0].get_legend_handles_labels()
    meaning = "caches: their settings, from left to right"
    figure.legend(*handles, title=meaning, loc="outside lower center", ncols=3)
    save_figure(path, figure)


def draw_accuracies(
    axis: Any,
    table: Sequence[Sequence[float]],
    layers: Sequence[int],
    timesteps: Sequence[float],
    trained: int | None = None,
) -> Any:
    """
    Draws accuracies in 0..1, a row for each layer and a column for each time, on a matplotlib axis. The layer
    `trained`, if it is among them, gets a frame. Returns the image, for [`add_accuracy_scale`].
    """
    values = np.array(table)
    image = axis.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axis.grid(False)
    axis.set_xticks(range(values.shape[1]), [f"{t:g}" for t in timesteps])
    axis.set_yticks(range(values.shape[0]), layers)
    axis.set_xlabel("time t (0: image, 1: noise)")
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.5 else "white"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    if trained in list(layers):
        row, last = list(layers).index(trained), values.shape[1] - 1
        corners = [(-0.5, row - 0.5), (last + 0.5, row - 0.5), (last + 0.5, row + 0.5), (-0.5, row + 0.5)]
        axis.plot(*zip(*corners, corners[0]), color="#D55E00", linewidth=3, clip_on=False)
    return image


def add_accuracy_scale(figure: Any, axes: Any, image: Any, chance: float, has_frame: bool):
    """The colour scale of [`draw_accuracies`], with chance on it, and if there is a frame, what it means."""
    scale = figure.colorbar(image, ax=axes, label="accuracy on held-out images")
    scale.ax.axhline(chance, color="white", linewidth=2)
    scale.set_ticks([chance, 0.5, 1], labels=[f"chance {chance:.2g}", "0.5", "1"])
    if has_frame:
        figure.supxlabel("orange frame: the depth that the probe of the training read", fontsize=9)


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


@figure_style()
def plot_denoising_strip(
    path: str | os.PathLike,
    states: np.ndarray,
    predictions: np.ndarray,
    times: Sequence[float],
    labels: Sequence[str],
    title: str = "",
):
    """
    Draws how images come out of noise: for each of them a row of the states `x_t` and a row of the images that the
    model expects at the end.

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
    gap, left, top = 0.06, 1.75, 0.95
    pitch = 2 * (1 + gap) + 0.1
    width, height = left + len(times) * (1 + gap), top + len(labels) * pitch
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")

    def write(text: str, x: float, y: float, **options):
        figure.text(x / width, y / height, text, **{"ha": "center", "va": "center", "fontsize": 12, **options})

    write(title, width / 2, height - 0.2, fontsize=13)
    for x, text in ((left + 0.5, "noise"), (width - 0.5 - gap, "image")):
        write(text, x, height - 0.54)
    for i, label in enumerate(labels):
        middle = height - top - i * pitch - 1 - gap / 2
        label = in_one_line(label)
        write(label, 0.2, middle, rotation=90 if len(label) > 2 else 0, fontsize=13, parse_math=False)
        for name, images, bottom in (
            ("noisy image\n$x_t$", states, middle + gap / 2),
            ("the model's\nguess $\\hat{x}_0$", predictions, middle - gap / 2 - 1),
        ):
            write(name, left / 2 + 0.15, bottom + 0.5)
            for column, image in enumerate(images[:, i]):
                x = left + column * (1 + gap)
                axis = figure.add_axes((x / width, bottom / height, 1 / width, 1 / height))
                axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
                if i == 0 and images is states:
                    axis.set_title(f"t = {times[column]:.2f}", fontsize=11)
    save_figure(path, figure, dpi=120)
