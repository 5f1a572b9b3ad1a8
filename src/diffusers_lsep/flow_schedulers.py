# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""Which schedulers integrate the flow of a SiT, and on what grid: this package's, and those of diffusers that can."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.schedulers import (
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeliosDMDScheduler,
    HeliosScheduler,
    LTXEulerAncestralRFScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from .argument_checks import describe


# They follow dx = v dt and nothing else, on whatever path. The others of diffusers use the linear path's sigma.
_VELOCITY_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMapEulerDiscreteScheduler)
_FLOW_SCHEDULERS = (*_VELOCITY_SCHEDULERS, FlowMatchLCMScheduler, LTXEulerAncestralRFScheduler)

# They have `use_flow_sigmas`, and yet do not end in images: the first two stop at t = 1 / N and leave that much noise,
# the third goes from images to noise, and Helios works through a pyramid of sizes.
_UNFIT_SCHEDULERS = (
    DEISMultistepScheduler,
    SASolverScheduler,
    DPMSolverMultistepInverseScheduler,
    HeliosScheduler,
    HeliosDMDScheduler,
)

# With which a scheduler goes from t = 1 to t = 0 on a grid of the flow. Other settings are the user's choice.
_FLOW_SETTINGS = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}

# With which UniPC stays finite down to t = 0.
_UNIPC_SETTINGS = {"predict_x0": True, "solver_type": "bh2", "lower_order_final": True}

# What the shift of a grid follows from, beside the number of tokens. Defaults as in FlowMatchEuler, as `from_config`
# leaves out what was not given.
_DYNAMIC_SHIFTING = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def takes(function: Callable, argument: str) -> bool:
    """Whether a function has an argument of this name."""
    return argument in inspect.signature(function).parameters


def has_path(scheduler: SchedulerMixin) -> bool:
    """Whether it is one of this package: no scheduler of diffusers is made for more than one path."""
    # Not told by classes, of which there are several where a repository brings its own code (see `hub.add_code`).
    return hasattr(scheduler, "path")


def _own_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    # The config also holds settings of the scheduler that this one was made from.
    own = inspect.signature(scheduler.__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in own}


def _is_flow_multistep(scheduler: SchedulerMixin) -> bool:
    return takes(scheduler.__init__, "use_flow_sigmas") and not isinstance(scheduler, _UNFIT_SCHEDULERS)


def _advise(scheduler: SchedulerMixin, path_type: str, settings: dict[str, Any] | None = None) -> str:
    """Says how to make a scheduler that works out of this one: by other settings of it, or else as one of ours."""
    config, name = _own_config(scheduler), type(scheduler).__name__
    if not settings and path_type == "linear" and _is_flow_multistep(scheduler):
        settings = {key: value for key, value in _FLOW_SETTINGS.items() if config.get(key, value) != value}
        if config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver"):  # these cannot end at 0
            settings["algorithm_type"] = "dpmsolver++"
    if not settings:
        name, settings = "FlowMatchSDEScheduler", {"path_type": path_type}
    listed = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"Try `{name}.from_config(pipe.scheduler.config, {listed})`."


def get_r_times(scheduler: SchedulerMixin) -> list[float] | None:
    """The times that a flow map is to go to in each step, if the scheduler is one for flow maps."""
    if isinstance(scheduler, FlowMapEulerDiscreteScheduler):
        return scheduler.sigmas[1:].tolist()
    return scheduler.r_sigmas.tolist() if hasattr(scheduler, "r_sigmas") else None


def check_scheduler(
    scheduler: SchedulerMixin, path_type: str, sigmas: list[float] | None = None, flow_map_depth: int | None = None
):
    """
    Refuses a scheduler that does not integrate the flow of a model, and says what would.

    Args:
        scheduler (`SchedulerMixin`): A scheduler of this package or of diffusers.
        path_type (`str`): The path that the model was trained on, `"linear"` or `"cosine"`.
        sigmas (`list[float]`, *optional*): The grid of times that it is to be given.
        flow_map_depth (`int`, *optional*): That of the transformer, if it is a flow map.

    Raises:
        `ValueError`: with advice, a line of code.
    """
    name, config = type(scheduler).__name__, _own_config(scheduler)
    if has_path(scheduler):
        if scheduler.config.path_type != path_type:
            advice = _advise(scheduler, path_type, {"path_type": path_type})
            raise ValueError(
                f"`scheduler` has `path_type={scheduler.config.path_type!r}`, but the transformer was trained on the"
                f" path {path_type!r}. {advice}"
            )
        if hasattr(scheduler, "r_sigmas") and flow_map_depth is None:
            raise ValueError(
                f"`scheduler` has to be one for velocities, as the transformer has no `flow_map_depth`, but {name} is"
                f" for flow maps. {_advise(scheduler, path_type)}"
            )
    elif not isinstance(scheduler, _FLOW_SCHEDULERS):
        advice = _advise(scheduler, path_type)
        if not _is_flow_multistep(scheduler):
            raise ValueError(
                f"`scheduler` has to be a flow-matching scheduler, but {name} has no mode that takes a velocity from"
                f" t = 1 to t = 0. {advice}"
            )
        if not config["use_flow_sigmas"]:
            raise ValueError(
                f"`scheduler` has to be a flow-matching scheduler, but {name} has `use_flow_sigmas=False`. {advice}"
            )
        if config.get("prediction_type") != "flow_prediction":
            raise ValueError(
                f"`scheduler` has to take a velocity, `prediction_type='flow_prediction'`, but {name} has"
                f" `prediction_type={config.get('prediction_type')!r}`. {advice}"
            )
        unfit = {key: value for key, value in _UNIPC_SETTINGS.items() if config.get(key, value) != value}
        if isinstance(scheduler, UniPCMultistepScheduler) and unfit:
            setting = next(iter(unfit))
            raise ValueError(
                f"`scheduler` {name} cannot end at t = 0 with `{setting}={config[setting]!r}`."
                f" {_advise(scheduler, path_type, unfit)}"
            )
    if sigmas is not None and not _takes_sigmas(scheduler):
        raise ValueError(f"`sigmas` cannot be used with {name}, which does not take any.")

    follows_velocity = isinstance(scheduler, _VELOCITY_SCHEDULERS) and not config.get("stochastic_sampling")
    if path_type != "linear" and not follows_velocity and not has_path(scheduler):
        raise ValueError(
            f"`scheduler` {name} is for the linear path, but the transformer was trained on the path {path_type!r}."
            f" {_advise(scheduler, path_type)}"
        )
    if config.get("scale_factors"):
        advice = _advise(scheduler, path_type, {"scale_factors": None})
        raise ValueError(
            f"`scheduler` has to keep the size of images, but {name} has `scale_factors={config['scale_factors']}`."
            f" {advice}"
        )
    values = {key: scheduler.config.get(key, default) for key, default in _DYNAMIC_SHIFTING.items()}
    missing = [key for key, value in values.items() if value is None]
    if _shifts_dynamically(scheduler) and missing:
        advice = _advise(scheduler, path_type, {"use_dynamic_shifting": False})
        raise ValueError(
            f"`scheduler` {name} has `use_dynamic_shifting=True`, but none of {missing}, which the shift follows from."
            f" {advice}"
        )
    if _shifts_dynamically(scheduler) and values["base_image_seq_len"] == values["max_image_seq_len"]:
        raise ValueError(
            f"`scheduler` {name} has to have a `max_image_seq_len` other than its `base_image_seq_len`, between which"
            f" the shift is interpolated, but both are {values['max_image_seq_len']}."
        )


