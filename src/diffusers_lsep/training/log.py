# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What training reports: metrics and their curves."""

import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..figures import figure_style, save_figure
from ..files import parse_json, write_text
from ..objective import LSEPObjectiveOutput
from ..regularizers import REGULARIZERS, regularizer_key


NUM_TIME_BINS = 10  # of the probe's loss against t


def batch_means(output: LSEPObjectiveOutput) -> dict[str, torch.Tensor]:
    """What there is to report of a batch, beside the loss: means over its samples, on the device."""
    values = {"denoising_loss": output.denoising_loss}
    if output.probe_accuracy is not None:
        values |= {"probe_loss": output.probe_loss, "probe_accuracy": output.probe_accuracy}
    return values | {f"{name}_loss": loss for name, loss in (output.regularizer_losses or {}).items()}


class StepMetrics:
    """
    Collects the metrics of training steps on the device. They reach the host, and the other processes, in one transfer
    per interval: `collect`.

    Args:
        accelerator (`Accelerator`): The processes, and the device.
        gradient_accumulation_steps (`int`, defaults to `1`): Batches per step.
    """

    def __init__(self, accelerator: Accelerator, gradient_accumulation_steps: int = 1):
        self.accelerator = accelerator
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._clear()

    def _clear(self) -> None:
        self._names: list[str] = []
        self._losses: list[torch.Tensor] = []  # by these names, one tensor per batch
        self._grad_norms: list[torch.Tensor] = []  # one per step
        # Sums over the probe's samples, of which a batch may have more or fewer than another, and their numbers.
        self._bins = torch.zeros(2, NUM_TIME_BINS, device=self.accelerator.device)
        self._correct = torch.zeros(1, device=self.accelerator.device)
        self._start = time.perf_counter()
        self._wait = 0.0

    def restart_clock(self):
        """Leaves out of the interval's seconds what was done since the last one: checkpoints and validation."""
        self._start = time.perf_counter()

    def add_batch(self, output: LSEPObjectiveOutput, timesteps: torch.Tensor, data_wait: float):
        """Takes in one batch, for which training waited `data_wait` seconds. `timesteps` are those of its probe."""
        losses = {"loss": output.loss.detach(), **batch_means(output)}
        self._names = list(losses)
        self._losses.append(torch.stack([value.float() for value in losses.values()]))
        if output.probe_losses is not None and output.probe_accuracy is not None:
            bins = (timesteps * NUM_TIME_BINS).long().clamp(max=NUM_TIME_BINS - 1)
            probe_losses = output.probe_losses.float()
            finite = probe_losses.isfinite()
            self._bins.index_add_(1, bins, torch.stack([torch.where(finite, probe_losses, 0.0), finite.float()]))
            self._correct += output.probe_accuracy * len(probe_losses)
        self._wait += data_wait

    def add_step(self, grad_norm: torch.Tensor):
        """Ends a step."""
        self._grad_norms.append(grad_norm.detach().float())

    def collect(self) -> tuple[dict[str, Any], list[float], list[float]]:
        """
        Ends an interval.

        Returns:
            `tuple[dict, list[float], list[float]]`: the means over the interval and all processes, of its finite steps
            if there are any, and the loss and the gradient's norm of every step in it.
        """
        num_steps = len(self._grad_norms)
        losses = torch.stack(self._losses).unflatten(0, (num_steps, self.gradient_accumulation_steps)).mean(dim=1)
        grad_norms = torch.stack(self._grad_norms).to(losses.device)
        values = torch.cat([losses.flatten(), grad_norms, self._correct, self._bins.flatten()])
        values = self.accelerator.reduce(values, reduction="sum").cpu()
        seconds, wait = time.perf_counter() - self._start, self._wait

        sizes = [len(self._names) * num_steps, num_steps, 1, 2 * NUM_TIME_BINS]
        losses, grad_norms, correct, bins = values.split(sizes)
        losses = losses.view(num_steps, -1) / self.accelerator.num_processes
        grad_norms = grad_norms / self.accelerator.num_processes
        sums, counts = bins.view(2, NUM_TIME_BINS).tolist()
        metrics: dict[str, Any] = dict(zip(self._names, mean_of_finite(losses).tolist()))
        metrics.pop("probe_accuracy", None)
        if any(counts):
            metrics["probe_accuracy"] = (correct / sum(counts)).item()
            metrics["probe_loss_by_time"] = [s / c if c else None for s, c in zip(sums, counts)]
        metrics["grad_norm"] = mean_of_finite(grad_norms).item()
        metrics["seconds_per_step"] = seconds / num_steps
        metrics["data_wait"] = wait / seconds
        metrics["memory_gb"] = peak_memory(self.accelerator.device) / 1e9
        self._clear()
        return metrics, losses[:, 0].tolist(), grad_norms.tolist()


