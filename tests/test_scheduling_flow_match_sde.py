# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The solvers against closed forms.

With Gaussian data of mean `MEAN` and standard deviation `STD` the exact velocity is affine in the sample, so every
step is an affine map of sample and noise. Its three coefficients, read off `step` itself, carry mean and variance
through a schedule without any sampling error.
"""

import math

import pytest
import torch

from diffusers_lsep import FlowMatchSDEScheduler
from diffusers_lsep.paths import get_path


MEAN, STD = 0.3, 0.2
SDE_FORMS = ["constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm"]


def marginal(path_type, t):
    """Mean and standard deviation of `x_t`."""
    path = get_path(path_type)
    return path.alpha(t) * MEAN, math.sqrt((path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2)


def exact_velocity(path_type, sample, t):
    path = get_path(path_type)
    mean, std = marginal(path_type, t)
    slope = (path.alpha(t) * path.d_alpha(t) * STD**2 + path.sigma(t) * path.d_sigma(t)) / std**2
    return path.d_alpha(t) * MEAN + slope * (sample - mean)


def exact_score(path_type, sample, t):
    mean, std = marginal(path_type, t)
    return -(sample - mean) / std**2


def moments(scheduler, until=0.0):
    """Mean and standard deviation after the steps that start above `until`, from the exact start."""
    path_type = scheduler.config.path_type
    mean, std = marginal(path_type, scheduler.sigmas[0].item())
    # One sample each for the constant, the slope in the sample and the slope in the noise.
    noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    state = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    for i, timestep in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[i].item()
        if t <= until:
            break
        begins_step = scheduler.state_in_first_order
        velocity = exact_velocity(path_type, state, t)
        state = scheduler.step(velocity, timestep, state, variance_noise=noise).prev_sample
        if not scheduler.state_in_first_order:
            continue
        constant, slope, noise_slope = state[0], state[1] - state[0], state[2] - state[0]
        mean, std = constant + slope * mean, torch.sqrt(slope**2 * std**2 + noise_slope**2)
        state = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        assert begins_step or scheduler.config.solver_order == 2
    return float(mean), float(std)


def errors(steps, until=0.0, **config):
    scheduler = FlowMatchSDEScheduler(**config)
    scheduler.set_timesteps(steps)
    found = moments(scheduler, until)
    expected = marginal(scheduler.config.path_type, until)
    return [abs(a - b) for a, b in zip(found, expected)]


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
def test_sde_converges_with_order_one_before_its_last_step(path_type, diffusion_form):
    config = {"path_type": path_type, "diffusion_form": diffusion_form}
    coarse = errors(1000, until=0.04, **config)
    fine = errors(2000, until=0.04, **config)
    for before, after in zip(coarse, fine):
        assert after < 2e-3
        assert before / after == pytest.approx(2, abs=0.25) or before < 1e-7


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize(("solver_order", "steps"), [(1, 500), (2, 100)])
def test_ode_converges_with_its_order(path_type, solver_order, steps):
    config = {"path_type": path_type, "diffusion_form": "none", "solver_order": solver_order}
    coarse, fine = errors(steps, **config), errors(2 * steps, **config)
    for before, after in zip(coarse, fine):
        assert after < 2e-3
        assert before / after == pytest.approx(2**solver_order, rel=0.15) or before < 1e-7


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_form", SDE_FORMS)
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
def test_last_step_gives_its_closed_form(path_type, diffusion_form, last_step):
    norm, t, x = 0.7, 0.04, torch.tensor([0.5, -1.0], dtype=torch.float64)
    path = get_path(path_type)
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


def test_fifty_steps_leave_the_known_spread():
    """Standard deviations after 50 steps where the data have 0.2."""

    def std(**config):
        scheduler = FlowMatchSDEScheduler(**config)
        scheduler.set_timesteps(50)
        return moments(scheduler)[1]

    assert std(diffusion_form="none") == pytest.approx(0.190, abs=6e-4)
    assert std(diffusion_form="none", solver_order=2) == pytest.approx(0.199, abs=6e-4)
    assert std() == pytest.approx(0.189, abs=6e-4)
    assert std(last_step="tweedie") == pytest.approx(0.197, abs=6e-4)


def test_default_grid_is_that_of_the_paper():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(250)
    expected = torch.cat([torch.linspace(1, 0.04, 250, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    assert scheduler.sigmas.dtype == torch.float64 and scheduler.timesteps.dtype == torch.float32
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0, atol=0)
    torch.testing.assert_close(scheduler.timesteps, (1000 * expected[:-1]).float(), rtol=0, atol=0)


def test_sbdm_grid_starts_below_its_singularity():
    scheduler = FlowMatchSDEScheduler(diffusion_form="sbdm")
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0] == 1 - 1e-3 and scheduler.sigmas[-2:].tolist() == [0.04, 0]


@pytest.mark.parametrize("solver_order", [1, 2])
def test_ode_grid(solver_order):
    scheduler = FlowMatchSDEScheduler(diffusion_form="none", solver_order=solver_order)
    scheduler.set_timesteps(4)
    times = [1, 0.75, 0.5, 0.25, 0] if solver_order == 1 else [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0]
    assert scheduler.sigmas.tolist() == times
    assert scheduler.timesteps.tolist() == [1000 * t for t in times[:-1]]
    assert scheduler.order == solver_order


def test_heun_is_laid_out_as_in_diffusers():
    from diffusers import FlowMatchHeunDiscreteScheduler

    ours = FlowMatchSDEScheduler(diffusion_form="none", solver_order=2)
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
    scheduler, path = FlowMatchSDEScheduler(path_type=path_type), get_path(path_type)
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
    heun = FlowMatchSDEScheduler(diffusion_form="none", solver_order=2)
    heun.set_timesteps(4)
    assert heun.index_for_timestep(heun.timesteps[1]) == 2, "the second place begins a step"


def test_config_round_trip(tmp_path):
    config = {
        "path_type": "cosine",
        "diffusion_form": "sigma",
        "diffusion_norm": 0.5,
        "last_step": "tweedie",
        "last_step_size": 0.02,
    }
    scheduler = FlowMatchSDEScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    for loaded in (
        FlowMatchSDEScheduler.from_pretrained(tmp_path),
        FlowMatchSDEScheduler.from_config(scheduler.config),
    ):
        assert {name: loaded.config[name] for name in config} == config
    heun = FlowMatchSDEScheduler.from_config(scheduler.config, diffusion_form="none", solver_order=2)
    assert heun.order == 2 and heun.config.path_type == "cosine"


def test_interchangeable_with_other_schedulers():
    scheduler = FlowMatchSDEScheduler()
    sample = torch.ones(2)
    assert scheduler.init_noise_sigma == 1 and scheduler.order == 1 and len(scheduler) == 1000
    assert scheduler.scale_model_input(sample, 3.0) is sample
    assert len(scheduler.timesteps) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_type": "vp"}, r"`path_type` has to be one of \['linear', 'cosine'\], but is 'vp'"),
        ({"diffusion_form": "vp"}, r"`diffusion_form` has to be one of .*'none'\], but is 'vp'"),
        ({"diffusion_norm": -1.0}, "`diffusion_norm` has to be a number not below 0, but is -1.0"),
        ({"diffusion_norm": math.nan}, "`diffusion_norm` has to be a number not below 0, but is nan"),
        ({"solver_order": 3}, "`solver_order` has to be 1 or 2, but is 3"),
        ({"solver_order": 2}, "`solver_order=2` .* needs `diffusion_form='none'`, but `diffusion_form` is 'linear'"),
        ({"last_step": "heun"}, r"`last_step` has to be one of .*, but is 'heun'"),
        ({"last_step_size": 0}, "`last_step_size` has to lie between 0 and 1, but is 0"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` has to be at least 1, but is 0"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler(**arguments)


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
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler().set_timesteps(**arguments)


def test_sbdm_refuses_a_grid_that_starts_at_its_singularity():
    with pytest.raises(ValueError, match="`sigmas` have to start at 0.999 or below .* start at 1.0"):
        FlowMatchSDEScheduler(diffusion_form="sbdm").set_timesteps(sigmas=[1.0, 0.5])


def test_impossible_steps_are_refused():
    scheduler, sample = FlowMatchSDEScheduler(), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="call `set_timesteps` before `step`"):
        scheduler.step(sample, 1000.0, sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="`timestep` has to be one of .* but is the integer 0"):
        scheduler.step(sample, 0, sample)
    with pytest.raises(ValueError, match="`timestep` has to be one of the scheduler's `timesteps`, but is 123.0"):
        scheduler.step(sample, 123.0, sample)
    with pytest.raises(
        ValueError, match=r"`variance_noise` has to be of the shape of `sample`, \[2, 2\], .* \[2, 3\]"
    ):
        scheduler.step(sample, scheduler.timesteps[0], sample, variance_noise=torch.zeros(2, 3))
    for timestep in scheduler.timesteps:
        scheduler.step(sample, timestep, sample)
    with pytest.raises(ValueError, match="All 2 steps of this schedule are done"):
        scheduler.step(sample, scheduler.timesteps[0], sample)
