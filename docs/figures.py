# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of docs/concepts.md: `python docs/figures.py [FOLDER]`, by default into docs/images."""

import sys
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from diffusers_lsep import LinearProbe, LSEPObjective, SiTTransformer2DModel
from diffusers_lsep.figures import COLOURS, figure_style, save_figure
from diffusers_lsep.interpolants import get_interpolant


DOCS = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, *_ = COLOURS


@figure_style()
def draw_path(path: Path):
    """A digit at nine times on the linear path, and the factors of picture and noise on both paths."""
    mnist = DOCS.parent / "examples" / "mnist" / "test.parquet"
    image = load_dataset("parquet", data_files=str(mnist), split="train").with_format("numpy")[4]["image"] / 127.5 - 1
    noise = np.random.default_rng(0).standard_normal(image.shape)
    figure = Figure(figsize=(8, 4))
    strip, curves = figure.subfigures(2, 1, height_ratios=(1, 2))
    linear = get_interpolant("linear")
    for axis, t in zip(strip.subplots(1, 9), np.linspace(0, 1, 9)):
        axis.imshow(linear.alpha(t) * image + linear.sigma(t) * noise, cmap="gray", vmin=-1, vmax=1)
        axis.set_axis_off()
        axis.set_title(f"t = {t:.3g}")
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    for axis, name in zip(curves.subplots(1, 2, sharey=True), ("linear", "cosine")):
        interpolant = get_interpolant(name)
        axis.plot(times, interpolant.alpha(times), color=BLUE, label="factor of the picture")
        axis.plot(times, interpolant.sigma(times), "--", color=ORANGE, label="factor of the noise")
        axis.set(xlabel="time t", title=f"{name} path")
    curves.axes[0].legend(loc="upper center")
    save_figure(path, figure)


@figure_style()
def draw_streams(path: Path):
    """The blocks, both streams through them, and what each of them ends in."""
    figure = Figure(figsize=(8, 3.2))
    axis = figure.subplots()
    axis.set(xlim=(0, 16), ylim=(0, 6))
    axis.set_axis_off()

    def box(x: float, y: float, width: float, text: str, colour: str, height: float = 1.1):
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", fc="white", ec=colour, lw=1.6))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str):
        style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": colour, "lw": 1.6}
        axis.add_patch(FancyArrowPatch(start, end, **style))

    box(0.1, 2.2, 2.2, "noisy picture\n$x_t$, time $t$", "0.3", 1.4)
    box(4.1, 4.1, 1.9, "label, hidden\nin 10 %", BLUE)
    box(4.1, 0.5, 1.9, "label, hidden\nin 90 %", ORANGE)
    for y, colour, blocks in ((4.1, BLUE, 6), (0.5, ORANGE, 2)):
        arrow((2.4, 2.9), (4.0, y + 0.55), colour)
        for block in range(blocks):
            left = 7 + 1.0 * block
            arrow((left - 0.9 if block == 0 else left - 0.25, y + 0.55), (left, y + 0.55), colour)
            box(left + 0.05, y, 0.6, str(block + 1), colour)
    axis.text(9.8, 5.6, "main stream: all blocks", ha="center", color=BLUE)
    axis.text(7.8, 2.0, "probe's stream: the first $k$", ha="center", color=ORANGE)
    arrow((12.75, 4.65), (13.3, 4.65), BLUE)
    box(13.4, 4.1, 2.4, "velocity:\nwhere to move", BLUE)
    arrow((8.75, 1.05), (13.3, 1.05), ORANGE)
    box(13.4, 0.5, 2.4, "linear probe:\nwhich class?", ORANGE)
    axis.text(7.8, 3.0, "the same blocks,\nthe same weights", ha="center", va="center", color="0.4", fontsize=9)
    save_figure(path, figure)


@figure_style()
def draw_weights(path: Path):
    """The weight of the probe's loss of SiT-XL against time."""
    transformer = SiTTransformer2DModel(8, 2, 1, num_layers=8, num_attention_heads=1, attention_head_dim=8)
    weights = LSEPObjective(transformer, LinearProbe(8, 1000)).probe_weights
    figure = Figure(figsize=(6, 2.8))
    axis = figure.subplots()
    axis.stairs(weights.numpy(), np.linspace(0, 1, len(weights) + 1), color=GREEN, linewidth=2, baseline=None)
    axis.set(xlabel="time t (0: picture, 1: noise)", ylabel="weight w(t)", xlim=(0, 1), ylim=(0, 0.033))
    save_figure(path, figure)


def main(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    draw_path(folder / "concepts-path.png")
    draw_streams(folder / "concepts-streams.png")
    draw_weights(folder / "concepts-weights.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images")
