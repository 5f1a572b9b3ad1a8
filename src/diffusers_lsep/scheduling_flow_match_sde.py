# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from .argument_checks import check_choice
from .interpolants import get_interpolant
from .reverse_sde import DIFFUSION_FORMS, ReverseSDE
from .scheduling_flow_match import FlowMatchScheduler, has_own_solver_order


class FlowMatchSDEScheduler(FlowMatchScheduler):
    r"""
    Integrates a flow-matching model from noise (`t = 1`) to data (`t = 0`) by Euler-Maruyama along the reverse SDE
    (SiT, arXiv 2401.08740, equation 6), which is how LSEP, REPA and SiT report their results, or, with
    `diffusion_form="none"`, by Euler's method along the probability-flow ODE. Both are of first order:
    [`FlowMatchSDEMultistepScheduler`] and [`FlowMatchHeunODEScheduler`] are of second.

    With `w(t)` half the squared diffusion coefficient and the score `s = -noise / sigma(t)`, a step of Euler-Maruyama
    is

        x <- x + (v - w(t) s) dt + sqrt(2 w(t) |dt|) z

    on the grid `linspace(1, last_step_size, N)`, followed by a last step to 0 without noise. The ODE is solved on
    `linspace(1, 0, N + 1)`.

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            Scale of the timesteps: `timesteps = num_train_timesteps * t`.
        path_type (`str`, defaults to `"linear"`): The path of the model, `"linear"` or `"cosine"`.
        diffusion_form (`str`, defaults to `"linear"`):
            `w(t)`: `"constant"` (1), `"sigma"` (`sigma(t)`), `"linear"` (`t`), `"decreasing"`
            (`(cos(pi (1 - t)) + 1)^2 / 4`), `"increasing-decreasing"` (`sin(pi (1 - t))^2`), `"sbdm"`
            (`sigma sigma' - sigma^2 alpha' / alpha`, singular at `t = 1`, so its grid starts at 0.999), or `"none"`
            for the ODE.
        diffusion_norm (`float`, defaults to `1.0`): Factor of `w(t)`, 0 to 1,000,000 (`"decreasing"`: of the cosine).
        last_step (`str`, defaults to `"mean"`):
            The last step of the SDE, from `last_step_size` to 0: `"mean"` (a step without noise), `"tweedie"` (the
            expected data) or `"euler"` (Euler's step of the ODE).
        last_step_size (`float`, defaults to `0.04`):
            Length of that step, between 0 and 1 (`"sbdm"`: 0.999). The error of this step depends on it, not on the
            number of steps.

    Raises:
        `ValueError`: if an argument is none of the above.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path_type: str = "linear",
        diffusion_form: str = "linear",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float = 0.04,
    ):
        check_choice("diffusion_form", diffusion_form, [*DIFFUSION_FORMS, "none"])
        self.sde = ReverseSDE(get_interpolant(path_type), diffusion_form, diffusion_norm, last_step, last_step_size)
        super().__init__(num_train_timesteps, path_type)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Reads a config as diffusers does, for `from_config`, but refuses the second order: another scheduler's."""
        saved = config_dict["solver_order"] if has_own_solver_order(config_dict) else None
        if kwargs.get("solver_order", saved) == 2:
            is_ode = kwargs.get("diffusion_form", config_dict.get("diffusion_form")) == "none"
            successor = "FlowMatchHeunODEScheduler" if is_ode else "FlowMatchSDEMultistepScheduler"
            raise ValueError(
                f"`solver_order` has to be 1 with FlowMatchSDEScheduler, but is 2: that is {successor} now. It reads"
                f" the same config; give it to a saved pipeline by `scheduler={successor}.from_pretrained(pipeline,"
                " subfolder='scheduler')`."
            )
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def _start(self) -> float:
        return self.sde.start

    def _get_times(self, num_inference_steps: int) -> torch.Tensor:
        if self.sde.diffusion_form == "none":
            return super()._get_times(num_inference_steps)
        times = torch.linspace(self.sde.start, self.sde.last_step_size, num_inference_steps, dtype=torch.float64)
        return torch.cat([times, times.new_zeros(1)])

    def _step(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        time: float,
        next_time: float,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        sde, is_last = self.sde, next_time == 0
        if sde.diffusion_form == "none" or (is_last and sde.last_step == "euler"):
            return sample + velocity * (next_time - time)
        if is_last and sde.last_step == "tweedie":
            # E[x_0 | x_t] = (x + sigma^2 s) / alpha, in the form that is regular where alpha is 0
            return self.path.predict_original_sample(velocity, sample, time)

        # v - w s, with the score s = -noise / sigma
        half_variance = sde.half_variance(time)
        noise = self.path.predict_noise(velocity, sample, time)
        prev_sample = sample + (velocity + half_variance / self.path.sigma(time) * noise) * (next_time - time)
        if is_last:
            return prev_sample

        variance_noise = self._draw_noise(sample, generator, variance_noise)
        return prev_sample + math.sqrt(2 * half_variance * (time - next_time)) * variance_noise
