# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The solvers against closed forms.

With Gaussian data of mean `MEAN` and standard deviation `STD` the exact velocity is affine in the sample, so what
comes out of a schedule is an affine map of the initial sample and of the noise of every step. Its coefficients, read
off `step` itself, give mean and variance without any sampling error.
"""

import ast
import fractions
import inspect
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from diffusers_lsep import (
    FlowMapScheduler,
    FlowMatchHeunODEScheduler,
    FlowMatchSDEMultistepScheduler,
    FlowMatchSDEScheduler,
)
from diffusers_lsep.interpolants import get_interpolant


MEAN, STD = 0.3, 0.2
SDE_FORMS = ["constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm"]


def diffusers_schedulers(*names):
    return [getattr(diffusers, f"{name}Scheduler") for name in names]


def marginal(path_type, t, data_std=STD):
    """Mean and standard deviation of `x_t`."""
    path = get_interpolant(path_type)
    return path.alpha(t) * MEAN, math.sqrt((path.alpha(t) * data_std) ** 2 + path.sigma(t) ** 2)


def exact_velocity(path_type, sample, t, data_std=STD):
    path = get_interpolant(path_type)
    mean, std = marginal(path_type, t, data_std)
    slope = (path.alpha(t) * path.d_alpha(t) * data_std**2 + path.sigma(t) * path.d_sigma(t)) / std**2
    return path.d_alpha(t) * MEAN + slope * (sample - mean)


def exact_score(path_type, sample, t):
    mean, std = marginal(path_type, t)
    return -(sample - mean) / std**2


def moments(scheduler, until=0.0, data_std=STD):
    """Mean and standard deviation after the steps that start above `until`, from the exact start."""
    path_type = scheduler.config.path_type
    mean, std = marginal(path_type, scheduler.sigmas[0].item(), data_std)
    # One trajectory for the constant, one for the slope in the initial sample, one for the noise of each step. So it
    # does not matter what a solver remembers of its earlier steps.
    state = torch.zeros(2 + len(scheduler.timesteps), dtype=torch.float64)
    state[1] = 1
    for i, timestep in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[i].item()
        if t <= until:
            break
        noise = torch.zeros_like(state)
        noise[2 + i] = 1
        velocity = exact_velocity(path_type, state, t, data_std)
        state = scheduler.step(velocity, timestep, state, variance_noise=noise).prev_sample
    slopes = state[1:] - state[0]
    return float(state[0] + slopes[0] * mean), math.sqrt((slopes[0] * std) ** 2 + slopes[1:].square().sum())


def errors(scheduler_class, steps, until=0.0, data_std=STD, **config):
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(steps)
    found = moments(scheduler, until, data_std)
    expected = marginal(scheduler.config.path_type, until, data_std)
    return [abs(a - b) for a, b in zip(found, expected)]


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
def test_sde_converges_with_order_one_before_its_last_step(path_type, diffusion_form):
    config = {"path_type": path_type, "diffusion_form": diffusion_form}
    coarse = errors(FlowMatchSDEScheduler, 1000, until=0.04, **config)
    fine = errors(FlowMatchSDEScheduler, 2000, until=0.04, **config)
    for before, after in zip(coarse, fine):
        assert after < 2e-3
        assert before / after == pytest.approx(2, abs=0.25) or before < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
def test_second_order_sde_converges_with_order_two_before_its_last_step(path_type, diffusion_form):
    # w / sigma^2 of the constant form is 625 at the end: it takes many steps until they are small
    steps = 1600 if diffusion_form == "constant" else 400

    def total(steps):
        config = {"path_type": path_type, "diffusion_form": diffusion_form}
        # of two widths, for at one of them the leading error may happen to vanish
        found = [errors(FlowMatchSDEMultistepScheduler, steps, 0.04, data_std, **config) for data_std in (STD, 0.5)]
        assert max(mean for mean, _ in found) < 1e-12, "the mean is exact"
        return sum(std for _, std in found)

    coarse, fine = total(steps), total(2 * steps)
    assert fine < 2e-5 and coarse / fine == pytest.approx(4, abs=0.5)


def test_second_order_sde_on_grids_of_ones_own():
    def excess(grid):
        """Of the spread at `t = 0.04`."""
        scheduler = FlowMatchSDEMultistepScheduler()
        scheduler.set_timesteps(sigmas=grid)
        return moments(scheduler, until=0.04)[1] / marginal("linear", 0.04)[1] - 1

    uniform = torch.linspace(0.96, 0.04, 32, dtype=torch.float64)
    assert abs(excess(uniform)) < 0.01
    # Long steps after short ones: less exact, but what is extrapolated does not explode.
    for distance in (1e-4, 1e-12):
        pairs = torch.stack([uniform + distance, uniform], dim=1).flatten()
        assert abs(excess(pairs)) < 0.05


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
def test_second_order_sde_takes_times_next_to_each_other(path_type, diffusion_form):
    times = [0.9, 0.78, 0.5, 0.3]  # 0.78: where rounding would make a rate of the cosine path negative
    times += [math.nextafter(t, 0) for t in times] + [math.nextafter(math.nextafter(t, 0), 0) for t in times]
    scheduler = FlowMatchSDEMultistepScheduler(path_type=path_type, diffusion_form=diffusion_form)
    scheduler.set_timesteps(sigmas=sorted(times, reverse=True))
    scheduler.set_begin_index(0)  # in `timesteps`, which are float32, they are the same
    mean, std = moments(scheduler)
    assert mean == pytest.approx(MEAN) and math.isfinite(std)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
@pytest.mark.parametrize("steps", [2, 5])
def test_second_order_sde_is_exact_for_a_point(path_type, diffusion_form, steps):
    """The data prediction is constant then, and the rest of the equation is linear."""
    config = {"path_type": path_type, "diffusion_form": diffusion_form, "diffusion_norm": 0.7}
    found = errors(FlowMatchSDEMultistepScheduler, steps, until=0.04, data_std=0.0, **config)
    assert found == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("path_type", "diffusion_form", "integral"),
    [  # of w / sigma^2
        ("linear", "constant", lambda t: -1 / t),
        ("linear", "sigma", math.log),
        ("linear", "linear", math.log),
        ("linear", "sbdm", lambda t: math.log(t / (1 - t))),
        ("cosine", "constant", lambda t: -2 / math.pi / math.tan(math.pi / 2 * t)),
        ("cosine", "sigma", lambda t: 2 / math.pi * math.log(math.tan(math.pi / 4 * t))),
        ("cosine", "sbdm", lambda t: math.log(math.tan(math.pi / 2 * t))),
    ],
)
def test_second_order_sde_keeps_the_noise_of_the_sde(path_type, diffusion_form, integral):
    """How much of the noise a step keeps and how much it replaces."""
    path, norm, t, u = get_interpolant(path_type), 0.7, 0.9, 0.5
    scheduler = FlowMatchSDEMultistepScheduler(path_type=path_type, diffusion_form=diffusion_form, diffusion_norm=norm)
    scheduler.set_timesteps(sigmas=[t, u])
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # The data are the point 0.
    velocity = path.d_sigma(t) / path.sigma(t) * x
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64)
    kept, new = scheduler.step(velocity, scheduler.timesteps[0], x, variance_noise=noise).prev_sample.tolist()
    factor = math.exp(-norm * (integral(t) - integral(u)))
    assert kept == pytest.approx(path.sigma(u) / path.sigma(t) * factor, rel=1e-8)
    assert new == pytest.approx(path.sigma(u) * math.sqrt(1 - factor**2), rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
def test_64_second_order_steps_are_as_good_as_250_of_euler_maruyama(path_type, diffusion_form):
    """On Gaussians from narrow to wide, where the error is that of the spread."""
    config = {"path_type": path_type, "diffusion_form": diffusion_form}
    stds = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]

    def compare(until):
        first = [math.hypot(*errors(FlowMatchSDEScheduler, 250, until, std, **config)) for std in stds]
        second = [math.hypot(*errors(FlowMatchSDEMultistepScheduler, 64, until, std, **config)) for std in stds]
        return [b / a for a, b in zip(first, second)], sum(second) / sum(first)

    ratios, ratio = compare(0.04)
    if diffusion_form != "constant":
        assert max(ratios) < 0.5 and ratio < 0.1
    else:
        # On the linear path Euler-Maruyama's error changes its sign between the two widest, and is very small there.
        assert max(ratios[:5]) < 1 and ratio < 0.2
        assert max(ratios) < (11 if path_type == "linear" else 1)
    ratios, ratio = compare(0.0)
    # So it does at the narrowest, after the last step.
    assert max(ratios[1:]) < 0.5 and ratio < 0.4


@pytest.mark.slow
def test_64_second_order_steps_are_as_good_as_250_of_euler_maruyama_on_a_mixture():
    """benchmarks/solver_order.py has more of it."""
    path, count = get_interpolant("linear"), 120_000
    weights, means, stds = (
        torch.tensor(values, dtype=torch.float64) for values in ([0.3, 0.5, 0.2], [-1.0, 0.2, 1.2], [0.05, 0.1, 0.2])
    )

    def velocity(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = (alpha * stds) ** 2 + sigma**2
        centred = x[:, None] - alpha * means
        parts = (weights.log() - 0.5 * variance.log() - 0.5 * centred**2 / variance).softmax(1)
        original = (parts * (means + alpha * stds**2 / variance * centred)).sum(1)
        return path.velocity(original, (x - alpha * original) / sigma, t)

    def measure(x, t):
        """Wasserstein distance to the exact quantiles, and error of the spread of the narrowest mode."""
        centres, widths = path.alpha(t) * means, ((path.alpha(t) * stds) ** 2 + path.sigma(t) ** 2).sqrt()
        grid = torch.linspace(-3, 3, 20_001, dtype=torch.float64)
        distribution = torch.special.ndtr((grid[:, None] - centres) / widths) @ weights
        levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        distance = (x.sort().values - grid[torch.searchsorted(distribution, levels)]).abs().mean()
        spread = x[x < (centres[0] + centres[1]) / 2].std() / widths[0] - 1
        return float(distance), abs(float(spread))

    def run(scheduler, steps):
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, generator=generator, dtype=torch.float64)
        for i, timestep in enumerate(scheduler.timesteps):
            before = x
            v = velocity(x, scheduler.sigmas[i].item())
            x = scheduler.step(v, timestep, x, generator=generator).prev_sample
        return *measure(before, 0.04), *measure(x, 0.0)

    first, second = run(FlowMatchSDEScheduler(), 250), run(FlowMatchSDEMultistepScheduler(), 64)
    noise = 0.002  # of the distance, with so many samples
    assert second[0] < first[0] + noise and second[1] < 0.5 * first[1]
    assert second[2] < 0.5 * first[2] and second[3] < 0.5 * first[3]


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("scheduler_class", "config", "order", "steps"),
    [(FlowMatchSDEScheduler, {"diffusion_form": "none"}, 1, 500), (FlowMatchHeunODEScheduler, {}, 2, 100)],
)
def test_ode_converges_with_its_order(path_type, scheduler_class, config, order, steps):
    coarse, fine = (errors(scheduler_class, n, path_type=path_type, **config) for n in (steps, 2 * steps))
    for before, after in zip(coarse, fine):
        assert after < 2e-3
        assert before / after == pytest.approx(2**order, rel=0.15) or before < 1e-7


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
def test_last_step_gives_its_closed_form(path_type, diffusion_form, last_step):
    norm, t, x = 0.7, 0.04, torch.tensor([0.5, -1.0], dtype=torch.float64)
    path = get_interpolant(path_type)
    alpha, sigma = path.alpha(t), path.sigma(t)
    velocity, score = exact_velocity(path_type, x, t), exact_score(path_type, x, t)
    half_variance = {
        "constant": norm,
        "sigma": norm * sigma,
        "linear": norm * t,
        "decreasing": (norm * math.cos(math.pi * (1 - t)) + 1) ** 2 / 4,
        "increasing-decreasing": norm * math.sin(math.pi * (1 - t)) ** 2,
        "sbdm": norm * (t / (1 - t) if path_type == "linear" else (math.pi / 2) * math.tan(math.pi * t / 2)),
    }[diffusion_form]
    expected = {
        "mean": x - (velocity - half_variance * score) * t,
        "tweedie": (x + sigma**2 * score) / alpha,
        "euler": x - velocity * t,
    }[last_step]

    scheduler = FlowMatchSDEScheduler(
        path_type=path_type, diffusion_form=diffusion_form, diffusion_norm=norm, last_step=last_step
    )
    scheduler.set_timesteps(sigmas=[0.5, t])
    scheduler.set_begin_index(1)
    found = scheduler.step(velocity, scheduler.timesteps[1], x).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_last_step_of_the_second_order_sde(path_type):
    def last_step_at(t, velocity, **config):
        scheduler = FlowMatchSDEMultistepScheduler(path_type=path_type, **config)
        scheduler.set_timesteps(sigmas=[t])
        return scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample

    x, path = torch.tensor([0.5, -1.0], dtype=torch.float64), get_interpolant(path_type)
    velocity, score = exact_velocity(path_type, x, 0.04), exact_score(path_type, x, 0.04)
    expected = (x + path.sigma(0.04) ** 2 * score) / path.alpha(0.04)
    torch.testing.assert_close(last_step_at(0.04, velocity, last_step="tweedie"), expected, rtol=1e-10, atol=1e-10)
    expected = x - 0.04 * velocity
    torch.testing.assert_close(last_step_at(0.04, velocity, last_step="euler"), expected, rtol=1e-10, atol=1e-10)

    # "mean" is exact for data of mean 0 and variance 1, at any time,
    for t in (0.04, 0.9, 1.0):
        variance = path.alpha(t) ** 2 + path.sigma(t) ** 2
        velocity = (path.alpha(t) * path.d_alpha(t) + path.sigma(t) * path.d_sigma(t)) / variance * x
        torch.testing.assert_close(last_step_at(t, velocity), x / math.sqrt(variance), rtol=1e-10, atol=1e-10)
    # and in general off by the fourth order in sigma.
    spreads = []
    for t in (0.02, 0.01):
        found = last_step_at(t, exact_velocity(path_type, x, t))
        spreads.append(float((found[0] - found[1]) / (x[0] - x[1])) * marginal(path_type, t)[1] / STD - 1)
    assert abs(spreads[0]) < 1e-3 and spreads[0] / spreads[1] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
def test_last_evaluation_corrects_the_step_before(last_step):
    """The data prediction there is 2 at the predicted sample, and 1 before."""
    scheduler = FlowMatchSDEMultistepScheduler(last_step=last_step)
    t, u = 0.5, 0.1
    scheduler.set_timesteps(sigmas=[t, u])
    x = torch.tensor([0.7], dtype=torch.float64)
    predicted = scheduler.step((x - 1) / t, scheduler.timesteps[0], x, variance_noise=torch.zeros(1)).prev_sample
    noise = (x - (1 - t)) / t
    torch.testing.assert_close(predicted, (1 - u) + u * (u / t) * noise)
    found = scheduler.step((predicted - 2) / u, scheduler.timesteps[1], predicted).prev_sample
    # q(s) = (1 - s) u^2 / s^2 here, and its mean over log s is in closed form.
    mean = u**2 * ((u**-2 - t**-2) / 2 - (1 / u - 1 / t)) / math.log(t / u)
    corrected = predicted + (1 - u - mean)
    noise = (corrected - 2 * (1 - u)) / u
    expected = {"mean": 2 + (math.hypot(1 - u, u) - (1 - u)) / u * noise, "tweedie": 2, "euler": 2}[last_step]
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64).reshape(1), rtol=1e-9, atol=0)


def test_what_a_callback_adds_to_the_predicted_sample_stays():
    """Unlike where the correction starts from the sample of the step before."""
    results = []
    for shift in (0.0, 0.3):
        scheduler = FlowMatchSDEMultistepScheduler()
        scheduler.set_timesteps(sigmas=[0.8, 0.5, 0.2])
        x, noise = torch.ones(1, dtype=torch.float64), torch.zeros(1)
        for i, timestep in enumerate(scheduler.timesteps[:2]):
            x = x + shift * i
            x = scheduler.step(x / scheduler.sigmas[i], timestep, x, variance_noise=noise).prev_sample  # data: 0
        results.append(x.item())
    assert results[1] - results[0] == pytest.approx(0.3 * (0.2 / 0.5) ** 2)


def test_fifty_steps_leave_the_known_spread():
    """Standard deviations after 50 steps where the data have 0.2."""

    def std(scheduler):
        scheduler.set_timesteps(50)
        return moments(scheduler)[1]

    assert std(FlowMatchSDEScheduler(diffusion_form="none")) == pytest.approx(0.190, abs=6e-4)
    assert std(FlowMatchHeunODEScheduler()) == pytest.approx(0.199, abs=6e-4)
    assert std(FlowMatchSDEScheduler()) == pytest.approx(0.189, abs=6e-4)
    assert std(FlowMatchSDEScheduler(last_step="tweedie")) == pytest.approx(0.197, abs=6e-4)
    assert std(FlowMatchSDEMultistepScheduler()) == pytest.approx(0.200, abs=6e-4)


def test_default_grid_is_that_of_the_paper():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(250)
    expected = torch.cat([torch.linspace(1, 0.04, 250, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    assert scheduler.sigmas.dtype == torch.float64 and scheduler.timesteps.dtype == torch.float32
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0, atol=0)
    torch.testing.assert_close(scheduler.timesteps, (1000 * expected[:-1]).float(), rtol=0, atol=0)


@pytest.mark.parametrize("diffusion_form", ["linear", "sbdm"])
def test_grid_of_the_second_order_sde(diffusion_form):
    scheduler = FlowMatchSDEMultistepScheduler(diffusion_form=diffusion_form)
    start = 0.999 if diffusion_form == "sbdm" else 1.0
    scheduler.set_timesteps(64)
    assert scheduler.sigmas.dtype == torch.float64 and scheduler.timesteps.dtype == torch.float32
    assert len(scheduler.sigmas) == 65 and len(scheduler.timesteps) == 64, "one evaluation for each step"
    assert scheduler.sigmas[0] == start and scheduler.sigmas[-2:].tolist() == [0.04, 0]
    steps = (scheduler.sigmas[:-1] ** (1 / 3)).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, (0.04 ** (1 / 3) - start ** (1 / 3)) / 63))
    scheduler.set_timesteps(1)
    assert scheduler.sigmas.tolist() == [start, 0]


def test_sbdm_grid_starts_below_its_singularity():
    scheduler = FlowMatchSDEScheduler(diffusion_form="sbdm")
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0] == 1 - 1e-3 and scheduler.sigmas[-2:].tolist() == [0.04, 0]


@pytest.mark.parametrize(
    ("scheduler", "order", "times"),
    [
        (FlowMatchSDEScheduler(diffusion_form="none"), 1, [1, 0.75, 0.5, 0.25, 0]),
        (FlowMatchHeunODEScheduler(), 2, [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0]),
    ],
)
def test_ode_grid(scheduler, order, times):
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.dtype == torch.float64 and scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas.tolist() == times
    assert scheduler.timesteps.tolist() == [1000 * t for t in times[:-1]]
    assert scheduler.order == order


def test_heun_is_laid_out_as_in_diffusers():
    from diffusers import FlowMatchHeunDiscreteScheduler

    ours = FlowMatchHeunODEScheduler()
    theirs = FlowMatchHeunDiscreteScheduler()
    ours.set_timesteps(5)
    theirs.set_timesteps(5)
    assert len(ours.timesteps) == len(theirs.timesteps) == 9
    assert len(ours.sigmas) == len(theirs.sigmas)
    sample = torch.ones(1)
    for i in range(9):
        assert ours.state_in_first_order == theirs.state_in_first_order, i
        ours.step(sample, ours.timesteps[i], sample)
        theirs.step(sample, theirs.timesteps[i], sample)


def test_own_sigmas_make_the_grid_with_or_without_the_final_zero():
    scheduler = FlowMatchSDEScheduler()
    for sigmas in ([1.0, 0.5, 0.1], [1.0, 0.5, 0.1, 0.0]):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.1, 0.0]
        assert scheduler.num_inference_steps == 3


def test_noise_is_drawn_in_float32_and_not_in_the_last_step():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(2)
    sample = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    stepped = scheduler.step(sample, scheduler.timesteps[0], sample, generator=generator).prev_sample
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    torch.testing.assert_close(stepped, math.sqrt(2 * 0.96) * noise.double(), rtol=1e-12, atol=1e-12)
    state = generator.get_state()
    scheduler.step(sample, scheduler.timesteps[1], stepped, generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_second_order_sde_takes_one_evaluation_and_one_draw_for_each_step():
    scheduler = FlowMatchSDEMultistepScheduler()
    scheduler.set_timesteps(5)
    generator, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    drawn = given = torch.ones(2, 3)
    other = FlowMatchSDEMultistepScheduler()
    other.set_timesteps(5)
    for i, timestep in enumerate(scheduler.timesteps):
        assert scheduler.order == 1 and scheduler.step_index in (None, i)
        drawn = scheduler.step(0.3 * drawn, timestep, drawn, generator=generator).prev_sample
        noise = torch.randn(2, 3, generator=same) if i < 4 else None
        given = other.step(0.3 * given, timestep, given, variance_noise=noise).prev_sample
        assert torch.equal(generator.get_state(), same.get_state()) and torch.equal(drawn, given)


def test_second_order_sde_forgets_the_run_before():
    scheduler = FlowMatchSDEMultistepScheduler()
    results = []
    for stop in (3, 6, 6):  # the first run is given up
        scheduler.set_timesteps(6)
        sample, generator = torch.ones(4), torch.Generator().manual_seed(0)
        for timestep in scheduler.timesteps[:stop]:
            sample = scheduler.step(sample.sin(), timestep, sample, generator=generator).prev_sample
        results.append(sample)
    fresh = FlowMatchSDEMultistepScheduler()
    fresh.set_timesteps(6)
    sample, generator = torch.ones(4), torch.Generator().manual_seed(0)
    for timestep in fresh.timesteps:
        sample = fresh.step(sample.sin(), timestep, sample, generator=generator).prev_sample
    assert torch.equal(results[1], sample) and torch.equal(results[2], sample)


@pytest.mark.parametrize("scheduler_class", [FlowMatchSDEScheduler, FlowMatchSDEMultistepScheduler])
def test_a_single_number_is_a_sample(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(4)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    x, one = torch.tensor(0.3), torch.tensor([0.3])
    alone = scheduler.step(one, scheduler.timesteps[0], one, generator=generators[0]).prev_sample
    scheduler.set_timesteps(4)
    found = scheduler.step(x, scheduler.timesteps[0], x, generator=generators[1]).prev_sample
    assert found.shape == () and found == alone


def test_a_timestep_is_found_whatever_its_type():
    scheduler = FlowMatchSDEScheduler(num_train_timesteps=3)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    for time in (fractions.Fraction(3, 2), np.float64(1.5), torch.tensor([1.5]), 1.5):
        assert scheduler.index_for_timestep(time) == 1
    with pytest.raises(ValueError, match="`timestep` has to be one of the scheduler's `timesteps`, but is 0.333"):
        scheduler.index_for_timestep(fractions.Fraction(1, 3))


def test_given_noise_replaces_the_draw():
    scheduler = FlowMatchSDEScheduler()
    sample, noise = torch.zeros(1, 2), torch.randn(1, 2)
    results = []
    for arguments in ({"variance_noise": noise}, {"variance_noise": noise.double()}):
        scheduler.set_timesteps(3)
        results.append(scheduler.step(sample, scheduler.timesteps[0], sample, **arguments, return_dict=False)[0])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], math.sqrt(2 * 0.48) * noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_the_sample(dtype):
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(3)
    sample = torch.ones(2, 2, dtype=dtype)
    assert scheduler.step(sample.float(), scheduler.timesteps[0], sample).prev_sample.dtype == dtype


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_noise_is_added_with_the_path_of_the_model(path_type):
    scheduler, path = FlowMatchSDEScheduler(path_type=path_type), get_interpolant(path_type)
    data, noise = torch.randn(2, 2, 3, 4, 4)
    noisy = scheduler.add_noise(data, noise, torch.tensor([250.0, 600.0]))
    for i, t in enumerate((0.25, 0.6)):
        torch.testing.assert_close(noisy[i], path.alpha(t) * data[i] + path.sigma(t) * noise[i])
        torch.testing.assert_close(scheduler.scale_noise(data, 1000 * t, noise)[i], noisy[i])


def test_starting_in_the_middle_finds_the_step():
    scheduler = FlowMatchSDEScheduler(diffusion_form="none")
    scheduler.set_timesteps(4)
    sample = torch.ones(1)
    assert scheduler.step(sample, scheduler.timesteps[2], sample).prev_sample.item() == pytest.approx(0.75)
    assert scheduler.step_index == 3
    second_order = FlowMatchSDEMultistepScheduler()
    second_order.set_timesteps(4)
    second_order.step(sample, second_order.timesteps[2], sample)
    assert second_order.step_index == 3
    heun = FlowMatchHeunODEScheduler()
    heun.set_timesteps(4)
    assert heun.index_for_timestep(heun.timesteps[1]) == 2, "the second place begins a step"


SDE_CONFIG = {
    "path_type": "cosine",
    "diffusion_form": "sigma",
    "diffusion_norm": 0.5,
    "last_step": "tweedie",
    "last_step_size": 0.02,
}
SCHEDULERS = [FlowMatchSDEScheduler, FlowMatchSDEMultistepScheduler, FlowMatchHeunODEScheduler, FlowMapScheduler]
OF_SDES = SCHEDULERS[:2]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def through_a_file(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_config_round_trip(tmp_path, scheduler_class):
    config = SDE_CONFIG if scheduler_class in OF_SDES else {"path_type": "cosine"}
    scheduler = scheduler_class(**config, num_train_timesteps=500)
    for loaded in (through_a_file(scheduler, tmp_path), scheduler_class.from_config(scheduler.config)):
        assert {name: loaded.config[name] for name in config} == config and loaded.path is scheduler.path
        loaded.set_timesteps(3)
        assert loaded.timesteps[0] == 500 == len(loaded)


@pytest.mark.parametrize(
    "swapped_class", [*SCHEDULERS, *diffusers_schedulers("FlowMatchEulerDiscrete", "UniPCMultistep")]
)
def test_settings_survive_another_scheduler(tmp_path, swapped_class):
    """As a pipeline that is saved between the swaps keeps them."""
    saved = through_a_file(FlowMatchSDEScheduler(**SDE_CONFIG), tmp_path / "a")
    swapped = through_a_file(swapped_class.from_config(saved.config), tmp_path / "b")
    for scheduler_class in OF_SDES:
        back = through_a_file(scheduler_class.from_config(swapped.config), tmp_path / "c")
        assert {name: back.config[name] for name in SDE_CONFIG} == SDE_CONFIG and back.sde.last_step == "tweedie"


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_schedulers_of_diffusers_are_loaded_from_our_files(tmp_path, scheduler_class):
    scheduler_class().save_pretrained(tmp_path)
    for other_class in diffusers_schedulers("DPMSolverMultistep", "UniPCMultistep"):
        other = other_class.from_pretrained(tmp_path, **FLOW)
        assert other.config.solver_order == 2 and other.config.use_flow_sigmas


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_no_config_key_means_something_else_in_diffusers(scheduler_class):
    """Keys of a config are handed on to the scheduler that it is swapped for."""
    theirs = {}  # from the sources: some schedulers need packages that are not installed
    for path in Path(diffusers.__file__).parent.glob("schedulers/scheduling_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        theirs[node.name] = {argument.arg for argument in method.args.args + method.args.kwonlyargs}
    assert len(theirs) > 40 and "solver_order" in theirs["UniPCMultistepScheduler"]
    ours = set(inspect.signature(scheduler_class).parameters)
    shared = {key for keys in theirs.values() for key in ours & keys}
    assert shared == {"num_train_timesteps"}


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_compatibles_are_named_and_swapped(scheduler_class):
    theirs = diffusers_schedulers(
        "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"
    )
    scheduler = scheduler_class(num_train_timesteps=500)
    assert set(scheduler.compatibles) == {*SCHEDULERS, *theirs}
    for other_class in scheduler.compatibles:
        other = other_class.from_config(scheduler.config)
        assert type(other) is other_class and other.config.num_train_timesteps == 500
        back = scheduler_class.from_config(other.config)
        own = inspect.signature(scheduler_class).parameters
        assert {name: back.config[name] for name in own} == {name: scheduler.config[name] for name in own}


# --- configs from before there was one scheduler for each solver ---------------------------------------------------


@pytest.fixture
def old_config(tmp_path):
    """Writes what `FlowMatchSDEScheduler` used to save."""

    def write(solver_order, **config):
        FlowMatchSDEScheduler(**config).save_pretrained(tmp_path / "old")
        path = tmp_path / "old" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "solver_order": solver_order}))
        return tmp_path / "old"

    return write


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_solver_order_of_old_configs_is_not_handed_on(old_config, tmp_path, scheduler_class):
    scheduler = scheduler_class.from_pretrained(old_config(1, **SDE_CONFIG))
    assert "solver_order" not in scheduler.config and scheduler.config.path_type == "cosine"
    for other_class in diffusers_schedulers("DPMSolverMultistep", "UniPCMultistep"):
        for config in (scheduler.config, through_a_file(scheduler, tmp_path / "new").config):
            assert other_class.from_config(config, **FLOW).config.solver_order == 2


@pytest.mark.parametrize(
    ("diffusion_form", "successor"),
    [("linear", FlowMatchSDEMultistepScheduler), ("none", FlowMatchHeunODEScheduler)],
)
def test_old_second_order_does_not_become_first_order(old_config, diffusion_form, successor):
    folder = old_config(2, diffusion_form=diffusion_form, last_step="tweedie")
    message = f"`solver_order` has to be 1 with FlowMatchSDEScheduler, but is 2: that is {successor.__name__} now"
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler.from_pretrained(folder)
    scheduler = successor.from_pretrained(folder)
    assert "solver_order" not in scheduler.config and scheduler.config.last_step == "tweedie"
    # Nor does a call that was right before.
    config = FlowMatchSDEScheduler().config
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler.from_config(config, diffusion_form=diffusion_form, solver_order=2)


def test_the_solver_of_an_sde_is_not_for_the_ode(old_config):
    with pytest.raises(ValueError, match="is 'none'. For the ODE use FlowMatchHeunODEScheduler"):
        FlowMatchSDEMultistepScheduler.from_pretrained(old_config(2, diffusion_form="none"))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("saved", [False, True])
def test_solver_order_of_others_survives(tmp_path, scheduler_class, solver_order, saved):
    """A user's choice for DPM++ or UniPC is kept while another scheduler is in its place."""
    for other_class in diffusers_schedulers("DPMSolverMultistep", "UniPCMultistep"):
        scheduler = other_class(**FLOW, solver_order=solver_order)
        for swapped_class in (scheduler_class, FlowMatchSDEScheduler, other_class):
            scheduler = swapped_class.from_config(scheduler.config)
            scheduler = through_a_file(scheduler, tmp_path) if saved else scheduler
        assert scheduler.config.solver_order == solver_order and scheduler.config.use_flow_sigmas


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_interchangeable_with_other_schedulers(scheduler_class):
    scheduler = scheduler_class()
    sample = torch.ones(2)
    assert scheduler.init_noise_sigma == 1 and len(scheduler) == 1000
    assert scheduler.order == (2 if scheduler_class is FlowMatchHeunODEScheduler else 1)
    assert scheduler.scale_model_input(sample, 3.0) is sample
    assert len(scheduler.timesteps) == (1999 if scheduler_class is FlowMatchHeunODEScheduler else 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_type": "vp"}, r"`path_type` has to be one of \['linear', 'cosine'\], but is 'vp'"),
        ({"diffusion_form": "vp"}, r"`diffusion_form` has to be one of \['constant', .*\], but is 'vp'"),
        ({"diffusion_norm": -1.0}, "`diffusion_norm` has to be a number from 0 to 1,000,000, but is -1.0"),
        ({"diffusion_norm": math.nan}, "`diffusion_norm` has to be a number from 0 to 1,000,000, but is nan"),
        ({"last_step": "heun"}, r"`last_step` has to be one of .*, but is 'heun'"),
        ({"last_step_size": 0}, "`last_step_size` has to lie between 0 and 1, but is 0"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` has to be at least 1, but is 0"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    for scheduler_class in SCHEDULERS:
        if arguments.keys() <= inspect.signature(scheduler_class).parameters.keys():
            with pytest.raises(ValueError, match=message):
                scheduler_class(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "One of `num_inference_steps` and `sigmas` has to be given"),
        ({"num_inference_steps": 0}, "`num_inference_steps` has to be at least 1, but is 0"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "`sigmas` describe 2 steps, .* is 3"),
        ({"sigmas": []}, "`sigmas` has to be a list of at least one number"),
        ({"sigmas": [0.0]}, r"`sigmas` have to decrease and to lie in \(0, 1\], but are \[0.0\]"),
        ({"sigmas": [1.0, 0.5, 0.7]}, "`sigmas` have to decrease"),
        ({"sigmas": [1.5, 0.5]}, r"`sigmas` .* lie in \(0, 1\]"),
        ({"sigmas": [0.5, -0.5]}, r"`sigmas` .* lie in \(0, 1\]"),
        ({"sigmas": [float("nan"), 0.5]}, "`sigmas` have to decrease"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    for scheduler_class in SCHEDULERS:
        with pytest.raises(ValueError, match=message):
            scheduler_class().set_timesteps(**arguments)


def test_sbdm_refuses_a_grid_that_starts_at_its_singularity():
    for scheduler_class in OF_SDES:
        with pytest.raises(ValueError, match="`sigmas` have to start at 0.999 or below.* start at 1.0"):
            scheduler_class(diffusion_form="sbdm").set_timesteps(sigmas=[1.0, 0.5])


def test_impossible_steps_are_refused():
    scheduler, sample = FlowMatchSDEScheduler(), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="call `set_timesteps` before `step`"):
        scheduler.step(sample, 1000.0, sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="`timestep` has to be one of .* but is the integer 0"):
        scheduler.step(sample, 0, sample)
    with pytest.raises(ValueError, match="`timestep` has to be one of the scheduler's `timesteps`, but is 123.0"):
        scheduler.step(sample, 123.0, sample)
    with pytest.raises(ValueError, match=r"`variance_noise` has to be of shape \[2, 2\], but is of shape \[2, 3\]"):
        scheduler.step(sample, scheduler.timesteps[0], sample, variance_noise=torch.zeros(2, 3))
    for timestep in scheduler.timesteps:
        scheduler.step(sample, timestep, sample)
    with pytest.raises(ValueError, match="All 2 steps of this schedule are done"):
        scheduler.step(sample, scheduler.timesteps[0], sample)
