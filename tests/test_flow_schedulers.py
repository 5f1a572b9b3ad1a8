# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Every scheduler of diffusers either integrates the flow, or is refused with advice that helps."""

import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXEulerAncestralRFScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from gaussian_flow import GaussianFlow
from tiny_models import make_pipeline

import diffusers_lsep
from diffusers_lsep import FlowMatchSDEScheduler, LSEPPipeline
from diffusers_lsep.interpolants import get_interpolant


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# They are for something else than the noise of images, and need to be told what.
REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
TAKEN_AS_THEY_ARE = {
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
}
TAKEN_WITH_FLOW_SIGMAS = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}
ON_ANY_PATH = TAKEN_AS_THEY_ARE - {"FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler"}


def list_schedulers():
    """Names of all schedulers of diffusers, but for those whose libraries (torchsde, scipy) are not installed."""
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    classes = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, SchedulerMixin)]
    return [cls.__name__ for cls in classes if cls.__module__.startswith("diffusers.")]


def make_gaussian_pipeline(scheduler, path_type="linear"):
    pipe = LSEPPipeline(GaussianFlow(sample_size=32, path_type=path_type), FlowMatchSDEScheduler(path_type=path_type))
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def draw(pipe, steps=100, **arguments):
    """Mean and standard deviation of the data that the scheduler makes of Gaussian noise with exactly 0 and 1."""
    noise = torch.randn(1, 8, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    pipe.transformer.times.clear()
    arguments = {"num_inference_steps": steps, "latents": noise, "output_type": "latent", **arguments}
    images = pipe(0, generator=torch.Generator().manual_seed(1), **arguments).images.double()
    return images.mean().item(), images.std(correction=0).item()


def follow_advice(pipe, error):
    (advice,) = re.findall("Try `(.+)`", str(error))
    name = advice.split(".")[0]
    scheduler_class = getattr(diffusers_lsep, name, None) or getattr(diffusers, name)
    pipe.scheduler = eval(advice, {name: scheduler_class, "pipe": pipe})


def predict_and_renoise_std(times):
    """
    In closed form: what becomes of the standard deviation where each step predicts the data, and adds new noise to
    that. The prediction of a Gaussian's data is linear in the state.
    """
    variance = 1.0
    for t, next_t in zip(times, [*times[1:], 0.0]):
        slope = 0.04 * (1 - t) / (0.04 * (1 - t) ** 2 + t**2)
        variance = (1 - next_t) ** 2 * slope**2 * variance + next_t**2
    return variance**0.5


def last_step_std(path_type):
    """In closed form: what FlowMatchSDE's last step makes of the standard deviation, whatever the number of steps."""
    t = torch.tensor(0.04, dtype=torch.float64)
    path = get_interpolant(path_type)
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    variance = (0.2 * alpha) ** 2 + sigma**2
    drift = (0.04 * alpha * d_alpha + sigma * d_sigma + t) / variance
    return (variance.sqrt() * (1 - t * drift)).item()


def expected_std(pipe):
    """What is to come out at 100 steps, and to which precision."""
    if isinstance(pipe.scheduler, FlowMatchSDEScheduler):
        return pytest.approx(last_step_std(pipe.config.path_type), abs=0.004)
    if isinstance(pipe.scheduler, FlowMatchLCMScheduler):
        return pytest.approx(predict_and_renoise_std(pipe.transformer.times), abs=0.002)
    is_noisy = isinstance(pipe.scheduler, LTXEulerAncestralRFScheduler)
    return pytest.approx(0.2, abs=0.013 if is_noisy else 0.006)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in constructors of diffusers
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("name", list_schedulers())
def test_every_scheduler_of_diffusers_works_or_is_refused_with_advice_that_works(name, path_type):
    pipe = make_gaussian_pipeline(None, path_type)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **REQUIRED.get(name, {}))
    taken = ON_ANY_PATH if path_type == "cosine" else TAKEN_AS_THEY_ARE
    if name not in taken:
        with pytest.raises(ValueError, match="`scheduler` .* Try `") as error:
            draw(pipe)
        assert not pipe.transformer.times, "before the loop"
        follow_advice(pipe, error.value)
        is_own = name in TAKEN_WITH_FLOW_SIGMAS and path_type == "linear"
        assert type(pipe.scheduler).__name__ == (name if is_own else "FlowMatchSDEScheduler")

    mean, std = draw(pipe)
    times = pipe.transformer.times
    assert times == pytest.approx(pipe.scheduler.sigmas[: len(times)].tolist(), abs=1e-7)
    assert times[0] == pytest.approx(1, abs=2e-3)
    assert std == expected_std(pipe) and mean == pytest.approx(0.3, abs=0.003)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMapEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        LTXEulerAncestralRFScheduler(eta=0.0),
        DPMSolverSinglestepScheduler(**FLOW, solver_order=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_first_order_have_a_quarter_of_the_error_with_four_times_the_steps(scheduler):
    few, many = (abs(draw(make_gaussian_pipeline(scheduler), steps)[1] - 0.2) for steps in (100, 400))
    assert 3.5 < few / many < 5


def test_noise_of_the_ancestral_scheduler_keeps_the_spread():
    """The standard error of the estimate is 0.0016."""
    for steps, tolerance in ((100, 0.013), (400, 0.006)):
        mean, std = draw(make_gaussian_pipeline(LTXEulerAncestralRFScheduler()), steps)
        assert std == pytest.approx(0.2, abs=tolerance) and mean == pytest.approx(0.3, abs=0.003)


@pytest.mark.parametrize("steps", [1, 2, 4, 100])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(),
        FlowMatchLCMScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=["lcm", "shifted", "euler"],
)
def test_schedulers_that_predict_and_renoise_do_that_exactly(scheduler, steps):
    pipe = make_gaussian_pipeline(scheduler)
    mean, std = draw(pipe, steps)
    assert std == pytest.approx(predict_and_renoise_std(pipe.transformer.times), abs=0.002)
    assert mean == pytest.approx(0.3, abs=0.003)


