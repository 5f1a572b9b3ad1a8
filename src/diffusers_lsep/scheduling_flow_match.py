# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""What the schedulers of this package share: the grid of times, the frame of a step, and the forward process."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .argument_checks import (
    check_count,
    check_generator,
    check_number,
    check_tensor,
    check_values,
    describe,
    make_plain,
)
from .devices import exact_dtype
from .interpolants import get_interpolant
from .reverse_sde import MIN_TIME


# diffusers hands keys that a scheduler does not know on to the next one. `solver_order` is a key of DPM++ and UniPC;
# until it was split, `FlowMatchSDEScheduler` had one too. Theirs comes with at least one of these.
KEYS_BESIDE_SOLVER_ORDER = ("algorithm_type", "solver_type", "use_flow_sigmas")


def has_own_solver_order(config: dict[str, Any]) -> bool:
    """Whether the config holds the `solver_order` of this package, and not that of DPM++ or UniPC."""
    return "solver_order" in config and not any(key in config for key in KEYS_BESIDE_SOLVER_ORDER)


class FlowMatchScheduler(SchedulerMixin, ConfigMixin, ABC):
    """
    Base class of the schedulers that integrate a flow-matching model from noise (`t = 1`) to data (`t = 0`). A
    scheduler adds its grid, `_get_times`, and its solver, `_step`.

    Args:
        num_train_timesteps (`int`): Scale of the timesteps: `timesteps = num_train_timesteps * t`.
        path_type (`str`): The path of the model, `"linear"` or `"cosine"`.

    Raises:
        `ValueError`: if an argument is none of the above.
    """

    _compatibles = [
        "FlowMatchSDEScheduler",
        "FlowMatchSDEMultistepScheduler",
        "FlowMatchHeunODEScheduler",
        "FlowMapScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ]

    order = 1
    """Model evaluations per full step."""

    init_noise_sigma = 1.0
    """Standard deviation of the initial noise."""

    _step_index: int | None
    _begin_index: int | None

    def __init__(self, num_train_timesteps: int, path_type: str):
        self.path = get_interpolant(path_type)
        num_train_timesteps = check_count("num_train_timesteps", num_train_timesteps)
        make_plain(self)

        # As in the schedulers of diffusers: a full grid until `set_timesteps` is called.
        self.num_inference_steps: int | None = None
        self._set_grid(torch.linspace(self._start, 0, num_train_timesteps + 1, dtype=torch.float64), device=None)

    def _get_times(self, num_inference_steps: int) -> torch.Tensor:
        """The grid of so many steps: decreasing, in float64, the last one 0."""
        return torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)

    @abstractmethod
    def _step(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        time: float,
        next_time: float,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        The sample at `next_time`: `time` and `next_time` are `sigmas[step_index]` and the one that follows, `velocity`
        and `sample` are in float64, and `generator` and `variance_noise` are for `_draw_noise`.
        """

    @property
    def _start(self) -> float:
        """The largest `t` of a grid."""
        return 1.0

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Reads a config as diffusers does, for `from_config`, but leaves out a `solver_order` of this package."""
        if has_own_solver_order(config_dict):
            config_dict = {key: value for key, value in config_dict.items() if key != "solver_order"}
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def step_index(self) -> int | None:
        """Index of the next step in `timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where it was set by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0):
        """
        Sets the index of the first step; pipelines do this before the loop.

        Args:
            begin_index (`int`, defaults to `0`): Index in `timesteps`.

        Raises:
            `ValueError`: if it is no index.
        """
        self._begin_index = check_count("begin_index", begin_index, low=0)

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
        holds `num_train_timesteps * t` in float32, one for each evaluation of the model.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, on the scheduler's own grid.
            device (`str` or `torch.device`, *optional*): The device of `timesteps`.
            sigmas (`list[float]`, *optional*):
                A grid of one's own, in place of `num_inference_steps`: decreasing times in (0, 1]. The final 0 may be
                left out, as everywhere in diffusers.

        Raises:
            `ValueError`: if neither or both of `num_inference_steps` and `sigmas` are given, if there is no step, or
            if `sigmas` do not decrease or leave the interval.
        """
        if num_inference_steps is not None:
            num_inference_steps = check_count("num_inference_steps", num_inference_steps)
        try:
            device = torch.device(device) if device is not None else None
        except (TypeError, RuntimeError):
            raise ValueError(f"`device` has to be a device of torch, but is {describe(device)}.") from None
        if sigmas is not None:
            times = self._check_sigmas(sigmas)
            if num_inference_steps is not None and num_inference_steps != len(times) - 1:
                raise ValueError(
                    f"`sigmas` describe {len(times) - 1} steps, but `num_inference_steps` is {num_inference_steps}."
                    " Pass one of the two."
                )
        elif num_inference_steps is None:
            raise ValueError("One of `num_inference_steps` and `sigmas` has to be given, but both are None.")
        else:
            times = self._get_times(num_inference_steps)
            if not bool((times.diff() < 0).all()):
                raise ValueError(
                    f"`num_inference_steps` has to be smaller, as the steps from {self._start:g} to `last_step_size`"
                    f" cannot be told apart, but is {num_inference_steps}."
                )

        self.num_inference_steps = len(times) - 1
        self._set_grid(times, device)

    def _check_sigmas(self, sigmas: list[float] | torch.Tensor) -> torch.Tensor:
        try:
            times = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").clone()
        except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
            times = torch.empty(0)
        if times.ndim != 1 or len(times) == 0 or times.layout != torch.strided:
            raise ValueError(f"`sigmas` has to be a list of at least one number, but is {describe(sigmas)}.")
        if times[-1] != 0:
            times = torch.cat([times, times.new_zeros(1)])
        # The comparisons are false for NaN.
        if len(times) < 2 or not bool((times.diff() < 0).all()) or not times[0] <= 1 or not times[-2] >= MIN_TIME:
            raise ValueError(f"`sigmas` have to decrease and to lie in (0, 1], but are {describe(sigmas)}.")
        if times[0] > self._start:
            raise ValueError(
                f"`sigmas` have to start at {self._start} or below, for the SDE is singular at 1, but start at"
                f" {float(times[0])}."
            )
        return times

    def _set_grid(self, times: torch.Tensor, device: str | torch.device | None):
        self.sigmas = times
        self.timesteps = (self.config.num_train_timesteps * times[:-1]).to(device=device, dtype=torch.float32)
        self._step_index = None
        self._begin_index = None

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
        if not (isinstance(timestep, torch.Tensor) and timestep.numel() == 1):
            timestep = check_number("timestep", timestep)
        if schedule_timesteps is None:
            schedule_timesteps = self.timesteps
        indices = (schedule_timesteps == timestep).nonzero()
        if len(indices) == 0:
            raise ValueError(f"`timestep` has to be one of the scheduler's `timesteps`, but is {describe(timestep)}.")
        return int(indices[min(1, len(indices) - 1)])

    def _first_step_index(self, timestep: float | torch.Tensor) -> int:
        if self._begin_index is not None:
            return self._begin_index
        if isinstance(timestep, torch.Tensor):
            timestep = timestep.to(self.timesteps.device)
        return self.index_for_timestep(timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
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
            [`~schedulers.scheduling_utils.SchedulerOutput`] or `tuple`: the next sample, in the dtype of `sample`.

        Raises:
            `ValueError`: if `set_timesteps` was not called, if `timestep` is an integer index, if all steps are done,
            if `model_output` or `variance_noise` is not of the shape of `sample`, or if there is not one generator, or
            one for each sample.
        """
        self._check_step(model_output, timestep, sample, generator, variance_noise)
        step_index = self._first_step_index(timestep) if self._step_index is None else self._step_index
        if step_index >= len(self.timesteps):
            raise ValueError(
                f"All {len(self.timesteps)} steps of this schedule are done. Call `set_timesteps` before another run."
            )

        # 1. Upcast: hundreds of small steps add up.
        dtype = exact_dtype(sample.device)
        velocity, state = model_output.to(dtype), sample.to(dtype)

        # 2. Step
        time, next_time = self.sigmas[step_index].item(), self.sigmas[step_index + 1].item()
        prev_sample = self._step(velocity, state, time, next_time, generator, variance_noise)

        # 3. The next step starts from here.
        self._step_index = step_index + 1

        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _check_step(self, model_output, timestep, sample, generator, variance_noise):
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None: call `set_timesteps` before `step`.")
        if isinstance(timestep, int) or (torch.is_tensor(timestep) and not timestep.is_floating_point()):
            raise ValueError(
                f"`timestep` has to be one of the scheduler's `timesteps`, but is the integer {describe(timestep)}."
                " Indices, as from `enumerate(timesteps)`, are not supported."
            )
        if not (isinstance(timestep, torch.Tensor) and timestep.numel() == 1):
            check_number("timestep", timestep)
        check_tensor("sample", sample)
        check_tensor("model_output", model_output, sample.shape)
        if variance_noise is not None:
            check_tensor("variance_noise", variance_noise, sample.shape)
        is_one = isinstance(generator, list) and len(generator) == 1  # which diffusers takes for all
        check_generator("generator", generator, 1 if is_one or sample.ndim == 0 else len(sample))

    @staticmethod
    def _draw_noise(
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        if variance_noise is None:
            # float32 also where the sample is float16: its tails are part of the noise
            first = generator[0] if isinstance(generator, list) else generator
            on_host = first is not None and first.device.type == "cpu" and sample.device.type == "cuda"
            device = torch.device("cpu") if on_host else sample.device
            shape = sample.shape or (1,)  # diffusers looks for a batch
            variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            variance_noise = variance_noise.reshape(sample.shape)
            if on_host:  # by way of pinned memory, so that the host does not wait for the device at every step
                variance_noise = variance_noise.pin_memory().to(sample.device, non_blocking=True)
        return variance_noise.to(sample.dtype)

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The forward process of flow matching: `alpha(t) sample + sigma(t) noise`.

        Args:
            sample (`torch.Tensor`): Data.
            timestep (`float` or `torch.Tensor` with one value, or with one for each sample):
                Timesteps in `[0, num_train_timesteps]`.
            noise (`torch.Tensor`): Noise of the shape of `sample`.

        Raises:
            `ValueError`: if an argument is none of these.
        """
        return self._add_noise(sample, timestep, noise, ("sample", "timestep"))

    def _add_noise(self, sample, timestep, noise, names: tuple[str, str]) -> torch.Tensor:
        check_tensor(names[0], sample)
        check_tensor("noise", noise, sample.shape)
        num_samples = len(sample) if sample.ndim else 1
        try:
            time = torch.as_tensor(timestep, device=sample.device)
        except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
            time = torch.empty(0)
        if time.ndim > 1 or len(time.reshape(-1)) not in (1, num_samples) or time.is_complex():
            raise ValueError(
                f"`{names[1]}` has to be one number, or one for each of the {num_samples} samples, but is"
                f" {describe(timestep)}."
            )
        check_values(names[1], time, 0, self.config.num_train_timesteps)
        time = time.to(torch.float32) / self.config.num_train_timesteps
        time = time.reshape(-1, *[1] * (sample.ndim - 1))
        return self.path.interpolate(sample, noise, time).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """`scale_noise` under the name and with the order of arguments of the discrete schedulers."""
        return self._add_noise(original_samples, timesteps, noise, ("original_samples", "timesteps"))

    def __len__(self) -> int:
        return self.config.num_train_timesteps
