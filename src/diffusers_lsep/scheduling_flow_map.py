# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import math

import torch
from diffusers.configuration_utils import register_to_config

from .argument_checks import check_probability
from .scheduling_flow_match import FlowMatchScheduler


class FlowMapScheduler(FlowMatchScheduler):
    r"""
    Goes from noise (`t = 1`) to data (`t = 0`) in a few long steps with a flow map: a model of the mean velocity
    `u(x_t, t, r)` between two times (MeanFlow, arXiv 2505.13447), which a [`SiTTransformer2DModel`] with
    `flow_map_depth` is. On the grid `linspace(1, 0, N + 1)`, a step from `t` to `s` goes to `r = (1 - renoising) s`,

        x_r = x_t + (r - t) u(x_t, t, r)

    and, if that lies beyond `s`, adds the noise that leads back from there, with which the marginal stays what it is:

        x_s = a x_r + sqrt(sigma(s)^2 - a^2 sigma(r)^2) z,    a = alpha(s) / alpha(r)

    `renoising=0` is deterministic. `renoising=1` goes to the data in every step, as a consistency model does (arXiv
    2303.01469, algorithm 1); what is in between trades the error of long steps for that of many (arXiv 2310.02279).

    Args:
        num_train_timesteps (`int`, defaults to `1000`):
            Scale of the timesteps: `timesteps = num_train_timesteps * t`.
        path_type (`str`, defaults to `"linear"`): The path of the model, `"linear"` or `"cosine"`.
        renoising (`float`, defaults to `0.0`): How far beyond the next time a step goes, in [0, 1].

    Raises:
        `ValueError`: if an argument is none of the above.
    """

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, path_type: str = "linear", renoising: float = 0.0):
        check_probability("renoising", renoising)
        super().__init__(num_train_timesteps, path_type)

    @property
    def r_sigmas(self) -> torch.Tensor:
        """The times `r` that the model is to go to: one for each of `timesteps`, float64, on the CPU."""
        return (1 - self.config.renoising) * self.sigmas[1:]

    def _step(
        self,
        velocity: torch.Tensor,
        sample: torch.Tensor,
        time: float,
        next_time: float,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: torch.Tensor | None,
    ) -> torch.Tensor:
        r = (1 - self.config.renoising) * next_time
        prev_sample = sample + (r - time) * velocity
        if r == next_time:
            return prev_sample
        ratio = self.path.alpha(next_time) / self.path.alpha(r)
        std = math.sqrt(self.path.sigma(next_time) ** 2 - (ratio * self.path.sigma(r)) ** 2)
        return ratio * prev_sample + std * self._draw_noise(sample, generator, variance_noise)
