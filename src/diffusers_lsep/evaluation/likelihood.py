# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Likelihood of images under a model, by the ODE that its samples follow (arXiv 2011.13456, appendix D.2)."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..data.draws import Purpose, keyed_generator
from ..data.sources import SampleSource
from ..devices import exact_dtype
from ..pipeline_lsep import LSEPPipeline
from ..progress import make_progress_bar
from .labelled_data import load_latents


TRACES = ("hutchinson", "exact")
# Images have 256 levels, and the model sees them in [-1, 1].
PIXEL_STEP = 2 / 255


def velocity_and_divergence(
    pipe: LSEPPipeline, latents: torch.Tensor, t: float, class_ids: torch.Tensor, directions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The velocity and its divergence in the state.

    Args:
        pipe ([`LSEPPipeline`]): The model, without guidance.
        latents (`torch.Tensor` of shape `[B, C, S, S]`): The state.
        t (`float`): The time.
        class_ids (`torch.Tensor` of shape `[B]`): Classes.
        directions (`torch.Tensor` of shape `[P, B, C, S, S]`, *optional*):
            Vectors `e` of mean 0 and covariance 1 for the mean of `e^T J e` (Hutchinson's estimate of the trace,
            arXiv 1810.01367); the exact trace, with a backward pass for each dimension, if not given.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: in the dtype of [`exact_dtype`], `[B, C, S, S]` and `[B]`.
    """
    dtype = exact_dtype(latents.device)
    with torch.enable_grad():
        state = latents.detach().requires_grad_()
        velocity = pipe.predict_velocity(state, t, class_ids)
        divergence = torch.zeros(len(state), dtype=dtype, device=state.device)
        if directions is None:
            for index in range(state[0].numel()):
                output = velocity.flatten(1)[:, index].sum()
                (gradient,) = torch.autograd.grad(output, state, retain_graph=True)
                divergence += gradient.flatten(1)[:, index]
        else:
            for direction in directions:
                output = (velocity * direction).sum()
                (gradient,) = torch.autograd.grad(output, state, retain_graph=True)
                divergence += (gradient * direction).flatten(1).sum(dim=1) / len(directions)
    return velocity.detach().to(dtype), divergence


def log_likelihood(
    pipe: LSEPPipeline,
    latents: torch.Tensor,
    class_ids: torch.Tensor,
    num_steps: int = 50,
    directions: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `log p(x | class)` of latents, or of pixels for a model without a VAE, in nats: the log density of the noise that
    the ODE `dx/dt = v(x, t)` leads to, and the integral of the velocity's divergence on the way there. Solved by the
    classical method of fourth order on the times `(i / num_steps)^2`, which are denser near the data.

    Args:
        pipe ([`LSEPPipeline`]): The model.
        latents (`torch.Tensor` of shape `[B, C, S, S]`): What it is asked about.
        class_ids (`torch.Tensor` of shape `[B]`): Classes; `num_classes` is none.
        num_steps (`int`, defaults to `50`): Steps of the solver, with four evaluations each.
        directions (`torch.Tensor`, *optional*): As for [`velocity_and_divergence`].

    Returns:
        `torch.Tensor`: `[B]`, in the dtype of [`exact_dtype`].
    """
    x = latents.to(exact_dtype(latents.device))
    change = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    times = [(i / num_steps) ** 2 for i in range(num_steps + 1)]
    for t, end in zip(times, times[1:]):
        h = end - t
        slopes: list[tuple[torch.Tensor, torch.Tensor]] = []
        for offset in (0, h / 2, h / 2, h):
            state = x + offset * slopes[-1][0] if slopes else x
            slopes.append(velocity_and_divergence(pipe, state, t + offset, class_ids, directions))
        for weight, (velocity, divergence) in zip((1, 2, 2, 1), slopes):
            x, change = x + weight * h / 6 * velocity, change + weight * h / 6 * divergence
    log_density = -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1)
    return log_density + change