def test_lcm_takes_sigmas_and_a_generator_for_each_image():
    pipe = make_pipeline(FlowMatchLCMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def run(*seeds):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe([1] * len(seeds), sigmas=[1.0, 0.7, 0.2], generator=generator, output_type="latent").images

    assert torch.equal(run(0, 1)[1], run(2, 1)[1]) and not torch.equal(run(0, 1)[0], run(2, 1)[0])
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1.0, 0.7, 0.2, 0.0]))


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "settings", "path_type"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {"invert_sigmas": False}, "linear"),
        (FlowMatchLCMScheduler(scale_factors=[0.5] * 99), {"scale_factors": None}, "linear"),
        (DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), {"use_karras_sigmas": False}, "linear"),
        (DPMSolverMultistepScheduler(**FLOW, use_lu_lambdas=True), {"use_lu_lambdas": False}, "linear"),
        (UniPCMultistepScheduler(**FLOW, use_exponential_sigmas=True), {"use_exponential_sigmas": False}, "linear"),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), {**FLOW, "use_karras_sigmas": False}, "linear"),
        (DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"), {"final_sigmas_type": "zero"}, "linear"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), {"prediction_type": "flow_prediction"}, "linear"),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=None),
            {"use_dynamic_shifting": False},
            "linear",
        ),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {"path_type": "cosine"}, "cosine"),
        (DPMSolverMultistepScheduler(**FLOW), {"path_type": "cosine"}, "cosine"),
        (FlowMatchSDEScheduler(), {"path_type": "cosine"}, "cosine"),
        (UniPCMultistepScheduler(**FLOW, solver_type="bh1"), {"solver_type": "bh2"}, "linear"),
        (UniPCMultistepScheduler(**FLOW, predict_x0=False), {"predict_x0": True}, "linear"),
        (UniPCMultistepScheduler(**FLOW, lower_order_final=False), {"lower_order_final": True}, "linear"),
        # It goes by settings of FlowMatchEuler that are none of its own.
        (
            LTXEulerAncestralRFScheduler.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config),
            {"path_type": "linear"},
            "linear",
        ),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "set_timesteps") else None,
)
def test_settings_that_do_not_fit_are_refused_with_advice_that_works(scheduler, settings, path_type):
    pipe = make_gaussian_pipeline(scheduler, path_type)
    with pytest.raises(ValueError, match="`scheduler` .* Try `") as error:
        draw(pipe)
    assert not pipe.transformer.times, "before the loop"
    follow_advice(pipe, error.value)
    assert {name: pipe.scheduler.config[name] for name in settings} == settings
    mean, std = draw(pipe)
    assert std == expected_std(pipe) and mean == pytest.approx(0.3, abs=0.003)