def _takes_sigmas(scheduler: SchedulerMixin) -> bool:
    # LTX's wants the last 0 among them, and then evaluates the model there.
    return takes(scheduler.set_timesteps, "sigmas") and not isinstance(scheduler, LTXEulerAncestralRFScheduler)


def _shifts_dynamically(scheduler: SchedulerMixin) -> bool:
    return takes(scheduler.set_timesteps, "mu") and bool(scheduler.config.get("use_dynamic_shifting"))


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device,
    sigmas: list[float] | None,
    path_type: str,
    num_tokens: int,
) -> tuple[torch.Tensor, list[float]]:
    """
    Lays out the grid of a scheduler that passed [`check_scheduler`], and begins there.

    Args:
        scheduler (`SchedulerMixin`): The scheduler.
        num_inference_steps (`int`): Number of steps.
        device (`torch.device`): Where its timesteps are to be.
        sigmas (`list[float]`, *optional*): The grid of times, in place of `num_inference_steps`.
        path_type (`str`): The path that the model was trained on.
        num_tokens (`int`): Tokens of an image, which dynamic shifting depends on.

    Returns:
        `tuple[torch.Tensor, list[float]]`: the timesteps, and the times `t` that they stand for.

    Raises:
        `ValueError`: if the grid does not end at `t = 0`, or leaves `[0, 1]`.
    """
    arguments: dict[str, Any] = {"device": device}
    if _shifts_dynamically(scheduler):
        # Linear in the number of tokens, as the pipelines of Flux and SD3 have it.
        start, end, low, high = (scheduler.config.get(key, default) for key, default in _DYNAMIC_SHIFTING.items())
        arguments["mu"] = low + (high - low) * (num_tokens - start) / (end - start)
    has_own_grid = has_path(scheduler) or bool(_own_config(scheduler).get("use_flow_sigmas"))
    if sigmas is None and not has_own_grid and _takes_sigmas(scheduler):
        # By itself FlowMatchEuler ends at 1 / num_train_timesteps and jumps to 0 from there.
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
    if sigmas is not None:
        # Some schedulers calculate with them as they are, which takes an array.
        try:
            arguments["sigmas"] = np.asarray(sigmas, dtype=np.float64)
        except (TypeError, ValueError):
            arguments["sigmas"] = np.empty(())
        if arguments["sigmas"].ndim != 1 or not arguments["sigmas"].size:
            raise ValueError(f"`sigmas` has to be a list of at least one number, but is {describe(sigmas)}.")
        if not has_path(scheduler):
            # As this package's check theirs. The others append the last 0 themselves.
            times = arguments["sigmas"][: -1 if arguments["sigmas"][-1] == 0 else None]
            if not (times.size and 0 < times[-1] and times[0] <= 1 and (np.diff(times) < 0).all()):
                raise ValueError(f"`sigmas` have to decrease and to lie in (0, 1], but are {describe(sigmas)}.")
            arguments["sigmas"] = times
    else:
        arguments["num_inference_steps"] = num_inference_steps
    scheduler.set_timesteps(**arguments)

    last, largest = scheduler.sigmas[-1].item(), scheduler.sigmas.max().item()
    if last != 0 or not largest <= 1 + 1e-6:  # not a number is neither
        settings = {"invert_sigmas": False} if _own_config(scheduler).get("invert_sigmas") else None
        raise ValueError(
            f"`scheduler` has to go down to t = 0 from no more than t = 1, but {type(scheduler).__name__} ends at"
            f" {last:g} and has times up to {largest:g}. {_advise(scheduler, path_type, settings)}"
        )
    scheduler.set_begin_index(0)
    return scheduler.timesteps, scheduler.sigmas[: len(scheduler.timesteps)].tolist()
