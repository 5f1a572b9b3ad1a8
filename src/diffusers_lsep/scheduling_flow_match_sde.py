# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .paths import get_path


DIFFUSION_FORMS = ("constant", "sigma", "linear", "decreasing", "increasing-decreasing", "sbdm", "none")
LAST_STEPS = ("mean", "tweedie", "euler")

# Where the grid starts when the diffusion is singular at t = 1, as in SiT.
SBDM_START = 1 - 1e-3

# The grid of the second-order SDE solver is uniform in t^(1/3): between uniform in t (best for wide data) and in log t
# (for narrow data).
GRID_EXPONENT = 3


@functools.cache  # and not a constant: numpy.polynomial would make the import of the package slower
def gauss_legendre() -> tuple[list[float], list[float]]:
    """Nodes and weights on [-1, 1], for integrals over a part of the grid."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    return nodes.tolist(), weights.tolist()


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """
    Output of [`FlowMatchSDEScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of the shape of the sample): The sample at the next, smaller `t`.
    """

    prev_sample: torch.Tensor


class FlowMatchSDEScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Integrates a flow-matching model from noise (`t = 1`) to data (`t = 0`): by Euler-Maruyama along the reverse SDE
    (SiT, arXiv 2401.08740, equation 6), which is how LSEP, REPA and SiT report their results, by a second-order solver
    of that SDE, which needs a quarter of the steps, or, with `diffusion_form="none"`, along the probability-flow ODE
    by Euler's or Heun's method.

    With `w(t)` half the squared diffusion coefficient and the score `s = -noise / sigma(t)`, a step of Euler-Maruyama
    is

        x <- x + (v - w(t) s) dt + sqrt(2 w(t) |dt|) z

    on the grid `linspace(1, last_step_size, N)`, followed by a last step to 0 without noise.

    With `solver_order=2` the linear part of the SDE, and with it the noise, is solved exactly over a step from `t` to
    `u`. What remains is the data prediction `D` of the model at the times `s` in between,

        x <- sigma(u) / sigma(t) e^-E(t) x + integral from t to u of D(s) dq(s) + sigma(u) sqrt(1 - e^-2E(t)) z,
        E(s) = integral of w / sigma^2 from u to s,    q(s) = alpha(s) sigma(u) / sigma(s) e^-E(s)

    A predictor extrapolates `D` from the last two evaluations; the evaluation at the predicted sample, which the next
    step needs anyway, then corrects this step by interpolation, with the noise of the step as it was (the scheme of
    SA-Solver, arXiv 2309.05019, and UniPC, arXiv 2302.04867, for any `w(t)` and on both paths). So there is one
    evaluation of the model per step, and the weak order is 2, for the samples that `step` returns as well: these are
    predicted ones, and their correction is added by the next call. The grid from 1 to `last_step_size` is uniform in
    `t^(1/3)`, that is, finer near the data.

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            Scale of the timesteps: `timesteps = num_train_timesteps * t`.
        path_type (`str`, defaults to `"linear"`): The path of the model, `"linear"` or `"cosine"`.
        diffusion_form (`str`, defaults to `"linear"`):
            `w(t)`: `"constant"` (1), `"sigma"` (`sigma(t)`), `"linear"` (`t`), `"decreasing"`
            (`(cos(pi (1 - t)) + 1)^2 / 4`), `"increasing-decreasing"` (`sin(pi (1 - t))^2`), `"sbdm"`
            (`sigma sigma' - sigma^2 alpha' / alpha`, singular at `t = 1`, so its grid starts at 0.999), or `"none"`
            for the ODE.
        diffusion_norm (`float`, defaults to `1.0`): Factor of `w(t)`, not negative (`"decreasing"`: of the cosine).
        solver_order (`int`, defaults to `1`):
            Order of the solver, 1 or 2. For the ODE, 2 is Heun's method, and `num_inference_steps=N` then means
            `2 N - 1` evaluations of the model. For the SDE it is `N` with both orders.
        last_step (`str`, defaults to `"mean"`):
            The last step of the SDE, from `last_step_size` to 0: `"mean"` (a step without noise), `"tweedie"` (the
            expected data) or `"euler"` (Euler's step of the ODE). With `solver_order=2`, `"mean"` is the ODE's step
            for data of variance 1: it takes away about half of the noise that is left, which is right up to the fourth
            order in `last_step_size` for any smooth distribution, where all others are wrong in the second.
        last_step_size (`float`, defaults to `0.04`):
            Length of that step, in (0, 1). The error of this step depends on it, not on the number of steps.

    Raises:
        `ValueError`: if an argument is none of the above.
    """

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path_type: str = "linear",
        diffusion_form: str = "linear",
        diffusion_norm: float = 1.0,
        solver_order: int = 1,
        last_step: str = "mean",
        last_step_size: float = 0.04,
    ):
        self.path = get_path(path_type)
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` has to be at least 1, but is {num_train_timesteps}.")
        if diffusion_form not in DIFFUSION_FORMS:
            raise ValueError(f"`diffusion_form` has to be one of {list(DIFFUSION_FORMS)}, but is {diffusion_form!r}.")
        if not (math.isfinite(diffusion_norm) and diffusion_norm >= 0):
            raise ValueError(f"`diffusion_norm` has to be a number not below 0, but is {diffusion_norm}.")
        if solver_order not in (1, 2):
            raise ValueError(f"`solver_order` has to be 1 or 2, but is {solver_order}.")
        if last_step not in LAST_STEPS:
            raise ValueError(f"`last_step` has to be one of {list(LAST_STEPS)}, but is {last_step!r}.")
        if not 0 < last_step_size < 1:
            raise ValueError(f"`last_step_size` has to lie between 0 and 1, but is {last_step_size}.")

        # As in the schedulers of diffusers: a full grid until `set_timesteps` is called.
        self.num_inference_steps = None
        self._set_grid(torch.linspace(self._first_time, 0, num_train_timesteps + 1, dtype=torch.float64), device=None)

    @property
    def order(self) -> int:
        """Model evaluations per full step: 2 with Heun's method, 1 with all others."""
        return 2 if self.config.diffusion_form == "none" and self.config.solver_order == 2 else 1

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial noise."""
        return 1.0

    @property
    def step_index(self) -> int | None:
        """Index of the next step in `timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where it was set by `set_begin_index`."""
        return self._begin_index

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next model output is the first of its step (with Heun's method there is a second one)."""
        return self._first_velocity is None

    @property
    def _first_time(self) -> float:
        return SBDM_START if self.config.diffusion_form == "sbdm" else 1.0

    def set_begin_index(self, begin_index: int = 0):
        """
        Sets the index of the first step; pipelines do this before the loop.

        Args:
            begin_index (`int`, defaults to `0`): Index in `timesteps`.
        """
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """
        Returns the sample as it is; for interchangeability with schedulers that scale it.

        Args:
            sample (`torch.Tensor`): The sample.
            timestep (`float` or `torch.Tensor`, *optional*): Not used.
        """
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
    ):
        """
        Lays out the grid. Afterwards `sigmas` holds the times `t` (float64, on the CPU, the last one 0), `timesteps`
        holds `num_train_timesteps * t` in float32, one for each evaluation of the model. With Heun's method every time
        but the first stands in both twice, as in `FlowMatchHeunDiscreteScheduler`.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of steps `N`. The SDE steps on `linspace(1, last_step_size, N)` (order 2: on the third power of
                `linspace(1, last_step_size^(1/3), N)`) and then to 0, the ODE on `linspace(1, 0, N + 1)`.
            device (`str` or `torch.device`, *optional*): The device of `timesteps`.
            sigmas (`list[float]`, *optional*):
                A grid of one's own, in place of `num_inference_steps`: decreasing times in (0, 1]. The final 0 may be
                left out, as everywhere in diffusers.

        Raises:
            `ValueError`: if neither or both of `num_inference_steps` and `sigmas` are given, if there is no step, or
            if `sigmas` do not decrease or leave the interval.
        """
        if sigmas is not None:
            times = self._check_sigmas(sigmas)
            if num_inference_steps is not None and num_inference_steps != len(times) - 1:
                raise ValueError(
                    f"`sigmas` describe {len(times) - 1} steps, but `num_inference_steps` is {num_inference_steps}."
                    " Pass one of the two."
                )
        elif num_inference_steps is None:
            raise ValueError("One of `num_inference_steps` and `sigmas` has to be given, but both are None.")
        elif num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` has to be at least 1, but is {num_inference_steps}.")
        elif self.config.diffusion_form == "none":
            times = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        else:
            first, last = self._first_time, self.config.last_step_size
            if self.config.solver_order == 1:
                times = torch.linspace(first, last, num_inference_steps, dtype=torch.float64)
            else:
                ends = first ** (1 / GRID_EXPONENT), last ** (1 / GRID_EXPONENT)
                times = torch.linspace(*ends, num_inference_steps, dtype=torch.float64) ** GRID_EXPONENT
                times[-1], times[0] = last, first  # without rounding
            times = torch.cat([times, times.new_zeros(1)])

        self.num_inference_steps = len(times) - 1
        self._set_grid(times, device)

    def _check_sigmas(self, sigmas: list[float] | torch.Tensor) -> torch.Tensor:
        times = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").clone()
        if times.ndim != 1 or len(times) == 0:
            raise ValueError(f"`sigmas` has to be a list of at least one number, but is {sigmas}.")
        if times[-1] != 0:
            times = torch.cat([times, times.new_zeros(1)])
        if len(times) < 2 or not bool((times.diff() < 0).all()) or times[0] > 1:
            raise ValueError(f"`sigmas` have to decrease and to lie in (0, 1], but are {sigmas}.")
        if times[0] > self._first_time:
            raise ValueError(
                f"`sigmas` have to start at {self._first_time} or below with `diffusion_form='sbdm'`, which is"
                f" singular at 1, but start at {float(times[0])}."
            )
        return times

    def _set_grid(self, times: torch.Tensor, device: str | torch.device | None):
        if self.order == 2:
            times = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
        self.sigmas = times
        self.timesteps = (self.config.num_train_timesteps * times[:-1]).to(device=device, dtype=torch.float32)

        self._step_index = None
        self._begin_index = None
        # Heun's method: the first half of the step
        self._first_velocity = None
        self._first_sample = None
        # The second-order SDE solver: what it has to know of the step before
        self._previous_step = None

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """
        Finds a timestep in the schedule. Of a time that stands there twice (Heun's method) the second place is taken,
        which begins a step.

        Args:
            timestep (`float` or `torch.Tensor`): One of `timesteps`.
            schedule_timesteps (`torch.Tensor`, *optional*): Where to look, in place of `timesteps`.

        Raises:
            `ValueError`: if it is not in the schedule.
        """
        if schedule_timesteps is None:
            schedule_timesteps = self.timesteps
        indices = (schedule_timesteps == timestep).nonzero()
        if len(indices) == 0:
            raise ValueError(f"`timestep` has to be one of the scheduler's `timesteps`, but is {timestep}.")
        return indices[min(1, len(indices) - 1)].item()

    def _init_step_index(self, timestep: float | torch.Tensor):
        if self.begin_index is None:
            if isinstance(timestep, torch.Tensor):
                timestep = timestep.to(self.timesteps.device)
            self._step_index = self.index_for_timestep(timestep)
        else:
            self._step_index = self._begin_index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple[torch.Tensor]:
        """
        Takes the sample from `timestep` to the next one. Computed in float64 where the device has it.

        Args:
            model_output (`torch.Tensor`): The velocity that the model predicts.
            timestep (`float` or `torch.Tensor`): The current one of `timesteps`.
            sample (`torch.Tensor`): The current sample.
            generator (`torch.Generator` or a list of them, one for each sample, *optional*):
                Draws the noise of the SDE.
            variance_noise (`torch.Tensor`, *optional*): That noise, in place of a draw; of the shape of `sample`.
            return_dict (`bool`, defaults to `True`): Whether to return an output class in place of a tuple.

        Returns:
            [`FlowMatchSDESchedulerOutput`] or `tuple`: the next sample, in the dtype of `sample`.

        Raises:
            `ValueError`: if `set_timesteps` was not called, if `timestep` is an integer index, if all steps are done,
            or if `variance_noise` is not of the shape of `sample`.
        """
        self._check_step(timestep, sample, variance_noise)
        if self.step_index is None:
            self._init_step_index(timestep)
        if self.step_index >= len(self.timesteps):
            raise ValueError(
                f"All {len(self.timesteps)} steps of this schedule are done. Call `set_timesteps` before another run."
            )

        # 1. Upcast: hundreds of small steps add up.
        dtype = torch.float32 if sample.device.type in ("mps", "npu") else torch.float64
        velocity, state = model_output.to(dtype), sample.to(dtype)

        # 2. Step
        if self.config.diffusion_form == "none":
            prev_sample = self._step_ode(velocity, state)
        elif self.config.solver_order == 1:
            prev_sample = self._step_sde(velocity, state, generator, variance_noise)
        else:
            prev_sample = self._step_sde_second_order(velocity, state, generator, variance_noise)

        # 3. The next step starts from here.
        self._step_index += 1

        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchSDESchedulerOutput(prev_sample=prev_sample)

    def _check_step(self, timestep, sample, variance_noise):
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None: call `set_timesteps` before `step`.")
        if isinstance(timestep, int) or (torch.is_tensor(timestep) and not timestep.is_floating_point()):
            raise ValueError(
                f"`timestep` has to be one of the scheduler's `timesteps`, but is the integer {timestep}. Indices, as"
                " from `enumerate(timesteps)`, are not supported."
            )
        if variance_noise is not None and variance_noise.shape != sample.shape:
            raise ValueError(
                f"`variance_noise` has to be of the shape of `sample`, {list(sample.shape)}, but is of shape"
                f" {list(variance_noise.shape)}."
            )

    def _step_ode(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        time, next_time = self.sigmas[self.step_index].item(), self.sigmas[self.step_index + 1].item()
        if self.config.solver_order == 1:
            return sample + velocity * (next_time - time)

        if not self.state_in_first_order:
            # Heun's second evaluation, at the end of the interval: both times are one place back.
            time, next_time = self.sigmas[self.step_index - 1].item(), self.sigmas[self.step_index].item()
            prev_sample = self._first_sample + 0.5 * (self._first_velocity + velocity) * (next_time - time)
            self._first_velocity = self._first_sample = None
            return prev_sample

        if next_time > 0:  # the last interval has no second evaluation
            self._first_velocity, self._first_sample = velocity, sample
        return sample + velocity * (next_time - time)

    def _step_sde(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        time, next_time = self.sigmas[self.step_index].item(), self.sigmas[self.step_index + 1].item()
        is_last = next_time == 0
        if is_last and self.config.last_step == "tweedie":
            # E[x_0 | x_t] = (x + sigma^2 s) / alpha, in the form that is regular where alpha is 0
            return self.path.predict_original_sample(velocity, sample, time)
        if is_last and self.config.last_step == "euler":
            return sample + velocity * (next_time - time)

        # v - w s, with the score s = -noise / sigma
        half_variance = self._half_variance(time)
        noise = self.path.predict_noise(velocity, sample, time)
        prev_sample = sample + (velocity + half_variance / self.path.sigma(time) * noise) * (next_time - time)
        if is_last:
            return prev_sample

        variance_noise = self._draw_noise(sample, generator, variance_noise)
        return prev_sample + math.sqrt(2 * half_variance * (time - next_time)) * variance_noise

    def _step_sde_second_order(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        time, next_time = self.sigmas[self.step_index].item(), self.sigmas[self.step_index + 1].item()
        path = self.path
        original = path.predict_original_sample(velocity, sample, time)

        # 1. Correct the step before, of which this sample is the prediction. As a difference: what was done to the
        # sample in the meantime stays.
        extrapolation = 0.0
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
            if self.config.last_step == "tweedie":
                return original
            if self.config.last_step == "euler":
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
        path = self.path
        if self.config.diffusion_form == "sbdm":
            # w / sigma^2 is the derivative of log(sigma / alpha), times the norm
            ratio = path.sigma(end) / path.alpha(end) * path.alpha(start) / path.sigma(start)
            return self.config.diffusion_norm * math.log(max(1.0, ratio))  # not below 1 by rounding
        return math.log(end / start) * self._mean_over_log_time(
            lambda t: t * self._half_variance(t) / path.sigma(t) ** 2, start, end
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

    @staticmethod
    def _draw_noise(
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        if variance_noise is None:
            # float32 also where the sample is float16: its tails are part of the noise
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        return variance_noise.to(sample.dtype)

    def _half_variance(self, t: float) -> float:
        """`w(t)`, half the squared diffusion coefficient (SiT, table 2)."""
        norm, path = self.config.diffusion_norm, self.path
        match self.config.diffusion_form:
            case "constant":
                return norm
            case "sigma":
                return norm * path.sigma(t)
            case "linear":
                return norm * t
            case "decreasing":
                return 0.25 * (norm * math.cos(math.pi * (1 - t)) + 1) ** 2
            case "increasing-decreasing":
                return norm * math.sin(math.pi * (1 - t)) ** 2
            case "sbdm":
                # sigma sigma' - sigma^2 alpha' / alpha
                return norm * path.sigma(t) * path.wronskian / path.alpha(t)

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The forward process of flow matching: `alpha(t) sample + sigma(t) noise`.

        Args:
            sample (`torch.Tensor`): Data.
            timestep (`float` or `torch.Tensor` with one value, or with one for each sample):
                Timesteps in `[0, num_train_timesteps]`.
            noise (`torch.Tensor`): Noise of the shape of `sample`.
        """
        time = torch.as_tensor(timestep, device=sample.device).to(torch.float32) / self.config.num_train_timesteps
        time = time.reshape(-1, *[1] * (sample.ndim - 1))
        return self.path.interpolate(sample, noise, time).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """`scale_noise` under the name and with the order of arguments of the discrete schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