def mean_of_finite(rows: torch.Tensor) -> torch.Tensor:
    """The mean over the rows whose values are all finite, or over all if none is such."""
    finite = rows.isfinite().flatten(1).all(dim=1) if rows.ndim > 1 else rows.isfinite()
    return rows[finite if finite.any() else ...].mean(dim=0)


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: the device's allocations, or on the CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


class MetricsFile:
    """
    `metrics.jsonl`: one JSON object per line, each with a `step`.

    Args:
        path (`Path`): The file.
        last_step (`int`): What later steps wrote is dropped: a run that continues writes it anew.
        validates (`bool`): Whether that holds for the validation of the last step too.
    """

    def __init__(self, path: Path, last_step: int, validates: bool):
        self.path = path
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= last_step]
            if validates:
                kept = [line for line in kept if line["step"] < last_step or not is_validation(line)]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, metrics: dict[str, Any]):
        """Writes a line. Numbers that JSON lacks become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def is_validation(line: dict[str, Any]) -> bool:
    return any(name.startswith("validation_") for name in line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without what a killed run or a full disk left between them."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            lines.append(parse_json(line))
    return [line for line in lines if isinstance(line, dict)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The [`read_lines`] of a `metrics.jsonl`."""
    return [line for line in read_lines(path) if "step" in line]


@figure_style()
def plot_curves(metrics: list[dict[str, Any]], path: Path):
    """
    Draws the curves of a `metrics.jsonl` into a PNG file. Needs matplotlib.

    Args:
        metrics (`list[dict]`): Its lines.
        path (`Path`): The file to write.
    """
    from matplotlib.figure import Figure

    panels = {
        "denoising loss": (("denoising_loss", "training"), ("validation_denoising_loss", "held out")),
        "probe loss, weighted": (("probe_loss", "training"), ("validation_probe_loss", "held out")),
        **{
            f"{name} loss, weighted": ((f"{key}_loss", "training"), (f"validation_{key}_loss", "held out"))
            for name, key in {"REPA": "repa", **{name: regularizer_key(name) for name in REGULARIZERS}}.items()
        },
        "probe accuracy, mean over times t from 0 to 1": (
            ("probe_accuracy", "training, some with their label"),
            ("validation_probe_accuracy", "held out, none with its label"),
        ),
        "gradient norm": (("grad_norm", "training"),),
    }
    known = {key for line in metrics for key, value in line.items() if value is not None}
    panels = {title: keys for title, keys in panels.items() if known.intersection(key for key, _ in keys)}
    figure = Figure(figsize=(8, 2.8 * -(-len(panels) // 2)))
    shape = (-(-len(panels) // 2), min(2, len(panels)))
    every_axis = figure.subplots(*shape, squeeze=False).ravel()
    for axes, (title, keys) in zip(every_axis, panels.items()):
        for key, name in keys:
            points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points), label=name, marker="o" if name.startswith("held out") else None, markersize=3)
        axes.set(title=title, xlabel="training step")
        if len(keys) > 1:
            axes.legend()
    for axes in every_axis[len(panels) :]:
        axes.set_axis_off()
    save_figure(path, figure)


def draw_curves(output_dir: Path):
    """Draws `curves.png` of a run, where matplotlib is installed."""
    try:
        plot_curves(read_metrics(output_dir / "metrics.jsonl"), output_dir / "curves.png")
    except ImportError:
        print("curves.png needs matplotlib: pip install 'diffusers_lsep[train]'", file=sys.stderr)
