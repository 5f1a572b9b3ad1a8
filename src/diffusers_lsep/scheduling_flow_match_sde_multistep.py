# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from .argument_checks import check_choice
from .interpolants import get_interpolant
from .reverse_sde import DIFFUSION_FORMS, ReverseSDE
from .scheduling_flow_match import FlowMatchScheduler


# The grid is uniform in t^(1/3): between uniform in t (best for wide data) and in log t (for narrow data).
GRID_EXPONENT = 3


@functools.cache  # and not a constant: numpy.polynomial would make the import of the package slower
def gauss_legendre() -> tuple[list[float], list[float]]:
    """Nodes and weights on [-1, 1], for integrals over a part of the grid."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    return nodes.tolist(), weights.tolist()


class FlowMatchSDEMultistepScheduler(FlowMatchScheduler):
    r"""
    Integrates a flow-matching model from noise (`t = 1`) to data (`t = 0`) along the same reverse SDE as
    [`FlowMatchSDEScheduler`], by a multistep method of weak order 2, which needs a quarter of the steps.

    With `w(t)` half the squared diffusion coefficient, the velocity `v` and the score `s = -noise / sigma(t)`, the SDE
    is `dx = (v - w s) dt + sqrt(2 w) dW` (SiT, arXiv 2401.08740, equation 6). The model's `v` is
    `alpha' D + sigma' noise` with its data prediction `D` and `noise = (x - alpha D) / sigma`, so that

        dx = (sigma' / sigma + w / sigma^2) x dt + (alpha' - alpha (sigma' / sigma + w / sigma^2)) D dt + sqrt(2 w) dW

    is linear but for `D`. The linear part, and with it the noise, is solved exactly over a step from `t` to `u`.
    What remains is `D` at the times `s` in between,

        x <- sigma(u) / sigma(t) e^-E(t) x + integral from t to u of D(s) dq(s) + sigma(u) sqrt(1 - e^-2E(t)) z,
        E(s) = integral of w / sigma^2 from u to s,    q(s) = alpha(s) sigma(u) / sigma(s) e^-E(s)

    A predictor extrapolates `D` from the last two evaluations; the evaluation at the predicted sample, which the next
    step needs anyway, then corrects this step by interpolation, with the noise of the step as it was (the scheme of
    SA-Solver, arXiv 2309.05019, and UniPC, arXiv 2302.04867, for any `w(t)` and on both paths). So there is one
    evaluation of the model per step, and the weak order is 2, for the samples that `step` returns as well: these are
    predicted ones, and their correction is added by the next call. The grid from 1 to `last_step_size` is uniform in
    `t^(1/3)`, that is, finer near the data; a last step to 0 without noise follows.

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            Scale of the timesteps: `timesteps = num_train_timesteps * t`.
        path_type (`str`, defaults to `"linear"`): The path of the model, `"linear"` or `"cosine"`.
        diffusion_form (`str`, defaults to `"linear"`):
            `w(t)`: `"constant"` (1), `"sigma"` (`sigma(t)`), `"linear"` (`t`), `"decreasing"`
            (`(cos(pi (1 - t)) + 1)^2 / 4`), `"increasing-decreasing"` (`sin(pi (1 - t))^2`), or `"sbdm"`
            (`sigma sigma' - sigma^2 alpha' / alpha`, singular at `t = 1`, so its grid starts at 0.999).
        diffusion_norm (`float`, defaults to `1.0`): Factor of `w(t)`, 0 to 1,000,000 (`"decreasing"`: of the cosine).
        last_step (`str`, defaults to `"mean"`):
            The last step, from `last_step_size` to 0: `"mean"` (the ODE's step for data of variance 1), `"tweedie"`
            (the expected data) or `"euler"` (Euler's step of the ODE). `"mean"` takes away about half of the noise
            that is left, which is right up to the fourth order in `last_step_size` for any smooth distribution, where
            the others are wrong in the second.
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
        if isinstance(diffusion_form, str) and diffusion_form == "none":
            raise ValueError(
                f"`diffusion_form` has to be one of {list(DIFFUSION_FORMS)}, but is 'none'. For the ODE use"
                " FlowMatchHeunODEScheduler."
            )
        check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        self.sde = ReverseSDE(get_interpolant(path_type), diffusion_form, diffusion_norm, last_step, last_step_size)
        super().__init__(num_train_timesteps, path_type)

    @property
    def _start(self) -> float:
        return self.sde.start

    def _get_times(self, num_inference_steps: int) -> torch.Tensor:
        first, last = self.sde.start, self.sde.last_step_size
        ends = first ** (1 / GRID_EXPONENT), last ** (1 / GRID_EXPONENT)
        times = torch.linspace(*ends, num_inference_steps, dtype=torch.float64) ** GRID_EXPONENT
        times[-1], times[0] = last, first  # without rounding
        return torch.cat([times, times.new_zeros(1)])

    def _set_grid(self, times: torch.Tensor, device: str | torch.device | None):
        super()._set_grid(times, device)
        # What has to be known of the step before: its time, data prediction, extrapolation and weight of correction.
        self._previous_step: tuple[float, torch.Tensor, torch.Tensor | float, float] | None = None

    def _step(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        time: float,
        next_time: float,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        path, sde = self.path, self.sde
        original = path.predict_original_sample(velocity, sample, time)

        # 1. Correct the step before, of which this sample is the prediction. As a difference: what was done to the
        # sample in the meantime stays.
        extrapolation: torch.Tensor | float = 0.0
        if self._previous_step is not None:
            previous_time, previous_original, previous_extrapolation, correction_weight = self._previous_step
            self._previous_step = None
            change = original - previous_original
            sample = sample + correction_weight * change - previous_extrapolation
            # Half of the change: to the middle of the step. The noise in it, half a step late, then makes up for the
            # noise of this step, which the data prediction does not know yet, where both steps are about as long. A
            # long step after a short one does not multiply it.
            extrapolation = 0.5 * min(1.0, (time - next_time) / (previous_time - time)) * change

        noise = (sample - path.alpha(time) * original) / path.sigma(time)
        if next_time == 0:
            if sde.last_step == "tweedie":
                return original
            if sde.last_step == "euler":
                return sample + path.velocity(original, noise, time) * (next_time - time)
            # For data of variance 1 the ODE keeps (x - E[x]) / sqrt(alpha^2 + sigma^2).
            alpha, sigma = path.alpha(time), path.sigma(time)
            return original + (math.hypot(alpha, sigma) - alpha) / sigma * noise

        # 2. Predict
        exponent = self._integrate_rate(next_time, time)
        kept = math.exp(-exponent) * path.sigma(next_time)  # of the noise
        weight = path.alpha(next_time) - kept * path.alpha(time) / path.sigma(time)  # q(u) - q(t)
        extrapolation = weight * extrapolation
        self._previous_step = time, original, extrapolation, self._integrate_correction(next_time, time)

        variance_noise = self._draw_noise(sample, generator, variance_noise)
        new = math.sqrt(-math.expm1(-2 * exponent)) * path.sigma(next_time)
        return path.alpha(next_time) * original + extrapolation + kept * noise + new * variance_noise

    def _integrate_rate(self, start: float, end: float) -> float:
        """`E(end)`, the integral of `w / sigma^2` from `start`; in float64 on the host."""
        path, sde = self.path, self.sde
        if sde.diffusion_form == "sbdm":
            # w / sigma^2 is the derivative of log(sigma / alpha), times the norm
            ratio = path.sigma(end) / path.alpha(end) * path.alpha(start) / path.sigma(start)
            return sde.diffusion_norm * math.log(max(1.0, ratio))  # not below 1 by rounding
        return math.log(end / start) * self._mean_over_log_time(
            lambda t: t * sde.half_variance(t) / path.sigma(t) ** 2, start, end
        )

    def _integrate_correction(self, start: float, end: float) -> float:
        """
        The integral of `dq(s)` times the part of the way from `end` to `start` that `log s` has covered: by parts,
        `q(start)` less the mean of `q` over `log s`.
        """
        path = self.path
        return path.alpha(start) - self._mean_over_log_time(
            lambda t: path.alpha(t) * path.sigma(start) / path.sigma(t) * math.exp(-self._integrate_rate(start, t)),
            start,
            end,
        )

    @staticmethod
    def _mean_over_log_time(function: Callable[[float], float], start: float, end: float) -> float:
        # Rates grow towards 0 like powers of t.
        middle, half = 0.5 * (math.log(end) + math.log(start)), 0.5 * math.log(end / start)
        nodes, weights = gauss_legendre()
        values = [function(math.exp(middle + half * node)) for node in nodes]
        return 0.5 * sum(weight * value for weight, value in zip(weights, values))
