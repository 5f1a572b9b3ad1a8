# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The interpolation paths between data (`t = 0`) and noise (`t = 1`).

Every function takes `t` as a `float` or as a tensor that broadcasts against the samples.
"""

import math
from abc import ABC, abstractmethod
from typing import TypeVar

import torch

from .argument_checks import check_choice


Time = TypeVar("Time", float, torch.Tensor)


def _sin(t: Time) -> Time:
    return torch.sin(t) if isinstance(t, torch.Tensor) else math.sin(t)


def _cos(t: Time) -> Time:
    return torch.cos(t) if isinstance(t, torch.Tensor) else math.cos(t)


def _atan(t: Time) -> Time:
    return torch.atan(t) if isinstance(t, torch.Tensor) else math.atan(t)


class Interpolant(ABC):
    """
    A path `x_t = alpha(t) x_0 + sigma(t) noise` with the velocity `v = alpha'(t) x_0 + sigma'(t) noise` (SiT, arXiv
    2401.08740, equations 1 and 3).
    """

    wronskian: float
    """`alpha sigma' - alpha' sigma`: constant on both paths, so that `x_0` and noise follow from `v` at every `t`."""

    @abstractmethod
    def alpha(self, t: Time) -> Time: ...

    @abstractmethod
    def sigma(self, t: Time) -> Time: ...

    @abstractmethod
    def d_alpha(self, t: Time) -> float | Time: ...

    @abstractmethod
    def d_sigma(self, t: Time) -> float | Time: ...

    @abstractmethod
    def time_of_ratio(self, ratio: Time) -> Time:
        """The `t` at which `sigma(t) / alpha(t)` equals `ratio`."""

    def interpolate(self, original_samples: torch.Tensor, noise: torch.Tensor, t: Time) -> torch.Tensor:
        """`x_t` of data and noise."""
        return self.alpha(t) * original_samples + self.sigma(t) * noise

    def velocity(self, original_samples: torch.Tensor, noise: torch.Tensor, t: Time) -> torch.Tensor:
        """`v` of data and noise: what the network is trained to predict."""
        return self.d_alpha(t) * original_samples + self.d_sigma(t) * noise

    def predict_original_sample(self, velocity: torch.Tensor, sample: torch.Tensor, t: Time) -> torch.Tensor:
        """`x_0` of `v` and `x_t`."""
        return (self.d_sigma(t) * sample - self.sigma(t) * velocity) / self.wronskian

    def predict_noise(self, velocity: torch.Tensor, sample: torch.Tensor, t: Time) -> torch.Tensor:
        """The noise of `v` and `x_t`; the score is `-noise / sigma(t)`."""
        return (self.alpha(t) * velocity - self.d_alpha(t) * sample) / self.wronskian


class LinearInterpolant(Interpolant):
    """`alpha(t) = 1 - t`, `sigma(t) = t`."""

    wronskian = 1.0

    def alpha(self, t: Time) -> Time:
        return 1 - t

    def sigma(self, t: Time) -> Time:
        return t

    def d_alpha(self, t: Time) -> float | Time:
        return -1.0

    def d_sigma(self, t: Time) -> float | Time:
        return 1.0

    def time_of_ratio(self, ratio: Time) -> Time:
        return ratio / (1 + ratio)


class CosineInterpolant(Interpolant):
    """`alpha(t) = cos(pi t / 2)`, `sigma(t) = sin(pi t / 2)`; the GVP path of SiT."""

    wronskian = math.pi / 2

    def alpha(self, t: Time) -> Time:
        return _cos(t * (math.pi / 2))

    def sigma(self, t: Time) -> Time:
        return _sin(t * (math.pi / 2))

    def d_alpha(self, t: Time) -> float | Time:
        return -(math.pi / 2) * self.sigma(t)

    def d_sigma(self, t: Time) -> float | Time:
        return (math.pi / 2) * self.alpha(t)

    def time_of_ratio(self, ratio: Time) -> Time:
        return (2 / math.pi) * _atan(ratio)


_INTERPOLANTS = {"linear": LinearInterpolant(), "cosine": CosineInterpolant()}


def get_interpolant(path_type: str) -> Interpolant:
    """
    Returns the path of that name.

    Args:
        path_type (`str`): `"linear"` or `"cosine"`.

    Raises:
        `ValueError`: if there is no path of that name.
    """
    check_choice("path_type", path_type, _INTERPOLANTS)
    return _INTERPOLANTS[path_type]


def timesteps_from_uniform(uniform: torch.Tensor, path: Interpolant, timestep_sampling: str) -> torch.Tensor:
    """
    Maps draws from U(0, 1) to the times that training looks at.

    Args:
        uniform (`torch.Tensor`): Draws in [0, 1).
        path (`Interpolant`): The path of the model.
        timestep_sampling (`str`):
            `"uniform"`, or `"logit_normal"`: `ln(sigma / alpha)` is a standard normal variable (by its inverse
            distribution function, so that one uniform draw per sample serves both).
    """
    if timestep_sampling == "uniform":
        return uniform
    # A draw of exactly 0 has no finite image.
    return path.time_of_ratio(torch.special.ndtri(uniform.clamp(min=2**-25)).exp())
