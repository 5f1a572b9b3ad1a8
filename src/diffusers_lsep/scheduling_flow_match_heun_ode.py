# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import torch
from diffusers.configuration_utils import register_to_config

from .scheduling_flow_match import FlowMatchScheduler


class FlowMatchHeunODEScheduler(FlowMatchScheduler):
    r"""
    Integrates a flow-matching model from noise (`t = 1`) to data (`t = 0`) by Heun's method along the probability-flow
    ODE `dx = v dt`, as SiT (arXiv 2401.08740) and LSEP do it: on the grid `linspace(1, 0, N + 1)`, from `t` to `u`,

        y = x + v(x, t) (u - t),    x <- x + (v(x, t) + v(y, u)) / 2 (u - t)

    but for the last interval, to 0, where Euler's step `y` is the result. So `N` steps are `2 N - 1` evaluations of
    the model. Each is one call of [`step`], which returns `y` first and then `x`. The schedule is laid out as that of
    `FlowMatchHeunDiscreteScheduler`: all times between 1 and 0 stand in `timesteps` and `sigmas` twice.

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            Scale of the timesteps: `timesteps = num_train_timesteps * t`.
        path_type (`str`, defaults to `"linear"`):
            The path of the model, `"linear"` or `"cosine"`. The ODE is the same on both; `add_noise` needs it.

    Raises:
        `ValueError`: if an argument is none of the above.
    """

    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, path_type: str = "linear"):
        super().__init__(num_train_timesteps, path_type)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next model output is the first of its step."""
        return self._first_evaluation is None

    def _set_grid(self, times: torch.Tensor, device: str | torch.device | None):
        super()._set_grid(torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]]), device)
        self._first_evaluation: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def _step(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        time: float,
        next_time: float,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._first_evaluation is not None:
            first_velocity, first_sample, dt = self._first_evaluation
            self._first_evaluation = None
            return first_sample + 0.5 * (first_velocity + velocity) * dt

        dt = next_time - time
        if next_time > 0:  # the last interval has no second evaluation
            self._first_evaluation = velocity, sample, dt
        return sample + velocity * dt
