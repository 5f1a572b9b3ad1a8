# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""A model with a closed form."""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_lsep.argument_checks import can_be_seen
from diffusers_lsep.interpolants import get_interpolant


MEAN, STD = 0.3, 0.2


class GaussianFlow(ModelMixin, ConfigMixin):
    """
    The exact velocity of Gaussian data of mean 0.3 and standard deviation 0.2, in place of a network; with
    `flow_map_depth` the exact mean velocity.
    """

    @register_to_config
    def __init__(self, sample_size=64, in_channels=8, num_classes=1, path_type="linear", flow_map_depth=None):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.path = get_interpolant(path_type)
        self.times, self.r_times = [], []

    def moments(self, t):
        """Mean and standard deviation of `x_t`."""
        return MEAN * self.path.alpha(t), ((STD * self.path.alpha(t)) ** 2 + self.path.sigma(t) ** 2) ** 0.5

    def move(self, sample, t, r):
        """The solution of the ODE at `r` that is `sample` at `t`: a quantile stays one."""
        (mean, std), (r_mean, r_std) = self.moments(t), self.moments(r)
        return r_mean + r_std / std * (sample - mean)

    def forward(self, hidden_states, timestep, class_labels, return_dict=True, r_timestep=None):
        if can_be_seen(timestep):
            self.times += timestep.detach()[:1].tolist()
        path, t = self.path, timestep.double()[:, None, None, None]
        mean, std = self.moments(t)
        slope = (STD**2 * path.alpha(t) * path.d_alpha(t) + path.sigma(t) * path.d_sigma(t)) / std**2
        velocity = path.d_alpha(t) * MEAN + slope * (hidden_states - mean)
        if r_timestep is not None:
            self.r_times += r_timestep.detach()[:1].tolist()
            r = r_timestep.double()[:, None, None, None]
            gap = torch.where(r == t, 1.0, t - r)
            velocity = torch.where(r == t, velocity, (hidden_states - self.move(hidden_states, t, r)) / gap)
        return (velocity.to(hidden_states.dtype),)
