# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear classifiers on the tokens of every layer, at several times (REPA's linear probing)."""

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.draws import Purpose, keyed_generator
from ..data.sources import SampleSource
from ..devices import exact_dtype
from ..figures import add_accuracy_scale, draw_accuracies, figure_style, save_figure
from ..files import make_temporary_array
from ..interpolants import get_interpolant
from ..objective import LinearProbe
from ..pipeline_lsep import LSEPPipeline
from ..progress import make_progress_bar
from ..sampling import float32_products
from .labelled_data import load_latents


logger = logging.getLogger(__name__)

METHODS = ("mae", "ridge")

DEFAULT_TIMESTEPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# MAE's linear probing on ImageNet (arXiv 2111.06377, table 10): LARS with learning rate 0.1 * 16384 / 256.
MAE_EPOCHS = 90
MAE_WARMUP_EPOCHS = 10
MAE_BATCH_SIZE = 16384
MAE_STEPS_PER_EPOCH = 78
MAE_LEARNING_RATE = 6.4
LARS_MOMENTUM = 0.9
LARS_TRUST_COEFFICIENT = 0.001

# Training and held-out images share no noise.
NOISE_PURPOSES = {"training": Purpose.TRAINING_FEATURES, "held-out": Purpose.HELD_OUT_FEATURES}


def fit_mae(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, epochs: int = MAE_EPOCHS, seed: int = 0
) -> nn.Module:
    """
    Trains a linear classifier by the protocol of MAE (He et al. 2021, arXiv 2111.06377, table 10): BatchNorm without
    affine parameters and a linear layer, LARS with momentum 0.9 and learning rate 6.4, 10 of 90 epochs of warm-up,
    then a cosine, no weight decay, batches of 16,384.

    Two things differ. Features are fixed, so images are not augmented. And a data set smaller than ImageNet is divided
    into smaller batches, of at least 32, so that an epoch keeps up to 78 steps; the learning rate stays, as LARS takes
    steps relative to the norm of the weights.

    Args:
        features (`torch.Tensor`):
            Features `[N, D]`, `N >= 2`.
        labels (`torch.Tensor`):
            Classes `[N]` in `0..num_classes - 1`.
        num_classes (`int`):
            Number of classes.
        epochs (`int`, defaults to `90`):
            Length of the training; the warm-up takes a ninth of it.
        seed (`int`, defaults to `0`):
            Of the initial weights and the order.

    Returns:
        `nn.Module`: takes features to logits.
    """
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6)
    linear = nn.Linear(features.shape[1], num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    probe = nn.Sequential(norm, linear).to(features.device)
    momenta = [torch.zeros_like(parameter) for parameter in linear.parameters()]

    count = len(features)
    batch_size = min(count, MAE_BATCH_SIZE, max(32, count // MAE_STEPS_PER_EPOCH))
    num_steps = count // batch_size
    warmup = epochs * MAE_WARMUP_EPOCHS / MAE_EPOCHS
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator).to(features.device)
        for step in range(num_steps):
            progress = epoch + step / num_steps
            scale = progress / warmup
            if progress >= warmup:
                scale = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (epochs - warmup)))
            rows = order[step * batch_size : (step + 1) * batch_size]
            loss = F.cross_entropy(probe(features[rows]), labels[rows])
            gradients = torch.autograd.grad(loss, list(linear.parameters()))
            with torch.no_grad():
                for parameter, gradient, momentum in zip(linear.parameters(), gradients, momenta):
                    if parameter.ndim > 1:  # LARS leaves biases alone
                        trust = LARS_TRUST_COEFFICIENT * parameter.norm() / gradient.norm()
                        gradient = gradient * torch.where(torch.isfinite(trust) & (trust > 0), trust, 1.0)
                    momentum.mul_(LARS_MOMENTUM).add_(gradient)
                    parameter.sub_(MAE_LEARNING_RATE * scale * momentum)
    return probe.eval().requires_grad_(False)