def measure_likelihood(
    pipe: LSEPPipeline,
    source: SampleSource,
    class_ids: np.ndarray,
    with_classes: bool = True,
    classify: bool = False,
    trace: str = "hutchinson",
    num_directions: int = 1,
    num_steps: int = 50,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Mean log likelihood of images. Pixels get uniform noise of the width of a level, so that a density of them bounds
    the probability of the image with 256 levels from below (arXiv 1511.01844); of a VAE's latents, which are drawn
    from its posterior, it is the density itself, and says nothing about what the VAE loses.

    Args:
        pipe ([`LSEPPipeline`]): The model, in float32.
        source (`SampleSource`): The images.
        class_ids (`np.ndarray` of shape `[N]`): Their classes, in the numbers of the pipeline.
        with_classes (`bool`, defaults to `True`): Whether the model is given them.
        classify (`bool`, defaults to `False`):
            Whether to compute the likelihood under every class, with the same noise, and by Bayes' rule, all classes
            being equally frequent, the probability of each class: a classifier that nobody has trained as such
            (arXiv 2303.16203).
        trace (`str`, defaults to `"hutchinson"`):
            How the divergence is computed: `"hutchinson"`, an estimate without bias, or `"exact"`.
        num_directions (`int`, defaults to `1`): For the estimate, how many random directions are averaged.
        num_steps (`int`, defaults to `50`): Of [`log_likelihood`].
        batch_size (`int`, defaults to `64`): Images at a time.
        seed (`int`, defaults to `0`): With an image's row it decides its noise.

    Returns:
        `dict`: `nats_per_dim` (of the density), of pixels `bits_per_dim` (upper bound, 8 is that of uniform noise),
        their standard errors over the images, `solver_error` (the mean difference that half of the steps make in the
        first batch, in nats per dimension), `space`, and with `classify` a `classifier` with `accuracy` and
        `cross_entropy` in nats. Of `classify` the likelihood is that without a class, the mean over the classes.

    Raises:
        `ValueError`: if a likelihood is no finite number.
    """
    config = pipe.transformer.config
    in_pixels, device = pipe.vae is None, pipe.device
    dims = config.in_channels * config.sample_size**2
    found: list[torch.Tensor] = []
    solver_error = 0.0

    def ask(latents: torch.Tensor, ids: torch.Tensor, directions: torch.Tensor | None, steps: int) -> torch.Tensor:
        return log_likelihood(pipe, latents, ids, steps, directions).cpu()

    for rows in _batches(len(source.labels), batch_size):
        # 1. The images with their noise
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise, signs = _draw(seed, rows, shape, in_pixels, num_directions)
        latents = load_latents(pipe, source, rows, None if in_pixels else noise)
        if in_pixels:
            latents = latents + PIXEL_STEP * (noise.to(device) - 0.5)
        directions = signs.to(device) if trace == "hutchinson" else None

        # 2. Their likelihood: `[B]`, or `[B, K]`
        ids = torch.from_numpy(class_ids[rows]).to(device)
        asked = list(range(config.num_classes)) if classify else [None]
        columns = []
        for class_id in asked:
            given = ids if with_classes else torch.full_like(ids, config.num_classes)
            given = given if class_id is None else torch.full_like(ids, class_id)
            columns.append(ask(latents, given, directions, num_steps))
        if rows[0] == 0 and num_steps > 1:
            coarse = ask(latents, given, directions, num_steps // 2)
            solver_error = float((coarse - columns[-1]).mean().abs()) / dims
        found.append(torch.stack(columns, dim=1))
    values = torch.cat(found)
    if not values.isfinite().all():
        raise ValueError(
            "`transformer` has come to likelihoods that are no finite numbers: its weights may be damaged."
        )

    # 3. What it comes to
    num_asked = values.shape[1]
    nats = (torch.logsumexp(values, dim=1) - math.log(num_asked)) / dims
    error = float(nats.std(correction=1) / math.sqrt(len(nats))) if len(nats) > 1 else None
    results: dict[str, Any] = {
        "num_images": len(nats),
        "space": "pixels" if in_pixels else "latents, without what the VAE loses",
        "dimensions": dims,
        "given": "no class" if classify or not with_classes else "the class",
        "nats_per_dim": float(nats.mean()),
        "nats_per_dim_standard_error": error,
    }
    if in_pixels:
        # The density times the width of a level is the bound of its probability.
        results["bits_per_dim"] = -(results["nats_per_dim"] + math.log(PIXEL_STEP)) / math.log(2)
        results["bits_per_dim_standard_error"] = None if error is None else error / math.log(2)
    if classify:
        labels = torch.from_numpy(class_ids)
        results["classifier"] = {
            "accuracy": float((values.argmax(dim=1) == labels).double().mean()),
            "cross_entropy": float(torch.nn.functional.cross_entropy(values, labels)),
            "chance": 1 / num_asked,
        }
    settings = {"trace": trace, "num_steps": num_steps, "seed": seed, "batch_size": batch_size}
    if trace == "hutchinson":
        settings["num_directions"] = num_directions
    return {**results, "solver_error": solver_error, **settings}


def _batches(count: int, batch_size: int) -> Iterator[np.ndarray]:
    starts = range(0, count, batch_size)
    for start in make_progress_bar(iterable=starts, desc="Likelihood", unit="batch", leave=False):
        yield np.arange(start, min(start + batch_size, count))


def _draw(
    seed: int, rows: np.ndarray, shape: tuple[int, ...], uniform: bool, num_directions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of each row, uniform in [0, 1) or normal, `[B, C, S, S]`; and directions of signs, `[P, B, C, S, S]`."""
    noise, signs = [], []
    for row in rows:
        generator = keyed_generator(seed, int(row), Purpose.LIKELIHOOD)
        draw = generator.random if uniform else generator.standard_normal
        noise.append(draw(shape, dtype=np.float32))
        signs.append(2 * generator.integers(2, size=(num_directions, *shape)).astype(np.float32) - 1)
    return torch.from_numpy(np.stack(noise)), torch.from_numpy(np.stack(signs, axis=1))