@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler])
def test_dpm_solver_is_advised_to_be_the_one_that_reaches_zero(scheduler_class):
    pipe = make_gaussian_pipeline(scheduler_class(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"))
    with pytest.raises(ValueError, match="has `use_flow_sigmas=False`. Try `") as error:
        draw(pipe)
    follow_advice(pipe, error.value)
    assert pipe.scheduler.config.algorithm_type == "dpmsolver++" and draw(pipe)[1] == pytest.approx(0.2, abs=0.003)


@pytest.mark.parametrize("shifts", [{}, {"base_shift": 0.2, "max_shift": 2.0, "base_image_seq_len": 8}])
@pytest.mark.parametrize(
    ("scheduler_class", "arguments"),
    [
        (FlowMatchEulerDiscreteScheduler, {}),
        (FlowMatchLCMScheduler, {}),
        (LTXEulerAncestralRFScheduler, {}),
        (UniPCMultistepScheduler, FLOW),
        (DPMSolverMultistepScheduler, FLOW),
        (DPMSolverSinglestepScheduler, FLOW),
    ],
)
def test_dynamic_shifting_follows_the_number_of_tokens(scheduler_class, arguments, shifts):
    """As the pipelines of Flux and SD3 have it; their function gives the expected shift."""
    original = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts)
    for sample_size, patch_size in ((8, 2), (16, 2), (16, 4)):
        scheduler = scheduler_class.from_config(original.config, **arguments)
        pipe = make_pipeline(scheduler, sample_size=sample_size, patch_size=patch_size)
        pipe.set_progress_bar_config(disable=True)
        pipe(1, num_inference_steps=4, output_type="latent")
        tokens = (sample_size // patch_size) ** 2
        names = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
        names |= {"base_shift": "base_shift", "max_shift": "max_shift"}
        shift = np.exp(calculate_shift(tokens, **{key: original.config[name] for key, name in names.items()}))

        unshifted = scheduler_class(**arguments)
        pipe.scheduler = unshifted
        pipe(1, num_inference_steps=4, output_type="latent")
        sigmas = unshifted.sigmas.double().clamp(1e-9)
        expected = shift * sigmas / (1 + (shift - 1) * sigmas)
        torch.testing.assert_close(scheduler.sigmas.double(), expected, rtol=0, atol=2e-3)


def test_dynamic_shifting_without_a_range_is_refused():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=16)
    with pytest.raises(ValueError, match="`max_image_seq_len` other than its `base_image_seq_len`.* but both are 16"):
        make_pipeline(scheduler)(1, num_inference_steps=2)


def test_heun_of_diffusers_shifts_nothing_dynamically():
    """It keeps the setting for others, and is none that shifts."""
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = make_gaussian_pipeline(FlowMatchHeunDiscreteScheduler.from_config(shifting.config))
    assert draw(pipe)[1] == pytest.approx(0.2, abs=0.002)