class NormalEquations:
    """
    Ridge regression of one-hot classes on features that come in batches, of which none is kept: their sums and
    products in float64.

    Args:
        num_classes (`int`):
            Number of classes `K`.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self._shift: torch.Tensor | None = None  # near the mean, so that nothing cancels in variances
        self._sums: list[torch.Tensor] = []  # of features [D], their products [D, D], those with classes [D, K], [K]

    def add(self, features: torch.Tensor, labels: torch.Tensor):
        """Takes in features `[B, D]` of the classes `[B]`."""
        self._device = features.device
        if exact_dtype(features.device) != torch.float64:
            features, labels = features.cpu(), labels.cpu()
        if self._shift is None:
            self._shift = features[0].double()
        x, targets = features.double() - self._shift, F.one_hot(labels, self.num_classes).double()
        sums = [x.sum(dim=0), x.T @ x, x.T @ targets, targets.sum(dim=0)]
        self._sums = [total.add_(value) for total, value in zip(self._sums, sums)] if self._sums else sums

    def solve(self, regularization: float = 0.01) -> nn.Linear:
        """
        The classifier: least squares from standardised features to one-hot classes, with `regularization` (above 0)
        times the identity added to the features' correlation matrix. It takes features to scores, of which the
        largest marks the class.
        """
        if self._shift is None:
            raise ValueError("`add` has to be called with features before `solve`.")
        count = self._sums[-1].sum()
        mean, products, products_with_classes, share = (value / count for value in self._sums)
        covariance = products - torch.outer(mean, mean)
        variance = covariance.diagonal()
        inverse_std = torch.where(variance > 0, variance.rsqrt(), 0.0)
        gram = covariance * inverse_std * inverse_std[:, None]
        gram += regularization * torch.eye(len(mean), dtype=gram.dtype, device=gram.device)
        targets = (products_with_classes - torch.outer(mean, share)) * inverse_std[:, None]
        weight = torch.linalg.solve(gram, targets) * inverse_std[:, None]
        linear = nn.Linear(weight.shape[0], weight.shape[1], device=self._device)
        linear.weight.data.copy_(weight.T)
        linear.bias.data.copy_(share - (mean + self._shift) @ weight)
        return linear.requires_grad_(False)


@torch.no_grad()
def find_hits(probe: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Whether the largest score of each of the features `[N, D]` is that of its class; bool, `[N]`."""
    return (probe(features).argmax(dim=1) == labels).cpu().numpy()


class HiddenStates:
    """
    Token means of a model's layers on noised images, without a class label (the null class).

    Args:
        pipe ([`LSEPPipeline`]):
            The model.
        layers (`Sequence[int]`):
            Depths, in blocks.
        folder (`str` or `os.PathLike`):
            Where there is room for latents, and features that are kept, out of memory's way. No file is seen there.
        batch_size (`int`, defaults to `64`):
            Images at a time.
        seed (`int`, defaults to `0`):
            With an image's row it decides its noise, which is the same at every time.
        allow_tf32 (`bool`, *optional*):
            For VAE and model, of [`~sampling.float32_products`].
    """

    def __init__(
        self,
        pipe: LSEPPipeline,
        layers: Sequence[int],
        folder: str | os.PathLike,
        batch_size: int = 64,
        seed: int = 0,
        allow_tf32: bool | None = None,
    ):
        self.pipe, self.layers, self.folder = pipe, list(layers), Path(folder)
        self.batch_size, self.seed, self.allow_tf32 = batch_size, seed, allow_tf32

    def encode(self, name: str, source: SampleSource) -> np.ndarray:
        """
        Latents `[N, C, S, S]` of a source, `"training"` or `"held-out"`: the means of the VAE's posterior, or pixels
        without a VAE.
        """
        config = self.pipe.transformer.config
        shape = (len(source.labels), config.in_channels, config.sample_size, config.sample_size)
        latents = make_temporary_array(self.folder, np.float32, shape)
        for start, rows in self._batches(len(latents), f"{name} images"):
            with float32_products(self.allow_tf32):
                latents[start : start + len(rows)] = load_latents(self.pipe, source, rows).cpu().numpy()
        return latents

    @torch.no_grad()
    def batches_at(self, t: float, name: str, latents: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the latents and their features at a time, float32 `[layers, B, D]` on the device: none are kept."""
        pipe = self.pipe
        path, null_class = get_interpolant(pipe.config.path_type), pipe.transformer.config.num_classes
        for start, rows in self._batches(len(latents), f"{name} features at t = {t:g}"):
            noise = np.stack(
                [
                    keyed_generator(self.seed, int(row), NOISE_PURPOSES[name]).standard_normal(
                        latents.shape[1:], dtype=np.float32
                    )
                    for row in rows
                ]
            )
            x = path.interpolate(torch.from_numpy(latents[rows]), torch.from_numpy(noise), t).to(pipe.device)
            labels = torch.full((len(rows),), null_class, device=pipe.device)
            with float32_products(self.allow_tf32):
                tokens = pipe.transformer.hidden_states_at(x.to(pipe.transformer.dtype), t, labels, self.layers)
            features = torch.stack([value.mean(dim=1, dtype=torch.float32) for value in tokens])
            finite = features.isfinite().flatten(1).all(dim=1).tolist()
            if not all(finite):
                dtype = str(pipe.transformer.dtype).removeprefix("torch.")
                raise ValueError(
                    f"`transformer` in {dtype} gives tokens that are no finite numbers after"
                    f" {self.layers[finite.index(False)]} blocks at t = {t:g}."
                )
            yield slice(start, start + len(rows)), features

    def at(self, t: float, name: str, latents: np.ndarray) -> np.ndarray:
        """All of the features `[layers, N, D]` at a time, on disk."""
        shape = (len(self.layers), len(latents), self.pipe.transformer.inner_dim)
        features = make_temporary_array(self.folder, np.float32, shape)
        for rows, values in self.batches_at(t, name, latents):
            features[:, rows] = values.cpu().numpy()
        return features

    def _batches(self, count: int, description: str):
        starts = range(0, count, self.batch_size)
        for start in make_progress_bar(iterable=starts, desc=description, unit="batch", leave=False):
            yield start, np.arange(start, min(start + self.batch_size, count))


def fit_layers(
    states: HiddenStates,
    t: float,
    latents: np.ndarray,
    labels: torch.Tensor,
    layers: Sequence[int],
    num_classes: int,
    method: str,
    epochs: int,
    seed: int,
) -> dict[int, nn.Module]:
    """The classifiers of layers at a time, by layer, fitted to the latents of the training images."""
    if method == "ridge":
        equations = {layer: NormalEquations(num_classes) for layer in layers}
        for rows, features in states.batches_at(t, "training", latents):
            for layer, value in zip(states.layers, features):
                if layer in equations:
                    equations[layer].add(value, labels[rows])
        return {layer: each.solve() for layer, each in equations.items()}
    # MAE's training goes through the features epoch after epoch.
    kept = states.at(t, "training", latents)
    probes: dict[int, nn.Module] = {}
    for layer in layers:
        x = torch.from_numpy(kept[states.layers.index(layer)].copy()).to(labels.device)
        probes[layer] = fit_mae(x, labels, num_classes, epochs=epochs, seed=seed)
    return probes


def probe_layers(
    pipe: LSEPPipeline,
    train: SampleSource,
    held_out: SampleSource,
    num_classes: int,
    layers: Sequence[int] | None = None,
    timesteps: Sequence[float] = DEFAULT_TIMESTEPS,
    method: str = "mae",
    epochs: int = MAE_EPOCHS,
    training_probe: LinearProbe | None = None,
    probe_depth: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    allow_tf32: bool | None = None,
) -> dict[str, Any]:
    """
    Held-out accuracy of linear classifiers on the mean of the tokens of every layer at every time, with no class label
    given (REPA's linear probing, arXiv 2410.06940).

    Args:
        pipe ([`LSEPPipeline`]):
            The model.
        train ([`SampleSource`]):
            What the classifiers are fitted to.
        held_out ([`SampleSource`]):
            What accuracy is measured on: images that neither `train` nor the training of the model has.
        num_classes (`int`):
            Number of classes of the data, which need not be the model's.
        layers (`Sequence[int]`, *optional*):
            Depths in blocks, 0 for the embedded patches; all blocks if not given.
        timesteps (`Sequence[float]`, defaults to `(0.0, 0.1, ..., 0.9)`):
            Times `t` in [0, 1].
        method (`str`, defaults to `"mae"`):
            `"mae"` ([`fit_mae`]), which keeps the features of all layers at one time in the temporary folder (4 bytes
            x images x layers x width), or `"ridge"` ([`NormalEquations`]), which is fast and keeps none.
        epochs (`int`, defaults to `90`):
            Length of MAE's training.
        training_probe ([`LinearProbe`], *optional*):
            LSEP's own probe, which is measured on the same features as it is.
        probe_depth (`int`, *optional*):
            The depth it was trained at.
        batch_size (`int`, defaults to `64`):
            Images in one pass of the model.
        seed (`int`, defaults to `0`):
            Of the noise, of MAE's training and of the two halves.
        allow_tf32 (`bool`, *optional*):
            For VAE and model, of [`~sampling.float32_products`].

    Returns:
        `dict[str, Any]`: `layers`, `timesteps`, `accuracy` (a row for each layer, a column for each time, on all
        held-out images), `best` (the layer and time that are best on one half of the held-out images, and their
        accuracy on the other half, which took no part in the choice) and `training_probe` (its accuracy at each time),
        ready for JSON.

    Raises:
        `ValueError`: before any work, if an argument is out of range.
    """
    depth = pipe.transformer.config.num_layers
    layers = list(range(1, depth + 1)) if layers is None else sorted(set(layers))
    if not layers or not 0 <= layers[0] <= layers[-1] <= depth:
        raise ValueError(f"`layers` has to lie in 0..{depth}, but is {layers}.")
    timesteps = sorted(set(timesteps))
    if not timesteps or not 0 <= timesteps[0] <= timesteps[-1] <= 1:
        raise ValueError(f"`timesteps` has to lie in [0, 1], but is {timesteps}.")
    if method not in METHODS:
        raise ValueError(f"`method` has to be one of {list(METHODS)}, but is {method!r}.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` has to be at least 1, but is {value}.")
    if training_probe is not None and (probe_depth is None or not 1 <= probe_depth <= depth):
        raise ValueError(f"`probe_depth` has to lie in 1..{depth}, but is {probe_depth}.")
    if len(train.labels) < 2 or len(held_out.labels) < 2:
        raise ValueError(
            f"the data has to hold 2 images to fit and 2 to measure, but holds {len(train.labels)} and "
            f"{len(held_out.labels)}."
        )

    device = pipe.device
    all_layers = sorted({*layers, probe_depth}) if training_probe is not None and probe_depth is not None else layers
    sources = {"training": train, "held-out": held_out}
    labels = {name: torch.from_numpy(source.labels).to(device) for name, source in sources.items()}
    hits = np.zeros((len(layers), len(timesteps), len(held_out.labels)), dtype=bool)
    of_training_probe = np.zeros((len(timesteps), len(held_out.labels)), dtype=bool)
    states = HiddenStates(pipe, all_layers, tempfile.gettempdir(), batch_size, seed, allow_tf32)
    latents = {name: states.encode(name, source) for name, source in sources.items()}
    for column, t in enumerate(timesteps):
        fit = (latents["training"], labels["training"], layers, num_classes, method, epochs, seed)
        probes = fit_layers(states, t, *fit)
        for rows, features in states.batches_at(t, "held-out", latents["held-out"]):
            for layer, x in zip(all_layers, features):
                if layer in probes:
                    hits[layers.index(layer), column, rows] = find_hits(probes[layer], x, labels["held-out"][rows])
                if training_probe is not None and layer == probe_depth:
                    probe = training_probe.to(device)
                    means = x[:, None]  # of the tokens, which is all that the probe looks at
                    of_training_probe[column, rows] = find_hits(probe, means, labels["held-out"][rows])
    # The largest of many accuracies is too high by chance, unless it is measured anew.
    order = keyed_generator(seed, 0, Purpose.HALVES).permutation(len(held_out.labels))
    choosing, measuring = np.split(order, [len(order) // 2])
    chosen = hits[:, :, choosing].mean(axis=2)
    row, column = np.unravel_index(chosen.argmax(), chosen.shape)
    return {
        "accuracy": hits.mean(axis=2).tolist(),
        "layers": layers,
        "timesteps": timesteps,
        "best": {
            "layer": layers[row],
            "timestep": timesteps[column],
            "accuracy": hits[row, column, measuring].mean().item(),
            "num_images_chosen_on": len(choosing),
            "num_images_measured_on": len(measuring),
        },
        "training_probe": {"layer": probe_depth, "accuracy": of_training_probe.mean(axis=1).tolist()}
        if training_probe is not None
        else None,
        "chance": np.bincount(held_out.labels).max().item() / len(held_out.labels),
        "method": method,
        "epochs": epochs if method == "mae" else None,
        "num_training_images": len(train.labels),
        "num_held_out_images": len(held_out.labels),
        "num_classes": num_classes,
        "seed": seed,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "allow_tf32": allow_tf32,
    }


@figure_style()
def draw_heat_map(path: str | os.PathLike, results: dict[str, Any], title: str = "") -> None:
    """
    Draws the accuracies of [`probe_layers`], layer against time, as a PNG that appears whole or not at all. Chance is
    marked on the scale, and the layer that the training's own probe read with a frame.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        results (`dict[str, Any]`):
            What [`probe_layers`] returned.
        title (`str`, defaults to `""`):
            Its title.
    """
    from matplotlib.figure import Figure

    trained = results["training_probe"]["layer"] if results["training_probe"] is not None else None
    rows, columns = np.shape(results["accuracy"])
    figure = Figure(figsize=(max(6.0, 2.2 + 0.6 * columns), 1.9 + 0.35 * rows))
    axis: Any = figure.subplots()
    image = draw_accuracies(axis, results["accuracy"], results["layers"], results["timesteps"], trained)
    axis.set(ylabel="read after this many blocks", title=title)
    add_accuracy_scale(figure, axis, image, results["chance"], trained is not None)
    save_figure(path, figure)
